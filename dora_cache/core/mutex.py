"""The lock of a cache, and work and warnings that are deferred until it is released."""

from __future__ import annotations

import threading
from collections import deque
from contextlib import contextmanager, suppress
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Protocol, TypeVar

from dora_cache.copying import Uncopyable
from dora_cache.errors import warn

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator

__all__ = ["Mutex", "exclusive"]

P = ParamSpec("P")


class Mutex(Uncopyable):
    """A reentrant lock. The garbage collector may run anybody's code while it is held.

    What that code asks for is put off until the lock is released, so that nothing is changed
    half-way through (see :func:`exclusive`). Warnings and log records wait as well: filters and
    handlers may run code.

    Args:
        settle: called with the lock held, when it has been acquired and before it is released.

    Attributes:
        lock: the lock itself, for short sections. :meth:`catch_up` has to be called after them:
            another thread may have put something off meanwhile.
    """

    def __init__(self, settle: Callable[[], object]) -> None:
        self.lock: Any = threading.RLock()
        self._settle = settle
        self._later: deque[Callable[[], object]] = deque()
        self._warned: set[Hashable] = set()
        self._told: deque[Callable[[], object]] = deque()

    @property
    def is_owned(self) -> bool:
        """Whether this thread holds the lock."""
        owned: bool = self.lock._is_owned()
        return owned

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock, and do what was put off once it is released."""
        try:
            with self.lock:
                self._settle()
                try:
                    yield
                finally:
                    self._settle()
        finally:
            self.catch_up()

    def later(self, action: Callable[[], object], *, now: bool = False) -> None:
        """Do something once the lock is released; it must not raise.

        Args:
            action: called without arguments.
            now: do it at once if the lock is free. Does not wait for the lock.
        """
        self._later.append(action)
        if now and not self.is_owned and self.lock.acquire(blocking=False):
            try:
                self._settle()
            finally:
                self.lock.release()
            self.catch_up()

    def reset(self) -> None:
        """Make the lock anew, for a child process: a thread that is not there may have held it."""
        self.lock = threading.RLock()

    def catch_up(self) -> None:
        """Do what had to wait, unless this thread still holds the lock."""
        if not (self._later or self._told) or self.is_owned:
            return
        while self._later:
            try:
                action = self._later.popleft()
            except IndexError:  # another thread took the last one
                break
            action()
        while self._told:  # never an error, whatever filters and handlers do
            with suppress(Exception):
                self._told.popleft()()

    def tell(self, action: Callable[[], object]) -> None:
        """Log something, when the lock is released."""
        self._told.append(action)

    def warn(self, cause: Hashable, text: str) -> None:
        """Warn once per cause, when the lock is released."""
        if cause not in self._warned:
            self._warned.add(cause)
            self.tell(partial(warn, text))

    def failed(self, what: str, error: Exception) -> None:
        """Warn, once per cause, of something that failed and will be made up for."""
        text = f"{what} failed, so values are derived again: {type(error).__name__}: {error}"
        self.warn((what, type(error)), text)

    def attempt(self, operation: str, action: Callable[[], Any], otherwise: Any) -> Any:
        """Do something with the backend; a failure costs a warning per cause, never an inference.

        Args:
            operation: its name, for the warning.
            action: calls it.
            otherwise: what to return if it fails.
        """
        try:
            return action()
        except Exception as error:  # noqa: BLE001 - whatever a third party's backend raises
            self.failed(f"the backend's {operation}", error)
            return otherwise


class _Owner(Protocol):
    mutex: Mutex


S = TypeVar("S", bound=_Owner)


def exclusive(
    method: Callable[Concatenate[S, P], int],
) -> Callable[Concatenate[S, P], int]:
    """Give a method of what has a ``mutex`` the lock.

    The garbage collector may run a ``__del__`` that calls the method inside the lock, in the thread
    that has it. Then it is put off until the lock is released, and returns 0.
    """

    @wraps(method)
    def wrapper(self: S, /, *args: P.args, **kwargs: P.kwargs) -> int:
        if self.mutex.is_owned:
            self.mutex.later(partial(wrapper, self, *args, **kwargs))
            return 0
        with self.mutex.held():
            return method(self, *args, **kwargs)

    return wrapper
