"""LoRA on ``nn.MultiheadAttention``: both projections' weights with the adapters' deltas added.

PEFT merges the adapters into the weights before each forward and takes them out again afterwards.
(It adds the output projection's delta twice: once by itself, once by the ``merge`` of the layer
there. So do the stored weights.)

Adding and subtracting a delta rounds, so PEFT's own forward may move the weights a little. For
equal bits it has to run as long as it does. With one active adapter, the first forward or two move
the weights to where the next ones leave them; from there on the merged weights are the same at each
forward, and those are stored. With several, the weights keep moving, and nothing is.

(``numerics="fast"`` changes none of this: weights that PEFT would move are part of the model.)
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear, MultiheadAttention
from peft.utils.other import transpose
from torch import Tensor, nn

from dora_cache.attributes import SLOT
from dora_cache.core.decorator import cached
from dora_cache.lifecycle import plain_class
from dora_cache.reasons import Reason
from dora_cache.recipes.examples import Base, Example
from dora_cache.recipes.hooks import UnusualError, active_in, own_parameter
from dora_cache.recipes.peft_layers import follow_layer, is_hooked, why_uncached
from dora_cache.recipes.substitutes import (
    Plan,
    Substitute,
    check_cached,
    gate_for,
    is_plain,
    stand_in,
    substituted,
    substituting,
    warmers,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dora_cache.core.engine import Engine

__all__ = ["RECIPE"]


def _parts(layer: Any) -> tuple[Any, Any, Any]:
    """Return the attention module, the layer on its output projection, and what that wraps."""
    base = layer._modules["base_layer"]
    out = base._modules["out_proj"]
    return base, out, out._modules["base_layer"]


def _depends_on(layer: Any, adapter: str) -> Iterator[object]:
    base, out, projection = _parts(layer)
    yield own_parameter(base, "in_proj_weight")
    yield own_parameter(projection, "weight")
    yield out.fan_in_fan_out
    for part in (layer, out):
        modules = part._modules
        yield part.scaling[adapter]
        yield own_parameter(modules["lora_A"]._modules[adapter], "weight")
        yield own_parameter(modules["lora_B"]._modules[adapter], "weight")


@cached("LoRA attention", adapter="adapter", depends_on=_depends_on)
def _merged(layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
    """Derive the merged weights of the input and output projections.

    Raises:
        UnusualError: PEFT's forward would not leave the unmerged weights exactly as they are.
    """
    base, _, projection = _parts(layer)
    in_merged, out_merged, in_left, out_left = _sums(layer, adapter)
    for left, weight in ((in_left, base.in_proj_weight), (out_left, projection.weight)):
        if left.dtype is not weight.dtype or not torch.equal(left, weight):
            msg = "PEFT's forward changes the weights"
            raise UnusualError(msg, Reason.CHANGED)
    return in_merged, out_merged


def _sums(layer: Any, adapter: str) -> tuple[Tensor, ...]:
    """Derive the merged weights, and what PEFT's forward leaves of the unmerged ones."""
    base, out, projection = _parts(layer)
    in_weight, out_weight = base.in_proj_weight, projection.weight
    dtype = out_weight.dtype
    ours = _delta(layer, adapter).to(dtype)
    theirs = _delta(out, adapter, fan_in_fan_out=out.fan_in_fan_out)
    in_merged = in_weight.detach() + ours
    out_merged = out_weight.detach() + theirs.to(dtype)
    out_merged += theirs  # in place: a sum in the wider dtype, rounded once
    in_left = in_merged - ours
    out_left = out_merged - theirs.to(dtype) - theirs.to(dtype)
    return in_merged, out_merged, in_left, out_left


def _delta(layer: Any, adapter: str, *, fan_in_fan_out: bool = False) -> Tensor:
    """Do as ``get_delta_weight`` does, without giving the parameters other memory each time."""
    a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    dtype = b.dtype
    wider = b.device.type == "cpu" and dtype in {torch.float16, torch.bfloat16}
    if wider:
        a, b = a.float(), b.float()
    delta = transpose(b @ a, fan_in_fan_out) * layer.scaling[adapter]
    return delta.to(dtype) if wider else delta


@cached("LoRA attention, compiled", adapter="adapter", depends_on=_depends_on)
def _next(layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
    """Derive what PEFT's next forward would merge, whether or not that moves the weights.

    Compiled code leaves them where they are.
    """
    inputs, outputs, *_ = _sums(layer, adapter)
    return inputs, outputs


def _finish(layer: Any, view: Any) -> None:
    """Give a view what compiled code runs in the attention module's place."""
    holder = layer.__dict__[SLOT].holder
    base, out, projection = _parts(layer)
    followed = out.__dict__.get(SLOT)
    if followed is not None:  # PEFT switches it after the layer
        followed.holder.dependants.add(holder)
    if _adapter(layer) is None:
        msg = "there is no adapter"
        raise UnusualError(msg)
    inner = substituted(projection, {"weight": Substitute(holder, _next, 1)})
    around = substituted(out, {}, {"base_layer": inner})
    stand_in(view, base, {"in_proj_weight": Substitute(holder, _next, 0)}, {"out_proj": around})


def _adapter(layer: Any) -> str | None:
    """Return the active adapter; None if there is none.

    Raises:
        UnusualError: there are several, or something else is unusual.
    """
    base, out, projection = _parts(layer)
    adapters = active_in(layer, "lora_A")
    if not adapters:
        return None
    if len(adapters) > 1:
        msg = "there are several active adapters"
        raise UnusualError(msg, Reason.SEVERAL)
    adapter: str = adapters[0]
    if (
        out.active_adapters != layer.active_adapters
        or out.merged_adapters
        or adapter in out.lora_variant
        or out.lora_bias.get(adapter)
        or adapter not in out._modules["lora_A"]._modules
    ):
        msg = "the output projection has no adapter like this one"
        raise UnusualError(msg)
    if is_hooked(base):  # a hook may write to the weights, as that of pruning does
        msg = "the attention module has hooks"
        raise UnusualError(msg, Reason.HOOKED)
    for module, name in ((base, "in_proj_weight"), (projection, "weight")):
        weight = module._parameters.get(name)
        # After its forward, PEFT's weights do not require gradients.
        if type(weight) is not nn.Parameter or weight.requires_grad or weight.is_meta:
            msg = f"{name!r} is no parameter that requires no gradients"
            raise UnusualError(msg)
    return adapter


def _wants_gradients(layer: Any, adapter: str) -> bool:
    # Not layer.parameters(), with which PEFT makes new parameters of the old ones.
    return torch.is_grad_enabled() and any(
        own_parameter(part._modules[name]._modules[adapter], "weight").requires_grad
        for part in (layer, _parts(layer)[1])
        for name in ("lora_A", "lora_B")
    )


def _plan(layer: Any, kwargs: dict[str, Any]) -> Plan | None:
    plan = Plan()
    if is_plain(layer):
        return plan
    if layer._disable_adapters:
        return None
    check_cached(layer)
    if "adapter_names" in kwargs:
        msg = "adapter_names"
        raise UnusualError(msg, Reason.UNUSUAL_INPUT)
    adapter = _adapter(layer)
    if adapter is None:
        return None
    if _wants_gradients(layer, adapter):
        msg = "a factor requires gradients"
        raise UnusualError(msg, Reason.GRADIENTS)
    merged = _merged(layer, adapter)
    base, _, projection = _parts(layer)
    plan.weights[id(base), "in_proj_weight"], plan.weights[id(projection), "weight"] = merged
    plan.layers.add(id(layer))
    return plan


def _covered(layer: Any, query: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    output, weights = layer.base_layer(query, *args, **kwargs)
    dtype = query.dtype
    return output.to(dtype), None if weights is None else weights.to(dtype)


def _moving(layer: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Run PEFT's own forward, and see whether it has left the weights settled."""
    result = plain_class(type(layer)).forward(layer, query, *args, **kwargs)  # type: ignore[attr-defined]
    binding = layer.__dict__.get(SLOT)
    if not (binding is None or why_uncached(layer, binding)):
        with suppress(UnusualError):
            _plan(layer, kwargs)
    return result


_forward = substituting(_plan, _covered, _moving)


def _restore_weights(self: Any) -> None:
    """Leave registered weights as they are.

    PEFT makes new parameters of them whenever somebody lists the modules. They would count writes
    anew, and what was derived from the old ones could not be told from what would be derived now.
    """
    base, _, projection = _parts(self)
    for module, name in ((base, "in_proj_weight"), (projection, "weight")):
        weight = module._parameters.get(name)
        if type(weight) is not nn.Parameter or weight.requires_grad or weight.grad is not None:
            break
    else:
        return
    plain_class(type(self))._restore_weights(self)  # type: ignore[attr-defined]
    binding = self.__dict__.get(SLOT)
    if binding is not None:
        binding.cache.event(binding)


class _LoraAttention:
    name = "LoRA on attention"
    relies_on = {  # noqa: RUF012
        "peft.tuners.lora.layer:MultiheadAttention.forward": "e983cfc40b6e",
        "peft.tuners.lora.layer:MultiheadAttention.merge": "5bc6bd9fa4f8",
        "peft.tuners.lora.layer:MultiheadAttention.unmerge": "20549783f6c4",
        "peft.tuners.lora.layer:MultiheadAttention.get_delta_weight": "1eabe304189c",
        "peft.tuners.lora.layer:MultiheadAttention.out_proj": "5174fd5b6004",
        "peft.tuners.lora.layer:MultiheadAttention._check_forward_args": "aad8c761c8d7",
        "peft.tuners.lora.layer:MultiheadAttention._restore_weights": "52e1f772c648",
        "peft.tuners.lora.layer:Linear.merge": "7cc32be1e927",
        "peft.tuners.lora.layer:Linear.unmerge": "8f37cd1b2f60",
        "peft.tuners.lora.layer:Linear.get_delta_weight": "1e4648002a64",
    }

    def __init__(self) -> None:
        self.examples = _EXAMPLES

    def applies(self, layer: nn.Module) -> bool:
        return isinstance(layer, MultiheadAttention)

    def apply(self, cache: Engine, layer: Any) -> bool:
        reason = _reason(layer)
        if reason:
            plain = plain_class(type(layer))
            cache.decline(self.name, f"{plain.__module__}.{plain.__qualname__}", reason)
            return False
        overrides = {"forward": _forward, "_restore_weights": _restore_weights}
        binding = follow_layer(cache, layer, self, overrides)
        binding.warmers = partial(warmers, _merged)
        base, _, projection = _parts(layer)
        gate = gate_for(cache, base)
        holder: Any = binding.holder
        holder.finish = _finish
        gate.substitute(base, "in_proj_weight", holder.changed)
        gate.substitute(projection, "weight", holder.changed)
        return True


def _reason(layer: Any) -> str | None:
    """Why a layer cannot be cached."""
    plain = plain_class(type(layer))
    for method in ("forward", "merge", "unmerge", "get_delta_weight"):
        if getattr(plain, method) is not getattr(MultiheadAttention, method):
            return f"its {method}() is not that of PEFT's MultiheadAttention"
    base, out, projection = _parts(layer)
    for method in ("merge", "unmerge", "get_delta_weight"):
        if getattr(plain_class(type(out)), method, None) is not getattr(Linear, method):
            return f"the {method}() of its output projection is not that of PEFT's Linear"
    for module in (base, projection):
        if "base_layer" in module._modules or "parametrizations" in module._modules:
            return "its base layer is adapted or parametrized in another way as well"
    return None


# Examples


class _SelfAttention(nn.Module):
    def __init__(self, inputs: int, _: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(inputs, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return output


_EXAMPLES = (
    Example(
        "LoRA on attention",
        lambda *_: LoraConfig(
            r=4, lora_alpha=9, init_lora_weights=False, target_modules=["attention"]
        ),
        Base(
            "MultiheadAttention",
            _SelfAttention,
            lambda inputs, tokens: torch.randn(1, tokens, inputs),
        ),
    ),
)

RECIPE = _LoraAttention()
