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

from dora_cache.core.facts import UncheckableError
from dora_cache.recipes.compiled import face_of, noted
from dora_cache.recipes.dora.bound import bind
from dora_cache.recipes.dora.outputs import exact_sum, fast_sum
from dora_cache.recipes.dora.values import FAST, STORED
from dora_cache.recipes.dora.variants import CachedVariant, stands_aside
from dora_cache.recipes.fingerprints import fingerprint
from dora_cache.recipes.views import ACTIVE

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
            face = face_of(self)
            if face is not None:
                with suppress(UncheckableError):
                    found = _traced(face, x, fast=fast) if ordinary else None
                    result = plain(face.__dict__["view"], x) if found is None else found
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


def remark(view: Any) -> tuple[bool, dict[str, object]]:
    """Return whether :func:`_traced` computes a layer's view, and what it reads of it."""
    state, modules = view.__dict__, view._modules
    adapter = state["_active_adapter"]
    if type(adapter) is not str or not isinstance(
        state["lora_variant"].get(adapter), CachedVariant
    ):
        return False, {}
    a, b = (modules[name]._modules[adapter] for name in ("lora_A", "lora_B"))
    if (
        type(modules["base_layer"]) is not nn.Linear
        or not all(type(part) is nn.Linear and "weight" in part._parameters for part in (a, b))
        or a.bias is not None
        or stands_aside(view, adapter)
    ):
        return False, {}
    scaling = state["scaling"][adapter]
    parts = {"a": a.weight, "b": b.weight, "bias": b.bias, "base": modules["base_layer"]}
    return True, {**parts, "scaling": scaling}


def _traced(face: Any, x: Tensor, *, fast: bool) -> Tensor | None:
    """Compute the output of a layer's view. None if it is not in the common configuration.

    For torch.compile, which guards everything that is looked at here, for each layer and at each
    call: so it is little, and without PEFT's properties and methods, each of which is guarded in
    all base classes.
    """
    if not noted(face.form) or torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
        return None
    base, a, scaling = face.base, face.a, face.scaling
    result: Tensor = base(x)
    if x.dtype is not a.dtype:
        x = face.__dict__["view"]._cast_input_dtype(x, a.dtype)
    delta = linear(linear(x, a), face.b, face.bias)
    if fast:
        scale, *shift = face.value(FAST, ACTIVE)
        total = fast_sum(result, delta, scale, shift[0] if shift else None, scaling)
    else:
        scale = face.value(STORED, ACTIVE, x.dtype)
        total = exact_sum(result, base._parameters.get("bias"), delta, scale, scaling)
    return total.to(result.dtype)
