"""DeLoRA (https://arxiv.org/abs/2503.18225): the normalizing scale of each rank.

Under ``numerics="fast"``, ``A`` with this scale and the norms of the base weight in it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from peft import DeloraConfig
from peft.tuners.delora.layer import DeloraLinear
from torch import Tensor
from torch.nn.functional import linear

from dora_cache.core.decorator import cached
from dora_cache.recipes.examples import BOTH, TARGETS, Example
from dora_cache.recipes.hooks import LayerRecipe, active_in, check_unhooked, guard, parameter
from dora_cache.recipes.peft_layers import base_layer, drops

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["RECIPE"]


def _depends_on(layer: Any, adapter: str) -> Iterator[object]:
    yield parameter(layer, "delora_A", adapter)
    yield parameter(layer, "delora_B", adapter)
    yield parameter(layer, "delora_lambda", adapter)
    yield layer.__dict__["r"][adapter]


@cached("DeLoRA scale", adapter="adapter", depends_on=_depends_on)
def _scale(layer: Any, adapter: str) -> Tensor:
    """Derive ``lambda / r / (|A_i| |B_i|)`` for each rank i; (r,)."""
    a_norm = torch.clamp(layer.delora_A[adapter].norm(dim=1), min=1e-4)
    b_norm = torch.clamp(layer.delora_B[adapter].norm(dim=0), min=1e-4)
    scale: Tensor = (layer.delora_lambda[adapter] / layer.r[adapter]) / (a_norm * b_norm)
    return scale


def _forward(layer: Any, x: Tensor) -> Tensor | None:
    if not layer.__dict__["_active_adapter"]:
        return None
    modules = layer._modules
    adapters = active_in(layer, "delora_A")
    lasts = [parameter(layer, "delora_B", adapter) for adapter in adapters]
    base_result: Tensor = layer.base_layer(x)
    added = torch.zeros_like(base_result)
    for adapter, last in zip(adapters, lasts, strict=True):
        dropped = modules["delora_dropout"]._modules[adapter](x)
        norms = modules["delora_w_norm"]._buffers[adapter]
        hidden = linear(dropped * norms, parameter(layer, "delora_A", adapter))
        hidden = hidden * _scale(layer, adapter)
        added += linear(hidden, last)
    return (base_result + added.to(base_result.dtype)).to(x.dtype)


# What numerics="fast" stores and does


def _scaled_depends_on(layer: Any, adapter: str) -> Iterator[object]:
    yield from _depends_on(layer, adapter)
    yield layer._modules["delora_w_norm"]._buffers[adapter]


@cached("DeLoRA factor", adapter="adapter", depends_on=_scaled_depends_on)
def _scaled(layer: Any, adapter: str) -> Tensor:
    """Derive ``A`` with each rank's scale and each input's norm in it; (r, in)."""
    a: Tensor = layer.delora_A[adapter]
    with torch.autocast(a.device.type, enabled=False):
        scale = _scale.__wrapped__(layer, adapter)
        scaled: Tensor = a * scale[:, None] * layer.delora_w_norm[adapter]
        return scaled.to(a.dtype)


def _fast_forward(layer: Any, x: Tensor) -> Tensor | None:
    adapters = active_in(layer, "delora_A")
    if not all([_scales(layer, adapter, x.dtype) for adapter in adapters]):  # noqa: C419 - faster
        return _forward(layer, x)
    lasts = [parameter(layer, "delora_B", adapter) for adapter in adapters]
    result: Tensor = layer.base_layer(x)
    for adapter, last in zip(adapters, lasts, strict=True):
        scaled = _scaled(layer, adapter)
        hidden = linear(x.to(scaled.dtype), scaled)
        result = result + linear(hidden, last)
    return result.to(x.dtype)


def _scales(layer: Any, adapter: str, dtype: torch.dtype) -> bool:
    """Whether ``x`` times the norms has the dtype of ``A``, and there is no dropout or hook."""
    modules = layer._modules
    norms = modules["delora_w_norm"]._buffers[adapter].dtype
    dropout = modules["delora_dropout"]._modules[adapter]
    check_unhooked(dropout)
    if drops(dropout):
        return False
    expected = parameter(layer, "delora_A", adapter).dtype
    return dtype == norms == expected or torch.promote_types(dtype, norms) == expected


def _warm(layer: Any, adapter: str) -> object:
    scales = _scales(layer, adapter, base_layer(layer).weight.dtype)  # type: ignore[arg-type]
    return _scaled(layer, adapter) if scales else _scale(layer, adapter)


RECIPE = LayerRecipe(
    name="DeLoRA",
    hooks={DeloraLinear: [guard(_forward, warm=_scale)]},
    fast={DeloraLinear: [guard(_fast_forward, warm=_warm)]},
    adapters="delora_A",
    relies_on={"peft.tuners.delora.layer:DeloraLinear.forward": "199084d1c13a"},
    examples=[
        Example(
            "DeLoRA",
            lambda inputs, outputs: DeloraConfig(
                r=8 if min(inputs, outputs) >= 64 else 2,  # noqa: PLR2004 - a usual one, or small
                delora_lambda=3,
                target_modules=TARGETS,
                init_weights=False,
            ),
            numerics=BOTH,
        )
    ],
)
