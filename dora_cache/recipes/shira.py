"""SHiRA (https://arxiv.org/abs/2406.13175): the weight with a sparse delta added.

Under ``numerics="fast"`` the delta stays sparse, and beside the weight; not in compiled code, where
one product with the sum is faster than the launches of a sparse one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from peft import ShiraConfig
from peft.tuners.shira import layer as peft_shira
from peft.tuners.shira.layer import Linear
from torch.nn.functional import linear

from dora_cache.core.decorator import cached
from dora_cache.reasons import Reason
from dora_cache.recipes.bases import ON_QUANTIZED
from dora_cache.recipes.examples import BOTH, TARGETS, Example
from dora_cache.recipes.hooks import LayerRecipe, UnusualError, active_in, guard, parameter
from dora_cache.recipes.peft_layers import base_layer, weights_of
from dora_cache.recipes.sparse import compress, fits, multiply, warn_of_hooks

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

__all__ = ["RECIPE"]

_TOKENS = 128  # with more of them, adding the delta to the weight costs less than its product


def _depends_on(layer: Any, *adapters: str) -> Iterator[object]:
    yield layer.out_features
    yield layer.in_features
    yield from weights_of(base_layer(layer))
    for adapter in adapters:
        yield from _delta_depends_on(layer, adapter)


def _delta_depends_on(layer: Any, adapter: str, *_: object) -> Iterator[object]:
    yield parameter(layer, "shira_weight", adapter)
    yield layer.shira_indices[adapter]
    yield layer.scaling[adapter]


@cached("SHiRA weight", adapter="adapters", depends_on=_depends_on)
def _weight(layer: Any, *adapters: str) -> Tensor:
    """Derive the weight with every adapter's delta; shape (out, in)."""
    weight: Tensor = layer.get_base_weight().clone()
    for adapter in adapters:
        weight += layer.get_delta_weight(adapter)
    return weight


@cached("SHiRA delta", adapter="adapter", depends_on=_delta_depends_on)
def _delta(layer: Any, adapter: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Derive the delta's entries row by row, in the dtype given; see ``sparse.compress``."""
    values = layer.shira_weight[adapter] * layer.scaling[adapter]
    rows, columns = layer.shira_indices[adapter].to(values.device).long()
    base: Any = base_layer(layer)
    outputs, inputs = base.weight.shape
    return compress(rows * inputs + columns, values.to(dtype), outputs, inputs)


def _forward(layer: Any, x: Tensor) -> Tensor | None:
    adapters = active_in(layer, "shira_weight")
    if not adapters:
        return None
    warn_of_hooks(layer, peft_shira)
    return linear(x, _weight(layer, *adapters), layer.base_layer.bias)


def _forward_fast(layer: Any, x: Tensor) -> Tensor | None:
    adapters = active_in(layer, "shira_weight")
    if not adapters:
        return None
    if torch.compiler.is_dynamo_compiling() or not _is_small(layer, adapters):
        return _forward(layer, x)
    base: Any = base_layer(layer)
    if not 0 < x.numel() <= _TOKENS * base.weight.shape[1]:
        msg = "an input of no token, or many"
        raise UnusualError(msg, Reason.LARGE_INPUT if x.numel() else Reason.UNUSUAL_INPUT)
    warn_of_hooks(layer, peft_shira)
    result = linear(x, base.weight, base.bias)
    for adapter in adapters:
        result = result + multiply(x, *_delta(layer, adapter, x.dtype)).to(result.dtype)
    return result


def _is_small(layer: Any, adapters: Any) -> bool:
    entries = sum(parameter(layer, "shira_weight", adapter).numel() for adapter in adapters)
    return fits(base_layer(layer), entries)


def _warm_fast(layer: Any, adapter: str) -> object:
    if _is_small(layer, [adapter]):
        base: Any = base_layer(layer)
        return _delta(layer, adapter, base.weight.dtype)
    return _weight(layer, adapter)


def _declines(layer: Any) -> str | None:
    if layer.quantization_backend is not None:
        return ON_QUANTIZED
    return None


def _config(inputs: int, outputs: int, **more: Any) -> ShiraConfig:
    rank = 8 if min(inputs, outputs) >= 256 else 1  # noqa: PLR2004 - a usual one, or a sparse one
    return ShiraConfig(r=rank, init_weights=False, target_modules=TARGETS, **more)


RECIPE = LayerRecipe(
    name="SHiRA",
    hooks={Linear: [guard(_forward, warm=_weight)]},
    fast={Linear: [guard(_forward_fast, warm=_warm_fast)]},
    adapters="shira_weight",
    declines=_declines,
    relies_on={
        "peft.tuners.shira.layer:Linear.forward": "9f414ec30135",
        "peft.tuners.shira.layer:ShiraLayer.update_layer": "e8b4a5c0b9e2",
        "peft.tuners.shira.layer:Linear.get_delta_weight": "536681360a66",
        "peft.tuners.tuners_utils:BaseTunerLayer.get_base_weight": "4ef25139bf51",
    },
    examples=[
        Example(
            "SHiRA",
            lambda inputs, outputs: _config(inputs, outputs, random_seed=0),
            second=lambda inputs, outputs: _config(inputs, outputs, random_seed=1),
            numerics=BOTH,
        ),
    ],
)
