"""What LoHa and LoKr share: PEFT derives the dense delta in ``get_delta_weight``."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

from dora_cache.attributes import SLOT
from dora_cache.core.decorator import cached
from dora_cache.lifecycle import plain_class
from dora_cache.reasons import Reason
from dora_cache.recipes.baking import DIRECT
from dora_cache.recipes.compiled import Face
from dora_cache.recipes.hooks import Hook, optional_parameter
from dora_cache.recipes.peft_layers import base_layer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

__all__ = ["delta_hook", "factors_of"]


def factors_of(attributes: Sequence[str]) -> Callable[[Any, str], Iterator[object]]:
    """Return a ``depends_on``: an adapter's scaling, and its parameters in these attributes."""

    def depends_on(layer: Any, adapter_name: str) -> Iterator[object]:
        yield layer.scaling[adapter_name]
        for attribute in attributes:
            yield optional_parameter(layer, attribute, adapter_name)

    return depends_on


def delta_hook(
    owner: type,
    name: str,
    factors: Callable[[Any, str], Iterator[object]],
    *,
    in_graph: Callable[[Any, str], bool] | None = None,
) -> Hook:
    """Return a hook for ``get_delta_weight`` that stores the delta.

    Args:
        owner: the class that has the method.
        name: what the value is called, for people.
        factors: see :func:`factors_of`.
        in_graph: called with a layer and an adapter; returns whether compiled code derives the
            delta, in less time than it would take to read a stored one from memory.
    """

    def depends_on(layer: Any, adapter_name: str) -> Iterator[object]:
        yield from factors(layer, adapter_name)
        base: Any = base_layer(layer)
        yield from base.weight.shape

    # With positional arguments alone, unlike PEFT's method, since those are looked up faster.
    @cached(name, adapter="adapter_name", depends_on=depends_on)
    def stored(layer: Any, adapter_name: str) -> Tensor:
        delta: Tensor = plain_class(type(layer)).get_delta_weight(layer, adapter_name)  # type: ignore[attr-defined]
        return delta

    @functools.wraps(owner.get_delta_weight)  # type: ignore[attr-defined]
    def get_delta_weight(
        self: Any, adapter_name: str, *, apply_rank_dropout: bool = False
    ) -> Tensor:
        derives = apply_rank_dropout  # it is a random value
        if in_graph is not None and torch.compiler.is_dynamo_compiling():
            face = self.__dict__.get(SLOT)
            if isinstance(face, Face) and in_graph(self, adapter_name):
                face.passed_by(Reason.IN_GRAPH)
                derives = True
        if derives:
            delta: Tensor = plain_class(type(self)).get_delta_weight(  # type: ignore[attr-defined]
                self, adapter_name, apply_rank_dropout=apply_rank_dropout
            )
            return delta
        return stored(self, adapter_name)

    setattr(get_delta_weight, DIRECT, get_delta_weight)
    return Hook("get_delta_weight", get_delta_weight, stored)
