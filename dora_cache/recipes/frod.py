"""FRoD (https://doi.org/10.1609/aaai.v40i31.39813): the sparse rotation between shared bases.

An adapter's weight is ``U (S + diag(l)) V^T`` with a sparse S, of which PEFT sorts the entries anew
at each forward. (It also copies U and V, where they are on another device or of another dtype than
the input.) Under ``numerics="fast"`` the weight itself is stored.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from peft import FrodConfig
from peft.tuners.frod.layer import Linear
from torch.nn.functional import linear

from dora_cache.core.decorator import cached
from dora_cache.reasons import Reason
from dora_cache.recipes.compiled import opaque
from dora_cache.recipes.examples import BOTH, TARGETS, Example
from dora_cache.recipes.hooks import (
    LayerRecipe,
    UnusualError,
    active_in,
    check_unhooked,
    guard,
    parameter,
)
from dora_cache.recipes.peft_layers import base_layer, drops

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

__all__ = ["RECIPE"]

_SIXTEEN_BITS = (torch.float16, torch.bfloat16)


def _depends_on(layer: Any, adapter: str, *_: object) -> Iterator[object]:
    state = layer.__dict__
    yield parameter(layer, "frod_lambda_s_values", adapter)
    yield state["frod_s_indices"]._buffers[adapter]
    yield state["frod_s_size"]._buffers[adapter]
    yield state["frod_V"]._buffers[adapter].shape[1]


def _bases_depend_on(layer: Any, adapter: str, *_: object) -> Iterator[Tensor]:
    yield layer._modules["frod_U"]._buffers[adapter]
    yield layer.__dict__["frod_V"]._buffers[adapter]


def _all_depend_on(layer: Any, adapter: str, *_: object) -> Iterator[object]:
    yield parameter(layer, "frod_lambda_l", adapter)
    yield from _bases_depend_on(layer, adapter)
    yield from _depends_on(layer, adapter)


@cached("FRoD rotation", adapter="adapter", depends_on=_depends_on)
def _entries(
    layer: Any, adapter: str, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Derive the places and values of S, sorted.

    Raises:
        UnusualError: S is not square. PEFT has an error for that.
    """
    rotation = layer._get_frod_tensors(adapter, device=device, dtype=dtype)[2]
    if not rotation.shape[0] == rotation.shape[1] == layer.frod_V[adapter].shape[1]:
        msg = f"S has the shape {tuple(rotation.shape)}"
        raise UnusualError(msg)
    return rotation.indices(), rotation.values()


@cached("FRoD rotation", adapter="adapter", depends_on=_depends_on)
def _dense(layer: Any, adapter: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Derive S as PEFT multiplies inputs of 16 bits with it: dense; shape (in, in)."""
    rotation = layer._get_frod_tensors(adapter, device=device, dtype=dtype)[2]
    dense: Tensor = rotation.to_dense()
    return dense


@cached("FRoD bases", adapter="adapter", depends_on=_bases_depend_on)
def _bases(
    layer: Any, adapter: str, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Derive U and V on another device or of another dtype; shapes (out, in) and (in, in)."""
    u, v = (bases[adapter].to(device=device, dtype=dtype) for bases in (layer.frod_U, layer.frod_V))
    return u, v


@cached("FRoD weight", adapter="adapter", depends_on=_all_depend_on)
def _weight(layer: Any, adapter: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Derive ``U (S + diag(l)) V^T``, in float32 at least; shape (out, in)."""
    wide = torch.promote_types(dtype, torch.float32)
    u, v, rotation, diagonal = layer._get_frod_tensors(adapter, device=device, dtype=wide)
    with torch.autocast(device.type, enabled=False):
        turned = torch.sparse.mm(rotation.t(), u.t()).t() + u * diagonal
        weight: Tensor = (turned @ v.t()).to(dtype)
    return weight


def _forward(layer: Any, x: Tensor) -> Tensor | None:
    adapters = active_in(layer, "frod_lambda_s_values")
    if not adapters:
        return None
    _check(layer, adapters, x)
    parts = [_outputs(layer, adapter, x) for adapter in adapters]
    bias: Tensor | None = base_layer(layer).bias  # type: ignore[assignment]
    if len(parts) == 1:
        result = parts[0] if bias is None else parts[0] + bias
        return result.to(x.dtype)
    result = layer.base_layer(x)
    base = result if bias is None else result - bias
    for part in parts:
        result = result + part - base
    return result.to(x.dtype)


def _outputs(layer: Any, adapter: str, x: Tensor) -> Tensor:
    """Return an adapter's product."""
    device, dtype = x.device, x.dtype
    u, v = _bases_depend_on(layer, adapter)
    if u.dtype is not dtype or v.dtype is not dtype or u.device != device or v.device != device:
        u, v = _bases(layer, adapter, device, dtype)
    diagonal = layer.frod_lambda_l[adapter].to(device=device, dtype=dtype)
    flat = torch.matmul(layer.frod_dropout[adapter](x).reshape(-1, x.shape[-1]), v)
    if not parameter(layer, "frod_lambda_s_values", adapter).numel():
        turned = torch.zeros_like(flat)
    elif flat.dtype in _SIXTEEN_BITS:
        turned = flat @ _dense(layer, adapter, device, dtype).t()
    else:
        turned = _turn(flat, *_entries(layer, adapter, device, dtype)).t()
    result = linear(turned + flat * diagonal, u)
    return result.reshape(*x.shape[:-1], result.shape[-1])


def _turned(flat: Tensor, places: Tensor, values: Tensor) -> Tensor:
    """Return S times the transpose of ``flat``, by operations that torch.compile cannot follow."""
    size = (flat.shape[1], flat.shape[1])
    rotation = torch.sparse_coo_tensor(
        places, values, size, is_coalesced=True, check_invariants=False
    )
    return torch.sparse.mm(rotation, flat.t())


_turn = opaque(
    "turn(Tensor flat, Tensor places, Tensor values) -> Tensor",
    _turned,
    lambda flat, *_: flat.new_empty(flat.shape[::-1]),
)


def _forward_fast(layer: Any, x: Tensor) -> Tensor | None:
    adapters = active_in(layer, "frod_lambda_s_values")
    if len(adapters) != 1:
        return _forward(layer, x)
    _check(layer, adapters, x)
    result = linear(x, _weight(layer, adapters[0], x.device, x.dtype))
    bias: Tensor | None = base_layer(layer).bias  # type: ignore[assignment]
    return (result if bias is None else result + bias).to(x.dtype)


def _check(layer: Any, adapters: Any, x: Tensor) -> None:
    """Check that no dropout is in training or hooked, and that the base weight stays where it is.

    Raises:
        UnusualError: that is not so.
    """
    if x.device != base_layer(layer).weight.device or not x.is_floating_point():
        msg = "the input is on another device, or holds integers"
        raise UnusualError(msg, Reason.UNUSUAL_INPUT)
    dropouts = layer._modules["frod_dropout"]._modules
    for adapter in adapters:
        dropout = dropouts[adapter]
        if layer.runtime_offload_base_weight.get(adapter):
            msg = "the base weight is offloaded"
            raise UnusualError(msg, Reason.OFFLOADED)
        check_unhooked(dropout)
        if drops(dropout):
            msg = "a dropout drops"
            raise UnusualError(msg, Reason.DROPOUT)


def _warm(layer: Any, adapter: str) -> object:
    weight: Any = base_layer(layer).weight
    if weight.dtype in _SIXTEEN_BITS:
        return _dense(layer, adapter, weight.device, weight.dtype)
    return _entries(layer, adapter, weight.device, weight.dtype)


def _warm_fast(layer: Any, adapter: str) -> object:
    weight: Any = base_layer(layer).weight
    return _weight(layer, adapter, weight.device, weight.dtype)


def _config(*_: int, **more: Any) -> FrodConfig:
    return FrodConfig(init_weights=False, progressbar=False, target_modules=TARGETS, **more)


RECIPE = LayerRecipe(
    name="FRoD",
    hooks={Linear: [guard(_forward, warm=_warm)]},
    fast={Linear: [guard(_forward_fast, warm=_warm_fast)]},
    adapters="frod_lambda_s_values",
    relies_on={
        "peft.tuners.frod.layer:Linear.forward": "f9ff8714d000",
        "peft.tuners.frod.layer:Linear._get_frod_tensors": "09ef2319d3e0",
        "peft.tuners.frod.layer:Linear._sparse_activation_mm": "7df9291c99cf",
        "peft.tuners.frod.layer:FrodLayer.update_layer": "dd5cca4f5f2a",
        "peft.tuners.frod.layer:FrodLayer._set_shared_projection_buffers": "41fe38a75bbf",
    },
    examples=[
        Example("FRoD", lambda *_: _config(sparse_rate=0.02), numerics=BOTH),
    ],
)
