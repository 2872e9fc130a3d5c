"""LoRA on bare parameters (``target_parameters``): the parameter with the adapters' deltas added.

PEFT registers a parametrization on the base module for the time of each forward, and adds the
(dense) delta when the module reads the parameter. Here the sum is stored, and the module reads it
in the parameter's place. Wrappers of several parameters of one module are nested; the outermost one
decides for all of them.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import ParamWrapper, _LoraFactorsProxy, _LoraParameterProxy
from peft.utils import ALLOWED_COMPUTE_DTYPES
from torch import Tensor, nn

from dora_cache.attributes import SLOT
from dora_cache.core.decorator import cached, derivations_of
from dora_cache.lifecycle import plain_class
from dora_cache.reasons import Reason
from dora_cache.recipes.examples import Base, Example
from dora_cache.recipes.hooks import UnusualError, active_in, own_parameter
from dora_cache.recipes.peft_layers import base_layer, follow_layer, wants_gradients
from dora_cache.recipes.substitutes import (
    Plan,
    Substitute,
    check_cached,
    gate_for,
    is_plain,
    stand_in,
    substituting,
    warmers,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dora_cache.core.engine import Engine

__all__ = ["RECIPE"]


def _depends_on(layer: Any, *adapters: str) -> Iterator[object]:
    modules = layer._modules
    yield own_parameter(base_layer(layer), layer.parameter_name)
    yield layer.num_experts
    yield layer._did_swap_in_out_features
    yield layer.fan_in_fan_out
    for adapter in adapters:
        yield layer.scaling[adapter]
        yield own_parameter(modules["lora_A"]._modules[adapter], "weight")
        yield own_parameter(modules["lora_B"]._modules[adapter], "weight")


@cached("LoRA parameter", adapter="adapters", depends_on=_depends_on)
def _weight(layer: Any, *adapters: str) -> Tensor:
    """Derive the parameter with the deltas of these adapters.

    Raises:
        UnusualError: PEFT would refuse to.
    """
    weight: Any = base_layer(layer)._parameters[layer.parameter_name]
    proxy: nn.Module
    if len(adapters) == 1 and layer.num_experts > 1:
        proxy = _LoraFactorsProxy(*layer.get_delta_factors(adapters[0]))
    else:
        first, *others = adapters
        delta = layer.get_delta_weight(first)
        for adapter in others:
            delta = delta + layer.get_delta_weight(adapter)
        proxy = _LoraParameterProxy(delta)
    found: Tensor = proxy(weight)
    if found.dtype is not weight.dtype or found.shape != weight.shape:
        msg = "a parametrization may change neither dtype nor shape"
        raise UnusualError(msg)
    return found


def _plan(outermost: Any, kwargs: dict[str, Any]) -> Plan | None:
    if "adapter_names" in kwargs:
        msg = "adapter_names"
        raise UnusualError(msg, Reason.UNUSUAL_INPUT)
    base = base_layer(outermost)
    state = base.__dict__
    plan = Plan()
    unmerges = False
    layer = outermost
    while layer is not base:
        if not isinstance(layer, ParamWrapper):
            msg = f"a {type(layer).__name__} wraps the module as well"
            raise UnusualError(msg)
        if layer._disable_adapters and layer.merged_adapters:
            unmerges = True
        elif not is_plain(layer) and (adapters := active_in(layer, "lora_A")):
            check_cached(layer)
            if not plan.layers and wants_gradients(outermost):
                msg = "a parameter requires gradients"
                raise UnusualError(msg, Reason.GRADIENTS)
            name = layer.parameter_name
            place = (id(base), name)
            parameter = state["_parameters"].get(name)
            if (
                not _is_usual(parameter)
                or place in plan.weights
                or "parametrizations" in state["_modules"]
            ):
                msg = f"{name!r} is no plain parameter of the module, or has two adapters"
                raise UnusualError(msg)
            plan.weights[place] = _weight(layer, *adapters)
            plan.layers.add(id(layer))
        layer = layer._modules["base_layer"]
    return None if unmerges else plan  # which changes the weights


def _is_usual(parameter: Tensor | None) -> bool:
    return (
        type(parameter) is nn.Parameter
        and parameter.dtype in ALLOWED_COMPUTE_DTYPES
        and not parameter.is_meta
    )


def _covered(layer: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    return layer.base_layer(x, *args, **kwargs)


def _finish(outermost: Any, view: Any) -> None:
    """Give a view what compiled code runs in the base module's place."""
    base = base_layer(outermost)
    substitutes = {}
    layer = outermost
    while layer is not base:
        substitutes[layer.parameter_name] = Substitute(layer.__dict__[SLOT].holder, _weight)
        layer = layer._modules["base_layer"]
    stand_in(view, base, substitutes)


_forward = substituting(_plan, _covered)


class _LoraParameters:
    name = "LoRA on parameters"
    relies_on = {  # noqa: RUF012
        "peft.tuners.lora.layer:ParamWrapper.forward": "26bdbcd6915f",
        "peft.tuners.lora.layer:ParamWrapper.get_param": "0adf914e400a",
        "peft.tuners.lora.layer:ParamWrapper.get_delta_factors": "ed5243627e46",
        "peft.tuners.lora.layer:ParamWrapper.get_delta_weight": "a02d137b1137",
        "peft.tuners.lora.layer:ParamWrapper._activate_lora": "31aae5aeb40d",
        "peft.tuners.lora.layer:ParamWrapper._remove_parametrizations": "088800aaa7a7",
        "peft.tuners.lora.layer:ParamWrapper._check_forward_args": "843da84e4699",
        "peft.tuners.lora.layer:_LoraParameterProxy.forward": "2dafc3a23171",
        "peft.tuners.lora.layer:_LoraParameterProxy._low_prec_add": "8c414f52db1b",
        "peft.tuners.lora.layer:_LoraFactorsProxy.forward": "7e421ad30fe9",
        "peft.tuners.lora.layer:Linear.get_delta_weight": "1e4648002a64",
        "peft.tuners.lora.layer:LoraLayer._check_forward_args": "36f3f6060292",
    }

    def __init__(self) -> None:
        self.examples = _EXAMPLES

    def applies(self, layer: nn.Module) -> bool:
        return isinstance(layer, ParamWrapper)

    def apply(self, cache: Engine, layer: Any) -> bool:
        base = base_layer(layer)
        reason = _reason(layer, base)
        if reason:
            plain = plain_class(type(layer))
            cache.decline(self.name, f"{plain.__module__}.{plain.__qualname__}", reason)
            return False
        binding = follow_layer(cache, layer, self, {"forward": _forward})
        binding.warmers = partial(warmers, _weight)
        holder: Any = binding.holder
        holder.finish = _finish
        gate_for(cache, base).substitute(base, layer.parameter_name, holder.changed)
        return True


def _reason(layer: Any, base: nn.Module) -> str | None:
    """Why a wrapper cannot be cached."""
    plain, name = plain_class(type(layer)), layer.parameter_name
    for method in ("forward", "_activate_lora", "get_delta_weight", "get_delta_factors"):
        if getattr(plain, method) is not getattr(ParamWrapper, method):
            return f"its {method}() is not that of PEFT's ParamWrapper"
    inner = layer
    while inner is not base:
        if not isinstance(inner, ParamWrapper):
            return f"the module has an adapter of another kind as well, a {type(inner).__name__}"
        inner = inner._modules["base_layer"]
    parameter = base._parameters.get(name)
    # Under FSDP2 a DTensor stands for a plain one between forwards.
    known = type(parameter) is nn.Parameter or type(parameter).__name__ == "DTensor"
    if "parametrizations" in base._modules or not known:
        return f"{name!r} is no plain parameter of the module"
    if parameter.dtype not in ALLOWED_COMPUTE_DTYPES:
        return f"PEFT adds to a {parameter.dtype} parameter in another precision"
    if derivations_of(type(base)) or hasattr(plain_class(type(base)), name):
        return f"the module's class does something of its own with {name!r}"
    return None


# Examples


class _Experts(nn.Module):
    """Experts whose weights are stacked, (experts, in, out), and averaged."""

    is_transposed = True

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, inputs, outputs) / inputs**0.5)
        self.down = nn.Parameter(torch.randn(4, outputs, inputs) / outputs**0.5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(x[:, None] @ self.up)
        return (hidden @ self.down).mean(1)


class _TransposedExperts(nn.Module):
    """One layer of experts, whose weights are stacked as (experts, out, in)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, outputs, inputs) / inputs**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return (x[:, None] @ self.weight.mT).mean(1)


def _sample(inputs: int, tokens: int) -> Tensor:
    return torch.randn(1, tokens, inputs)


def _targeting(*parameters: str) -> Any:
    def config(*_: int) -> LoraConfig:
        return LoraConfig(
            r=4,
            lora_alpha=9,
            init_lora_weights=False,
            target_modules=[],
            target_parameters=list(parameters),
        )

    return config


_EXAMPLES = (
    Example("LoRA on parameters", _targeting("layer.weight", "back.weight")),
    Example(
        "LoRA on parameters, two of stacked experts",
        _targeting("layer.up", "layer.down"),
        Base("experts", _Experts, _sample),
    ),
    Example(
        "LoRA on parameters, transposed experts",
        _targeting("layer.weight"),
        Base("transposed experts", _TransposedExperts, _sample),
    ),
)

RECIPE = _LoraParameters()
