"""What will be asked for next, and copies of it that are on their way already."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Mapping

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

    def fill(
        self,
        after: Hashable,
        sizes: Mapping[Hashable, int],
        room: int,
        load: Callable[[Hashable], Entry | None],
    ) -> None:
        """Have copies of the entries expected after a key's on their way.

        Copies that are not among them make room for them, the oldest first.

        Args:
            after: the key asked for last.
            sizes: bytes of the entries that can be copied, by key.
            room: bytes that all copies may take.
            load: begins to copy a key's entry; None if it cannot be copied after all.
        """
        copies, left = self._copies, room
        expected: list[Hashable] = []
        missing = 0
        following: Hashable = after
        for _ in range(_STEPS):
            following = self._successors.get(following)
            if following is None or following == after:
                break
            nbytes = sizes.get(following)
            if nbytes is None:
                continue
            left -= nbytes
            if left < 0:
                break
            expected.append(following)
            if following not in copies:
                missing += nbytes
        if not missing:
            return
        if self.nbytes + missing > room:
            for key in [key for key in copies if key not in expected]:
                self.take(key)
                if self.nbytes + missing <= room:
                    break
        for key in expected:
            if key not in copies:
                entry = load(key)
                if entry is not None:
                    copies[key] = entry
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
