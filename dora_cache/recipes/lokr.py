"""LoKr (https://arxiv.org/abs/2309.14859): the dense Kronecker product of two small matrices.

Under ``numerics="fast"`` the two matrices are stored and applied one after the other:
``(w1 ⊗ w2) x = w1 X w2^T``, with ``X`` the input laid out as a matrix. For two-dimensional
convolutions ``w2`` is a kernel, applied to the input's channels in groups that ``w1`` then mixes.
Small linear layers store the sum with the weight instead.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from peft import LoKrConfig
from peft.tuners.lokr.layer import Conv1d, Conv2d, Linear, LoKrLayer, make_weight_cp
from torch import Tensor, nn
from torch.nn.functional import conv2d as convolve
from torch.nn.functional import linear

from dora_cache.core.decorator import cached
from dora_cache.recipes import folding
from dora_cache.recipes.examples import BOTH, TARGETS, Base, Example, conv2d
from dora_cache.recipes.folding import fold, is_large
from dora_cache.recipes.hooks import LayerRecipe, guard, optional_parameter
from dora_cache.recipes.lycoris import delta_hook, factors_of
from dora_cache.recipes.peft_layers import base_layer

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["RECIPE"]

_FACTORS = (
    "lokr_w1",
    "lokr_w1_a",
    "lokr_w1_b",
    "lokr_w2",
    "lokr_w2_a",
    "lokr_w2_b",
    "lokr_t2",
)
_depends_on = factors_of(_FACTORS)


@cached("LoKr factors", adapter="adapter_name", depends_on=_depends_on)
def _factors(layer: Any, adapter_name: str) -> tuple[Tensor, Tensor]:
    """Derive ``w1`` (scaled) and ``w2``, whose Kronecker product is the delta.

    For a convolution ``w2`` has two dimensions, or all four of a kernel.
    """
    w1, w1_a, w1_b, w2, w2_a, w2_b, t2 = _parameters(layer, adapter_name)
    if w1 is None:
        w1 = w1_a @ w1_b
    if w2 is None:
        w2 = w2_a @ w2_b if t2 is None else make_weight_cp(t2, w2_a, w2_b)
    return w1 * layer.scaling[adapter_name], w2


def _parameters(layer: Any, adapter: str) -> list[Any]:
    return [optional_parameter(layer, name, adapter) for name in _FACTORS]


def _active(layer: Any) -> Sequence[str]:
    modules = layer._modules
    whole, parts = modules["lokr_w1"]._keys, modules["lokr_w1_a"]._keys
    return [name for name in layer.active_adapters if name in whole or name in parts]


def _is_small(layer: Any, adapter: str) -> bool:
    """Whether the factors are at most half as large as the delta."""
    w1, w1_a, w1_b, w2, w2_a, w2_b, t2 = _parameters(layer, adapter)
    first = w1.numel() if w1 is not None else w1_a.shape[0] * w1_b.shape[1]
    if w2 is not None:
        second = w2.numel()
    elif t2 is None:
        second = w2_a.shape[0] * w2_b.shape[1]
    else:
        second = w2_a.shape[1] * w2_b.shape[1] * t2.shape[2] * t2.shape[3]
    small: bool = 2 * (first + second) <= first * second
    return small


_delta = delta_hook(LoKrLayer, "LoKr delta", _depends_on, in_graph=_is_small)


def _fits(layer: Any, adapter: str) -> bool:
    base: Any = base_layer(layer)
    if type(base) is not nn.Linear and (
        type(base) is not nn.Conv2d
        or base.groups != 1
        or 4 * base.weight.numel() < folding.LARGE  # each weight is used in many places
    ):
        return False
    return _is_small(layer, adapter)


def _linear(layer: Any, x: Tensor) -> Tensor | None:
    adapters = _active(layer)
    if not all([_fits(layer, adapter) for adapter in adapters]):  # noqa: C419 - faster
        return None
    result: Tensor = layer.base_layer(x)
    for adapter in adapters:
        w1, w2 = _factors(layer, adapter)
        matrices = layer._cast_input_dtype(x, w2.dtype).reshape(-1, w1.shape[1], w2.shape[1])
        inner = linear(matrices, w2)
        outer = torch.bmm(w1.expand(inner.shape[0], -1, -1), inner)
        result = result + outer.view(result.shape)
    return result.to(x.dtype)


def _conv2d(layer: Any, x: Tensor) -> Tensor | None:
    adapters = _active(layer)
    base: Any = base_layer(layer)
    if x.dim() != 4 or not all([_fits(layer, adapter) for adapter in adapters]):  # noqa: C419, PLR2004
        return None
    result: Tensor = layer.base_layer(x)
    for adapter in adapters:
        w1, w2 = _factors(layer, adapter)
        inputs = w1.shape[1]
        kernel = w2.reshape(-1, base.in_channels // inputs, *base.kernel_size)
        batch = layer._cast_input_dtype(x, w2.dtype).reshape(-1, kernel.shape[1], *x.shape[2:])
        inner = convolve(batch, kernel, None, base.stride, base.padding, base.dilation)
        inner = inner.reshape(x.shape[0], inputs, math.prod(inner.shape[1:]))
        outer = torch.bmm(w1.expand(x.shape[0], -1, -1), inner)
        result = result + outer.view(result.shape)
    return result.to(x.dtype)


def _warm(layer: Any, adapter: str) -> object:
    if _fits(layer, adapter):
        return _factors(layer, adapter)
    return layer.get_delta_weight(adapter)


_folded = fold(
    "LoKr weight",
    active=_active,
    delta=LoKrLayer.get_delta_weight,
    depends_on=_depends_on,
    weights=lambda layer, adapter: [p for p in _parameters(layer, adapter) if p is not None],
    unless=lambda layer, adapter: is_large(layer) and _fits(layer, adapter),
    otherwise=_linear,
    warm_otherwise=_warm,
)

_conv1d = Base(
    "Conv1d",
    lambda inputs, outputs: nn.Conv1d(inputs, outputs, 3, padding=1),
    lambda inputs, tokens: torch.randn(1, inputs, tokens),
)


def _config(inputs: int, outputs: int, **more: Any) -> LoKrConfig:
    rank = 8 if min(inputs, outputs) >= 256 else 1  # noqa: PLR2004 - a usual one, or a small one
    settings = {"r": rank, "alpha": rank + 1, "init_weights": False, **more}
    return LoKrConfig(target_modules=TARGETS, **settings)


RECIPE = LayerRecipe(
    name="LoKr",
    hooks={Linear: [_delta], Conv1d: [_delta], Conv2d: [_delta]},
    # Where neither sum nor factors are used, PEFT's forward runs, and finds the delta stored.
    fast={
        Linear: [_folded, replace(_delta, warm=None)],
        Conv2d: [guard(_conv2d, warm=_warm, stored=True), replace(_delta, warm=None)],
    },
    adapters="scaling",
    relies_on={
        "peft.tuners.lokr.layer:LoKrLayer.get_delta_weight": "a00b8c4d2f44",
        "peft.tuners.lokr.layer:LoKrLayer.forward": "71a4e0c30cc2",
        "peft.tuners.lokr.layer:LoKrLayer._available_adapters": "7727436bf070",
        "peft.tuners.lokr.layer:Linear._get_delta_activations": "49de96ad4999",
        "peft.tuners.lokr.layer:Conv1d._get_delta_activations": "408b92f6f41f",
        "peft.tuners.lokr.layer:Conv2d._get_delta_activations": "3c9d841d65ee",
        "peft.tuners.lokr.layer:make_weight_cp": "06d430fe08cd",
        "peft.tuners.lokr.layer:make_kron": "8f71ebed9221",
    },
    examples=[
        Example("LoKr", _config, numerics=BOTH),
        Example(
            "LoKr, decompose_both",
            lambda inputs, outputs: _config(
                inputs,
                outputs,
                decompose_both=True,
                decompose_factor=16 if min(inputs, outputs) >= 256 else 4,  # noqa: PLR2004
            ),
            numerics=BOTH,
        ),
        # A rank so large that PEFT uses a whole second matrix.
        Example("LoKr, w2", lambda inputs, outputs: _config(inputs, outputs, r=64), numerics=BOTH),
        Example("LoKr, Conv2d", _config, conv2d, numerics=BOTH),
        Example(
            "LoKr, Conv2d, effective",
            lambda inputs, outputs: _config(inputs, outputs, use_effective_conv2d=True),
            conv2d,
            numerics=BOTH,
        ),
        Example("LoKr, Conv1d", _config, _conv1d),
        Example(
            "LoKr, Conv1d, w2", lambda inputs, outputs: _config(inputs, outputs, r=64), _conv1d
        ),
    ],
)
