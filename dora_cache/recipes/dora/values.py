"""What DoRA derives and stores: ``s = m / ||W + g B A||``, one number for each output.

Exactly as PEFT does, in the dtype it would have; with ``numerics="fast"`` in float32 (float64 for
float64 weights), and with the base layer's bias folded in.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora.layer import _ConvNd
from peft.utils.integrations import (
    dequantize_bnb_weight,
    dequantize_module_weight,
    get_bnb_param_type,
)
from torch import Tensor, nn

from dora_cache.ambient import any_autocast, untraceable
from dora_cache.core.decorator import MARK, cached
from dora_cache.lifecycle import bring, is_offloaded, weights_in_place
from dora_cache.recipes.dora import kernels
from dora_cache.recipes.peft_layers import base_layer, weights_of

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "FAST",
    "STORED",
    "Buffers",
    "bias_of",
    "dense",
    "depends_on",
    "fast_depends_on",
    "fast_scale",
    "has_offloaded",
    "is_conv",
    "offloaded_fast_scale",
    "offloaded_scale",
    "scale_of",
    "stored_scale",
    "wants_gradient",
]


Buffers = tuple[Tensor, ...]


def _plain_parts(layer: Any, adapter: str) -> tuple[object, ...]:
    """Return the scaling and an adapter's parameters, straight from the dictionaries.

    It runs at every lookup, and ``nn.Module.__getattr__`` would cost more than all the rest.

    Raises:
        KeyError: they are elsewhere: an embedding's, or parametrized ones.
    """
    modules = layer._modules
    lora_a = modules["lora_A"]._modules[adapter]._parameters
    lora_b = modules["lora_B"]._modules[adapter]._parameters
    return (
        layer.scaling[adapter],
        modules["lora_magnitude_vector"]._modules[adapter]._parameters["weight"],
        lora_a["weight"],
        lora_a["bias"],  # None, unless somebody has put another module there
        lora_b["weight"],
        lora_b["bias"],
    )


def depends_on(layer: Any, adapter: str, dtype: torch.dtype | None = None) -> list[object]:  # noqa: ARG001
    """Return what ``s`` is derived from."""
    try:
        found = [*_plain_parts(layer, adapter)]
    except KeyError:
        found = [layer.scaling[adapter], layer.lora_magnitude_vector[adapter].weight]
        if adapter in layer.lora_A:
            for part in (layer.lora_A[adapter], layer.lora_B[adapter]):
                found += [part.weight, part.bias]
        else:
            found += [layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]]
    found += weights_of(base_layer(layer))
    return found


def bias_of(module: nn.Module) -> Any:
    """Return a base layer's bias, or None."""
    parameters = module._parameters
    return parameters["bias"] if "bias" in parameters else getattr(module, "bias", None)


def dense(base: Any) -> Any:
    """Return the weight of a base layer, dequantized; torch.compile can follow it if it is plain.

    Detached, since it only goes into constants: PEFT's transpose() makes a Parameter of a
    Parameter, which torch.compile cannot follow.
    """
    weight = base._parameters.get("weight")
    if type(weight) is nn.Parameter and not hasattr(base, "W_q"):  # HQQ has a stub
        return weight.detach()
    if get_bnb_param_type(weight):
        # dequantize_module_weight() puts a new parameter in the weight's place, on a CPU.
        return dequantize_bnb_weight(weight, state=getattr(base, "state", None))
    return dequantize_module_weight(base)


@cached("DoRA norm", adapter="adapter", depends_on=depends_on, detach=True)
def _norm(layer: Any, adapter: str, dtype: torch.dtype | None = None) -> Tensor:
    """Derive ``||W + g B A||`` by PEFT's own operations, in the dtype they would have.

    Args:
        layer: the LoRA layer.
        adapter: the adapter's name.
        dtype: dtype of the layer's input, for linear layers.

    Returns:
        Shape (out,) for linear and embedding layers, (1, out, 1, ...) for convolutions.
    """
    dora = layer.lora_magnitude_vector[adapter]
    base: Any = base_layer(layer)
    if adapter in layer.lora_A:
        factors = {"lora_A": layer.lora_A[adapter], "lora_B": layer.lora_B[adapter]}
    else:
        factors = {
            "lora_A": layer.lora_embedding_A[adapter].T,
            "lora_B": layer.lora_embedding_B[adapter].T,
        }
    delta = dora.get_lora_weight(**factors)
    if dtype is None:
        weight = base.weight.detach()
        if weight.dim() > 2:  # noqa: PLR2004 - a convolution's
            delta = delta.reshape(weight.shape)
    else:
        delta = delta.to(dtype)
        weight = dense(base).to(dtype)
    norm: Tensor = dora.get_weight_norm(
        weight=weight, lora_weight=delta.detach(), scaling=layer.scaling[adapter]
    )
    return norm.detach()


@cached("DoRA scale", adapter="adapter", depends_on=depends_on, detach=True)
def stored_scale(layer: Any, adapter: str, dtype: torch.dtype | None = None) -> Tensor:
    """Derive ``s = m / ||W + g B A||``; (1, out) for linear layers, else the norm's shape."""
    norm = _norm.__wrapped__(layer, adapter, dtype)
    scale: Tensor = layer.lora_magnitude_vector[adapter].weight / norm
    return scale if dtype is None else scale.view(1, -1)


def _parts(layer: Any, adapter: str) -> list[Any]:
    """Return the modules that have what ``s`` is derived from."""
    modules = layer._modules
    parts = [base_layer(layer), modules["lora_magnitude_vector"]._modules[adapter]]
    if adapter in layer.lora_A:
        parts += [modules["lora_A"]._modules[adapter], modules["lora_B"]._modules[adapter]]
    return parts


def has_offloaded(layer: Any, adapter: str) -> bool:
    """Whether hooks bring the weights of the base layer, or of another part, for its forward."""
    base = base_layer(layer)
    if "forward" in base.__dict__ and is_offloaded(base):
        return True
    for name in ("lora_A", "lora_B", "lora_magnitude_vector"):
        part = layer._modules[name]._modules.get(adapter)
        if part is not None and "forward" in part.__dict__ and is_offloaded(part):
            return True
    return False


def _offloaded_depends_on(layer: Any, adapter: str, *_: object) -> list[object]:
    found: list[object] = [layer.scaling[adapter]]
    for part in _parts(layer, adapter):
        found += weights_in_place(part)
    if adapter not in layer.lora_A:
        found += [layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]]
    return found


@cached("DoRA scale, offloaded", adapter="adapter", depends_on=_offloaded_depends_on, detach=True)
def offloaded_scale(
    layer: Any, adapter: str, dtype: torch.dtype | None = None
) -> tuple[Tensor, ...]:
    """Derive ``s`` while the weights are brought, and keep the base layer's bias, if any, with it.

    PEFT reads both outside the base layer's forward, where they are offloaded.

    Args:
        layer: the LoRA layer.
        adapter: the adapter's name.
        dtype: as for :func:`stored_scale`.
    """
    with bring(*_parts(layer, adapter)):
        scale = stored_scale.__wrapped__(layer, adapter, dtype)
        bias = bias_of(base_layer(layer))
        return (scale,) if bias is None else (scale, bias.detach().clone())


@cached(
    "DoRA scale, offloaded, fast", adapter="adapter", depends_on=_offloaded_depends_on, detach=True
)
def offloaded_fast_scale(layer: Any, adapter: str) -> tuple[Tensor, ...]:
    """Derive what :func:`fast_scale` does while the weights are brought."""
    with bring(*_parts(layer, adapter)):
        derived: tuple[Tensor, ...] = fast_scale.__wrapped__(layer, adapter)
        return derived


def wants_gradient(layer: Any, adapter: str) -> bool:
    """Whether the magnitude's gradient is wanted, so that ``s`` cannot be a constant.

    It may be where compiled code has a functorch transform: tensors do not tell there.
    """
    if torch.is_grad_enabled() and layer.lora_magnitude_vector[adapter].weight.requires_grad:
        return True
    return torch.compiler.is_dynamo_compiling() and _is_followed()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_followed() -> bool:
    """Whether others follow the operations; runs while a layer is traced."""
    return untraceable()


def scale_of(layer: Any, adapter: str, dtype: torch.dtype | None = None) -> Tensor:
    """Return ``s``. The norm is a constant to autograd; the magnitude's gradient must flow."""
    if not wants_gradient(layer, adapter):
        return stored_scale(layer, adapter, dtype)
    scale: Tensor = layer.lora_magnitude_vector[adapter].weight / _norm(layer, adapter, dtype)
    return scale if dtype is None else scale.view(1, -1)


# Elements of W, so that deriving takes 64 MiB at most; on a CPU, what its caches may hold.
_AT_ONCE = {"cpu": 1 << 20}
_AT_ONCE_ELSEWHERE = 1 << 24


def fast_depends_on(layer: Any, adapter: str) -> list[object]:
    """Return what :func:`fast_scale` derives from."""
    return [*depends_on(layer, adapter), bias_of(base_layer(layer))]


@cached("DoRA scale, fast", adapter="adapter", depends_on=fast_depends_on, detach=True)
def fast_scale(layer: Any, adapter: str) -> tuple[Tensor, ...]:
    """Derive ``s`` and, where the base layer has a bias, ``(1 - s) * bias``.

    Returns:
        One or two tensors, float32, or float64 for a float64 base weight; (1, out) for linear
        layers, (out,) for embeddings, (1, out, 1, ...) for convolutions.
    """
    weight = dense(base_layer(layer))
    dtype = torch.float64 if weight.dtype is torch.float64 else torch.float32
    # The meta device has no autocast, and plans are made there.
    as_it_is = weight.is_meta or not any_autocast()
    plain = nullcontext() if as_it_is else torch.autocast(weight.device.type, enabled=False)
    with plain:
        norms = _norms_at_once(layer, adapter, weight)
        if norms is None:
            rows = _rows(layer, adapter, dtype)
            norms = torch.cat([torch.linalg.vector_norm(some, dim=1) for some in rows])
        magnitude = layer.lora_magnitude_vector[adapter].weight.flatten().to(dtype)
        scale = magnitude / norms
        bias = bias_of(base_layer(layer))
        parts = (scale,) if bias is None else (scale, (1 - scale) * bias.to(dtype))
        return tuple(part.view(_shape(layer, adapter, weight)) for part in parts)


STORED: Any = getattr(stored_scale, MARK)
FAST: Any = getattr(fast_scale, MARK)


def _norms_at_once(layer: Any, adapter: str, weight: Tensor) -> Tensor | None:
    """Return the norms of the rows of ``W + g B A`` by one kernel; None where it does not do."""
    if not weight.is_cuda or weight.dim() > 2 or getattr(layer, "fan_in_fan_out", False):  # noqa: PLR2004
        return None
    try:
        scaling, _, a, a_bias, b, b_bias = _plain_parts(layer, adapter)
    except KeyError:
        return None
    if not a_bias is b_bias is None or type(scaling) not in {int, float}:
        return None
    return kernels.norms(weight, a.detach(), b.detach(), scaling)  # type: ignore[attr-defined, arg-type]


def _rows(layer: Any, adapter: str, dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield ``W + g B A`` as a matrix with a row for each output, some rows at a time.

    Added up and not as the sum of ``|W|^2`` and what the factors add to it: that would be fewer
    operations, but where ``g B A`` nearly cancels ``W`` nothing would be left of its precision.
    """
    weight = dense(base_layer(layer))
    if adapter not in layer.lora_A:
        a, b = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
        weight, bias = weight.T, None
    else:
        first, last = layer.lora_A[adapter], layer.lora_B[adapter]
        a, b = first.weight, last.weight
        # PEFT finds B A by sending the identity through both layers, their biases included.
        bias = last.bias if weight.dim() == 2 else None  # noqa: PLR2004
        if first.bias is not None and weight.dim() == 2:  # noqa: PLR2004
            through = b.to(dtype) @ first.bias.to(dtype)
            bias = through if bias is None else through + bias.to(dtype)
        if getattr(layer, "fan_in_fan_out", False):
            weight = weight.T
    rank, scaling = a.shape[0], layer.scaling[adapter]
    a, b = a.reshape(rank, -1).to(dtype), b.reshape(-1, rank).to(dtype) * scaling
    if weight.dim() > 2:  # noqa: PLR2004 - a convolution's: small, and grouped ones mix rows
        yield weight.flatten(1).to(dtype) + (b @ a).reshape(weight.shape).flatten(1)
        return
    b = b.expand(weight.shape[0], rank)  # as addition would
    at_once = _AT_ONCE.get(weight.device.type, _AT_ONCE_ELSEWHERE)
    step = max(1, at_once // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], step):
        rows = slice(start, start + step)
        total = weight[rows].to(dtype, copy=True).addmm_(b[rows], a)
        yield total if bias is None else total.add_(scaling * bias[rows, None].to(dtype))


def _shape(layer: Any, adapter: str, weight: Tensor) -> tuple[int, ...]:
    """Return the shape in which numbers, one for each output, multiply a result."""
    if is_conv(layer):
        return (1, -1, *[1] * (weight.dim() - 2))
    return (1, -1) if adapter in layer.lora_A else (-1,)


def is_conv(layer: Any) -> bool:
    """Whether a LoRA layer is a convolution's."""
    return isinstance(layer, _ConvNd)
