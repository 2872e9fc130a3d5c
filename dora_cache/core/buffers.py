"""Buffers of derived values, which compiled code reads without a lookup.

The core voids them at events, fills them afterwards, and counts their bytes towards the cap. What
they hold, and how it is derived, is the recipes' business.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet

from dora_cache.copying import Uncopyable

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Hashable, Iterable

    import torch
    from torch import Tensor, nn

    from dora_cache.core.binding import Binding, Buffer, Holder
    from dora_cache.core.memory import Memory
    from dora_cache.core.mutex import Mutex

__all__ = ["Buffers"]


class Buffers(Uncopyable):
    """The buffers of one cache.

    Args:
        mutex: the cache's lock.
        memory: where their bytes are counted.
        bindings: returns the cache's bindings.

    Attributes:
        wanted: calls that compiled code makes, by the form of the owners, by numbers of them both.
        entries: checks of compiled code, by what that code calls: kept for as long as that.
    """

    def __init__(
        self, mutex: Mutex, memory: Memory, bindings: Callable[[], Iterable[Binding]]
    ) -> None:
        self._mutex = mutex
        self._memory = memory
        self._bindings = bindings
        self._closed = False
        self.wanted: dict[int, dict[int, None]] = {}
        self.entries: WeakKeyDictionary[Any, object] = WeakKeyDictionary()
        self._copied: dict[int, WeakSet[Holder]] = {}

    def close(self) -> None:
        """Give none out any more; the lock is held."""
        self._closed = True
        for binding in self._bindings():
            self.drop_all(binding)
        self.entries.clear()
        self._copied.clear()

    def follow(self, binding: Binding, key: Hashable, buffer: Buffer) -> None:
        """Take on a value that compiled code reads of an owner."""
        with self._mutex.held():
            binding.buffers[key] = buffer

    def copied(self, container: nn.Module, holder: Holder) -> None:
        """Take note that compiled code reads a copy of a container of modules or parameters."""
        with self._mutex.held():
            self._copied.setdefault(id(container), WeakSet()).add(holder)

    def comes(self, parent: nn.Module, table: str, name: str, new: object) -> None:
        """Take note that a module is being given a part; takes no lock.

        Args:
            parent: the module.
            table: the attribute of the module that is to have the part.
            name: the part's.
            new: the part.
        """
        for holder in list(self._copied.get(id(parent), ())):
            holder.gets(parent.__dict__[table], name, new)

    def all(self) -> list[Buffer]:
        """Return every buffer, and what else takes bytes."""
        scalings = [one.scalings for one in self.holders()]
        return scalings + [
            buffer for one in list(self._bindings()) for buffer in list(one.buffers.values())
        ]

    def holders(self) -> list[Any]:
        """Return what compiled code may read, owner by owner."""
        return [one.holder for one in list(self._bindings()) if one.holder is not None]

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

    def publish(self, buffer: Buffer, values: Tensor | tuple[Tensor, ...]) -> bool:
        """Let compiled code read a buffer, unless an event has come since it was derived."""
        with self._mutex.held():
            if buffer.stale or self._closed or not buffer.nbytes:
                return False
            buffer.publish(values)
            return True

    def drop(self, buffer: Buffer | None) -> None:
        """Free a buffer's memory; it stays empty until it is filled."""
        with self._mutex.held():
            self._drop(buffer)

    def drop_all(self, binding: Binding) -> None:
        """Free the memory of all buffers of a binding; the lock is held."""
        if binding.holder is not None:
            self._drop(binding.holder.scalings)
            binding.holder.close()
        while binding.buffers:
            self._drop(binding.buffers.popitem()[1])

    def drop_adapter(self, binding: Binding, adapter: str) -> None:
        """Free the memory of a binding's buffers of an adapter; the lock is held."""
        for key, buffer in list(binding.buffers.items()):
            if adapter in buffer.adapters:
                self._drop(binding.buffers.pop(key))

    def void(self, buffer: Buffer) -> None:
        """Keep compiled code from reading a buffer until it is filled."""
        with self._mutex.held():
            buffer.void()

    def void_derived(self, storages: set[int]) -> None:
        """Void what is derived from some storages; the lock is held."""
        for buffer in self.all():
            if buffer.derived_from(storages):
                buffer.void()

    def evict(self, devices: Container[torch.device]) -> None:
        """Free the memory of all buffers on some devices; the lock is held."""
        for buffer in self._memory.buffers_on(devices):
            self._drop(buffer)

    def refill_later(self, bindings: Iterable[Binding]) -> None:
        """Fill what compiled code reads of owners, as far as that can be done, after an event."""
        for binding in bindings:
            holder = binding.holder
            if holder is not None and holder.used:
                self._mutex.later(partial(_update, holder))

    def _drop(self, buffer: Buffer | None) -> None:
        if buffer is not None:
            self._release(buffer)
            buffer.drop()

    def _release(self, buffer: Buffer) -> None:
        self._mutex.attempt("resize", lambda: self._memory.release(buffer), None)


def _update(holder: Holder) -> None:
    holder.update()
