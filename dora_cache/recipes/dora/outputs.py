"""What a DoRA layer returns, given what its base layer returned and what is stored."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from dora_cache.recipes.dora import kernels
from dora_cache.recipes.dora.values import (
    FAST,
    at_hand,
    bias_of,
    fast_scale,
    is_conv,
    scale_of,
    wants_gradient,
)
from dora_cache.recipes.peft_layers import base_layer

if TYPE_CHECKING:
    from dora_cache.recipes.dora.values import Buffers

__all__ = ["FORWARDS", "few_rows", "is_just_linear"]


def _linear(
    layer: Any,
    adapter: str,
    x: Tensor,
    result: Tensor,
    buffers: Buffers | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the layer's output; in ``dtype``, if that costs nothing."""
    if buffers is None:
        scale, scaling = scale_of(layer, adapter, x.dtype), layer.scaling[adapter]
    else:
        scale, scaling = buffers
    delta = _projected(layer, adapter, x)
    bias = bias_of(base_layer(layer))
    if buffers is None and _fusible(result, delta, scaling):
        fused = kernels.combine(result, delta, scale, bias, scaling, dtype)
        if fused is not None:
            return fused
    base = result if bias is None else result - bias
    return _sum(layer, adapter, result, base, delta, scale, scaling)


def _conv(
    layer: Any, adapter: str, x: Tensor, result: Tensor, buffers: Buffers | None = None
) -> Tensor:
    if buffers is None:
        scale, scaling = scale_of(layer, adapter), layer.scaling[adapter]
    else:
        scale, scaling = buffers
    bias = bias_of(base_layer(layer))
    base = result
    if bias is not None:
        base = result - bias.view(1, -1, *[1] * (result.dim() - 2))
    delta = _projected(layer, adapter, x)
    return _sum(layer, adapter, result, base, delta, scale, scaling)


def _fusible(result: Tensor, delta: Tensor, scaling: Any) -> bool:
    """Whether a kernel may do what follows the matrix products."""
    return (
        result.is_cuda
        and not torch.is_grad_enabled()
        and type(scaling) in {int, float}
        and kernels.usable(result, delta)
    )


def _sum(
    layer: Any,
    adapter: str,
    result: Tensor,
    base: Tensor,
    delta: Tensor,
    scale: Tensor,
    scaling: Any,
) -> Tensor:
    """Return ``result + ((s - 1) base + s delta g)``, with each operation's own rounding.

    In place where nobody else can see it: that takes fewer allocations, and the same bits.
    """
    changed = (scale - 1) * base
    if (
        torch.compiler.is_dynamo_compiling()
        or torch.is_grad_enabled()
        or not (changed.dtype is delta.dtype is scale.dtype and changed.dim() == delta.dim())
        or type(layer._modules["lora_B"]._modules[adapter]) not in _MAKES_NEW
    ):
        return result + (changed + scale * delta * scaling)
    delta.mul_(scale)
    if type(scaling) is not float or scaling != 1.0:
        delta.mul_(scaling)
    return changed.add_(delta).add_(result)


_MAKES_NEW = frozenset({nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d})
"""Modules whose result is a tensor of its own."""


def _embedding(
    layer: Any, adapter: str, x: Tensor, result: Tensor, buffers: Buffers | None = None
) -> Tensor:
    if buffers is None:
        scale, scaling = scale_of(layer, adapter), layer.scaling[adapter]
    else:
        scale, scaling = buffers
    delta = scale * _embedded(layer, adapter, x) * scaling
    embed_scale = layer._get_embed_scale()
    if embed_scale is not None:
        delta = delta * embed_scale.to(delta.dtype)
    return scale * result + delta


def _projected(layer: Any, adapter: str, x: Tensor) -> Tensor:
    modules = layer._modules
    lora_a, lora_b = modules["lora_A"]._modules[adapter], modules["lora_B"]._modules[adapter]
    if is_just_linear(lora_a) and is_just_linear(lora_b):
        # What calling the modules comes to, at half its cost; hooks are checked before.
        a, b = lora_a.__dict__["_parameters"], lora_b.__dict__["_parameters"]
        return linear(linear(x, a["weight"], a["bias"]), b["weight"], b["bias"])
    return lora_b(lora_a(x))


def is_just_linear(module: Any) -> bool:
    """Whether calling a module comes to a matrix product, but for the hooks of forwards."""
    if type(module) is not nn.Linear or torch.compiler.is_dynamo_compiling():
        return False
    state = module.__dict__
    return "weight" in state["_parameters"] and not (
        "forward" in state
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or module._compiled_call_impl
        or nn.Linear.forward is not _linear_forward
    )


_linear_forward = nn.Linear.forward


def _embedded(layer: Any, adapter: str, x: Tensor) -> Tensor:
    embedded: Tensor = layer._embed(x, layer.lora_embedding_A[adapter].T)
    return embedded @ layer.lora_embedding_B[adapter].T


def _combine(
    layer: Any,
    adapter: str,
    result: Tensor,
    delta: Tensor,
    buffers: Buffers | None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return ``s * (result + g * delta) + (1 - s) * bias``; the result already has the bias."""
    if buffers is None:
        found = None if torch.compiler.is_dynamo_compiling() else at_hand(layer, FAST, adapter)
        scale, *shift = found or fast_scale(layer, adapter)
        scaling = layer.scaling[adapter]
        if adapter in layer.lora_A and not is_conv(layer) and _fusible(result, delta, scaling):
            bias = shift[0] if shift else None
            fused = kernels.combine_fast(result, delta, scale, bias, scaling, dtype)
            if fused is not None:
                return fused
    else:
        scale, *shift, scaling = buffers
        delta = delta.to(scale.dtype)  # a tensor g, unlike a number, multiplies in delta's dtype
    if isinstance(scaling, Tensor):
        y = result + delta * scaling
    else:
        y = torch.add(result, delta, alpha=scaling)
    # PEFT's result has two dimensions for an input of one.
    y = y * scale if torch.is_grad_enabled() or y.dim() < scale.dim() else y.mul_(scale)
    return y + shift[0] if shift else y


def _fast_projected(
    layer: Any,
    adapter: str,
    x: Tensor,
    result: Tensor,
    buffers: Buffers | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    if wants_gradient(layer, adapter):
        exact = _conv if is_conv(layer) else _linear
        return exact(layer, adapter, x, result)
    return _combine(layer, adapter, result, _projected(layer, adapter, x), buffers, dtype)


def few_rows(layer: Any, adapter: str, x: Tensor, result: Tensor) -> Tensor | None:
    """Return a linear layer's output by two small kernels; None where they do not pay."""
    scaling = layer.scaling[adapter]
    modules = layer._modules
    lora_a, lora_b = modules["lora_A"]._modules[adapter], modules["lora_B"]._modules[adapter]
    if not (_fusible(result, x, scaling) and is_just_linear(lora_a) and is_just_linear(lora_b)):
        return None
    a, b = lora_a.__dict__["_parameters"], lora_b.__dict__["_parameters"]
    if not a["bias"] is b["bias"] is None or (
        x.dtype is not a["weight"].dtype and not getattr(layer, "cast_input_dtype_enabled", True)
    ):
        return None
    scale, *shift = at_hand(layer, FAST, adapter) or fast_scale(layer, adapter)
    return kernels.adapted(
        x, result, a["weight"], b["weight"], scale, shift[0] if shift else None, scaling
    )


def _fast_embedding(
    layer: Any, adapter: str, x: Tensor, result: Tensor, buffers: Buffers | None = None
) -> Tensor:
    if wants_gradient(layer, adapter):
        return _embedding(layer, adapter, x, result)
    delta = _embedded(layer, adapter, x)
    embed_scale = layer._get_embed_scale()
    if embed_scale is not None:
        delta = delta * embed_scale.to(delta.dtype)
    return _combine(layer, adapter, result, delta, buffers)


FORWARDS = {
    ("peft", "linear"): _linear,
    ("peft", "embedding"): _embedding,
    ("peft", "conv"): _conv,
    ("fast", "linear"): _fast_projected,
    ("fast", "embedding"): _fast_embedding,
    ("fast", "conv"): _fast_projected,
}
