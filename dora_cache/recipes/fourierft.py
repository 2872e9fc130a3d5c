"""FourierFT (https://arxiv.org/abs/2405.03003): the inverse transform of a few frequencies.

Under ``numerics="fast"`` it is added to the weight where that is as exact.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from peft import FourierFTConfig
from peft.tuners.fourierft.layer import FourierFTLayer, FourierFTLinear

from dora_cache.recipes.examples import BOTH, TARGETS, Example
from dora_cache.recipes.folding import fold
from dora_cache.recipes.hooks import LayerRecipe, active_in, memo, parameter

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["RECIPE"]


def _depends_on(layer: Any, adapter: str) -> Iterator[object]:
    yield parameter(layer, "fourierft_spectrum", adapter)
    yield layer.indices[adapter]
    yield layer.fourierft_scaling[adapter]
    yield layer.out_features
    yield layer.in_features


_delta = memo(
    FourierFTLinear,
    "get_delta_weight",
    "FourierFT delta",
    adapter="adapter",
    depends_on=_depends_on,
)

_folded = fold(
    "FourierFT weight",
    active=partial(active_in, attribute="fourierft_spectrum"),
    delta=FourierFTLayer.get_delta_weight,
    depends_on=_depends_on,
    weights=lambda layer, adapter: (parameter(layer, "fourierft_spectrum", adapter),),
    warm_otherwise=lambda layer, adapter: layer.get_delta_weight(adapter),
)

RECIPE = LayerRecipe(
    name="FourierFT",
    hooks={FourierFTLinear: [_delta]},
    # Where the sum will not do, PEFT's forward runs, and finds the delta stored.
    fast={FourierFTLinear: [_folded, replace(_delta, warm=None)]},
    adapters="fourierft_spectrum",
    relies_on={
        "peft.tuners.fourierft.layer:FourierFTLayer.get_delta_weight": "8bb975b5e9e9",
        "peft.tuners.fourierft.layer:FourierFTLinear.forward": "ea6ca2d1a19c",
    },
    examples=[
        Example(
            "FourierFT",
            lambda inputs, outputs: FourierFTConfig(
                n_frequency=min(1000, inputs * outputs // 4), target_modules=TARGETS
            ),
            numerics=BOTH,
        )
    ],
)
