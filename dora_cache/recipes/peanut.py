"""PEANuT (https://arxiv.org/abs/2410.01870): a small network of the base weight, as a dense delta.

Its last layer is linear, so under ``numerics="fast"`` what comes before it is stored: a matrix of
the network's width, which with the last layer makes a pair like LoRA's. Small layers store the sum
with the weight instead.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from peft import PeanutConfig
from peft.tuners.peanut.layer import Linear
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.activations import ACT2FN

from dora_cache.core.decorator import cached
from dora_cache.recipes.examples import BOTH, TARGETS, Example
from dora_cache.recipes.folding import fold, is_large
from dora_cache.recipes.hooks import LayerRecipe, UnusualError, active_in, memo, own_parameter
from dora_cache.recipes.peft_layers import base_layer, is_hooked, weights_of

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["RECIPE"]


def _hidden_depends_on(layer: Any, adapter: str) -> Iterator[object]:
    modules = layer._modules
    yield from weights_of(base_layer(layer))
    yield own_parameter(modules["peanut_A"]._modules[adapter], "weight")
    parts = [
        *modules["peanut_encoders"]._modules[adapter]._modules.values(),
        *modules["peanut_decoders"]._modules[adapter]._modules.values(),
    ]
    yield from _weights(*parts)
    yield layer.act_fn[adapter]
    yield layer.scaling[adapter]
    yield layer.res_num[adapter]


def _weights(*parts: nn.Module) -> Iterator[object]:
    """Yield the weights of layers that PEFT calls."""
    if is_hooked(*parts):
        msg = "a layer of the network is hooked"
        raise UnusualError(msg)
    for part in parts:
        if type(part) is not nn.Linear:
            msg = f"a layer of the network is a {type(part).__name__}"
            raise UnusualError(msg)
        yield own_parameter(part, "weight")
        yield own_parameter(part, "bias")


def _depends_on(layer: Any, adapter: str) -> Iterator[object]:
    yield from _hidden_depends_on(layer, adapter)
    yield from _weights(layer._modules["peanut_B"]._modules[adapter])


_delta = memo(Linear, "get_delta_weight", "PEANuT delta", adapter="adapter", depends_on=_depends_on)


@cached("PEANuT hidden", adapter="adapter", depends_on=_hidden_depends_on)
def _hidden(layer: Any, adapter: str) -> Tensor:
    """Derive what goes into the last layer, times scaling; shape (width, in)."""
    first: Any = layer.peanut_A[adapter]
    nonlinear = ACT2FN[layer.act_fn[adapter]]
    weight = base_layer(layer).weight.transpose(0, 1).to(first.weight.dtype)  # type: ignore[operator]
    hidden = nonlinear(torch.matmul(weight, first.weight.t()))
    before = []
    count = layer.res_num[adapter]
    for index in range(count):
        before.append(hidden)
        hidden = nonlinear(layer.peanut_encoders[adapter][index](hidden))
    for index in range(count):
        hidden = nonlinear(layer.peanut_decoders[adapter][index](hidden)) + before.pop()
    scaled: Tensor = (hidden * layer.scaling[adapter]).t().contiguous()
    return scaled


def _is_small(layer: Any, adapter: str) -> bool:
    """Whether the last layer is as PEFT makes it, without hooks, and narrow."""
    last: Any = layer._modules["peanut_B"]._modules[adapter]
    if type(last) is not nn.Linear or is_hooked(last):
        return False
    weight = own_parameter(last, "weight")
    narrow: bool = 2 * weight.shape[1] <= weight.shape[0]
    return narrow and own_parameter(last, "bias") is None


def _forward(layer: Any, x: Tensor) -> Tensor | None:
    adapters = active_in(layer, "peanut_A")
    if not all([_is_small(layer, adapter) for adapter in adapters]):  # noqa: C419 - faster
        return None
    result: Tensor = layer.base_layer(x)
    dtype = result.dtype
    for adapter in adapters:
        hidden = _hidden(layer, adapter)
        last = layer._modules["peanut_B"]._modules[adapter]._parameters["weight"]
        inner = linear(layer._cast_input_dtype(x, hidden.dtype), hidden)
        result = result + linear(inner, last).to(dtype)
    return result


def _warm(layer: Any, adapter: str) -> object:
    return _hidden(layer, adapter) if _is_small(layer, adapter) else layer.get_delta_weight(adapter)


_folded = fold(
    "PEANuT weight",
    active=partial(active_in, attribute="peanut_A"),
    delta=Linear.get_delta_weight,
    depends_on=_depends_on,
    weights=lambda layer, adapter: (
        layer.peanut_A[adapter].weight,
        layer.peanut_B[adapter].weight,
    ),
    unless=lambda layer, adapter: is_large(layer) and _is_small(layer, adapter),
    otherwise=_forward,
    warm_otherwise=_warm,
)


def _config(inputs: int, outputs: int, **more: Any) -> PeanutConfig:
    rank = 8 if min(inputs, outputs) >= 256 else 3  # noqa: PLR2004 - a usual one, or a small one
    return PeanutConfig(r=rank, scaling=1.5, init_weights=False, target_modules=TARGETS, **more)


RECIPE = LayerRecipe(
    name="PEANuT",
    hooks={Linear: [_delta]},
    # Where neither the sum nor the pair is used, PEFT's forward runs, and finds the delta stored.
    fast={Linear: [_folded, replace(_delta, warm=None)]},
    adapters="peanut_A",
    relies_on={
        "peft.tuners.peanut.layer:Linear.get_delta_weight": "63440c8bf7ae",
        "peft.tuners.peanut.layer:Linear._compute_delta_weight": "cd134f88fc13",
        "peft.tuners.peanut.layer:Linear.forward": "f8b2c3d4702e",
    },
    examples=[
        Example("PEANuT", _config, numerics=BOTH),
        Example(
            "PEANuT, depth=2",
            lambda inputs, outputs: _config(inputs, outputs, depth=2, act_fn="gelu"),
            numerics=BOTH,
        ),
    ],
)
