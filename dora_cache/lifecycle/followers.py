"""The caches that hear of something process-wide, for as long as any is attached."""

from __future__ import annotations

import threading
import weakref
from contextlib import ExitStack
from typing import TYPE_CHECKING

from dora_cache.copying import Uncopyable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dora_cache.cache import AdapterCache

__all__ = ["Followers"]


class Followers(Uncopyable):
    """Some attached caches. Iterating gives those that follow now.

    Args:
        begin: called when the first cache follows: makes the process tell, and leaves on the stack
            what undoes that once the last one has detached.
    """

    def __init__(self, begin: Callable[[ExitStack], object]) -> None:
        self._begin = begin
        self._lock = threading.Lock()
        self._caches: weakref.WeakSet[AdapterCache] = weakref.WeakSet()
        self._undo: ExitStack | None = None

    def add(self, cache: AdapterCache) -> None:
        """Have a cache follow until it detaches."""
        with self._lock:
            self._caches.add(cache)
            if self._undo is None:
                self._undo = ExitStack()
                self._begin(self._undo)
        reference = weakref.ref(cache)
        cache.on_detach(lambda: self._remove(reference()))

    def _remove(self, cache: AdapterCache | None) -> None:
        with self._lock:
            if cache is not None:
                self._caches.discard(cache)
            if not self._caches and self._undo is not None:
                self._undo.close()
                self._undo = None

    def __iter__(self) -> Iterator[AdapterCache]:
        """Return an iterator over the caches that follow now."""
        return iter(list(self._caches))
