"""Mixed batches: each row of a batch with an adapter of its own, as PEFT's ``adapter_names`` says.

PEFT goes adapter by adapter, selects the rows of each and adds to them, and refuses DoRA. Here rows
are sorted by adapter, once for all layers. A linear layer in its ordinary state then takes two
products of consecutive rows for each adapter, and its scales come from the cache. In any other
state, as with gradients, under autocast or within ``bypass()``, and on embeddings and convolutions,
the same rows go through the adapters' modules and variants, one adapter after another.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from peft.tuners.lora.layer import VARIANT_KWARG_KEYS
from torch import Tensor, nn
from torch.nn.functional import linear

from dora_cache.ambient import global_forward_hooks, is_quiet, untraceable
from dora_cache.attributes import SLOT
from dora_cache.lifecycle import plain_class
from dora_cache.recipes.dora.outputs import embedded, exact_sum, fast_sum
from dora_cache.recipes.dora.values import (
    bias_of,
    fast_scale,
    has_offloaded,
    is_conv,
    stored_scale,
)
from dora_cache.recipes.dora.variants import CachedVariant, why_unusual
from dora_cache.recipes.fingerprints import changed as differing
from dora_cache.recipes.peft_layers import base_layer, drops

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = ["KNOWN", "mixed_for"]

_CHECK = {"peft.tuners.lora.layer:LoraLayer._check_forward_args": "36f3f6060292"}
_FORWARD = {"peft.tuners.lora.layer:LoraLayer._mixed_batch_forward": "6ea8bf9a61f0"}
KNOWN: dict[str, dict[str, str]] = {
    "peft.tuners.lora.layer:Linear": _FORWARD,
    "peft.tuners.lora.layer:_ConvNd": _FORWARD,
    "peft.tuners.lora.layer:Embedding": {
        "peft.tuners.lora.layer:Embedding._mixed_batch_forward": "9143353eea21"
    },
    "peft.tuners.lora.bnb:Linear8bitLt": {
        "peft.tuners.lora.bnb:Linear8bitLt._mixed_batch_forward": "2917df781ddd"
    },
    "peft.tuners.lora.bnb:Linear4bit": {
        "peft.tuners.lora.bnb:Linear4bit._mixed_batch_forward": "2917df781ddd"
    },
    "peft.tuners.lora.hqq:HqqLoraLinear": {
        "peft.tuners.lora.hqq:HqqLoraLinear._mixed_batch_forward": "d4ade3d3e934"
    },
}
"""PEFT's methods for mixed batches that are known here, with fingerprints, by class of layers."""

_BASE = "__base__"
_FEW = 256
"""Rows, so that copies of their scales are small beside the weights."""


@functools.cache
def mixed_for(kind: type) -> dict[str, Callable[..., Any]]:
    """Return what stands in for a layer's methods for mixed batches; nothing if they are not known.

    Args:
        kind: the layer's class, without observers.
    """
    for base in kind.__mro__:
        known = KNOWN.get(f"{base.__module__}:{base.__qualname__}")
        if known is None:
            continue
        same = all(
            getattr(kind, name) is getattr(base, name)
            for name in ("forward", "_check_forward_args", "_mixed_batch_forward")
        )
        if same and not differing(_CHECK | known):
            return {"_check_forward_args": _check, "_mixed_batch_forward": _forward}
        return {}
    return {}


def _check(self: Any, x: Any, *args: Any, **kwargs: Any) -> None:
    """Check as PEFT does, except that DoRA adapters are no error."""
    names = kwargs.get("adapter_names")
    if names is not None:
        variants = self.lora_variant
        kwargs["adapter_names"] = [
            _BASE if isinstance(variants.get(name), CachedVariant) else name for name in names
        ]
        plain_class(type(self))._check_forward_args(self, x, *args, **kwargs)  # type: ignore[attr-defined]


def _forward(self: Any, x: Tensor, *args: Any, adapter_names: Sequence[str], **kwargs: Any) -> Any:
    """Return a layer's output for a mixed batch."""
    compiling = torch.compiler.is_dynamo_compiling()
    variants = self.lora_variant
    usual = not compiling and _is_usual(self, x)
    doras = any(isinstance(variants.get(one), CachedVariant) for one in adapter_names)
    # Then PEFT's output, to the bit, is what was promised.
    if not doras and not (usual and self.__dict__[SLOT].cache.config.numerics == "fast"):
        plain: Any = plain_class(type(self))
        return plain._mixed_batch_forward(self, x, *args, adapter_names=adapter_names, **kwargs)
    options = {key: kwargs.pop(key, None) for key in VARIANT_KWARG_KEYS}
    result = self.base_layer(x, *args, **kwargs)
    sort = _sorted.__wrapped__ if compiling else _sorted
    batch: _Batch = sort(tuple(adapter_names))
    if usual:
        found = _together(self, x, result, batch)
        if found is not None:
            return found
    return _one_by_one(self, x, result, batch, options | kwargs)


class _Batch(NamedTuple):
    """The rows of a batch, sorted by adapter.

    Attributes:
        groups: each adapter's name, and its rows as they are in the batch.
        order: the rows of all groups; None if that is how they are in the batch.
    """

    groups: tuple[tuple[str, tuple[int, ...]], ...]
    order: tuple[int, ...] | None


@functools.lru_cache(maxsize=256)
def _sorted(names: tuple[str, ...]) -> _Batch:
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        rows.setdefault(name, []).append(row)
    order = tuple([row for some in rows.values() for row in some])
    groups = tuple([(name, tuple(some)) for name, some in rows.items()])
    return _Batch(groups, None if order == tuple(range(len(names))) else order)


def _indices(order: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the rows' order and what puts them back, as tensors of shape (rows,) and int64."""
    there = torch.tensor(order, device=device)
    return there, torch.argsort(there)


@functools.lru_cache(maxsize=256)
def _kept_indices(order: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(mode=False):
        return _indices(order, device)


# One adapter after another


def _one_by_one(
    layer: Any, x: Tensor, result: Tensor, batch: _Batch, options: dict[str, Any]
) -> Tensor:
    """Return the output for rows that go through the adapters' own modules; nothing is written to.

    Args:
        layer: the layer.
        x: its input.
        result: what its base layer returned.
        batch: the rows.
        options: what PEFT passes on to variants.
    """
    back = None
    if batch.order is not None:
        there, back = _indices(batch.order, result.device)
        x, result = x[there], result[there]
    pieces, start = [], 0
    offsets = options.get("alora_offsets")
    for adapter, rows in batch.groups:
        stop = start + len(rows)
        if offsets is not None:
            options["alora_offsets"] = [offsets[row] for row in rows]
        pieces.append(_adapted(layer, adapter, x[start:stop], result[start:stop], options))
        start = stop
    total = torch.cat(pieces) if pieces else result
    return total if back is None else total[back]


def _adapted(
    layer: Any, adapter: str, x: Tensor, result: Tensor, options: dict[str, Any]
) -> Tensor:
    """Return the output for rows of one adapter."""
    on_embedding = adapter in layer.lora_embedding_A
    if adapter == _BASE or not (on_embedding or adapter in layer.lora_A):
        return result
    if not on_embedding:
        x = x.to(layer.lora_A[adapter].weight.dtype)
    variant = layer.lora_variant.get(adapter)
    if variant is not None:
        total: Tensor = variant.forward(
            layer, active_adapter=adapter, x=x, result=result, **options
        )
        return total.to(result.dtype)
    if on_embedding:
        delta = embedded(layer, adapter, x) * layer.scaling[adapter]
        embed_scale = layer._get_embed_scale()
        if embed_scale is not None:
            delta = delta * embed_scale.to(delta.dtype)
        return (result + delta).to(result.dtype)
    dropped = layer.lora_dropout[adapter](x)
    delta = layer.lora_B[adapter](layer.lora_A[adapter](dropped)) * layer.scaling[adapter]
    return result + delta.to(result.dtype)


# Linear layers in their ordinary state


def _is_usual(layer: Any, x: Any) -> bool:
    """Whether nobody follows the operations, and so products may be written in place."""
    binding = layer.__dict__.get(SLOT)
    return (
        binding is not None
        and not binding.cache.bypassing
        and type(x) is Tensor
        and not torch.is_grad_enabled()
        and is_quiet()
        and not untraceable()
        and not global_forward_hooks()
    )


@dataclass(slots=True)
class _Part:
    """An adapter, and the rows of the flattened input that are its own.

    Attributes:
        start: the first of them.
        stop: the one after the last.
        a: the first factor.
        b: the second one.
        bias: what the second factor adds, or None.
        scaling: the adapter's.
        value: what is stored for DoRA: the scale, and with ``numerics="fast"`` what is added for
            the base layer's bias; None for LoRA.
    """

    start: int
    stop: int
    a: Tensor
    b: Tensor
    bias: Tensor | None
    scaling: Any
    value: tuple[Tensor, ...] | None


def _together(layer: Any, x: Tensor, result: Tensor, batch: _Batch) -> Tensor | None:
    """Return the output of a linear layer, ``result`` overwritten; None for :func:`_one_by_one`.

    Args:
        layer: the layer.
        x: its input.
        result: what its base layer returned.
        batch: the rows.
    """
    binding = layer.__dict__.get(SLOT)
    if (
        binding is None
        or is_conv(layer)
        or layer._modules["lora_embedding_A"]._parameters
        or type(result) is not Tensor
        or x.dim() < 2  # noqa: PLR2004
        or x.shape[:-1] != result.shape[:-1]
        or not result.is_contiguous()
        or result.numel() == 0
    ):
        return None
    fast = binding.cache.config.numerics == "fast"
    parts = _parts(layer, batch, math.prod(x.shape[1:-1]), fast=fast)
    if parts is None:
        return None
    back = None
    if batch.order is not None:
        there, back = _kept_indices(batch.order, result.device)
        x, result = x.index_select(0, there), result.index_select(0, there)
    flat, total = x.reshape(-1, x.shape[-1]), result.view(-1, result.shape[-1])
    for run in _runs(parts):
        rows = slice(run[0].start, run[-1].stop)
        _add(layer, run, flat[rows], total[rows], fast=fast)
    return result if back is None else result.index_select(0, back)


def _parts(layer: Any, batch: _Batch, tokens: int, *, fast: bool) -> list[_Part] | None:
    """Return the adapters of a batch that are on a layer; None if one is out of the ordinary.

    Args:
        layer: the layer.
        batch: the rows.
        tokens: rows of the flattened input for each row of the batch.
        fast: whether ``numerics`` is ``"fast"``.
    """
    state = layer.__dict__
    modules, variants = state["_modules"], state["lora_variant"]
    firsts = modules["lora_A"]._modules
    found, stop = [], 0
    for adapter, rows in batch.groups:
        start = stop
        stop += tokens * len(rows)
        first = firsts.get(adapter)
        if first is None:
            continue
        last = modules["lora_B"]._modules[adapter]
        variant = variants.get(adapter)
        if not (_is_plain(first) and _is_plain(last)) or first._parameters["bias"] is not None:
            return None
        if state["training"] and drops(modules["lora_dropout"]._modules[adapter]):
            return None
        a, b = first._parameters["weight"], last._parameters["weight"]
        value = None
        if variant is not None:
            if (
                not isinstance(variant, CachedVariant)
                or why_unusual(layer, adapter) is not None
                or has_offloaded(layer, adapter)
            ):
                return None
            value = fast_scale(layer, adapter) if fast else (stored_scale(layer, adapter, a.dtype),)
        scaling = state["scaling"][adapter]
        found.append(_Part(start, stop, a, b, last._parameters["bias"], scaling, value))
    return found


def _is_plain(part: Any) -> bool:
    """Whether a factor is a linear layer whose forward may be left out."""
    state = part.__dict__
    return (
        type(part) is nn.Linear
        and type(state["_parameters"].get("weight")) is nn.Parameter
        and "bias" in state["_parameters"]
        and not state["_forward_hooks"]
        and not state["_forward_pre_hooks"]
        and "forward" not in state
        and state.get("_compiled_call_impl") is None
    )


def _runs(parts: list[_Part]) -> Iterator[list[_Part]]:
    """Yield adapters of the same sort and consecutive rows together, while these are few."""
    run: list[_Part] = []
    for part in parts:
        if run and not (
            part.start == run[-1].stop
            and part.stop - run[0].start <= _FEW
            and part.a.dtype is run[0].a.dtype
            and (part.value is None) is (run[0].value is None)
        ):
            yield run
            run = []
        run.append(part)
    if run:
        yield run


def _add(layer: Any, run: list[_Part], x: Tensor, total: Tensor, *, fast: bool) -> None:
    """Add adapters to what the base layer returned for their rows, in place.

    Args:
        layer: the layer.
        run: the adapters.
        x: the rows of the input, (rows, in).
        total: those of the base layer's result, (rows, out).
        fast: whether ``numerics`` is ``"fast"``.
    """
    sizes = [part.stop - part.start for part in run]
    first = run[0]
    delta = torch.empty(total.shape, dtype=first.b.dtype, device=total.device)
    deltas = delta.split_with_sizes(sizes)
    inputs = (x if x.dtype is first.a.dtype else x.to(first.a.dtype)).split_with_sizes(sizes)
    for part, rows, out in zip(run, inputs, deltas, strict=True):
        inner = linear(rows, part.a)
        if part.bias is None:
            torch.mm(inner, part.b.t(), out=out)
        else:
            torch.addmm(part.bias, inner, part.b.t(), out=out)
    scaling = first.scaling
    if not all(type(part.scaling) is float and part.scaling == scaling for part in run[1:]):
        for part, out in zip(run, deltas, strict=True):
            out.mul_(part.scaling)
        scaling = 1.0
    if first.value is None:
        if type(scaling) is not float or scaling != 1.0:
            delta.mul_(scaling)
        total.add_(delta if delta.dtype is total.dtype else delta.to(total.dtype))
        return
    values = [part.value for part in run if part.value is not None]
    scale, *shift = (_by_row(parts, sizes) for parts in zip(*values, strict=True))
    if fast:
        changed = fast_sum(total, delta, scale, shift[0] if shift else None, scaling, owned=True)
    else:
        bias = bias_of(base_layer(layer))
        changed = exact_sum(total, bias, delta, scale, scaling, owned=True)
    total.copy_(changed)


def _by_row(vectors: Sequence[Tensor], sizes: list[int]) -> Tensor:
    """Return vectors of shape (1, out) for so many rows each; a single one as it is."""
    if len(vectors) == 1:
        return vectors[0]
    rows = zip(vectors, sizes, strict=True)
    return torch.cat([one if size == 1 else one.expand(size, -1) for one, size in rows])
