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

    Two equations always hold: ``lookups == hits + misses``, and
    ``stores == entries + evictions + invalidations + replacements``. All but ``entries``, which is
    the backend's own number, are counters, so the second one requires a backend that reports its
    evictions and deletes entries as told.

    Attributes:
        hits: lookups answered without deriving, waiting for another thread's result included.
        misses: lookups that derived the value.
        stores: values that the backend kept.
        evictions: entries dropped to make room, by the backend, or by the cache for the buffers of
            compiled code and where memory ran out.
        rejections: values that the backend did not keep, for instance larger than the cap.
        invalidations: entries dropped because they were no longer valid, or by ``invalidate()``.
        replacements: entries dropped for a newer value under the same key, whether or not the
            backend kept that value.
        derive_seconds: time spent deriving, by the host's clock (on a GPU, the time to launch the
            work, not to run it).
        bypasses: calls for which the cache was not used (training, gradients through the value,
            tracing, ``bypass()``, and everything else that cannot be checked).
        entries: entries held now.
        nbytes: bytes held now, each distinct storage once; buffers of compiled code included.
        max_bytes: the most bytes that may be held; None if unbounded.
        reasons: how often each reason applied, by its name: why calls bypassed the cache, and why
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
