"""Keep the most recently used entries under a hard cap in bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cachetools import Cache, LRUCache

from dora_cache.backends.storage import Ledger
from dora_cache.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Hashable

    from dora_cache.backends.protocol import Entry

__all__ = ["LRUBackend"]


class _Entries(LRUCache[Any, Any]):
    """An ``LRUCache`` sized in bytes that reports every removal, evictions included."""

    def __init__(self, max_bytes: int, removed: Callable[[Hashable, Entry], None]) -> None:
        super().__init__(maxsize=max_bytes, getsizeof=lambda entry: entry.nbytes)
        self._removed = removed

    def __delitem__(self, key: Hashable) -> None:
        entry = Cache.__getitem__(self, key)
        super().__delitem__(key)
        self._removed(key, entry)


class LRUBackend:
    """Evict the least recently used entries so that the rest fit in ``max_bytes``.

    An entry counts with all its storages. Two entries that share a storage count it twice towards
    the cap, so what is really held (``nbytes``) can only be less.

    Args:
        max_bytes: the cap, in bytes; an entry above it is not kept.
    """

    def __init__(self, max_bytes: int) -> None:
        if max_bytes < 0:
            msg = f"max_bytes is {max_bytes}: give a size of zero bytes or more"
            raise ConfigError(msg)
        self._max_bytes = max_bytes
        self._ledger = Ledger()
        self._entries = _Entries(max_bytes, self.removed)

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
        return entry

    def put(self, key: Hashable, entry: Entry) -> bool:
        """Store ``entry`` as the most recently used, unless it is larger than the cap."""
        self.delete(key)
        if entry.nbytes > self._max_bytes:
            return False
        self._entries[key] = entry
        self._ledger.add(entry.tensors)
        return True

    def delete(self, key: Hashable) -> bool:
        """Drop the entry under ``key``; return whether there was one."""
        if key not in self._entries:
            return False
        del self._entries[key]
        return True

    def clear(self) -> None:
        """Drop every entry."""
        for key in list(self._entries):
            del self._entries[key]

    def keys(self) -> Collection[Hashable]:
        """Return the keys held now."""
        return self._entries.keys()

    def __len__(self) -> int:
        """Return the number of entries."""
        return len(self._entries)

    def close(self) -> None:
        """Drop every entry."""
        self.clear()

    def removed(self, key: Hashable, entry: Entry) -> None:  # noqa: ARG002
        """Take note that an entry has left, for whatever reason; subclasses may do more."""
        self._ledger.remove(entry.tensors)
