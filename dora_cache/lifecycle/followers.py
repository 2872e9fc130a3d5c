"""The caches that hear of something process-wide, for as long as any is attached."""

from __future__ import annotations

import inspect
import threading
import weakref
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from dora_cache.copying import Uncopyable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dora_cache.core.engine import Engine

__all__ = ["Followers", "wrap"]


class Followers(Uncopyable):
    """Some attached caches. Iterating gives those that follow now.

    Args:
        begin: called when the first cache follows: makes the process tell, and leaves on the stack
            what undoes that once the last one has detached. Called once more by :meth:`again`.
    """

    def __init__(self, begin: Callable[[ExitStack], object]) -> None:
        self._begin = begin
        self._lock = threading.Lock()
        self._caches: weakref.WeakSet[Engine] = weakref.WeakSet()
        self._undo: ExitStack | None = None

    def add(self, cache: Engine) -> None:
        """Have a cache follow until it detaches; one that follows already is left as it is."""
        with self._lock:
            if cache in self._caches:
                return
            self._caches.add(cache)
            if self._undo is None:
                self._undo = ExitStack()
                self._begin(self._undo)
        reference = weakref.ref(cache)
        cache.on_detach(lambda: self._remove(reference()))

    def again(self) -> None:
        """Have the process tell of what there was not yet; nothing happens if no cache follows."""
        with self._lock:
            if self._undo is not None:
                self._begin(self._undo)

    def _remove(self, cache: Engine | None) -> None:
        with self._lock:
            if cache is not None:
                self._caches.discard(cache)
            if not self._caches and self._undo is not None:
                self._undo.close()
                self._undo = None

    def __iter__(self) -> Iterator[Engine]:
        """Return an iterator over the caches that follow now."""
        return iter(list(self._caches))


def wrap(
    undo: ExitStack, owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> None:
    """Put a wrapper in a function's place, where it is defined; nothing if there is none.

    Args:
        undo: takes what puts the function back. Where others have put theirs on top since, the
            wrapper stays: it must do nothing while no cache follows.
        owner: a module, or a class that has or inherits the function.
        name: the function's name.
        make: called with the function; returns the wrapper.
    """
    if inspect.isclass(owner):
        owner = next((kind for kind in owner.__mro__ if name in vars(kind)), owner)
    original = vars(owner).get(name)
    if original is None:
        return
    if isinstance(original, staticmethod):
        wrapper: Any = staticmethod(make(original.__func__))
    else:
        wrapper = make(original)
    setattr(owner, name, wrapper)

    def restore() -> None:
        if vars(owner).get(name) is wrapper:
            setattr(owner, name, original)

    undo.callback(restore)
