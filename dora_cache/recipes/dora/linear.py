"""The forward of linear layers: bound where it can be, from buffers in compiled code, else PEFT's.

What PEFT's forward and its variant come to with one active DoRA adapter, without the calls in
between.
"""

from __future__ import annotations

import functools
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.nn.functional import linear

from dora_cache.facts import UncheckableError
from dora_cache.decorator import SLOT
from dora_cache.recipes.compiled import noted, view_of
from dora_cache.recipes.dora.bound import bind
from dora_cache.recipes.dora.outputs import exact_sum, fast_sum
from dora_cache.recipes.dora.values import fast_scale, stored_scale
from dora_cache.recipes.dora.variants import CachedVariant, stands_aside
from dora_cache.recipes.fingerprints import fingerprint

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["QUANTIZED", "forward_for"]


QUANTIZED = {
    "peft.tuners.lora.bnb:Linear4bit.forward": "308012f741a7",
    "peft.tuners.lora.bnb:Linear8bitLt.forward": "8c76c37707a1",
    "peft.tuners.lora.hqq:HqqLoraLinear.forward": "d518854abc09",
}
"""Forwards that come to the same as that of ordinary linear layers, with fingerprints."""


def forward_for(kind: type, numerics: str) -> Callable[..., Tensor] | None:
    """Return what stands in for a layer's forward; None if that is not known here.

    Args:
        kind: the layer's class, without observers.
        numerics: as in the settings.
    """
    plain: Any = getattr(kind, "forward", None)
    ordinary = plain is Linear.forward
    if not ordinary:
        path = f"{kind.__module__}:{kind.__qualname__}.forward"
        if QUANTIZED.get(path) != fingerprint(path):
            return None
    return _forward(plain, ordinary=ordinary, fast=numerics == "fast")


@functools.cache
def _forward(plain: Any, *, ordinary: bool, fast: bool) -> Callable[..., Tensor]:
    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor
        if args or kwargs:
            result = plain(self, x, *args, **kwargs)
            return result
        if torch.compiler.is_dynamo_compiling():
            view = view_of(self)
            if view is not None:
                with suppress(UncheckableError):
                    found = _traced(view, x, fast=fast) if ordinary else None
                    result = plain(view, x) if found is None else found
                    return result
            result = plain(self, x)
            return result
        state = self.__dict__  # past nn.Module.__getattr__, which costs more than all the rest
        active = state["_active_adapter"]
        adapter: Any = active if type(active) is str else active[0] if len(active) == 1 else None
        variant = state["lora_variant"].get(adapter)
        if not isinstance(variant, CachedVariant):
            result = plain(self, x)
            return result
        if variant.bound is not None:
            found = variant.bound.run(self, x)
            if found is not None:
                return found
        result = plain(self, x)
        bind(self, adapter, variant)
        return result

    return forward


def is_common(view: Any) -> bool:
    """Whether a layer's view is in the configuration that :func:`_traced` computes."""
    state = view.__dict__
    adapter = state["_active_adapter"]
    if type(adapter) is not str:
        return False
    modules = view._modules
    parts = [modules[name]._modules.get(adapter) for name in ("lora_A", "lora_B")]
    return (
        isinstance(state["lora_variant"].get(adapter), CachedVariant)
        and type(modules["base_layer"]) is nn.Linear
        and all(type(part) is nn.Linear and "weight" in part._parameters for part in parts)
        and parts[0].bias is None
    )


def _traced(view: Any, x: Tensor, *, fast: bool) -> Tensor | None:
    """Compute the output of a layer's view. None if it is not in the common configuration.

    For torch.compile, which guards everything that is looked at here, for each layer and at each
    call: so it is little, and without PEFT's properties and methods, each of which is guarded in
    all base classes.
    """
    if (
        not noted(view.__dict__[SLOT].form)
        or torch.is_grad_enabled()
        or torch.is_autocast_enabled(x.device.type)
    ):
        return None
    state = view.__dict__
    adapter = state["_active_adapter"]
    if stands_aside(view, adapter):
        return None
    modules: Any = view._modules
    base = modules["base_layer"]
    a: Any = modules["lora_A"]._modules[adapter]._parameters
    b: Any = modules["lora_B"]._modules[adapter]._parameters
    dtype = a["weight"].dtype
    result: Tensor = base(x)
    if x.dtype is not dtype:
        x = view._cast_input_dtype(x, dtype)
    delta = linear(linear(x, a["weight"]), b["weight"], b["bias"])
    scaling = state["scaling"][adapter]
    if fast:
        scale, *shift = fast_scale(view, adapter)
        total = fast_sum(result, delta, scale, shift[0] if shift else None, scaling)
    else:
        bias = base._parameters.get("bias")
        total = exact_sum(result, bias, delta, stored_scale(view, adapter, x.dtype), scaling)
    return total.to(result.dtype)
