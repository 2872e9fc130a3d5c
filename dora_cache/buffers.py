"""Buffers of derived values, which compiled code reads without a lookup.

The core voids them at events, fills them afterwards, and counts their bytes towards the cap. What
they hold, and how it is derived, is the recipes' business.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from dora_cache.copying import Uncopyable

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable

    import torch
    from torch import Tensor

    from dora_cache.binding import Binding, Buffer
    from dora_cache.memory import Memory
    from dora_cache.mutex import Mutex

__all__ = ["Buffers"]


class Buffers(Uncopyable):
    """The buffers of one cache.

    Args:
        mutex: the cache's lock.
        memory: where their bytes are counted.
        bindings: returns the cache's bindings.
    """

    def __init__(
        self, mutex: Mutex, memory: Memory, bindings: Callable[[], Iterable[Binding]]
    ) -> None:
        self._mutex = mutex
        self._memory = memory
        self._bindings = bindings
        self._closed = False

    def close(self) -> None:
        """Give none out any more; the lock is held."""
        self._closed = True
        for binding in self._bindings():
            self.drop_all(binding)

    def follow(self, binding: Binding, adapter: str, buffer: Buffer) -> None:
        """Take on what compiled code reads of an owner and adapter, in place of any older one."""
        with self._mutex.held():
            self._drop(binding.buffers.get(adapter))
            binding.buffers[adapter] = buffer

    def of(self, adapter: str) -> list[Buffer]:
        """Return what compiled code may read of an adapter, layer by layer."""
        found = [binding.buffers.get(adapter) for binding in list(self._bindings())]
        return [buffer for buffer in found if buffer is not None]

    def all(self) -> list[tuple[str, Buffer]]:
        """Return every buffer with its adapter."""
        return [pair for binding in list(self._bindings()) for pair in binding.buffers.items()]

    def reserve(self, buffer: Buffer, nbytes: int, device: torch.device) -> bool:
        """Set bytes of a device's cap aside for a buffer.

        Entries that are not pinned make room, other buffers do not.

        Returns:
            Whether there is room; if not, the buffer holds nothing any more.
        """
        with self._mutex.held():
            self._release(buffer)
            buffer.nbytes = 0
            reserve = partial(self._memory.reserve, buffer, nbytes, device)
            if self._closed or not self._mutex.attempt("max_bytes", reserve, False):  # noqa: FBT003
                self._drop(buffer)
                return False
            buffer.nbytes = nbytes
            return True

    def publish(
        self,
        buffer: Buffer,
        values: tuple[Tensor, ...],
        parameters: tuple[Tensor | None, ...],
    ) -> bool:
        """Let compiled code read a buffer, unless an event has come since it was derived."""
        with self._mutex.held():
            if buffer.stale or self._closed or not buffer.nbytes:
                return False
            buffer.values, buffer.parameters = values, parameters
            return True

    def drop(self, buffer: Buffer | None) -> None:
        """Free a buffer's memory; it stays empty until it is prepared."""
        with self._mutex.held():
            self._drop(buffer)

    def drop_all(self, binding: Binding) -> None:
        """Free the memory of all buffers of a binding; the lock is held."""
        while binding.buffers:
            self._drop(binding.buffers.popitem()[1])

    def void(self, buffer: Buffer) -> None:
        """Keep compiled code from reading a buffer until it is filled."""
        with self._mutex.held():
            buffer.void()

    def void_derived(self, storages: set[int]) -> None:
        """Void what is derived from some storages; the lock is held."""
        for _, buffer in self.all():
            if buffer.derived_from(storages):
                buffer.void()

    def evict(self, devices: Container[torch.device]) -> None:
        """Free the memory of all buffers on some devices; the lock is held."""
        for buffer in self._memory.buffers_on(devices):
            self._drop(buffer)

    def refill_later(self, bindings: Iterable[Binding]) -> None:
        """Fill what an event voids, as far as that can be done, after the event."""
        for binding in bindings:
            for buffer in binding.buffers.values():
                self._mutex.later(partial(_fill_stale, buffer))

    def _drop(self, buffer: Buffer | None) -> None:
        if buffer is not None:
            self._release(buffer)
            buffer.drop()

    def _release(self, buffer: Buffer) -> None:
        self._mutex.attempt("resize", lambda: self._memory.release(buffer), None)


def _fill_stale(buffer: Buffer) -> None:
    if buffer.stale:
        buffer.fill()
