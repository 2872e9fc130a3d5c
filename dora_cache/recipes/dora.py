"""DoRA (https://arxiv.org/abs/2402.09353), on linear, embedding and convolution layers.

A layer computes ``y = s * (W x + g B A x) + bias`` with ``s = m / ||W + g B A||``, one number for
each output. ``s`` depends on weights alone. It is what is stored; neither ``W`` nor ``B A`` is
touched again until one of them changes.
"""

from __future__ import annotations

import functools
import weakref
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig
from peft.tuners.lora.dora import DoraEmbeddingLayer, DoraLinearLayer, _DoraConvNdLayer
from peft.tuners.lora.layer import Linear, LoraLayer, _ConvNd
from peft.tuners.lora.variants import (
    DoraConv1dVariant,
    DoraConv2dVariant,
    DoraConv3dVariant,
    DoraEmbeddingVariant,
    DoraLinearVariant,
)
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.modules.module import _has_any_global_hook

from dora_cache.decorator import MARK, SLOT, cached
from dora_cache.lifecycle import reduce_as_plain
from dora_cache.recipes import kernels
from dora_cache.recipes.compiled import Buffer, prepare
from dora_cache.recipes.examples import BOTH, TARGETS, Example, conv2d, embedding
from dora_cache.recipes.peft_layers import base_layer, follow_layer, weights_of
from dora_cache.stamps import functorch_stack

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dora_cache.binding import Binding
    from dora_cache.cache import AdapterCache

Buffers = tuple[Tensor, ...]

__all__ = ["RECIPE"]


def _config(*_: int) -> LoraConfig:
    return LoraConfig(
        use_dora=True, r=8, lora_alpha=9, init_lora_weights=False, target_modules=TARGETS
    )


class _Dora:
    name = "DoRA"
    relies_on = {  # noqa: RUF012
        "peft.tuners.lora.layer:Linear.forward": "f3f969ac2a1b",
        "peft.tuners.lora.layer:Embedding.forward": "2188d6137662",
        "peft.tuners.lora.layer:_ConvNd.forward": "b00b0df02b43",
        "peft.tuners.lora.variants:DoraLinearVariant.forward": "b265a95426ad",
        "peft.tuners.lora.variants:DoraEmbeddingVariant.forward": "0eaa6f3ee09d",
        "peft.tuners.lora.variants:_DoraConvNdVariant.forward": "d5f618c5646e",
        "peft.tuners.lora.dora:DoraLinearLayer.get_lora_weight": "4b3ce9b3b3f5",
        "peft.tuners.lora.dora:DoraLinearLayer.get_weight_norm": "5263d6dbbd1d",
        "peft.tuners.lora.dora:DoraLinearLayer.forward": "e80db4e33df6",
        "peft.tuners.lora.dora:DoraEmbeddingLayer.get_lora_weight": "f1cfd267af6d",
        "peft.tuners.lora.dora:DoraEmbeddingLayer.forward": "d984279e3e09",
        "peft.tuners.lora.dora:_DoraConvNdLayer.get_lora_weight": "7c4e65ce5733",
        "peft.tuners.lora.dora:_DoraConvNdLayer.get_weight_norm": "954cd87c97e1",
        "peft.tuners.lora.dora:_DoraConvNdLayer.forward": "916cc471779a",
    }
    examples = (
        Example("DoRA", _config, numerics=BOTH),
        Example("DoRA, Embedding", _config, embedding, numerics=BOTH),
        Example("DoRA, Conv2d", _config, conv2d, numerics=BOTH),
    )

    def applies(self, layer: nn.Module) -> bool:
        return isinstance(layer, LoraLayer)

    def apply(self, cache: AdapterCache, layer: Any) -> bool:
        known = {
            adapter: variant
            for adapter, variant in layer.lora_variant.items()
            if isinstance(variant, _CachedVariant) or _kind(type(variant))
        }
        if not known:
            return False
        usual = type(layer).forward is Linear.forward
        forward = _forward_fast if cache.config.numerics == "fast" else _forward_exact
        binding = follow_layer(cache, layer, self, {"forward": forward} if usual else None)
        if binding.warmers is None:
            binding.warmers = _warmers
            binding.undo.callback(_restore, weakref.ref(layer))
        for adapter, variant in known.items():
            if not isinstance(variant, _CachedVariant):
                plain: Any = type(variant)
                stand_in = _cached_variant(plain, cache.config.numerics)
                layer.lora_variant[adapter] = stand_in(variant, binding, adapter)
        return True


RECIPE = _Dora()

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


def _kind(variant: Any) -> str:
    """Name the arithmetic of a variant class; empty if it is not one known here."""
    for kind, known in (
        ("linear", (DoraLinearVariant,)),
        ("embedding", (DoraEmbeddingVariant,)),
        ("conv", (DoraConv1dVariant, DoraConv2dVariant, DoraConv3dVariant)),
    ):
        if any(variant.forward is base.forward for base in known):
            return kind
    return ""


class _CachedVariant:
    """Marks the variants that stand in for PEFT's; they copy and pickle as PEFT's."""

    kind: str
    numerics: str
    arithmetic: Callable[..., Tensor]

    def __init__(self, original: Any, binding: Binding, adapter: str) -> None:
        self.original = original
        fast = self.numerics == "fast"
        self.buffer = Buffer(
            binding,
            adapter,
            partial(_fast_depends_on if fast else _depends_on, adapter=adapter),
            partial(_buffered_fast if fast else _buffered, kind=self.kind, adapter=adapter),
            partial(_parameters, adapter=adapter),
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        return reduce_as_plain(self.original.__reduce_ex__(protocol))


@functools.cache
def _cached_variant(plain: Any, numerics: str) -> Any:
    """Return a subclass of a variant's class whose forward uses what is stored."""
    kind = _kind(plain)
    forward = _FORWARDS[numerics, kind]
    readable = _readable if numerics == "fast" else _as_derived

    def run(
        module: Any,
        active_adapter: str,
        x: Tensor,
        result: Tensor,
        **kwargs: Any,
    ) -> Tensor:
        if torch.compiler.is_compiling():
            if (
                module.__dict__.get(SLOT) is None  # a copy that shares this variant
                or torch.compiler._is_exporting_flag  # torch 2.11 takes is_exporting() for True
                or _stands_aside(module, active_adapter)
            ):
                return plain.forward(
                    module, active_adapter=active_adapter, x=x, result=result, **kwargs
                )
            buffers = None
            if readable(module, active_adapter, x):
                buffer = module.lora_variant[active_adapter].buffer
                prepare(buffer.cache, active_adapter)
                if buffer.values is not None and _same(
                    buffer.parameters, _parameters(module, active_adapter)
                ):
                    buffers = buffer.values
            return forward(module, active_adapter, x, result, buffers)
        binding = module.__dict__.get(SLOT)
        if binding is None or binding.cache.bypassing or _is_unusual(module, active_adapter):
            if binding is not None:
                binding.cache.passed_by()
            return plain.forward(
                module, active_adapter=active_adapter, x=x, result=result, **kwargs
            )
        return forward(module, active_adapter, x, result)

    namespace = {
        "forward": staticmethod(run),
        "arithmetic": staticmethod(forward),
        "kind": kind,
        "numerics": numerics,
    }
    return type(plain.__name__, (_CachedVariant, plain), namespace)


def _stands_aside(layer: Any, adapter: str) -> bool:
    """Whether compiled code has to run PEFT's own: see :func:`_is_unusual`."""
    if layer.training:
        return True
    modules = layer._modules
    for name in _PARTS:
        part = modules[name]._modules.get(adapter)
        if part is not None and (part._forward_hooks or part._forward_pre_hooks):
            return True
    return False


def _is_unusual(layer: Any, adapter: str) -> bool:
    """Whether PEFT's own code has to run.

    In training mode; under vmap and its like, which allow no writes in place; and where what it
    derives or does by calling the adapter's modules may not be what they were made for: with hooks,
    theirs or those of all modules, with a ``forward`` set on one, or with one of another class.
    """
    if layer.training or _has_any_global_hook() or functorch_stack() is not None:  # type: ignore[no-untyped-call]
        return True
    modules = layer._modules
    for name in _PARTS:
        part = modules[name]._modules.get(adapter)
        if part is not None:
            state, kind = part.__dict__, part.__class__
            if (
                state["_forward_hooks"]
                or state["_forward_pre_hooks"]
                or "forward" in state
                or not _is_known(kind)
            ):
                return True
    return False


@functools.cache
def _is_known(kind: Any) -> bool:
    """Whether modules of a class do what PEFT's do; subclasses that change nothing are fine."""
    forward: Any = getattr(kind, "forward", None)
    return any(forward is known.forward for known in _KNOWN_PARTS)


def _forward_exact(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Run the one active DoRA adapter of a linear layer, as PEFT's forward would, only sooner.

    Whatever is not that usual case is left to PEFT's forward.
    """
    found = None
    if not (args or kwargs):
        if torch.compiler.is_dynamo_compiling():
            found = _traced(self, x, fast=False)
        else:
            found = _usual(self, x, fast=False)
    return Linear.forward(self, x, *args, **kwargs) if found is None else found


def _forward_fast(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Likewise with ``numerics="fast"``."""
    found = None
    if not (args or kwargs):
        if torch.compiler.is_dynamo_compiling():
            found = _traced(self, x, fast=True)
        else:
            found = _usual(self, x, fast=True)
    return Linear.forward(self, x, *args, **kwargs) if found is None else found


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
        not isinstance(variant, _CachedVariant)
        or type(base) is not nn.Linear
        or _stands_aside(layer, adapter)
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
    if values is None or a["bias"] is not None or not _same(buffer.parameters, parameters):
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
        not isinstance(variant, _CachedVariant)
        or binding is None  # detached meanwhile
        or state["_disable_adapters"]
        or state["merged_adapters"]
        or binding.cache.bypassing
        or _is_unusual(layer, adapter)
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
    total = _few_rows(layer, adapter, x, result) if fast else None
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
    if not _is_just_linear(base):
        return False
    state = base.__dict__
    return (
        type(state["_parameters"]["weight"]) is nn.Parameter
        and not state["_forward_hooks"]
        and not state["_forward_pre_hooks"]
    )


def _restore(layer: weakref.ref[Any]) -> None:
    living = layer()
    variants = {} if living is None else living.lora_variant
    for adapter, variant in variants.items():
        if isinstance(variant, _CachedVariant):
            variants[adapter] = variant.original


# What is derived


def _plain_parts(layer: Any, adapter: str) -> tuple[object, ...]:
    """Return the scaling and an adapter's parameters, straight from the dictionaries.

    It runs at every hit, and ``nn.Module.__getattr__`` would cost more than all the rest.

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


def _depends_on(layer: Any, adapter: str, dtype: torch.dtype | None = None) -> list[object]:  # noqa: ARG001
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


def _bias(module: nn.Module) -> Any:
    parameters = module._parameters
    return parameters["bias"] if "bias" in parameters else getattr(module, "bias", None)


def _dense(base: Any) -> Any:
    """Return the weight of a base layer, dequantized; torch.compile can follow it if it is plain.

    Detached, since it only goes into constants: PEFT's transpose() makes a Parameter of a
    Parameter, which torch.compile cannot follow.
    """
    weight = base._parameters.get("weight")
    plain = type(weight) is nn.Parameter and not hasattr(base, "W_q")  # HQQ has a stub
    return weight.detach() if plain else dequantize_module_weight(base)


@cached("DoRA norm", adapter="adapter", depends_on=_depends_on, detach=True)
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
        weight = _dense(base).to(dtype)
    norm: Tensor = dora.get_weight_norm(
        weight=weight, lora_weight=delta.detach(), scaling=layer.scaling[adapter]
    )
    return norm.detach()


@cached("DoRA scale", adapter="adapter", depends_on=_depends_on, detach=True)
def _stored_scale(layer: Any, adapter: str, dtype: torch.dtype | None = None) -> Tensor:
    """Derive ``s = m / ||W + g B A||``; (1, out) for linear layers, else the norm's shape."""
    norm = _norm.__wrapped__(layer, adapter, dtype)
    scale: Tensor = layer.lora_magnitude_vector[adapter].weight / norm
    return scale if dtype is None else scale.view(1, -1)


def _at_hand(layer: Any, derived: Any, adapter: str, dtype: torch.dtype | None = None) -> Any:
    """Return what ``derived(layer, adapter, dtype)`` got last time, if it would get it again.

    The way to a hit that most layers take at each token, without the calls in between. Only from
    where it is known that the cache is not bypassed and that nothing is unusual.

    Returns:
        The value; None where it has to be asked for.
    """
    binding = layer.__dict__.get(SLOT)
    if binding is None:  # detached meanwhile
        return None
    call = (derived.number, adapter) if dtype is None else (derived.number, adapter, dtype)
    shortcut = binding.shortcuts.get(call)
    if shortcut is None or binding._owner() is not layer:
        return None
    try:
        base = layer._modules["base_layer"]._parameters
        parts = (*_plain_parts(layer, adapter), base["weight"])
        if dtype is None:
            parts = (*parts, base["bias"])
    except KeyError:
        return None
    entry = binding.cache.recall(shortcut, parts)
    return None if entry is None else entry.value


def _wants_gradient(layer: Any, adapter: str) -> bool:
    return torch.is_grad_enabled() and layer.lora_magnitude_vector[adapter].weight.requires_grad


def _scale(layer: Any, adapter: str, dtype: torch.dtype | None = None) -> Tensor:
    """Return ``s``. The norm is a constant to autograd; the magnitude's gradient must flow."""
    if not _wants_gradient(layer, adapter):
        found = None
        if not (dtype is None or torch.compiler.is_dynamo_compiling()):
            found = _at_hand(layer, _STORED, adapter, dtype)
        return _stored_scale(layer, adapter, dtype) if found is None else found
    scale: Tensor = layer.lora_magnitude_vector[adapter].weight / _norm(layer, adapter, dtype)
    return scale if dtype is None else scale.view(1, -1)


# How it is used: the operations of PEFT's forward, in PEFT's order, for the same bits. Compiled
# code gets s and g from buffers, as tensors. (Not s and g s: then the bits would be others.)


def _linear(
    layer: Any,
    adapter: str,
    x: Tensor,
    result: Tensor,
    buffers: Buffers | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the layer's output; in ``dtype``, if that costs nothing."""
    if buffers is None:
        scale, scaling = _scale(layer, adapter, x.dtype), layer.scaling[adapter]
    else:
        scale, scaling = buffers
    delta = _projected(layer, adapter, x)
    bias = _bias(base_layer(layer))
    if buffers is None and _fusible(result, delta, scaling):
        fused = kernels.combine(result, delta, scale, bias, scaling, dtype)
        if fused is not None:
            return fused
    base = result if bias is None else result - bias
    return _sum(layer, adapter, result, base, delta, scale, scaling)


def _conv(
    layer: Any, adapter: str, x: Tensor, result: Tensor, buffers: Buffers | None = None
) -> Tensor:
    if buffers is None:
        scale, scaling = _scale(layer, adapter), layer.scaling[adapter]
    else:
        scale, scaling = buffers
    bias = _bias(base_layer(layer))
    base = result
    if bias is not None:
        base = result - bias.view(1, -1, *[1] * (result.dim() - 2))
    delta = _projected(layer, adapter, x)
    return _sum(layer, adapter, result, base, delta, scale, scaling)


def _fusible(result: Tensor, delta: Tensor, scaling: Any) -> bool:
    """Whether a kernel may do what follows the matrix products."""
    return (
        result.is_cuda
        and not torch.is_grad_enabled()
        and type(scaling) in {int, float}
        and kernels.usable(result, delta)
    )


def _sum(
    layer: Any,
    adapter: str,
    result: Tensor,
    base: Tensor,
    delta: Tensor,
    scale: Tensor,
    scaling: Any,
) -> Tensor:
    """Return ``result + ((s - 1) base + s delta g)``, with each operation's own rounding.

    In place where nobody else can see it: that takes fewer allocations, and the same bits.
    """
    changed = (scale - 1) * base
    if (
        torch.compiler.is_dynamo_compiling()
        or torch.is_grad_enabled()
        or not (changed.dtype is delta.dtype is scale.dtype and changed.dim() == delta.dim())
        or type(layer._modules["lora_B"]._modules[adapter]) not in _MAKES_NEW
    ):
        return result + (changed + scale * delta * scaling)
    delta.mul_(scale)
    if type(scaling) is not float or scaling != 1.0:
        delta.mul_(scaling)
    return changed.add_(delta).add_(result)


_MAKES_NEW = frozenset({nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d})
"""Modules whose result is a tensor of its own."""


def _embedding(
    layer: Any, adapter: str, x: Tensor, result: Tensor, buffers: Buffers | None = None
) -> Tensor:
    if buffers is None:
        scale, scaling = _scale(layer, adapter), layer.scaling[adapter]
    else:
        scale, scaling = buffers
    delta = scale * _embedded(layer, adapter, x) * scaling
    embed_scale = layer._get_embed_scale()
    if embed_scale is not None:
        delta = delta * embed_scale.to(delta.dtype)
    return scale * result + delta


def _projected(layer: Any, adapter: str, x: Tensor) -> Tensor:
    modules = layer._modules
    lora_a, lora_b = modules["lora_A"]._modules[adapter], modules["lora_B"]._modules[adapter]
    if _is_just_linear(lora_a) and _is_just_linear(lora_b):
        # What calling the modules comes to, at half its cost; hooks are checked before.
        a, b = lora_a.__dict__["_parameters"], lora_b.__dict__["_parameters"]
        return linear(linear(x, a["weight"], a["bias"]), b["weight"], b["bias"])
    return lora_b(lora_a(x))


def _is_just_linear(module: Any) -> bool:
    if type(module) is not nn.Linear or torch.compiler.is_dynamo_compiling():
        return False
    state = module.__dict__
    return "weight" in state["_parameters"] and not (
        "forward" in state
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or module._compiled_call_impl
        or nn.Linear.forward is not _linear_forward
    )


_linear_forward = nn.Linear.forward


def _embedded(layer: Any, adapter: str, x: Tensor) -> Tensor:
    embedded: Tensor = layer._embed(x, layer.lora_embedding_A[adapter].T)
    return embedded @ layer.lora_embedding_B[adapter].T


# numerics="fast": s in float32 (float64 for float64 weights), and y = s * (Wx + gBAx) at once

# Elements of W, so that deriving takes 64 MiB at most; on a CPU, what its caches may hold.
_AT_ONCE = {"cpu": 1 << 20}
_AT_ONCE_ELSEWHERE = 1 << 24


def _fast_depends_on(layer: Any, adapter: str) -> list[object]:
    return [*_depends_on(layer, adapter), _bias(base_layer(layer))]


@cached("DoRA scale, fast", adapter="adapter", depends_on=_fast_depends_on, detach=True)
def _fast_scale(layer: Any, adapter: str) -> tuple[Tensor, ...]:
    """Derive ``s`` and, where the base layer has a bias, ``(1 - s) * bias``.

    Returns:
        One or two tensors, float32, or float64 for a float64 base weight; (1, out) for linear
        layers, (out,) for embeddings, (1, out, 1, ...) for convolutions.
    """
    weight = _dense(base_layer(layer))
    dtype = torch.float64 if weight.dtype is torch.float64 else torch.float32
    # The meta device has no autocast, and plans are made there.
    as_it_is = weight.is_meta or not torch._C._is_any_autocast_enabled()
    plain = nullcontext() if as_it_is else torch.autocast(weight.device.type, enabled=False)
    with plain:
        norms = _norms_at_once(layer, adapter, weight)
        if norms is None:
            rows = _rows(layer, adapter, dtype)
            norms = torch.cat([torch.linalg.vector_norm(some, dim=1) for some in rows])
        magnitude = layer.lora_magnitude_vector[adapter].weight.flatten().to(dtype)
        scale = magnitude / norms
        bias = _bias(base_layer(layer))
        parts = (scale,) if bias is None else (scale, (1 - scale) * bias.to(dtype))
        return tuple(part.view(_shape(layer, adapter, weight)) for part in parts)


_STORED: Any = getattr(_stored_scale, MARK)
_FAST: Any = getattr(_fast_scale, MARK)


def _norms_at_once(layer: Any, adapter: str, weight: Tensor) -> Tensor | None:
    """Return the norms of the rows of ``W + g B A`` by one kernel; None where it does not do."""
    scaling = layer.scaling[adapter]
    if (
        not weight.is_cuda
        or adapter not in layer.lora_A
        or weight.dim() > 2  # noqa: PLR2004
        or getattr(layer, "fan_in_fan_out", False)
        or type(scaling) not in {int, float}
    ):
        return None
    first, last = layer.lora_A[adapter], layer.lora_B[adapter]
    if first.bias is not None or last.bias is not None:
        return None
    return kernels.norms(weight, first.weight.detach(), last.weight.detach(), scaling)


def _rows(layer: Any, adapter: str, dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield ``W + g B A`` as a matrix with a row for each output, some rows at a time.

    Added up and not as the sum of ``|W|^2`` and what the factors add to it: that would be fewer
    operations, but where ``g B A`` nearly cancels ``W`` nothing would be left of its precision.
    """
    weight = _dense(base_layer(layer))
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
    at_once = _AT_ONCE.get(weight.device.type, _AT_ONCE_ELSEWHERE)
    step = max(1, at_once // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], step):
        rows = slice(start, start + step)
        total = weight[rows].to(dtype, copy=True).addmm_(b[rows], a)
        yield total if bias is None else total.add_(scaling * bias[rows, None].to(dtype))


def _combine(
    layer: Any,
    adapter: str,
    result: Tensor,
    delta: Tensor,
    buffers: Buffers | None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return ``s * (result + g * delta) + (1 - s) * bias``; the result already has the bias."""
    if buffers is None:
        found = None if torch.compiler.is_dynamo_compiling() else _at_hand(layer, _FAST, adapter)
        scale, *shift = found or _fast_scale(layer, adapter)
        scaling = layer.scaling[adapter]
        if adapter in layer.lora_A and not _is_conv(layer) and _fusible(result, delta, scaling):
            bias = shift[0] if shift else None
            fused = kernels.combine_fast(result, delta, scale, bias, scaling, dtype)
            if fused is not None:
                return fused
    else:
        scale, *shift, scaling = buffers
        delta = delta.to(scale.dtype)  # a tensor g, unlike a number, multiplies in delta's dtype
    if isinstance(scaling, Tensor):
        y = result + delta * scaling
    else:
        y = torch.add(result, delta, alpha=scaling)
    # PEFT's result has two dimensions for an input of one.
    y = y * scale if torch.is_grad_enabled() or y.dim() < scale.dim() else y.mul_(scale)
    return y + shift[0] if shift else y


def _shape(layer: Any, adapter: str, weight: Tensor) -> tuple[int, ...]:
    """Return the shape in which numbers, one for each output, multiply a result."""
    if _is_conv(layer):
        return (1, -1, *[1] * (weight.dim() - 2))
    return (1, -1) if adapter in layer.lora_A else (-1,)


def _is_conv(layer: Any) -> bool:
    return isinstance(layer, _ConvNd)


def _fast_projected(
    layer: Any,
    adapter: str,
    x: Tensor,
    result: Tensor,
    buffers: Buffers | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    if _wants_gradient(layer, adapter):
        exact = _conv if _is_conv(layer) else _linear
        return exact(layer, adapter, x, result)
    return _combine(layer, adapter, result, _projected(layer, adapter, x), buffers, dtype)


def _few_rows(layer: Any, adapter: str, x: Tensor, result: Tensor) -> Tensor | None:
    """Return a linear layer's output by two small kernels; None where they do not pay."""
    scaling = layer.scaling[adapter]
    modules = layer._modules
    lora_a, lora_b = modules["lora_A"]._modules[adapter], modules["lora_B"]._modules[adapter]
    if not (_fusible(result, x, scaling) and _is_just_linear(lora_a) and _is_just_linear(lora_b)):
        return None
    a, b = lora_a.__dict__["_parameters"], lora_b.__dict__["_parameters"]
    if not a["bias"] is b["bias"] is None or (
        x.dtype is not a["weight"].dtype and not getattr(layer, "cast_input_dtype_enabled", True)
    ):
        return None
    scale, *shift = _at_hand(layer, _FAST, adapter) or _fast_scale(layer, adapter)
    return kernels.adapted(
        x, result, a["weight"], b["weight"], scale, shift[0] if shift else None, scaling
    )


def _fast_embedding(
    layer: Any, adapter: str, x: Tensor, result: Tensor, buffers: Buffers | None = None
) -> Tensor:
    if _wants_gradient(layer, adapter):
        return _embedding(layer, adapter, x, result)
    delta = _embedded(layer, adapter, x)
    embed_scale = layer._get_embed_scale()
    if embed_scale is not None:
        delta = delta * embed_scale.to(delta.dtype)
    return _combine(layer, adapter, result, delta, buffers)


_FORWARDS = {
    ("peft", "linear"): _linear,
    ("peft", "embedding"): _embedding,
    ("peft", "conv"): _conv,
    ("fast", "linear"): _fast_projected,
    ("fast", "embedding"): _fast_embedding,
    ("fast", "conv"): _fast_projected,
}


# What compiled code reads


def _buffered(layer: Any, kind: str, adapter: str) -> Buffers:
    """Derive ``s``, and ``g`` as a tensor: a guard on a number would be a recompilation."""
    dtype = layer.lora_A[adapter].weight.dtype if kind == "linear" else None
    scale = _stored_scale.__wrapped__(layer, adapter, dtype)
    return scale, _as_tensor(layer.scaling[adapter], scale)


def _buffered_fast(layer: Any, kind: str, adapter: str) -> Buffers:  # noqa: ARG001
    """Derive what the fast arithmetic takes, and ``g`` as a tensor."""
    scale, *shift = _fast_scale.__wrapped__(layer, adapter)
    return scale, *shift, _as_tensor(layer.scaling[adapter], scale)


def _parameters(layer: Any, adapter: str) -> tuple[Tensor | None, ...]:
    """Return the parameters that the values depend on, in a way that torch.compile can follow."""
    base = base_layer(layer)
    if adapter in layer.lora_A:
        lora_b = layer.lora_B[adapter]
        factors = (layer.lora_A[adapter].weight, lora_b.weight, lora_b.bias)
    else:
        factors = (layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter], None)
    magnitude = layer.lora_magnitude_vector[adapter].weight
    return (magnitude, *factors, *base._parameters.values(), *base._buffers.values())


def _same(ours: tuple[object, ...], theirs: tuple[object, ...]) -> bool:
    return len(ours) == len(theirs) and all(a is b for a, b in zip(ours, theirs))  # noqa: B905


def _as_tensor(scaling: Any, like: Tensor) -> Tensor:
    # Without dimensions it promotes nothing, as a number would not.
    dtype = torch.float64 if like.dtype is torch.float64 else torch.float32
    return torch.as_tensor(scaling, dtype=dtype, device=like.device)


def _readable(layer: Any, adapter: str, x: Tensor) -> bool:  # noqa: ARG001
    """Whether compiled code may read buffers here: with gradients it needs the magnitude."""
    return not _wants_gradient(layer, adapter)


def _as_derived(layer: Any, adapter: str, x: Tensor) -> bool:
    """Whether PEFT would derive here what is buffered: autocast and the input's dtype matter."""
    if not _readable(layer, adapter, x) or torch.is_autocast_enabled(x.device.type):
        return False
    return adapter not in layer.lora_A or x.dtype == layer.lora_A[adapter].weight.dtype


def _warmers(layer: Any, _: object) -> Iterator[tuple[str, Callable[[], object]]]:
    """Derive what an inference without gradients will use."""
    for adapter, variant in layer.lora_variant.items():
        if not isinstance(variant, _CachedVariant):
            continue
        if variant.numerics == "fast":
            yield adapter, partial(_fast_scale, layer, adapter)
        elif variant.kind == "linear":
            yield (
                adapter,
                partial(_stored_scale, layer, adapter, layer.lora_A[adapter].weight.dtype),
            )
        else:
            yield adapter, partial(_stored_scale, layer, adapter)
