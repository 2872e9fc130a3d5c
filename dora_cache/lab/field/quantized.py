"""Models with quantized weights, as libraries and transformers make them."""

from __future__ import annotations

import tempfile
from typing import TYPE_CHECKING, Any

from peft import get_peft_model

from dora_cache.lab.field.of_transformers import config, llama, running
from dora_cache.lab.field.setup import moved_magnitudes

if TYPE_CHECKING:
    from dora_cache.lab.field.setup import Built

__all__ = ["adapted", "loaded", "no_cuda"]


def loaded(width: int, **settings: Any) -> Any:
    """Return the small model of ``llama()``, loaded as a checkpoint is.

    Args:
        width: the size of its layers.
        **settings: for ``from_pretrained``, such as ``quantization_config``.
    """
    from transformers import LlamaForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        llama(width).save_pretrained(folder)
        return LlamaForCausalLM.from_pretrained(folder, **settings).eval()


def adapted(model: Any, dora: bool, **settings: Any) -> Built:  # noqa: FBT001
    """Return what runs a model with an adapter.

    Args:
        model: with quantized weights.
        dora: whether the adapter is DoRA, or else plain LoRA.
        **settings: more of the adapter's.
    """
    return running(moved_magnitudes(get_peft_model(model, config(dora, **settings)).eval()))


def no_cuda() -> str | None:
    """Return that a CUDA GPU is needed, or None if there is one."""
    import torch

    return None if torch.cuda.is_available() else "it needs a CUDA GPU"
