"""One dense weight in place of two: ``W`` and the deltas of the active adapters, added up.

For ``numerics="fast"``, where a delta is as large as the weight whatever one does, or both are so
small that the number of steps is what counts: the sum takes no more memory than the delta, and one
product instead of two. It is made in the weight's own dtype, so it is for weights of float32 and
float64 whose adapters have the same: a sum in less would lose what a small delta says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from dora_cache.ambient import any_autocast
from dora_cache.core.decorator import cached
from dora_cache.recipes.bases import dense_base, replaceable
from dora_cache.recipes.hooks import guard, own_parameter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from dora_cache.recipes.hooks import Hook

__all__ = ["fold", "is_large", "plain_linear"]

LARGE = 2**18
"""Entries of a weight. With fewer, a product takes less time than the calls that a form of more
steps consists of."""

_PRECISE = (torch.float32, torch.float64)


def is_large(layer: Any) -> bool:
    """Whether a linear layer is worth a form that is smaller and takes more steps."""
    large: bool = layer.in_features * layer.out_features >= LARGE
    return large


def plain_linear(layer: Any) -> nn.Linear | None:
    """Return a layer's base if it is an ordinary linear layer whose call nobody follows."""
    base: nn.Module = layer._modules["base_layer"]
    if type(base) is nn.Linear and replaceable(layer) and dense_base(layer) is base:
        return base
    return None


def fold(
    name: str,
    *,
    active: Callable[[Any], Sequence[str]],
    delta: Callable[[Any, str], Tensor],
    depends_on: Callable[[Any, str], Iterable[object]],
    weights: Callable[[Any, str], Sequence[Tensor]],
    unless: Callable[[Any, str], bool] = lambda *_: False,
    otherwise: Callable[[Any, Tensor], Tensor | None] = lambda *_: None,
    warm_otherwise: Callable[[Any, str], object] = lambda *_: None,
    stored: bool = True,
) -> Hook:
    """Return a hook for ``forward`` that multiplies with the sum, where that is as exact.

    Args:
        name: what the value is called, for people.
        active: called with a layer; returns its active adapters, in order.
        delta: called with a layer and an adapter; returns ``W``'s change, of ``W``'s shape, as the
            sum of what PEFT's forward adds for it.
        depends_on: called likewise; yields what the delta depends on.
        weights: called likewise; returns the tensors whose dtype and device have to be ``W``'s.
        unless: called likewise; whether there is a better way for the adapter. The sum is left if
            there is one for any active adapter.
        otherwise: a forward for where the sum will not do, as
            :func:`dora_cache.recipes.hooks.guard` takes one.
        warm_otherwise: derives ahead what PEFT's or that forward uses.
        stored: whether PEFT's forward derives the delta by a method whose results are stored.
    """

    def dependencies(layer: Any, *names: str) -> Iterator[object]:
        weight = layer._modules["base_layer"]._parameters["weight"]
        yield weight
        seen = {id(weight)}  # each tensor once: the short way of looking up takes none twice
        for one in names:
            for item in depends_on(layer, one):
                if isinstance(item, Tensor):
                    if id(item) in seen:
                        continue
                    seen.add(id(item))
                yield item

    @cached(name, adapter="names", depends_on=dependencies)
    def folded(layer: Any, *names: str) -> Tensor:
        weight: Tensor = layer._modules["base_layer"]._parameters["weight"]
        total = weight
        for one in names:
            total = total + delta(layer, one)
        if total.dtype is not weight.dtype or total.shape != weight.shape:
            msg = f"{name}: a delta of {total.dtype}, {tuple(total.shape)}, unlike the weight"
            raise TypeError(msg)
        return total

    def base_for(layer: Any, names: Sequence[str]) -> nn.Linear | None:
        """Return the base layer if the sum will do."""
        base = plain_linear(layer)
        if base is None or not names or any_autocast():
            return None
        weight = base._parameters["weight"]
        assert weight is not None  # noqa: S101 - for the type checker
        dtype, device = weight.dtype, weight.device
        if dtype not in _PRECISE:
            return None
        for one in names:
            if unless(layer, one):
                return None
            for tensor in weights(layer, one):
                if tensor.dtype is not dtype or tensor.device != device:
                    return None
        return base

    def forward(layer: Any, x: Tensor) -> Tensor | None:
        names = active(layer)
        base = base_for(layer, names)
        if base is None or x.dtype is not base._parameters["weight"].dtype:  # type: ignore[union-attr]
            return otherwise(layer, x)
        bias = own_parameter(base, "bias")
        return linear(x, folded(layer, *names), bias)

    def warm(layer: Any, adapter: str) -> object:
        if base_for(layer, (adapter,)) is None:
            return warm_otherwise(layer, adapter)
        return folded(layer, adapter)

    return guard(forward, warm=warm, stored=stored)
