"""Keep nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Hashable

    from dora_cache.backends.protocol import Entry

__all__ = ["NullBackend"]


class NullBackend:
    """Store nothing: every lookup derives again. For comparisons, or to switch off by config."""

    max_bytes = 0
    nbytes = 0

    def on_evict(self, evicted: Callable[[Hashable], object]) -> None:
        """Do nothing: what is never held is never evicted."""

    def get(self, key: Hashable) -> Entry | None:  # noqa: ARG002
        """Return None."""
        return None

    def put(self, key: Hashable, entry: Entry) -> bool:  # noqa: ARG002
        """Keep nothing."""
        return False

    def delete(self, key: Hashable) -> bool:  # noqa: ARG002
        """Say that there was nothing."""
        return False

    def clear(self) -> None:
        """Do nothing."""

    def keys(self) -> Collection[Hashable]:
        """Return no keys."""
        return ()

    def __len__(self) -> int:
        """Return zero."""
        return 0

    def close(self) -> None:
        """Do nothing."""
