"""Stand-ins for PEFT's DoRA variants, which use what is stored; and when they may not."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora.dora import DoraEmbeddingLayer, DoraLinearLayer, _DoraConvNdLayer
from peft.tuners.lora.variants import (
    DoraConv1dVariant,
    DoraConv2dVariant,
    DoraConv3dVariant,
    DoraEmbeddingVariant,
    DoraLinearVariant,
)
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from dora_cache.ambient import functorch_stack
from dora_cache.attributes import SLOT
from dora_cache.lifecycle import only_moves, reduce_as_plain
from dora_cache.reasons import Reason
from dora_cache.recipes.dora.outputs import FORWARDS, OFFLOADED
from dora_cache.recipes.dora.values import (
    fast_scale,
    has_offloaded,
    wants_gradient,
)
from dora_cache.recipes.peft_layers import drops, why_training

if TYPE_CHECKING:
    from collections.abc import Callable

    from dora_cache.recipes.dora.bound import Bound

__all__ = [
    "CachedVariant",
    "bake_variant",
    "cached_variant",
    "kind_of",
    "stands_aside",
    "why_unusual",
]


_PARTS = ("lora_A", "lora_B", "lora_magnitude_vector")
_KNOWN_PARTS = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    DoraLinearLayer,
    DoraEmbeddingLayer,
    _DoraConvNdLayer,
)
# As they were on import, so that one that is replaced in its class shows.
_KNOWN_FORWARDS = frozenset(kind.forward for kind in _KNOWN_PARTS)


def kind_of(variant: Any) -> str:
    """Name the arithmetic of a variant class; empty if it is not one known here."""
    for kind, known in (
        ("linear", (DoraLinearVariant,)),
        ("embedding", (DoraEmbeddingVariant,)),
        ("conv", (DoraConv1dVariant, DoraConv2dVariant, DoraConv3dVariant)),
    ):
        if any(variant.forward is base.forward for base in known):
            return kind
    return ""


class CachedVariant:
    """Marks the variants that stand in for PEFT's; they copy and pickle as PEFT's.

    Attributes:
        original: PEFT's.
        bound: the layer as bound to its stored value, where it is a linear one; or None.
        kind: of the arithmetic.
        numerics: likewise.
    """

    kind: str
    numerics: str

    def __init__(self, original: Any) -> None:
        self.original = original
        self.bound: Bound | None = None

    def __reduce_ex__(self, protocol: Any) -> Any:
        return reduce_as_plain(self.original.__reduce_ex__(protocol))


@functools.cache
def cached_variant(plain: Any, numerics: str) -> Any:
    """Return a subclass of a variant's class whose forward uses what is stored."""
    kind = kind_of(plain)
    forward = FORWARDS[numerics, kind]

    def run(
        module: Any,
        active_adapter: str,
        x: Tensor,
        result: Tensor,
        **kwargs: Any,
    ) -> Tensor:
        if torch.compiler.is_dynamo_compiling():
            binding = module.__dict__.get(SLOT)
            if (
                binding is None  # a copy that shares this variant
                or torch.compiler._is_exporting_flag
                or (module.training and binding.reader is None and binding.trains)
                or stands_aside(module, active_adapter)
            ):
                return plain.forward(
                    module, active_adapter=active_adapter, x=x, result=result, **kwargs
                )
            return forward(module, active_adapter, x, result)
        binding = module.__dict__.get(SLOT)
        reason = None
        if binding is not None:
            bypassing = binding.cache.bypassing
            reason = Reason.BYPASS if bypassing else why_unusual(module, active_adapter)
        offloaded = reason is None and binding is not None and has_offloaded(module, active_adapter)
        if offloaded and wants_gradient(module, active_adapter):
            reason = Reason.GRADIENTS
        if reason is not None or binding is None:
            if reason is not None:
                binding.passed_by(reason)
            return plain.forward(
                module, active_adapter=active_adapter, x=x, result=result, **kwargs
            )
        if offloaded:
            return OFFLOADED[numerics](module, active_adapter, x, result)
        return forward(module, active_adapter, x, result)

    namespace = {
        "forward": staticmethod(run),
        "kind": kind,
        "numerics": numerics,
    }
    return type(plain.__name__, (CachedVariant, plain), namespace)


class _BakedVariant:
    """Stands in for a variant of PEFT's in a copy of a layer whose scales are buffers.

    Args:
        kind: of the arithmetic; see :func:`kind_of`.
        names: of the buffers that have what :func:`fast_scale` returns.
    """

    def __init__(self, kind: str, names: list[str]) -> None:
        self._forward: Callable[..., Tensor] = FORWARDS["fast", kind]
        self._names = names

    def forward(
        self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any
    ) -> Tensor:
        """Return the layer's output; by the fewest operations, in float32 where it matters."""
        values = tuple([module._buffers[name] for name in self._names])
        scaling = module.scaling[active_adapter]
        return self._forward(module, active_adapter, x, result, (*values, scaling))


def bake_variant(layer: Any, adapter: str, keep: Callable[[str, Any], list[str]]) -> None:
    """Make an adapter's scale a constant of a copy of its layer."""
    variant = layer.lora_variant.get(adapter)
    kind = "" if variant is None else kind_of(type(variant))
    if kind and why_unusual(layer, adapter) is None:
        names = keep("DoRA scale, fast", fast_scale.__wrapped__(layer, adapter))
        layer.lora_variant[adapter] = _BakedVariant(kind, names)


def stands_aside(layer: Any, adapter: str) -> bool:
    """Whether compiled code has to run PEFT's own: see :func:`why_unusual`."""
    modules = layer._modules
    dropout = modules["lora_dropout"]._modules.get(adapter)
    if dropout is not None and drops(dropout):
        return True
    for name in _PARTS:
        part = modules[name]._modules.get(adapter)
        if part is not None and (
            part._forward_hooks or part._forward_pre_hooks or "forward" in part.__dict__
        ):
            return True
    return False


def why_unusual(layer: Any, adapter: str) -> Reason | None:
    """Return why PEFT's own code has to run, or None.

    In training mode; under vmap and its like, which allow no writes in place; and where what it
    derives or does by calling the adapter's modules may not be what they were made for: with hooks,
    theirs or those of all modules, with a ``forward`` set on one or its class (but for those that
    only move or cast weights), when one is compiled by itself, or with one of another class.
    """
    if layer.training:
        reason = why_training(layer, layer.__dict__[SLOT])
        if reason is not None:
            return reason
        dropout = layer._modules["lora_dropout"]._modules.get(adapter)
        if dropout is not None and drops(dropout):  # of an adapter that is not active
            return Reason.DROPOUT
    if _has_any_global_hook():  # type: ignore[no-untyped-call]
        return Reason.HOOKED
    if functorch_stack() is not None:
        return Reason.TRACED
    modules = layer._modules
    for name in _PARTS:
        part = modules[name]._modules.get(adapter)
        if part is not None:
            state, kind = part.__dict__, part.__class__
            if (
                state["_forward_hooks"]
                or state["_forward_pre_hooks"]
                or part._compiled_call_impl is not None
                or ("forward" in state and not only_moves(part))
            ):
                return Reason.HOOKED
            if (
                getattr(kind, "forward", None) not in _KNOWN_FORWARDS
                or "get_weight_norm" in state
                or "get_lora_weight" in state
            ):
                return Reason.UNUSUAL_PART
    return None
