"""PSOFT (https://openreview.net/forum?id=FSHrinMArK): a small rotation between two fixed factors.

Under ``numerics="fast"`` it is folded into the second factor: ``B (R - I)``, times the scaling.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from peft import PsoftConfig
from peft.tuners.psoft.layer import Linear, OrthLayer
from torch import Tensor
from torch.nn.functional import linear

from dora_cache.core.decorator import cached
from dora_cache.lifecycle import plain_class
from dora_cache.recipes.examples import BOTH, TARGETS, Example
from dora_cache.recipes.hooks import (
    LayerRecipe,
    UnusualError,
    active_in,
    check_unhooked,
    guard,
    own_parameter,
)
from dora_cache.recipes.peft_layers import drops

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["RECIPE"]


def _factor(layer: Any, which: str, adapter: str) -> Any:
    """Return PEFT's ``A`` (r, inputs) or ``B`` (outputs, r): weights of the base, not trained."""
    return layer._modules[f"_psoft_{which}_cache"]._buffers[adapter]


def _depends_on(layer: Any, adapter: str) -> list[object]:
    rotation = layer._modules["psoft_R"]._modules[adapter]
    state = rotation.__dict__
    return [
        own_parameter(rotation, "weight"),
        own_parameter(rotation, "vector_a"),
        own_parameter(rotation, "vector_b"),
        *state["_buffers"].values(),
        state["size"],
        state["orth"],
        state["use_cayley_neumann"],
        state["num_cayley_neumann_terms"],
        state["cayley_neumann_eps"],
    ]


@cached("PSOFT rotation", adapter="adapter", depends_on=_depends_on)
def _rotation(layer: Any, adapter: str) -> Tensor:
    """Derive ``R``, with PEFT's method; shape (r, r)."""
    rotation: Tensor = layer.psoft_R[adapter].get_matrix()
    return rotation


def _usual(layer: Any) -> Sequence[str]:
    """Return the active adapters.

    Raises:
        UnusualError: a dropout drops, or a rotation is not PEFT's own or has hooks.
    """
    adapters = active_in(layer, "psoft_R")
    modules = layer._modules
    for adapter in adapters:
        rotation = modules["psoft_R"]._modules[adapter]
        if (
            drops(modules["psoft_dropout"]._modules[adapter])
            or plain_class(type(rotation)) is not OrthLayer
        ):
            msg = "a dropout drops, or a rotation is not PEFT's own"
            raise UnusualError(msg)
        check_unhooked(rotation)
    return adapters


def _projected(layer: Any, x: Tensor, adapter: str) -> Tensor:
    """Return the input in the subspace, as PEFT has it; shape (..., r)."""
    factor = _factor(layer, "A", adapter)
    x = layer.psoft_dropout[adapter](layer._cast_input_dtype(x, factor.dtype))
    return x @ factor.to(x.device, x.dtype).t()


def _forward(layer: Any, x: Tensor) -> Tensor | None:
    adapters = _usual(layer)
    if not adapters:
        return None
    result: Tensor = layer.base_layer(x)
    dtype = result.dtype
    for adapter in adapters:
        inside = _projected(layer, x, adapter)
        half = inside.device.type == "cpu" and inside.dtype in {torch.float16, torch.bfloat16}
        compute = torch.float32 if half else inside.dtype
        rotation = _rotation(layer, adapter).to(compute).t()
        rotated = (inside.to(compute) @ rotation).to(inside.dtype)
        factor = _factor(layer, "B", adapter).to(inside.device, inside.dtype)
        result = result + (rotated - inside) @ factor.t() * layer.scaling[adapter]
    return result.to(dtype)


# numerics="fast": one factor instead of two


def _fast_depends_on(layer: Any, adapter: str) -> list[object]:
    found = _depends_on(layer, adapter)
    found += [_factor(layer, "B", adapter), layer.__dict__["scaling"][adapter]]
    return found


@cached("PSOFT factor", adapter="adapter", depends_on=_fast_depends_on)
def _folded(layer: Any, adapter: str) -> Tensor:
    """Derive ``B (R - I)`` times the scaling; shape (outputs, r), of B's dtype."""
    factor = _factor(layer, "B", adapter)
    dtype = torch.promote_types(factor.dtype, torch.float32)
    with torch.autocast(factor.device.type, enabled=False):
        change = layer.psoft_R[adapter].get_matrix().to(factor.device, dtype)
        change = change - torch.eye(len(change), device=factor.device, dtype=dtype)
        folded: Tensor = (factor.to(dtype) @ change) * layer.scaling[adapter]
        return folded.to(factor.dtype)


def _fast_forward(layer: Any, x: Tensor) -> Tensor | None:
    adapters = _usual(layer)
    if not adapters:
        return None
    result: Tensor = layer.base_layer(x)
    dtype = result.dtype
    for adapter in adapters:
        inside = _projected(layer, x, adapter)
        folded = _folded(layer, adapter).to(inside.device, inside.dtype)
        result = result + linear(inside, folded)
    return result.to(dtype)


def _config(inputs: int, outputs: int, **more: Any) -> PsoftConfig:
    rank = 32 if min(inputs, outputs) >= 256 else 4  # noqa: PLR2004 - the default, or a small one
    return PsoftConfig(
        r=rank, psoft_alpha=rank + 1, init_weights=False, target_modules=TARGETS, **more
    )


RECIPE = LayerRecipe(
    name="PSOFT",
    hooks={Linear: [guard(_forward, warm=_rotation)]},
    fast={Linear: [guard(_fast_forward, warm=_folded)]},
    adapters="psoft_R",
    relies_on={
        "peft.tuners.psoft.layer:OrthLayer.forward": "c9ec471f0d27",
        "peft.tuners.psoft.layer:OrthLayer.get_matrix": "5ca2413d0a41",
        "peft.tuners.psoft.layer:OrthLayer._skew_symmetric": "086e92442f42",
        "peft.tuners.psoft.layer:OrthLayer._project_Q": "535d404e0877",
        "peft.tuners.psoft.layer:PsoftLayer._get_psoft_ab_cache_buffers": "8267146fa97f",
        "peft.tuners.psoft.layer:Linear.forward": "fb802a831c8f",
        "peft.tuners.tuners_utils:BaseTunerLayer._cast_input_dtype": "88774c6f1321",
    },
    examples=[
        Example(
            "PSOFT",
            lambda inputs, outputs: _config(inputs, outputs, psoft_dropout=0.1),
            numerics=BOTH,
        ),
        Example(
            "PSOFT, Neumann",
            lambda inputs, outputs: _config(
                inputs, outputs, use_cayley_neumann=True, cayley_neumann_eps=0.9
            ),
        ),
    ],
)
