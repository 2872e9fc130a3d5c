"""Set-ups of accelerate: hooks on every module, and weights that are offloaded."""

from __future__ import annotations

import tempfile
from typing import TYPE_CHECKING, Any

import torch
from peft import get_peft_model

from dora_cache.lab.field.of_transformers import config, llama, running
from dora_cache.lab.field.setup import Built, SetUp, moved_magnitudes

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["SETUPS", "adapted", "base", "no_cuda"]


def base(width: int) -> Any:
    """Return a small random causal language model with biases, in eval mode."""
    model = llama(width, attention_bias=True, mlp_bias=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(std=0.1)
    return model


def adapted(dora: bool, width: int) -> Any:  # noqa: FBT001
    """Return the model with an adapter whose scales are not 1."""
    return moved_magnitudes(get_peft_model(base(width), config(dora)).eval())


def no_cuda() -> str | None:
    """Return why a set-up that needs a GPU cannot run, or None."""
    return None if torch.cuda.is_available() else "it needs a CUDA device"


def _after(prepare: Callable[..., object], *, alone: bool = True) -> Callable[[bool, int], Built]:
    """Return a builder that prepares a model with its adapter.

    Args:
        prepare: called with the model and what undoes it.
        alone: whether PEFT's own DoRA cannot run so.
    """

    def build(dora: bool, width: int) -> Built:  # noqa: FBT001
        model = adapted(dora, width)
        built = running(model)
        prepare(model, built.undo)
        if alone and dora:
            built.reference = running(adapted(dora, width)).run
        return built

    return build


def _before(prepare: Callable[..., object]) -> Callable[[bool, int], Built]:
    """Return a builder that prepares the base model and adds the adapter then."""

    def build(dora: bool, width: int) -> Built:  # noqa: FBT001
        model = base(width)
        built = running(model)
        prepare(model, built.undo)
        model = moved_magnitudes(get_peft_model(model, config(dora)).eval())
        return running(model)

    return build


def _dispatched(model: Any, _: object) -> None:
    from accelerate import dispatch_model

    dispatch_model(model, {"": "cpu"}, force_hooks=True)


def _on_cpu(model: Any, _: object, **settings: Any) -> None:
    from accelerate import cpu_offload

    cpu_offload(model, "cpu", **settings)


def _on_disk(model: Any, undo: Any, **settings: Any) -> None:
    from accelerate import disk_offload

    folder = undo.enter_context(tempfile.TemporaryDirectory())
    disk_offload(model, folder, "cpu", **settings)


def _by_block(prepare: Callable[..., object]) -> Callable[..., object]:
    return lambda model, undo: prepare(model, undo, preload_module_classes=["LlamaDecoderLayer"])


def _with_hook(model: Any, _: object) -> None:
    from accelerate import cpu_offload_with_hook

    cpu_offload_with_hook(model, "cpu")


def _cast(model: Any, _: object) -> None:
    from accelerate.big_modeling import attach_layerwise_casting_hooks

    attach_layerwise_casting_hooks(
        model, torch.bfloat16, torch.float32, skip_modules_pattern=["norm", "lora_"]
    )


def _split(model: Any) -> None:
    from accelerate import dispatch_model

    inner = "base_model.model.model"
    where = {
        "base_model.model.lm_head": 0,
        f"{inner}.embed_tokens": 0,
        f"{inner}.norm": 0,
        f"{inner}.rotary_emb": 0,
        f"{inner}.layers.0": 0,
        f"{inner}.layers.1": "cpu",
    }
    dispatch_model(model, where, main_device=0)


def _split_build(dora: bool, width: int) -> Built:  # noqa: FBT001
    model = adapted(dora, width)
    _split(model)
    ids = torch.arange(1, 6, device="cuda")[None]
    whole = adapted(dora, width).cuda()
    return Built(model, lambda: model(ids).logits, (lambda: whole(ids).logits) if dora else None)


SETUPS = [
    SetUp("dispatch_model(force_hooks=True)", "accelerate", _after(_dispatched, alone=False)),
    SetUp("dispatch_model, then adapters", "accelerate", _before(_dispatched)),
    SetUp("cpu_offload", "accelerate", _after(_on_cpu), note="PEFT's own DoRA cannot run on it"),
    SetUp("disk_offload", "accelerate", _after(_on_disk), note="PEFT's own DoRA cannot run on it"),
    SetUp("cpu_offload of blocks", "accelerate", _after(_by_block(_on_cpu), alone=False)),
    SetUp("disk_offload of blocks", "accelerate", _after(_by_block(_on_disk), alone=False)),
    SetUp("cpu_offload_with_hook", "accelerate", _after(_with_hook, alone=False)),
    SetUp("layerwise casting (bfloat16)", "accelerate", _after(_cast, alone=False)),
    SetUp(
        "dispatch_model to a GPU and the CPU",
        "accelerate",
        _split_build,
        cannot=no_cuda,
        note="PEFT's own DoRA cannot run on it",
    ),
]
