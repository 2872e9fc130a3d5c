"""Track storages that are freed and filled again, and what is known of their contents.

A refill leaves no trace in a tensor: the version counter stays, the storage stays, and the address
may be another each time. So each content of such a storage has a number, which is compared in
place of the address. Whoever fills it from a known source says so with :func:`filled`; in all other
cases the number is None, and nothing that depends on it is cached.
"""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dora_cache import ambient
from dora_cache.copying import Uncopyable
from dora_cache.core.weak import Held

if TYPE_CHECKING:
    from collections.abc import Collection, Hashable, Iterable, Sequence

__all__ = [
    "Source",
    "content_of",
    "fill_begins",
    "filled",
    "is_filling",
    "is_refilled",
    "mark_refilled",
    "note_written",
    "renew_contents",
]


class Source(Uncopyable):
    """What a storage is filled from, as it was at one moment.

    Args:
        tensors: plain tensors with version counters. No strong reference is kept.
        others: what else the content follows from.

    Raises:
        RuntimeError: a tensor has no version counter or no storage.
    """

    __slots__ = ("_facts", "_tensors", "storages")

    def __init__(self, tensors: Iterable[Tensor], *others: Hashable) -> None:
        self._tensors: list[weakref.ref[Tensor]] = []
        facts: list[Hashable] = [*others]
        self.storages: set[int] = set()
        for tensor in tensors:
            storage = ambient.storage_of(tensor)
            facts += (tensor._version, storage, tensor.data_ptr(), tensor.size(), tensor.stride())
            self._tensors.append(weakref.ref(tensor))
            self.storages.add(storage)
        self._facts = facts

    def equals(self, other: Source) -> bool:
        """Whether the tensors are the very same ones, alive and unchanged."""
        if self._facts != other._facts or len(self._tensors) != len(other._tensors):
            return False
        pairs = zip(self._tensors, other._tensors, strict=True)
        return all(one() is other() is not None for one, other in pairs)


class _Refilled(Uncopyable):
    """One storage.

    Attributes:
        content: a number that stands for what it holds, and never for anything else; None if that
            cannot be told.
        last: the source of the last fill, the tensor's version then, and the number it was given;
            None if a fill from the same source may be of other content.
        held: keeps the storage's number from being given to another one.
    """

    __slots__ = ("content", "held", "last")

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.content: int | None = None
        self.last: tuple[Source, int, int] | None = None
        self.held = Held(storage)  # type: ignore[no-untyped-call]


_refilled: dict[int, _Refilled] = {}
_begun: weakref.WeakKeyDictionary[Any, list[Source | None]] = weakref.WeakKeyDictionary()
_numbers = itertools.count(1)


def mark_refilled(tensor: Tensor | torch.UntypedStorage) -> bool:
    """Note that a storage's content changes and nothing counts it; what it holds is not known.

    Returns:
        Whether the storage was not marked before.
    """
    storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else tensor
    known = _refilled.get(storage._cdata)
    if known is not None:
        known.content = None
        return False
    if len(_refilled) % 1024 == 1023:  # noqa: PLR2004 - now and then
        for number, one in list(_refilled.items()):
            if one.held.expired():  # type: ignore[no-untyped-call]
                del _refilled[number]
    _refilled[storage._cdata] = _Refilled(storage)
    return True


def is_refilled(storage: int) -> bool:
    """Whether the storage of this number has been marked."""
    return storage in _refilled


def content_of(storage: int) -> int | None:
    """Return the number that stands for what a marked storage holds, or None.

    Raises:
        KeyError: the storage is not marked.
    """
    return _refilled[storage].content


def fill_begins(owner: object, sources: Sequence[Source | None]) -> None:
    """Note what an owner's tensors are about to be filled from, before that is read.

    Called once more before it may be read last: what has changed in between is not known.

    Args:
        owner: what the tensors belong to.
        sources: one for each tensor; None if the content does not follow from a source.
    """
    found = list(sources)
    for index, (before, now) in enumerate(zip(_begun.get(owner, ()), found, strict=False)):
        if before is None or now is None or not before.equals(now):
            found[index] = None if before is None or now is None else Source([])
    _begun[owner] = found


def is_filling(owner: object) -> bool:
    """Whether it has been noted what an owner's tensors are being filled from."""
    return owner in _begun


def filled(owner: object, tensors: Sequence[Tensor]) -> None:
    """Note that an owner's tensors, all of them marked, hold what was noted at the beginning.

    A tensor that was written to since it was last filled has another version than then. It gets a
    new number, since after the write its version and number stood for other content.
    """
    for tensor, source in zip(tensors, _begun.pop(owner, ()), strict=False):
        known = _refilled.get(ambient.storage_of(tensor))
        if known is None or source is None:
            continue
        version, last = tensor._version, known.last
        if last is not None and last[1] == version and source.equals(last[0]):
            known.content = last[2]
        else:
            known.content = number = next(_numbers)
            # A source that was written to meanwhile is none to compare with.
            known.last = (source, version, number) if source.storages else None


def note_written(storages: Collection[int]) -> None:
    """Note that some storages may have been written to, uncounted: sources or what is filled."""
    if not _refilled:
        return
    for number, known in list(_refilled.items()):
        if number in storages:
            known.last = None
            if known.content is not None:
                known.content = next(_numbers)
        elif known.last is not None and not known.last[0].storages.isdisjoint(storages):
            known.last = None
    for sources in list(_begun.values()):
        for index, source in enumerate(sources):
            if source is not None and not source.storages.isdisjoint(storages):
                sources[index] = Source([])


def renew_contents() -> None:
    """Have a new number stand for what each storage holds, where refills were not followed so far.

    Of one that is freed, the content is not known.
    """
    _begun.clear()
    for number, known in list(_refilled.items()):
        storage = ambient.storage_numbered(number)
        known.last = None
        known.content = next(_numbers) if storage is not None and storage.nbytes() else None
