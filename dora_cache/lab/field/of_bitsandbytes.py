"""Set-ups of bitsandbytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from dora_cache.lab.field.of_transformers import llama
from dora_cache.lab.field.quantized import adapted, loaded
from dora_cache.lab.field.setup import Built, SetUp

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

__all__ = ["SETUPS", "in_4_bit", "in_8_bit", "quantized"]


def in_4_bit(layer: nn.Linear, **settings: Any) -> nn.Module:
    """Return a linear layer quantized to 4 bit.

    Args:
        layer: stays as it is.
        **settings: of ``Linear4bit``.
    """
    from bitsandbytes.nn import Linear4bit

    return _filled(
        Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            **{"compute_dtype": torch.float32, "quant_type": "nf4"} | settings,
        ),
        layer,
    )


def in_8_bit(layer: nn.Linear) -> nn.Module:
    """Return a linear layer quantized to 8 bit; the layer stays as it is."""
    from bitsandbytes.nn import Linear8bitLt

    made = Linear8bitLt(
        layer.in_features, layer.out_features, layer.bias is not None, has_fp16_weights=False
    )
    return _filled(made, layer)


def _filled(made: nn.Module, layer: nn.Module) -> nn.Module:
    made.load_state_dict(layer.state_dict())
    return made.to(next(layer.parameters()).device)  # which quantizes


def quantized(width: int, make: Callable[[nn.Linear], nn.Module]) -> Any:
    """Return a small model with other layers in its projections' place."""
    model = llama(width)
    for name, layer in list(model.named_modules()):
        if name.endswith("_proj"):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, make(layer))
    return model


def _by_hand(**settings: Any) -> Callable[[bool, int], Built]:
    def build(dora: bool, width: int) -> Built:  # noqa: FBT001
        return adapted(quantized(width, lambda layer: in_4_bit(layer, **settings)), dora)

    return build


def _by_transformers(**settings: Any) -> Callable[[bool, int], Built]:
    def build(dora: bool, width: int) -> Built:  # noqa: FBT001
        from transformers import BitsAndBytesConfig

        return adapted(loaded(width, quantization_config=BitsAndBytesConfig(**settings)), dora)

    return build


def _first_of(build: Callable[[bool, int], Built]) -> Callable[[bool, int], Built]:
    """Compare with the first forward of another model: PEFT cannot run a second one."""

    def built(dora: bool, width: int) -> Built:  # noqa: FBT001
        found = build(dora, width)

        def reference() -> Tensor:
            return build(dora, width).run()

        return Built(found.model, found.run, reference)

    return built


SETUPS = [
    SetUp("4 bit", "bitsandbytes", _by_transformers(load_in_4bit=True)),
    SetUp(
        "4 bit, nf4, quantized twice",
        "bitsandbytes",
        _by_transformers(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        ),
    ),
    SetUp("Linear4bit", "bitsandbytes", _by_hand()),
    SetUp("Linear4bit, not quantized twice", "bitsandbytes", _by_hand(compress_statistics=False)),
    SetUp(
        "8 bit",
        "bitsandbytes",
        _first_of(_by_transformers(load_in_8bit=True)),
        note="on a CPU, PEFT fails from the second forward on: it loses the scales",
    ),
]
