"""LoHa (https://arxiv.org/abs/2108.06098): the dense ``(A1 B1) * (A2 B2)`` of each layer.

Under ``numerics="fast"`` linear layers store its factors instead: an entrywise product of matrices
of rank r is a matrix of rank r^2, whose factors are the Khatri-Rao products of theirs. Where ranks
are large, or layers small, they store the sum with the weight instead.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from peft import LoHaConfig
from peft.tuners.loha.layer import Conv1d, Conv2d, Linear, LoHaLayer
from torch import Tensor, nn
from torch.nn.functional import linear

from dora_cache.core.decorator import cached
from dora_cache.recipes.examples import BOTH, TARGETS, Example, conv2d
from dora_cache.recipes.folding import fold, is_large
from dora_cache.recipes.hooks import LayerRecipe, active_in
from dora_cache.recipes.lycoris import delta_hook, factors_of
from dora_cache.recipes.peft_layers import base_layer

__all__ = ["RECIPE"]

_FACTORS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
_depends_on = factors_of(_FACTORS)
_delta = delta_hook(LoHaLayer, "LoHa delta", _depends_on)


@cached("LoHa factors", adapter="adapter_name", depends_on=_depends_on)
def _factors(layer: Any, adapter_name: str) -> tuple[Tensor, Tensor]:
    """Derive ``R`` and ``L`` with ``L R`` equal to the delta; shapes (r^2, in) and (out, r^2)."""
    a1, b1, a2, b2 = (getattr(layer, name)[adapter_name] for name in _FACTORS[:4])
    right = (b1[:, None] * b2[None]).flatten(0, 1)
    left = (a1[:, :, None] * a2[:, None]).flatten(1)
    return right, left * layer.scaling[adapter_name]


def _forward(layer: Any, x: Tensor) -> Tensor | None:
    adapters = active_in(layer, "hada_w1_a")
    if not all(_is_small(layer, adapter) for adapter in adapters):
        return None
    result: Tensor = layer.base_layer(x)
    for adapter in adapters:
        right, left = _factors(layer, adapter)
        result = result + linear(linear(layer._cast_input_dtype(x, right.dtype), right), left)
    return result.to(x.dtype)


def _is_small(layer: Any, adapter: str) -> bool:
    """Whether the factors are smaller than the dense delta."""
    rank = layer.r[adapter]
    inputs, outputs = layer.hada_w1_b[adapter].shape[1], layer.hada_w1_a[adapter].shape[0]
    smaller: bool = rank * rank * (inputs + outputs) < inputs * outputs
    return smaller and type(base_layer(layer)) is nn.Linear


def _warm(layer: Any, adapter: str) -> object:
    if _is_small(layer, adapter):
        return _factors(layer, adapter)
    return layer.get_delta_weight(adapter)


_folded = fold(
    "LoHa weight",
    active=partial(active_in, attribute="hada_w1_a"),
    delta=LoHaLayer.get_delta_weight,
    depends_on=_depends_on,
    weights=lambda layer, adapter: [getattr(layer, name)[adapter] for name in _FACTORS[:4]],
    unless=lambda layer, adapter: is_large(layer) and _is_small(layer, adapter),
    otherwise=_forward,
    warm_otherwise=_warm,
)


def _config(inputs: int, outputs: int, **more: Any) -> LoHaConfig:
    rank = 8 if min(inputs, outputs) >= 256 else 2  # noqa: PLR2004 - a usual one, or a small one
    return LoHaConfig(r=rank, alpha=rank + 1, target_modules=TARGETS, init_weights=False, **more)


RECIPE = LayerRecipe(
    name="LoHa",
    hooks={Linear: [_delta], Conv1d: [_delta], Conv2d: [_delta]},
    # Where neither sum nor factors are used, PEFT's forward runs, and finds the delta stored.
    fast={Linear: [_folded, replace(_delta, warm=None)]},
    adapters="hada_w1_a",
    relies_on={
        "peft.tuners.loha.layer:LoHaLayer.get_delta_weight": "20577966d980",
        "peft.tuners.loha.layer:LoHaLayer.forward": "71a4e0c30cc2",
        "peft.tuners.loha.layer:Linear._get_delta_activations": "49de96ad4999",
        "peft.tuners.loha.layer:Conv1d._get_delta_activations": "408b92f6f41f",
        "peft.tuners.loha.layer:Conv2d._get_delta_activations": "3c9d841d65ee",
        "peft.tuners.loha.layer:make_weight": "e3e86caa540e",
        "peft.tuners.loha.layer:make_weight_cp": "2e531135d9b7",
    },
    examples=[
        Example("LoHa", _config, numerics=BOTH),
        Example("LoHa, Conv2d", _config, conv2d),
        Example(
            "LoHa, Conv2d, effective",
            lambda inputs, outputs: _config(inputs, outputs, use_effective_conv2d=True),
            conv2d,
        ),
    ],
)
