"""OSF (https://arxiv.org/abs/2504.07097): the factors of the difference of two low-rank products.

Under ``numerics="fast"``, their product where that is the smaller one, as with the default rank of
half of the full one; with the base weight in it where that loses no precision.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from peft import OSFConfig
from peft.tuners.osf.layer import Linear
from torch import Tensor, nn
from torch.nn.functional import linear

from dora_cache.core.decorator import cached
from dora_cache.recipes.bases import foldable
from dora_cache.recipes.examples import BOTH, TARGETS, Example
from dora_cache.recipes.hooks import LayerRecipe, UnusualError, guard, own_parameter
from dora_cache.recipes.peft_layers import base_layer, weights_of

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["RECIPE"]

_TRAINED = ("U_low", "S_low", "V_low")
_INITIAL = ("_osf_U_low_init", "_osf_S_low_init", "_osf_V_low_init")


def _depends_on(layer: Any, adapter: str) -> Iterator[object]:
    modules = layer._modules
    trained = modules["osf_svd_params"]._modules[adapter]
    for name in _TRAINED:
        yield own_parameter(trained, name)
    for name in _INITIAL:
        yield modules[name]._buffers[adapter]


@cached("OSF factors", adapter="adapter", depends_on=_depends_on)
def _factors(layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
    """Derive ``B`` and ``A`` with the delta ``A B``; shapes (2 r, in) and (out, 2 r)."""
    u, s, v = (layer.osf_svd_params[adapter][name] for name in _TRAINED)
    u0, s0, v0 = (getattr(layer, name)[adapter] for name in _INITIAL)
    left = torch.cat([u * s.unsqueeze(0), -(u0 * s0.unsqueeze(0))], dim=1)
    return torch.cat([v, v0], dim=0), left


def _forward(layer: Any, x: Tensor) -> Tensor:
    adapter = _active(layer)
    result: Tensor = layer.base_layer(x)
    if adapter is None:
        return result
    right, left = _factors(layer, adapter)
    hidden = linear(layer._cast_input_dtype(x, left.dtype), right)
    return result + linear(hidden, left).to(x.dtype)


def _active(layer: Any) -> str | None:
    """Return the adapter that PEFT uses: the first active one, if the layer has it."""
    active = layer.__dict__["_active_adapter"]
    if type(active) is not str:
        active = active[0] if active else None
    trained = layer._modules["osf_svd_params"]._modules.get(active)
    if trained is not None and type(trained) is not nn.ParameterDict:
        msg = "osf_svd_params has a member that is not a ParameterDict"
        raise UnusualError(msg)
    return None if trained is None else active


# What numerics="fast" stores and does


@cached("OSF delta", adapter="adapter", depends_on=_depends_on)
def _delta(layer: Any, adapter: str) -> Tensor:
    """Derive the delta, in the dtype of the factors; (out, in)."""
    right, left = _factors.__wrapped__(layer, adapter)
    wide = torch.promote_types(left.dtype, torch.float32)
    with torch.autocast(left.device.type, enabled=False):
        return (left.to(wide) @ right.to(wide)).to(left.dtype)


def _total_depends_on(layer: Any, adapter: str) -> Iterator[object]:
    yield from _depends_on(layer, adapter)
    yield from weights_of(base_layer(layer))


@cached("OSF weight, folded", adapter="adapter", depends_on=_total_depends_on)
def _total(layer: Any, adapter: str) -> Tensor:
    """Derive W and the delta; (out, in)."""
    right, left = _factors.__wrapped__(layer, adapter)
    base: Any = base_layer(layer)
    total: Tensor = torch.addmm(base.weight, left, right)
    return total


def _is_dense(layer: Any, adapter: str) -> bool:
    """Whether the delta is smaller than its factors."""
    trained = layer._modules["osf_svd_params"]._modules[adapter]
    outputs, rank = own_parameter(trained, "U_low").shape
    inputs = own_parameter(trained, "V_low").shape[1]
    smaller: bool = 2 * rank * (inputs + outputs) > inputs * outputs
    return smaller


def _folds(layer: Any, adapter: str, x: Tensor | None = None) -> bool:
    return foldable(layer, x, *_depends_on(layer, adapter))  # type: ignore[arg-type]


def _fast_forward(layer: Any, x: Tensor) -> Tensor:
    adapter = _active(layer)
    if adapter is None or not _is_dense(layer, adapter):
        return _forward(layer, x)
    if _folds(layer, adapter, x):
        return linear(x, _total(layer, adapter), base_layer(layer).bias)  # type: ignore[arg-type]
    result: Tensor = layer.base_layer(x)
    delta = _delta(layer, adapter)
    return result + linear(layer._cast_input_dtype(x, delta.dtype), delta).to(x.dtype)


def _warm(layer: Any, adapter: str) -> object:
    if type(layer.osf_svd_params[adapter]) is not nn.ParameterDict:
        return None
    if not _is_dense(layer, adapter):
        return _factors(layer, adapter)
    fold = _folds(layer, adapter)
    return _total(layer, adapter) if fold else _delta(layer, adapter)


RECIPE = LayerRecipe(
    name="OSF",
    hooks={Linear: [guard(_forward, warm=_factors)]},
    fast={Linear: [guard(_fast_forward, warm=_warm)]},
    adapters="osf_svd_params",
    relies_on={"peft.tuners.osf.layer:Linear.forward": "2bb5708e4098"},
    examples=[
        Example("OSF", lambda *_: OSFConfig(target_modules=TARGETS), layers=1, numerics=BOTH),
        Example(
            "OSF, low rank",
            lambda inputs, outputs: OSFConfig(
                # The rank of what stays as it is.
                effective_rank=min(inputs, outputs) - (8 if min(inputs, outputs) >= 64 else 2),  # noqa: PLR2004
                target_modules=TARGETS,
            ),
            layers=1,
            numerics=BOTH,
        ),
    ],
)
