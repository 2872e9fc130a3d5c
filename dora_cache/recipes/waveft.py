"""WaveFT (https://arxiv.org/abs/2505.12532): the dense inverse transform of a few wavelets.

Without the transform (``use_idwt=False``) the delta is the few numbers themselves. Under
``numerics="fast"`` these are stored row by row.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from peft import WaveFTConfig
from peft.tuners.waveft.layer import WaveFTLayer, WaveFTLinear
from torch import Tensor, nn

from dora_cache.core.decorator import cached
from dora_cache.recipes.examples import BOTH, TARGETS, Example
from dora_cache.recipes.folding import fold, is_large
from dora_cache.recipes.hooks import LayerRecipe, active_in, memo, parameter
from dora_cache.recipes.peft_layers import base_layer
from dora_cache.recipes.sparse import compress, multiply

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["RECIPE"]


def _depends_on(layer: Any, adapter: str) -> Iterator[object]:
    yield parameter(layer, "waveft_spectrum", adapter)
    yield layer.waveft_indices[adapter]
    yield layer.waveft_scaling[adapter]
    yield layer.waveft_use_idwt[adapter]
    yield layer.waveft_wavelet_family[adapter]
    yield layer.out_features
    yield layer.in_features


_delta = memo(
    WaveFTLinear,
    "get_delta_weight",
    "WaveFT delta",
    adapter="adapter",
    depends_on=_depends_on,
)


@cached("WaveFT entries", adapter="adapter", depends_on=_depends_on)
def _entries(layer: Any, adapter: str) -> tuple[Tensor, Tensor, Tensor]:
    """Derive the delta's entries row by row; see ``sparse.compress``."""
    delta = WaveFTLayer.get_delta_weight(layer, adapter)  # which of two in one place holds
    places = delta.flatten().nonzero().squeeze(1)
    return compress(places, delta.flatten()[places], *delta.shape)


def _is_sparse(layer: Any, adapter: str) -> bool:
    """Whether the delta has so few entries that they are smaller and faster than all of it."""
    count: int = parameter(layer, "waveft_spectrum", adapter).numel()
    few = 20 * count <= layer.out_features * layer.in_features and is_large(layer)
    return few and not layer.waveft_use_idwt[adapter] and type(base_layer(layer)) is nn.Linear


def _sparse(layer: Any, x: Tensor) -> Tensor | None:
    adapters = active_in(layer, "waveft_spectrum")
    if not x.numel() or not all([_is_sparse(layer, adapter) for adapter in adapters]):  # noqa: C419 - faster
        return None
    result: Tensor = layer.base_layer(x)
    for adapter in adapters:
        starts, columns, numbers = _entries(layer, adapter)
        inputs = layer._cast_input_dtype(x, numbers.dtype)
        result = result + multiply(inputs, starts, columns, numbers)
    return result.to(x.dtype)


def _warm(layer: Any, adapter: str) -> object:
    return (
        _entries(layer, adapter) if _is_sparse(layer, adapter) else layer.get_delta_weight(adapter)
    )


_folded = fold(
    "WaveFT weight",
    active=partial(active_in, attribute="waveft_spectrum"),
    delta=WaveFTLayer.get_delta_weight,
    depends_on=_depends_on,
    weights=lambda layer, adapter: (parameter(layer, "waveft_spectrum", adapter),),
    unless=_is_sparse,
    otherwise=_sparse,
    warm_otherwise=_warm,
)


def _config(inputs: int, outputs: int, **more: Any) -> WaveFTConfig:
    count = min(2592, inputs * outputs // 20)
    return WaveFTConfig(n_frequency=count, init_weights=False, target_modules=TARGETS, **more)


RECIPE = LayerRecipe(
    name="WaveFT",
    hooks={WaveFTLinear: [_delta]},
    # Where neither form will do, PEFT's forward runs, and finds the delta stored.
    fast={WaveFTLinear: [_folded, replace(_delta, warm=None)]},
    adapters="waveft_spectrum",
    relies_on={
        "peft.tuners.waveft.layer:WaveFTLayer.get_delta_weight": "85341611ff7a",
        "peft.tuners.waveft.layer:WaveFTLinear.forward": "3ede732289a0",
        "peft.tuners.waveft.waverec2d:waverec2d": "c678596ed952",
    },
    examples=[
        Example("WaveFT", _config, numerics=BOTH),
        Example(
            "WaveFT, db2",
            lambda inputs, outputs: _config(inputs, outputs, wavelet_family="db2"),
        ),
        Example(
            "WaveFT, use_idwt=False",
            lambda inputs, outputs: _config(inputs, outputs, use_idwt=False),
            numerics=BOTH,
        ),
    ],
)
