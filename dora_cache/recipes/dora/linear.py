"""The forward of linear layers with one active DoRA adapter: what most layers do at each token.

What PEFT's forward and its variant come to, without the calls in between.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.nn.functional import linear

from dora_cache.decorator import SLOT
from dora_cache.recipes.compiled import prepare
from dora_cache.recipes.dora.outputs import few_rows, is_just_linear
from dora_cache.recipes.dora.values import same
from dora_cache.recipes.dora.variants import CachedVariant, stands_aside, why_unusual

__all__ = ["forward_exact", "forward_fast"]


def forward_exact(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Return a linear layer's output, bit for bit PEFT's."""
    return _forward(self, x, args, kwargs, fast=False)


def forward_fast(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Return a linear layer's output, with ``numerics="fast"``."""
    return _forward(self, x, args, kwargs, fast=True)


def _forward(
    layer: Any, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], *, fast: bool
) -> Tensor:
    found = None
    if not (args or kwargs):
        run = _traced if torch.compiler.is_dynamo_compiling() else _usual
        found = run(layer, x, fast=fast)
    return Linear.forward(layer, x, *args, **kwargs) if found is None else found


def _traced(layer: Any, x: Tensor, *, fast: bool) -> Tensor | None:
    """Compute the output from what is buffered; None unless all is as it mostly is.

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
        total = (result + delta.to(scale.dtype) * scaling) * scale
        total = total + shift[0] if shift else total
    else:
        plain = result if bias is None else result - bias
        total = result + ((scale - 1) * plain + scale * delta * scaling)
    return total.to(result.dtype)


def _usual(layer: Any, x: Tensor, *, fast: bool) -> Tensor | None:
    """Return the output; None unless all is as it mostly is."""
    state = layer.__dict__  # past nn.Module.__getattr__, which costs more than all the rest
    active = state["_active_adapter"]
    adapter: Any = active if type(active) is str else active[0] if len(active) == 1 else ""
    variant, binding = state["lora_variant"].get(adapter), state.get(SLOT)
    if (
        not isinstance(variant, CachedVariant)
        or binding is None  # detached meanwhile
        or state["_disable_adapters"]
        or state["merged_adapters"]
        or binding.cache.bypassing
        or why_unusual(layer, adapter) is not None
    ):
        return None
    modules = state["_modules"]
    base = modules["base_layer"]
    # Matrix products of three dimensions come down to those of two: once here, not in each.
    flat = (
        type(x) is Tensor
        and x.dim() == 3  # noqa: PLR2004
        and torch._C._get_tracing_state() is None
        and x.is_contiguous()
        and x.numel() > 0
        and not torch.is_grad_enabled()
        and _is_bare(base)
    )
    shape = x.shape
    if flat:
        parameters = base._parameters
        x = x.view(-1, shape[2])
        result: Tensor = linear(x, parameters["weight"], parameters["bias"])
    else:
        result = base(x)
    total = few_rows(layer, adapter, x, result) if fast else None
    if total is None:
        dtype = modules["lora_A"]._modules[adapter].weight.dtype
        if x.dtype is not dtype:
            x = layer._cast_input_dtype(x, dtype)
        total = variant.arithmetic(layer, adapter, x, result, None, result.dtype)
        if total.dtype is not result.dtype:
            total = total.to(result.dtype)
    return total.view(shape[0], shape[1], -1) if flat else total


def _is_bare(base: Any) -> bool:
    """Whether calling a base layer comes to a matrix product with its weight."""
    if not is_just_linear(base):
        return False
    state = base.__dict__
    return (
        type(state["_parameters"]["weight"]) is nn.Parameter
        and not state["_forward_hooks"]
        and not state["_forward_pre_hooks"]
    )
