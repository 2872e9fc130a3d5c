"""What will be asked for next, and copies of it that are on their way already."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Hashable, Iterable

    from dora_cache.backends.protocol import Entry

__all__ = ["Prefetch"]

_STEPS = 32
"""How many keys are looked ahead, at most."""

_THREADS = 256
"""Threads whose last key is remembered, at most."""

_SUCCESSORS = 1 << 16
"""Keys whose successor is remembered, at most."""


class Prefetch:
    """Learns which key follows which, and holds copies of the next ones until they are taken.

    A forward asks for its values in the same order each time, so one forward is enough to learn it.
    Of each key the latest successor counts, in the same thread.

    Attributes:
        nbytes: bytes of the copies held.
    """

    def __init__(self) -> None:
        self.nbytes = 0
        self._copies: dict[Hashable, Entry] = {}
        self._successors: dict[Hashable, Hashable] = {}
        self._last: dict[int, Hashable] = {}

    def asked(self, key: Hashable) -> None:
        """Learn that a key was asked for, held or not."""
        thread = threading.get_ident()
        last = self._last.get(thread)
        if last is None and len(self._last) >= _THREADS:
            self._last.clear()
        if last is not None and self._successors.get(last) != key:
            if len(self._successors) >= _SUCCESSORS:
                self._successors.clear()
            self._successors[last] = key
        self._last[thread] = key

    def next(self, key: Hashable, among: Collection[Hashable]) -> list[Hashable]:
        """Return those of some keys that are expected after ``key``, the next one first."""
        found: list[Hashable] = []
        following: Hashable = key
        for _ in range(_STEPS):
            following = self._successors.get(following)
            if following is None or following == key or following in found:
                break
            if following in among:
                found.append(following)
        return found

    def fill(
        self,
        keys: Iterable[Hashable],
        room: int,
        size: Callable[[Hashable], int],
        load: Callable[[Hashable], Entry],
    ) -> None:
        """Have copies of some keys' entries on their way; older copies of others make room.

        Args:
            keys: the one needed first comes first.
            room: bytes that all copies may take.
            size: says how many a key's entry has.
            load: begins to copy a key's entry.
        """
        wanted, left = [], room
        for key in keys:
            left -= size(key)
            if left < 0:
                break
            wanted.append(key)
        missing = [key for key in wanted if key not in self._copies]
        if not missing:
            return
        most = room - sum(size(key) for key in missing)
        for key in [key for key in self._copies if key not in wanted]:
            if self.nbytes <= most:
                break
            self.take(key)
        for key in missing:
            self._copies[key] = entry = load(key)
            self.nbytes += entry.nbytes

    def take(self, key: Hashable) -> Entry | None:
        """Hand over the copy of a key's entry; None if there is none."""
        entry = self._copies.pop(key, None)
        if entry is not None:
            self.nbytes -= entry.nbytes
        return entry

    def clear(self) -> None:
        """Drop the copies; what was learned stays."""
        self._copies.clear()
        self.nbytes = 0
