"""Super-Tuning (https://arxiv.org/abs/2607.09287): the weight with sparse values added.

Its hybrid with LoRA (Supra) adds LoRA's product to the outputs, which is left as it is. Under
``numerics="fast"`` the values stay sparse, and beside the weight; not in compiled code, where one
product with the sum is faster than the launches of a sparse one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from peft import SupertuningConfig
from peft.tuners.supertuning import layer as peft_supertuning
from peft.tuners.supertuning.layer import Linear
from torch.nn.functional import linear

from dora_cache.core.decorator import cached
from dora_cache.reasons import Reason
from dora_cache.recipes.examples import BOTH, TARGETS, Example
from dora_cache.recipes.hooks import LayerRecipe, UnusualError, active_in, guard, parameter
from dora_cache.recipes.peft_layers import base_layer, weights_of
from dora_cache.recipes.sparse import compress, fits, multiply, warn_of_hooks

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

__all__ = ["RECIPE"]

_TOKENS = 32  # with more of them, adding the values to the weight costs less than their product


def _depends_on(layer: Any, *adapters: str) -> Iterator[object]:
    yield from weights_of(base_layer(layer))
    for adapter in adapters:
        yield from _values_depend_on(layer, adapter)


def _values_depend_on(layer: Any, adapter: str, *_: object) -> Iterator[object]:
    yield parameter(layer, "supertuning_values", adapter)
    yield layer._modules["supertuning_indices"]._buffers[adapter]


@cached("Super-Tuning weight", adapter="adapters", depends_on=_depends_on)
def _weight(layer: Any, *adapters: str) -> Tensor:
    """Derive the weight with every adapter's values; shape (out, in)."""
    base: Any = base_layer(layer)
    weight: Tensor = base.weight
    flat = weight.reshape(-1)
    for adapter in adapters:
        places = layer.supertuning_indices[adapter].long()
        values = layer.supertuning_values[adapter].to(weight.dtype)
        flat = flat.scatter_add(0, places, values)
    return flat.reshape_as(weight)


@cached("Super-Tuning values", adapter="adapter", depends_on=_values_depend_on)
def _values(layer: Any, adapter: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Derive the values row by row, in the dtype given; see ``sparse.compress``."""
    base: Any = base_layer(layer)
    outputs, inputs = base.weight.shape
    values = layer.supertuning_values[adapter].to(dtype)
    return compress(layer.supertuning_indices[adapter], values, outputs, inputs)


def _forward(layer: Any, x: Tensor) -> Tensor | None:
    adapters = active_in(layer, "supertuning_values")
    if not adapters:
        return None
    warn_of_hooks(layer, peft_supertuning)
    base: Any = base_layer(layer)
    result = linear(x, _weight(layer, *adapters), base.bias)
    return _with_lora(layer, x, result, adapters)


def _forward_fast(layer: Any, x: Tensor) -> Tensor | None:
    adapters = active_in(layer, "supertuning_values")
    if not adapters:
        return None
    if torch.compiler.is_dynamo_compiling() or not _is_small(layer, adapters):
        return _forward(layer, x)
    base: Any = base_layer(layer)
    if not 0 < x.numel() <= _TOKENS * base.weight.shape[1]:
        msg = "an input of no token, or many"
        raise UnusualError(msg, Reason.LARGE_INPUT if x.numel() else Reason.UNUSUAL_INPUT)
    warn_of_hooks(layer, peft_supertuning)
    result = linear(x, base.weight, base.bias)
    for adapter in adapters:
        result = result + multiply(x, *_values(layer, adapter, x.dtype)).to(result.dtype)
    return _with_lora(layer, x, result, adapters)


def _with_lora(layer: Any, x: Tensor, result: Tensor, adapters: Sequence[str]) -> Tensor:
    """Add the low-rank parts of those adapters that have one."""
    for adapter in adapters:
        rank = layer.supertuning_rank[adapter]
        if rank > 0:
            lora_a = layer.supertuning_lora_A[adapter]
            x_lora = layer.supertuning_lora_dropout[adapter](x).to(lora_a.weight.dtype)
            low = layer.supertuning_lora_B[adapter](lora_a(x_lora))
            scaling = layer.supertuning_lora_alpha[adapter] / rank
            result = result + (scaling * low).to(result.dtype)
    return result


def _is_small(layer: Any, adapters: Sequence[str]) -> bool:
    values = layer._modules["supertuning_values"]._parameters
    return fits(base_layer(layer), sum([values[adapter].numel() for adapter in adapters]))


def _warm_fast(layer: Any, adapter: str) -> object:
    if _is_small(layer, [adapter]):
        base: Any = base_layer(layer)
        return _values(layer, adapter, base.weight.dtype)
    return _weight(layer, adapter)


def _config(sparsity: float, **more: Any) -> SupertuningConfig:
    return SupertuningConfig(sparsity=sparsity, init_weights=False, target_modules=TARGETS, **more)


RECIPE = LayerRecipe(
    name="Super-Tuning",
    hooks={Linear: [guard(_forward, warm=_weight)]},
    fast={Linear: [guard(_forward_fast, warm=_warm_fast)]},
    adapters="supertuning_values",
    relies_on={
        "peft.tuners.supertuning.layer:Linear.forward": "36845da4d066",
        "peft.tuners.supertuning.layer:SupertuningLayer.update_layer": "a1d87c908cd5",
    },
    examples=[
        Example(
            "Super-Tuning",
            lambda *_: _config(0.99),
            second=lambda *_: _config(0.95, select_top=False),
            numerics=BOTH,
        ),
        Example(
            "Super-Tuning, Supra",
            lambda *_: _config(0.95, r=8, lora_dropout=0.1),
            second=lambda *_: _config(0.9),
            numerics=BOTH,
        ),
    ],
)
