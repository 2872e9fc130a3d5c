"""One backend for each device, for models that span several: each has a cap of its own."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

from dora_cache.backends.protocol import Declining
from dora_cache.backends.storage import UncopyableBackend

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Hashable, Iterable

    import torch

    from dora_cache.backends.protocol import Backend, Entry

__all__ = ["PerDeviceBackend"]

_REMEMBERED = 1 << 16  # keys whose entries are held no more


class PerDeviceBackend(UncopyableBackend):
    """Send each entry to the backend of the device that its tensors are on.

    Args:
        make: makes the backend of a device.
        devices: those whose backends are made now; others' are when a first entry comes.
    """

    def __init__(
        self, make: Callable[[torch.device], Backend], devices: Iterable[torch.device]
    ) -> None:
        self._make = make
        self._backends: dict[torch.device, Backend] = {}
        for device in devices:
            self.part(device)
        # Also of keys whose entries are gone: a policy may count who asks for them.
        self._places: dict[Hashable, Backend] = {}

    @property
    def keeps_everything(self) -> bool:
        """Whether no backend ever drops an entry of its own accord."""
        return all(getattr(one, "keeps_everything", False) is True for one in self._all())

    @property
    def max_bytes(self) -> int | None:
        """All caps together; None if one of the backends is unbounded."""
        caps = [backend.max_bytes for backend in self._all()]
        known = [cap for cap in caps if cap is not None]
        return sum(known) if len(known) == len(caps) else None

    @property
    def nbytes(self) -> int:
        """Bytes held on all devices."""
        return sum(backend.nbytes for backend in self._all())

    def part(self, device: torch.device) -> Backend:
        """Return the backend of a device, made if need be."""
        backend = self._backends.get(device)
        if backend is None:
            backend = self._backends[device] = self._make(device)
            backend.on_evict(self._evicted)
        return backend

    def on_evict(self, evicted: Callable[[Hashable], object]) -> None:
        """Have every backend report its evictions, also those that are made later."""
        super().on_evict(evicted)
        for backend in self._all():
            backend.on_evict(evicted)

    def place(self, key: Hashable, entry: Entry) -> Backend:
        """Return the backend that an entry belongs to; an older one elsewhere is dropped."""
        backend = self.part(entry.tensors[0].device)
        before = self._places.get(key)
        if before is not backend:
            if before is not None:
                before.delete(key)
            elif len(self._places) >= _REMEMBERED + 2 * len(self):
                held = set(self.keys())
                self._places = {one: at for one, at in self._places.items() if one in held}
            self._places[key] = backend
        return backend

    def get(self, key: Hashable) -> Entry | None:
        """Return the entry under ``key``, or None."""
        backend = self._places.get(key)
        return None if backend is None else backend.get(key)

    def put(self, key: Hashable, entry: Entry) -> bool:
        """Store ``entry`` on its own device, if that device's backend keeps it."""
        return self.place(key, entry).put(key, entry)

    def declines(self, key: Hashable) -> bool:
        """Whether the key's device's backend would refuse its value."""
        backend = self._places.get(key)
        return isinstance(backend, Declining) and backend.declines(key)

    def delete(self, key: Hashable) -> bool:
        """Drop the entry under ``key``; return whether there was one."""
        backend = self._places.get(key)
        return backend is not None and backend.delete(key)

    def clear(self) -> None:
        """Drop every entry."""
        self._places.clear()
        for backend in self._all():
            backend.clear()

    def keys(self) -> Collection[Hashable]:
        """Return the keys held now."""
        return list(chain.from_iterable(backend.keys() for backend in self._all()))

    def __len__(self) -> int:
        """Return the number of entries."""
        return sum(len(backend) for backend in self._all())

    def close(self) -> None:
        """Close every backend."""
        self._places.clear()
        for backend in self._all():
            backend.close()

    def _all(self) -> list[Backend]:
        return list(self._backends.values())
