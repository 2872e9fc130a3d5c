"""Keep the most recently used entries under a hard cap in bytes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from cachetools import Cache, LRUCache

from dora_cache.backends.storage import Ledger, UncopyableBackend, checked_cap

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Hashable

    from dora_cache.backends.protocol import Entry

__all__ = ["LRUBackend"]


class _Entries(LRUCache[Any, Any]):
    """An ``LRUCache`` that counts bytes and reports every removal; the backend evicts.

    It has no limit of its own, since the limit of an ``LRUCache`` cannot be changed.
    """

    def __init__(self, removed: Callable[[Hashable, Entry], None]) -> None:
        super().__init__(maxsize=math.inf, getsizeof=lambda entry: entry.nbytes)
        self._removed = removed

    def __delitem__(self, key: Hashable) -> None:
        entry = Cache.__getitem__(self, key)
        super().__delitem__(key)
        self._removed(key, entry)

    def drop(self, key: Hashable) -> Entry | None:
        """Take an entry out without a report; None if there is none."""
        entry: Entry | None = self.get(key)
        if entry is not None:
            super().__delitem__(key)
        return entry


class LRUBackend(UncopyableBackend):
    """Evict the least recently used entries so that the rest fit in ``max_bytes``.

    An entry counts with all its storages. Two entries that share a storage count it twice towards
    the cap, so what is really held (``nbytes``) can only be less.

    Args:
        max_bytes: the cap, in bytes; an entry above it is not kept.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = checked_cap(max_bytes)
        self._ledger = Ledger()
        self._entries = _Entries(self.removed)
        # Pinned entries stand apart, in no order; their keys are pins as well.
        self._pinned = _Entries(self.removed)
        self._pins: set[Hashable] = set()

    @property
    def max_bytes(self) -> int:
        """The cap, in bytes."""
        return self._max_bytes

    @property
    def nbytes(self) -> int:
        """Bytes held, each distinct storage once."""
        return self._ledger.nbytes

    def get(self, key: Hashable) -> Entry | None:
        """Return the entry under ``key``, now the most recently used, or None."""
        entry: Entry | None = self._entries.get(key)
        if entry is None and self._pins:
            entry = self._pinned.get(key)
        return entry

    def put(self, key: Hashable, entry: Entry) -> bool:
        """Store ``entry`` as the most recently used, unless it is larger than the cap.

        Pinned entries take their part of the cap: what does not fit beside them is not kept.
        """
        self.delete(key)
        nbytes = entry.nbytes
        if nbytes > self._max_bytes - self._pinned.currsize:
            return False
        self._make_room(nbytes)
        (self._pinned if key in self._pins else self._entries)[key] = entry
        self._ledger.add(entry.tensors)
        return True

    def delete(self, key: Hashable) -> bool:
        """Drop the entry under ``key``; return whether there was one."""
        for entries in (self._entries, self._pinned):
            if key in entries:
                del entries[key]
                return True
        return False

    def clear(self) -> None:
        """Drop every entry; pins stay."""
        for key in list(self.keys()):
            self.delete(key)

    def keys(self) -> Collection[Hashable]:
        """Return the keys held now."""
        return [*self._entries, *self._pinned] if self._pins else self._entries.keys()

    def __len__(self) -> int:
        """Return the number of entries."""
        return len(self._entries) + len(self._pinned)

    def close(self) -> None:
        """Drop every entry."""
        self.clear()
        self._pins.clear()

    def resize(self, max_bytes: int) -> None:
        """Change the cap; the least recently used entries go at once, pinned ones last."""
        self._max_bytes = checked_cap(max_bytes)
        self._make_room(0)
        while self._pinned.currsize > max_bytes:
            self._evict_from(self._pinned)

    def pin(self, key: Hashable) -> None:
        """Keep the entry under ``key``, the present one or any to come, until it is unpinned."""
        self._pins.add(key)
        self._move(key, self._entries, self._pinned)

    def unpin(self, key: Hashable) -> None:
        """Let the entry under ``key``, now the most recently used, be evicted again."""
        self._pins.discard(key)
        self._move(key, self._pinned, self._entries)

    def removed(self, key: Hashable, entry: Entry) -> None:  # noqa: ARG002
        """Take note that an entry has left, for whatever reason; subclasses may do more."""
        self._ledger.remove(entry.tensors)

    def _make_room(self, nbytes: int) -> None:
        room = self._max_bytes - self._pinned.currsize - nbytes
        while self._entries and self._entries.currsize > room:
            self._evict_from(self._entries)

    def _evict_from(self, entries: _Entries) -> None:
        key, _ = entries.popitem()
        self._evicted(key)

    def _move(self, key: Hashable, source: _Entries, target: _Entries) -> None:
        entry = source.drop(key)
        if entry is not None:
            target[key] = entry
