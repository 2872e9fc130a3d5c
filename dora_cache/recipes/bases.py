"""What a recipe may take for granted about the layer that an adapter is on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dora_cache.attributes import SLOT
from dora_cache.lifecycle import is_bare
from dora_cache.reasons import Reason
from dora_cache.recipes.hooks import UnusualError
from dora_cache.recipes.peft_layers import base_layer, is_hooked

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "ON_QUANTIZED",
    "dense_base",
    "foldable",
    "replaceable",
    "require_dense",
    "when_dense",
]

ON_QUANTIZED = "its base is quantized, and the weight to store would be many times as large"
"""Why a layer of a class for quantized weights is not cached."""

_FORWARDS = {kind: kind.forward for kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)}


def dense_base(layer: nn.Module) -> Any:
    """Return the innermost base layer if its weight is an ordinary parameter, else None.

    A weight that is quantized, sharded or computed by a parametrization is left to PEFT.
    """
    base = base_layer(layer)
    if type(base._parameters.get("weight")) is nn.Parameter:
        return base
    # An exporter has put a tensor of its own in the parameter's place.
    return base if getattr(layer.__dict__.get(SLOT), "dense", False) else None


def require_dense(layer: nn.Module) -> Any:
    """Return the :func:`dense_base` of a layer.

    Raises:
        UnusualError: its weight is quantized, sharded or computed.
    """
    base = dense_base(layer)
    if base is None:
        inner = base_layer(layer)
        weight = inner._parameters.get("weight", inner._parameters.get("W_q"))
        msg = f"the weight of {type(inner).__name__} is no ordinary parameter"
        raise UnusualError(msg, Reason.UNUSUAL_PART if weight is None else Reason.QUANTIZED)
    return base


def replaceable(layer: nn.Module) -> bool:
    """Whether the base layer is PyTorch's own and nobody would notice if it did not run."""
    base: Any = layer._modules.get("base_layer")
    known = _FORWARDS.get(type(base))
    if known is None:
        return False
    state = base.__dict__
    return not (
        is_hooked(base)
        or not is_bare(base)
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or base._compiled_call_impl
        or type(base).forward is not known
        or state.get("padding_mode", "zeros") != "zeros"
    )


def when_dense(warm: Callable[[Any, str], object]) -> Callable[[Any, str], object]:
    """Return a hook's ``warm`` that does nothing for layers that have no :func:`dense_base`."""

    def checked(layer: Any, adapter: str) -> object:
        return None if dense_base(layer) is None else warm(layer, adapter)

    return checked


def foldable(layer: nn.Module, x: Tensor | None, *parameters: Tensor) -> bool:
    """Whether what an adapter adds may be kept as one tensor with the base weight.

    In less than float32, or in less than what the adapter has, the sum would lose what the adapter
    adds: PEFT adds it to the output, which is rounded only once.

    Args:
        layer: the layer.
        x: its input; None to ask for one of the weight's dtype, without autocast.
        parameters: what the adapter's part is derived from.
    """
    if dense_base(layer) is None or not replaceable(layer):
        return False
    dtype = base_layer(layer)._parameters["weight"].dtype  # type: ignore[union-attr]
    if dtype not in {torch.float32, torch.float64}:
        return False
    if x is not None and (
        not isinstance(x, Tensor) or x.dtype != dtype or torch.is_autocast_enabled(x.device.type)
    ):
        return False
    return all(parameter.dtype == dtype for parameter in parameters)
