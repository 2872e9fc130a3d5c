"""Track the contents of tensors whose data a library moves or casts and moves back.

Offloading gives a parameter other memory at each move, while what it contains stays. Here such a
content has a number. It goes with the parameter from one place to the next, as long as whoever
moves it finds the tensor as it was left: the same version, storage and address.
"""

from __future__ import annotations

import functools
import itertools
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dora_cache import ambient
from dora_cache.copying import Uncopyable
from dora_cache.core.weak import Held

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator

__all__ = [
    "NOTHING",
    "contents",
    "forget",
    "is_known",
    "let_go",
    "moving",
    "new_content",
    "put",
    "take_over",
]

NOTHING = 0
"""The number of what must not be read: memory that waits to be given a content."""


class Content(Uncopyable):
    """What a tensor contains, and where it was put.

    Attributes:
        number: that no other content has.
        place: version, storage and address of the tensor.
        exact: the narrowest dtype that is known to hold all of it.
    """

    __slots__ = ("_held", "exact", "number", "place")

    def __init__(self, tensor: Tensor, number: int, exact: torch.dtype) -> None:
        self.number = number
        self.exact = exact
        self.place = _place(tensor)
        # Keeps the storage's number from being given to another one.
        self._held = Held(tensor.untyped_storage())  # type: ignore[no-untyped-call]

    @property
    def expired(self) -> bool:
        """Whether the memory was freed, so that no tensor is at the place any more."""
        gone: bool = self._held.expired()  # type: ignore[no-untyped-call]
        return gone


contents: dict[int, Content] = {}
"""By the tensor's id. One holds if its place is the tensor's; see :mod:`dora_cache.core.facts`."""

_numbers = itertools.count(1)


def new_content() -> int:
    """Return a number for a content that is not known to be any other."""
    return next(_numbers)


def put(tensor: Tensor, number: int, exact: torch.dtype | None = None) -> None:
    """Note what a tensor contains from now on.

    Args:
        tensor: one with data of its own; of any other nothing is noted.
        number: of the content.
        exact: a dtype that holds all of it; the tensor's own by default.
    """
    with suppress(RuntimeError, NotImplementedError):  # no storage or no version
        contents[id(tensor)] = Content(tensor, number, exact or tensor.dtype)
    if len(contents) % 1024 == 1023:  # noqa: PLR2004 - now and then
        for key, content in list(contents.items()):
            if content.expired:
                contents.pop(key, None)


def is_known(tensor: Tensor) -> bool:
    """Whether it is noted what a tensor contains where it is; so for all without a place."""
    found = contents.get(id(tensor))
    try:
        return found is not None and found.place == _place(tensor)
    except (RuntimeError, NotImplementedError):
        return True


def let_go(tensors: Iterable[Tensor]) -> None:
    """Note nothing of some tensors any more."""
    for tensor in tensors:
        contents.pop(id(tensor), None)


def forget(storages: Collection[int]) -> None:
    """Take what is in some storages for contents that are not known."""
    for key, content in list(contents.items()):
        if content.place[1] in storages:
            contents.pop(key, None)


def take_over(old: Tensor, new: Tensor) -> bool:
    """Note that a tensor takes another's place, over the same memory. Attributes do not count.

    What was derived from the one holds for the other then, as long as either's version shows the
    writes to it; and at this moment the two versions are the same.

    Returns:
        Whether it is so; nothing is noted otherwise.
    """
    try:
        place = _place(old)
        same = (
            type(old) is type(new)
            and _place(new) == place
            and (old.dtype, old.size(), old.stride()) == (new.dtype, new.size(), new.stride())
        )
    except (RuntimeError, NotImplementedError):
        return False
    if same:
        _, number, exact = _known(old)
        put(old, number, exact)
        put(new, number, exact)
    return same


@contextmanager
def moving(find: Callable[[], Iterable[Tensor]]) -> Iterator[None]:
    """Follow the contents of tensors that are exchanged for copies or casts, or whose data is.

    Args:
        find: returns the tensors; called before and after, it finds those in their places.
    """
    before = [(tensor, *_known(tensor)) for tensor in find()]
    try:
        yield
    except BaseException:
        let_go(tensor for tensor, *_ in before)
        raise
    after = list(find())
    if len(after) != len(before):
        let_go(tensor for tensor, *_ in before)
        return
    for (old, place, number, exact), tensor in zip(before, after, strict=True):
        with suppress(RuntimeError, NotImplementedError):
            if place is None or (tensor is old and _place(tensor) == place):
                continue  # not moved, or nothing that can be followed
            if tensor.shape != old.shape or not _holds(tensor.dtype, exact):
                number, exact = new_content(), tensor.dtype  # noqa: PLW2901 - rounded on the way
            put(tensor, number, exact)


def _known(tensor: Tensor) -> tuple[tuple[int, int, int] | None, int, torch.dtype]:
    """Return a tensor's place, None if it has none; its content; and the dtype that holds it."""
    try:
        place = _place(tensor)
    except (RuntimeError, NotImplementedError):
        return None, 0, tensor.dtype
    found = contents.get(id(tensor))
    if found is None or found.place != place:
        return place, new_content(), tensor.dtype
    return place, found.number, found.exact


def _place(tensor: Tensor) -> tuple[int, int, int]:
    return tensor._version, ambient.storage_of(tensor), tensor.data_ptr()


@functools.cache
def _holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether one floating dtype has every number of another."""
    if wide is narrow:
        return True
    if not (wide.is_floating_point and narrow.is_floating_point):
        return False
    one, other = torch.finfo(wide), torch.finfo(narrow)
    least, other_least = one.smallest_normal * one.eps, other.smallest_normal * other.eps
    return one.eps <= other.eps and one.max >= other.max and least <= other_least
