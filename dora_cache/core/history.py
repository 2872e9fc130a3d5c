"""Samples of counters over time, bounded in number."""

from __future__ import annotations

import time
from typing import NamedTuple

__all__ = ["History", "Sample"]

_MOST = 240  # samples kept
_SHORTEST = 0.1  # seconds between two samples, at first
_SHARE = 0.01  # of the time, that samples taken unasked may take


class Sample(NamedTuple):
    """Counters at one time.

    Attributes:
        seconds: since the beginning.
        hits: lookups answered from what was held, so far.
        misses: the other lookups, so far.
        evictions: so far.
        nbytes: bytes held.
    """

    seconds: float
    hits: int
    misses: int
    evictions: int
    nbytes: int


class History:
    """Samples of counters, at most 240 and one more for the latest.

    When there are too many, every second one goes, and the shortest time between two is doubled.
    So they cover all the time since the beginning, however long that is. The caller holds a lock.
    """

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._interval = _SHORTEST
        self._due = 0.0
        self._kept = [Sample(0.0, 0, 0, 0, 0)]
        self._latest = self._kept[0]

    @property
    def is_due(self) -> bool:
        """Whether a sample is worth its cost, where nobody asks for the counters."""
        return time.monotonic() >= self._due

    def add(self, hits: int, misses: int, evictions: int, nbytes: int, cost: float = 0.0) -> None:
        """Take a sample.

        Args:
            hits: so far.
            misses: so far.
            evictions: so far.
            nbytes: bytes held.
            cost: seconds that reading the counters took.
        """
        now = time.monotonic()
        self._due = now + max(self._interval, cost / _SHARE)
        self._latest = Sample(now - self._began, hits, misses, evictions, nbytes)
        if self._latest.seconds - self._kept[-1].seconds < self._interval:
            return
        self._kept.append(self._latest)
        if len(self._kept) > _MOST:
            del self._kept[1::2]  # the first one stays
            self._interval *= 2

    def samples(self) -> tuple[Sample, ...]:
        """Return the samples, the oldest first; the first one is of the beginning."""
        latest = () if self._latest == self._kept[-1] else (self._latest,)
        return (*self._kept, *latest)
