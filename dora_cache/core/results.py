"""Checks and copies of a function's result before it is stored."""

from __future__ import annotations

import math
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dora_cache.ambient import storage_of, storage_uses
from dora_cache.core.facts import UncheckableError, is_plain, read

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from dora_cache.backends import Value

__all__ = ["described", "storable"]


def storable(value: object, storages: Collection[int]) -> Value | None:
    """Return what to store for a result: it owns its memory and has no graph. None: nothing.

    A view would keep more memory alive than it shows. Memory that anybody else holds, a dependency
    or the function itself, may be written to past the version counter of the result. So these are
    copied. The caller must hold the result in one variable.

    Args:
        value: what the function returned.
        storages: numbers of the dependencies' storages.
    """
    whole, each = _references(value)
    if type(value) is tuple and value:
        alone, (alone_part,) = _alone(lambda: (object(),))
        times = Counter(map(id, value))  # one tensor may be there several times
        kept: dict[int, Tensor | None] = {}
        for part, count in zip(value, each, strict=True):
            if id(part) not in kept:
                held = whole > alone or count > alone_part + times[id(part)] - 1
                kept[id(part)] = _own(part, storages, held=held)
        tensors = tuple([one for one in (kept[id(part)] for part in value) if one is not None])
        return tensors if len(tensors) == len(value) else None
    return _own(value, storages, held=whole > _alone(object)[0])


def _own(value: object, storages: Collection[int], *, held: bool) -> Tensor | None:
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        return None
    if not is_plain(type(value)):
        return None
    try:
        read([value])  # the same doubts as for dependencies: inference tensors, fake ones, ...
    except UncheckableError:
        return None
    if held or storage_of(value) in storages or _is_shared(value):
        return value.detach().clone()
    tensor = value.detach() if type(value) is not Tensor or value.requires_grad else value
    own = tensor.untyped_storage().nbytes() <= tensor.numel() * tensor.element_size()
    return tensor if own else tensor.clone()


def _is_shared(tensor: Tensor) -> bool:
    """Whether anybody else holds a tensor's memory, or the tensor other than from Python.

    That is another tensor, such as the one of which this is ``.data``; an array of numpy's; another
    process; or whoever the memory was taken over from, whose storage cannot be resized.
    """
    if _holders(tensor) > (_ALONE_HOLDERS if tensor._base is None else _ALONE_VIEW):
        return True
    storage = tensor.untyped_storage()
    return not storage.resizable() or (tensor.device.type == "cpu" and storage.is_shared())


def _holders(tensor: Tensor) -> float:
    """Count who holds a tensor, its storage, and what it is a view of."""
    base: Any = tensor._base
    storage = tensor.untyped_storage()
    counted: Any = tensor
    try:
        uses: int = storage_uses(storage)
        uses += sys.getrefcount(storage) + counted._use_count()
        if base is not None:
            uses += sys.getrefcount(base) + base._use_count()
    except AttributeError:  # PyTorch does not tell, so it may be anybody
        return math.inf
    return uses


def _references(value: object) -> tuple[int, list[int]]:
    """Return how often a result is referred to, and each part of a tuple."""
    parts = value if type(value) is tuple else ()
    return sys.getrefcount(value), [sys.getrefcount(part) for part in parts]


def _alone(make: Callable[[], object]) -> tuple[int, list[int]]:
    """Count the references to what nobody else holds, as :func:`storable` counts them.

    Each time anew: how many references a call takes depends on who follows Python's frames, as
    TorchDynamo does after it has failed.
    """

    def count(value: object) -> tuple[int, list[int]]:
        whole, each = _references(value)
        return whole, each

    value = make()
    return count(value)


_ALONE_HOLDERS = min(_holders(torch.empty(1, device="cpu")), sys.maxsize)
_ALONE_VIEW = min(_holders(torch.empty(1, device="cpu").view(1, 1)), sys.maxsize)


def described(value: Any) -> str:
    """Say what a result is, for people."""
    if isinstance(value, Tensor):
        if value.layout is not torch.strided:
            return f"a tensor of layout {value.layout}"
        if value.is_inference():
            return "an inference tensor"
        return f"a {type(value).__name__} without data of its own"
    if value is None:
        return "None"
    if type(value) is tuple and value:
        kinds = ", ".join(dict.fromkeys(type(part).__name__ for part in value))
        return f"a tuple of {kinds}"
    if type(value) is tuple:
        return "an empty tuple"
    return f"a {type(value).__name__}"
