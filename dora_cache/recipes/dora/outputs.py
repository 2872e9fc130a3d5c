"""What a DoRA layer returns, given what its base layer returned and what is stored."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dora_cache.recipes.dora import kernels
from dora_cache.recipes.dora.values import (
    bias_of,
    fast_scale,
    is_conv,
    offloaded_fast_scale,
    offloaded_scale,
    scale_of,
    wants_gradient,
)
from dora_cache.recipes.peft_layers import base_layer

if TYPE_CHECKING:
    from dora_cache.recipes.dora.values import Buffers

__all__ = ["FORWARDS", "OFFLOADED", "add_exact", "add_fast", "embedded", "exact_sum", "fast_sum"]


def exact_sum(
    result: Tensor,
    bias: Tensor | None,
    delta: Tensor,
    scale: Tensor,
    scaling: Any,
    *,
    owned: bool = False,
    one: Any = 1,
) -> Tensor:
    """Return ``result + ((s - 1) (result - bias) + s delta g)``, as PEFT's operations round it.

    Args:
        result: what the base layer returned, its bias included.
        bias: the base layer's, in a shape that is subtracted from ``result``; or None.
        delta: what the adapter's factors returned.
        scale: ``s``.
        scaling: ``g``, a number or a tensor without dimensions.
        owned: whether nobody else sees ``delta``, and neither gradients nor a tracer matter. Then
            it is written into: that takes fewer allocations, and gives the same bits.
        one: 1, or a tensor of it.
    """
    changed = (scale - one) * (result if bias is None else result - bias)
    if not (
        owned
        and changed.dtype is delta.dtype is scale.dtype
        and changed.dim() == delta.dim()
        and changed.numel() == delta.numel()
    ):
        return result + (changed + scale * delta * scaling)
    delta.mul_(scale)
    if type(scaling) is not float or scaling != 1.0:
        delta.mul_(scaling)
    return changed.add_(delta).add_(result)


def fast_sum(
    result: Tensor,
    delta: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    scaling: Any,
    *,
    owned: bool = False,
) -> Tensor:
    """Return ``s (result + g delta) + (1 - s) bias``; ``result`` already has the bias.

    Args:
        result: what the base layer returned, its bias included.
        delta: what the adapter's factors returned.
        scale: ``s``.
        shift: ``(1 - s) bias``; None without a bias.
        scaling: ``g``, a number or a tensor without dimensions.
        owned: whether neither gradients nor a tracer matter.
    """
    if isinstance(scaling, Tensor):  # unlike a number, it multiplies in the dtype of delta
        total = result + delta.to(scale.dtype) * scaling
    else:
        total = torch.add(result, delta, alpha=+scaling)  # which takes no bool
    # PEFT's result has two dimensions for an input of one.
    total = total.mul_(scale) if owned and total.dim() >= scale.dim() else total * scale
    return total if shift is None else total + shift


def _is_followed() -> bool:
    """Whether gradients or a tracer matter, so that nothing may be written into."""
    return torch.compiler.is_dynamo_compiling() or torch.is_grad_enabled()


def _exact(layer: Any, adapter: str, x: Tensor, result: Tensor) -> Tensor:
    """Return the output of a linear layer or a convolution, bit for bit PEFT's."""
    conv = is_conv(layer)
    scale = scale_of(layer, adapter, None if conv else x.dtype)
    scaling = layer.scaling[adapter]
    delta = _projected(layer, adapter, x)
    bias = bias_of(base_layer(layer))
    if conv and bias is not None:
        bias = bias.view(1, -1, *[1] * (result.dim() - 2))
    last = layer._modules["lora_B"]._modules[adapter]
    owned = type(last) in _MAKES_NEW and not _is_followed()
    if not conv:
        return add_exact(result, delta, scale, bias, scaling, owned=owned)
    return exact_sum(result, bias, delta, scale, scaling, owned=owned)


def add_exact(
    result: Tensor,
    delta: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    scaling: Any,
    *,
    owned: bool = True,
    one: Any = 1,
    factor: Any = None,
) -> Tensor:
    """Return a linear layer's output by :func:`exact_sum`, or by a kernel where there is one.

    Args:
        result: as there, as are ``delta``, ``scale``, ``bias``, ``owned`` and ``one``.
        delta: likewise.
        scale: likewise.
        bias: likewise.
        scaling: a number.
        owned: likewise.
        one: likewise.
        factor: the scaling as an operand; None for the number.
    """
    if _fusible(result, delta, scaling):
        fused = kernels.combine(result, delta, scale, bias, scaling)
        if fused is not None:
            return fused
    scaling = scaling if factor is None else factor
    return exact_sum(result, bias, delta, scale, scaling, owned=owned, one=one)


_MAKES_NEW = frozenset({nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d})
"""Modules whose result is a tensor of its own."""


def _fusible(result: Tensor, delta: Tensor, scaling: Any) -> bool:
    """Whether a kernel may do what follows the matrix products."""
    return (
        result.is_cuda
        and not _is_followed()
        and type(scaling) in {int, float}
        and kernels.usable(result, delta)
    )


def _embedding(
    layer: Any, adapter: str, x: Tensor, result: Tensor, buffers: Buffers | None = None
) -> Tensor:
    if buffers is None:
        scale, scaling = scale_of(layer, adapter), layer.scaling[adapter]
    else:
        scale, scaling = buffers
    delta = scale * embedded(layer, adapter, x) * scaling
    embed_scale = layer._get_embed_scale()
    if embed_scale is not None:
        delta = delta * embed_scale.to(delta.dtype)
    return scale * result + delta


def _exact_offloaded(layer: Any, adapter: str, x: Tensor, result: Tensor) -> Tensor:
    """Return the output of a layer whose weights are in place for its parts' forwards alone."""
    conv = is_conv(layer)
    scaling = layer.scaling[adapter]
    if adapter not in layer.lora_A:
        scale, *_ = offloaded_scale(layer, adapter)
        return _embedding(layer, adapter, x, result, (scale, scaling))
    scale, *biases = offloaded_scale(layer, adapter, None if conv else x.dtype)
    bias = biases[0] if biases else None
    if conv and bias is not None:
        bias = bias.view(1, -1, *[1] * (result.dim() - 2))
    return exact_sum(result, bias, _projected(layer, adapter, x), scale, scaling)


def _fast_offloaded(layer: Any, adapter: str, x: Tensor, result: Tensor) -> Tensor:
    """Return the same, with ``numerics="fast"``."""
    buffers = (*offloaded_fast_scale(layer, adapter), layer.scaling[adapter])
    if adapter not in layer.lora_A:
        return _fast_embedding(layer, adapter, x, result, buffers)
    return _combine(layer, adapter, result, _projected(layer, adapter, x), buffers)


OFFLOADED = {"peft": _exact_offloaded, "fast": _fast_offloaded}
"""Forwards by numerics, for layers with offloaded weights and inference without gradients."""


def _projected(layer: Any, adapter: str, x: Tensor) -> Tensor:
    modules = layer._modules
    projected: Tensor = modules["lora_A"]._modules[adapter](x)
    return modules["lora_B"]._modules[adapter](projected)


def embedded(layer: Any, adapter: str, x: Tensor) -> Tensor:
    """Return what an adapter's factors return for an embedding layer's input, without scaling."""
    inner: Tensor = layer._embed(x, layer.lora_embedding_A[adapter].T)
    return inner @ layer.lora_embedding_B[adapter].T


def _combine(
    layer: Any, adapter: str, result: Tensor, delta: Tensor, buffers: Buffers | None
) -> Tensor:
    """Return the output, given what is added to the base layer's."""
    owned = not torch.is_grad_enabled()
    if buffers is None:
        value = fast_scale(layer, adapter)
        scaling = layer.scaling[adapter]
        if adapter in layer.lora_A and not is_conv(layer):
            return add_fast(result, delta, value, scaling, owned=owned)
        scale, *shift = value
    else:
        scale, *shift, scaling = buffers
    return fast_sum(result, delta, scale, shift[0] if shift else None, scaling, owned=owned)


def add_fast(
    result: Tensor,
    delta: Tensor,
    value: Buffers,
    scaling: Any,
    *,
    owned: bool = True,
) -> Tensor:
    """Return a linear layer's output by :func:`fast_sum`, or by a kernel where there is one."""
    scale, shift = value if len(value) > 1 else (value[0], None)
    if _fusible(result, delta, scaling):
        fused = kernels.combine_fast(result, delta, scale, shift, scaling)
        if fused is not None:
            return fused
    return fast_sum(result, delta, scale, shift, scaling, owned=owned)


def _fast_projected(
    layer: Any, adapter: str, x: Tensor, result: Tensor, buffers: Buffers | None = None
) -> Tensor:
    if wants_gradient(layer, adapter):
        return _exact(layer, adapter, x, result)
    return _combine(layer, adapter, result, _projected(layer, adapter, x), buffers)


def _fast_embedding(
    layer: Any, adapter: str, x: Tensor, result: Tensor, buffers: Buffers | None = None
) -> Tensor:
    if wants_gradient(layer, adapter):
        return _embedding(layer, adapter, x, result)
    delta = embedded(layer, adapter, x)
    embed_scale = layer._get_embed_scale()
    if embed_scale is not None:
        delta = delta * embed_scale.to(delta.dtype)
    return _combine(layer, adapter, result, delta, buffers)


FORWARDS = {
    ("peft", "linear"): _exact,
    ("peft", "embedding"): _embedding,
    ("peft", "conv"): _exact,
    ("fast", "linear"): _fast_projected,
    ("fast", "embedding"): _fast_embedding,
    ("fast", "conv"): _fast_projected,
}
