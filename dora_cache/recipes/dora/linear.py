"""The forward of linear layers: bound where it can be, from buffers in compiled code, else PEFT's.

What PEFT's forward and its variant come to with one active DoRA adapter, without the calls in
between.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.nn.functional import linear

from dora_cache.decorator import SLOT
from dora_cache.recipes.compiled import prepare
from dora_cache.recipes.dora.bound import bind
from dora_cache.recipes.dora.outputs import exact_sum, fast_sum
from dora_cache.recipes.dora.values import same
from dora_cache.recipes.dora.variants import CachedVariant, stands_aside

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["forward_exact", "forward_fast"]


def _forward(*, fast: bool) -> Callable[..., Tensor]:
    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs:
            return Linear.forward(self, x, *args, **kwargs)
        if torch.compiler.is_dynamo_compiling():
            found = _traced(self, x, fast=fast)
            return Linear.forward(self, x) if found is None else found
        state = self.__dict__  # past nn.Module.__getattr__, which costs more than all the rest
        active = state["_active_adapter"]
        adapter: Any = active if type(active) is str else active[0] if len(active) == 1 else None
        variant = state["lora_variant"].get(adapter)
        if not isinstance(variant, CachedVariant):
            return Linear.forward(self, x)
        if variant.bound is not None:
            found = variant.bound.run(self, x)
            if found is not None:
                return found
        result: Tensor = Linear.forward(self, x)
        bind(self, adapter, variant)
        return result

    return forward


forward_exact = _forward(fast=False)
"""Return a linear layer's output, bit for bit PEFT's."""

forward_fast = _forward(fast=True)
"""Return a linear layer's output, with ``numerics="fast"``."""


def _traced(layer: Any, x: Tensor, *, fast: bool) -> Tensor | None:
    """Compute the output from buffers. None if the layer is not in the common configuration.

    For torch.compile, which guards everything that is looked at here, for each layer and at each
    call: so it is little, and without PEFT's properties and methods, each of which is guarded in
    all base classes.
    """
    state = layer.__dict__
    active = state["_active_adapter"]
    if (
        state["_disable_adapters"]
        or state["merged_adapters"]
        or isinstance(active, str)
        or len(active) != 1
        or state.get(SLOT) is None  # a copy that shares the variants
        or torch.compiler._is_exporting_flag
        or torch.is_grad_enabled()
        or torch.is_autocast_enabled(x.device.type)
    ):
        return None
    adapter = active[0]
    variant = state["lora_variant"].get(adapter)
    # By this way alone: that two ways lead to one object, Dynamo guards in Python.
    modules: Any = layer._modules
    base = modules["base_layer"]
    if (
        not isinstance(variant, CachedVariant)
        or type(base) is not nn.Linear
        or stands_aside(layer, adapter)
    ):
        return None
    lora_a = modules["lora_A"]._modules[adapter]
    lora_b = modules["lora_B"]._modules[adapter]
    if type(lora_a) is not nn.Linear or type(lora_b) is not nn.Linear:
        return None
    a: Any = lora_a._parameters
    b: Any = lora_b._parameters
    weight, bias = base._parameters.get("weight"), base._parameters.get("bias")
    if "weight" not in a or "weight" not in b:  # pruned, for example
        return None
    buffer = variant.buffer
    prepare(buffer.cache, adapter)
    values = buffer.values
    magnitude = modules["lora_magnitude_vector"]._modules[adapter]._parameters["weight"]
    parameters = (magnitude, a["weight"], b["weight"], b["bias"], weight, bias)
    if values is None or a["bias"] is not None or not same(buffer.parameters, parameters):
        return None
    result: Tensor = base(x)
    if x.dtype is not a["weight"].dtype:
        x = layer._cast_input_dtype(x, a["weight"].dtype)
    delta = linear(linear(x, a["weight"]), b["weight"], b["bias"])
    scale, *shift, scaling = values
    if fast:
        total = fast_sum(result, delta, scale, shift[0] if shift else None, scaling)
    else:
        total = exact_sum(result, bias, delta, scale, scaling)
    return total.to(result.dtype)
