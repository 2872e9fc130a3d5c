"""MiSS in the mode "bat" (https://arxiv.org/abs/2409.15371): the whole weight, adapters applied.

Each adapter starts from the weight that the ones before it made, so the value belongs to the
active adapters together, in their order. The other modes derive nothing worth keeping.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from peft import MissConfig
from peft.tuners.miss.layer import MissLinear
from torch import Tensor
from torch.nn.functional import linear

from dora_cache.core.decorator import cached
from dora_cache.lifecycle import plain_class
from dora_cache.reasons import Reason
from dora_cache.recipes.bases import require_dense, when_dense
from dora_cache.recipes.examples import TARGETS, Example
from dora_cache.recipes.hooks import LayerRecipe, UnusualError, active_in, guard, parameter
from dora_cache.recipes.peft_layers import base_layer, weights_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

__all__ = ["RECIPE"]


def _depends_on(layer: Any, *adapters: str) -> Iterator[object]:
    yield from weights_of(base_layer(layer))
    for adapter in adapters:
        yield parameter(layer, "miss_block", adapter)


@cached("MiSS weight", adapter="adapters", depends_on=_depends_on)
def _weight(layer: Any, *adapters: str) -> Tensor:
    """Derive the weight that the adapters make of W, one after the other; (out, in)."""
    weight: Tensor = layer.get_base_weight().clone()
    for adapter in adapters:
        weight = weight + _delta(weight, layer.miss_block[adapter])
    return weight


def _delta(weight: Tensor, blocks: Tensor) -> Tensor:
    """Derive what an adapter adds to a weight.

    What PEFT's ``get_delta_weight`` returns, without its setting the parameter to a copy of itself
    (in half precision on CPUs).

    Args:
        weight: (out, in).
        blocks: (out / r, r, r).
    """
    dtype = blocks.dtype
    widened = blocks.device.type == "cpu" and dtype in {torch.float16, torch.bfloat16}
    if widened:
        blocks = blocks.float()
    weight = weight.to(blocks.dtype)
    rank = blocks.size(-1)
    tiles = weight.reshape(weight.size(0) // rank, rank, weight.size(1) // rank, rank)
    changed = tiles.permute(2, 0, 1, 3) @ blocks + blocks
    delta = changed.permute(1, 2, 0, 3).reshape(*weight.shape)
    return delta.to(dtype=dtype) if widened else delta


def _forward(layer: Any, x: Tensor) -> Tensor | None:
    adapters = active_in(layer, "miss_block")
    if layer.miss_fn != "bat":  # the layer's next adapter has changed it; nothing to store
        own: Tensor = plain_class(type(layer)).forward(layer, x)  # type: ignore[attr-defined]
        return own
    if not adapters:
        return None
    if layer.quantization_backend is not None:
        msg = "the base layer is quantized"
        raise UnusualError(msg, Reason.QUANTIZED)
    require_dense(layer)
    weight = _weight(layer, *adapters)
    dtype = x.dtype
    x = layer._cast_input_dtype(x, weight.dtype)
    bias = layer._cast_input_dtype(layer.base_layer.bias, weight.dtype)
    return linear(x, weight, bias).to(dtype)


class _MiSS(LayerRecipe):
    def applies(self, layer: nn.Module) -> bool:
        return super().applies(layer) and getattr(layer, "miss_fn", None) == "bat"


RECIPE = _MiSS(
    name="MiSS",
    hooks={MissLinear: [guard(_forward, warm=when_dense(_weight))]},
    adapters="miss_block",
    relies_on={
        "peft.tuners.miss.layer:MissLinear.forward": "c44795ea95cd",
        "peft.tuners.miss.layer:MissLinear.get_delta_weight": "3622fde7ec57",
        "peft.tuners.tuners_utils:BaseTunerLayer.get_base_weight": "4ef25139bf51",
    },
    examples=[
        Example(
            "MiSS, bat",
            lambda inputs, outputs: MissConfig(
                r=64 if min(inputs, outputs) % 64 == 0 else 4,
                init_weights="bat",
                target_modules=TARGETS,
            ),
        )
    ],
)
