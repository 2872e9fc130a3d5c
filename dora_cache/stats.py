"""Counters of a cache."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["CacheStats"]


@dataclass(frozen=True, slots=True)
class CacheStats:
    """A snapshot of a cache's counters.

    Two sums always hold: lookups are hits and misses, and
    ``stores == entries + evictions + invalidations + replacements``. All but ``entries``, which is
    the backend's own number, are counters, so the second holds for a backend that reports what it
    evicts, and deletes what it is told to.

    Attributes:
        hits: lookups answered without deriving, waiting for another thread's result included.
        misses: lookups that derived the value.
        stores: values that the backend kept.
        evictions: entries that the backend dropped to make room, or the cache did, as for what
            compiled code reads and where memory ran out.
        rejections: values that the backend did not keep, for instance larger than the cap.
        invalidations: entries dropped because they no longer hold, or because a caller said so.
        replacements: entries that a newer value under the same key took the place of, or would
            have if it had been kept.
        derive_seconds: spent deriving, by the host's clock (on a GPU, where deriving is launched
            and not waited for, that is the time to launch it).
        bypasses: calls that went past the cache (training, gradients through the value, tracing,
            ``bypass()``, or whatever else cannot be checked).
        entries: entries held now.
        nbytes: bytes held now, each distinct storage once; what compiled code reads included.
        max_bytes: the most bytes that may be held; None if unbounded.
        reasons: how often each reason applied, by its name: why calls went past the cache, and why
            derived values were not kept. See :class:`dora_cache.reasons.Reason`.
    """

    hits: int = 0
    misses: int = 0
    stores: int = 0
    evictions: int = 0
    rejections: int = 0
    invalidations: int = 0
    replacements: int = 0
    bypasses: int = 0
    entries: int = 0
    nbytes: int = 0
    max_bytes: int | None = None
    derive_seconds: float = 0.0
    reasons: Mapping[str, int] = field(default_factory=dict)

    @property
    def lookups(self) -> int:
        """Calls that consulted the cache."""
        return self.hits + self.misses

    @property
    def hit_rate(self) -> float:
        """Hits per lookup, from 0 to 1; 0 before the first lookup."""
        return self.hits / self.lookups if self.lookups else 0.0
