"""Keep everything, where it was derived."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dora_cache.backends.storage import Ledger, UncopyableBackend

if TYPE_CHECKING:
    from collections.abc import Collection, Hashable

    from dora_cache.backends.protocol import Entry

__all__ = ["DictBackend"]


class DictBackend(UncopyableBackend):
    """An unbounded dictionary; the fastest backend, for when everything fits."""

    max_bytes = None
    keeps_everything = True

    def __init__(self) -> None:
        self._entries: dict[Hashable, Entry] = {}
        self._ledger = Ledger()

    @property
    def nbytes(self) -> int:
        """Bytes held, each distinct storage once."""
        return self._ledger.nbytes

    def get(self, key: Hashable) -> Entry | None:
        """Return the entry under ``key``, or None."""
        return self._entries.get(key)

    def put(self, key: Hashable, entry: Entry) -> bool:
        """Store ``entry``; always kept."""
        self.delete(key)
        self._entries[key] = entry
        self._ledger.add(entry.tensors)
        return True

    def delete(self, key: Hashable) -> bool:
        """Drop the entry under ``key``; return whether there was one."""
        entry = self._entries.pop(key, None)
        if entry is None:
            return False
        self._ledger.remove(entry.tensors)
        return True

    def clear(self) -> None:
        """Drop every entry."""
        self._entries.clear()
        self._ledger.clear()

    def keys(self) -> Collection[Hashable]:
        """Return the keys held now."""
        return self._entries.keys()

    def __len__(self) -> int:
        """Return the number of entries."""
        return len(self._entries)

    def close(self) -> None:
        """Drop every entry."""
        self.clear()
