"""Models of well-known shapes with random weights: nothing to download, made where they run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import nn

__all__ = ["SHAPES", "shape_config", "shaped"]

_STD = 0.02  # of the weights, as Transformers initialises them

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {**_LLAMA3_ROPE, "factor": 8.0},
    },
    "llama-3.2-1b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {**_LLAMA3_ROPE, "factor": 32.0},
        "tie_word_embeddings": True,
    },
    "qwen2.5-7b": {
        "model_type": "qwen2",
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    "smollm2-135m": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        "tie_word_embeddings": True,
    },
    "tiny": {
        "model_type": "llama",
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    },
}
"""What Transformers needs to know of each shape; ``tiny`` is for trying things out."""


def shaped(
    name: str,
    *,
    layers: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Any:
    """Return a causal language model of a named shape, with random weights, in eval mode.

    It is made without weights and filled where it is to run, so that a model for a GPU needs no
    memory elsewhere.

    Args:
        name: one of :data:`SHAPES`.
        layers: how many of its layers to make; by default all of them.
        dtype: of the weights.
        device: where they are made.
        seed: of the weights; the caller's random state is left as it was.

    Raises:
        KeyError: there is no shape of that name.
        ValueError: it has fewer layers than that.
    """
    from transformers import AutoModelForCausalLM

    config = shape_config(name, layers=layers)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.to_empty(device=device)
    model.tie_weights()  # to_empty() has given each its own memory
    _fill(model, torch.Generator(device).manual_seed(seed))
    # Its buffers are no weights: they have to be computed.
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    return model.requires_grad_(requires_grad=False).eval()


def shape_config(name: str, *, layers: int | None = None) -> Any:
    """Return the Transformers configuration of a named shape.

    Args:
        name: one of :data:`SHAPES`.
        layers: how many of its layers; by default all of them.

    Raises:
        KeyError: there is no shape of that name.
        ValueError: it has fewer layers than that.
    """
    from transformers import AutoConfig

    settings = dict(SHAPES[name])
    kind, most = settings.pop("model_type"), settings["num_hidden_layers"]
    if not 1 <= (layers or most) <= most:
        raise ValueError(f"{name} has {most} layers: give a number from 1 to {most}")
    settings["num_hidden_layers"] = layers or most
    # No token ends a generation before its time.
    return AutoConfig.for_model(
        kind, **settings, bos_token_id=None, eos_token_id=None, pad_token_id=None
    )


@torch.no_grad()
def _fill(model: nn.Module, generator: torch.Generator) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, _STD, generator=generator)
        else:
            parameter.fill_(0 if name.endswith("bias") else 1)
