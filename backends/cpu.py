"""Keep entries in host memory, and on the device what pays most there."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import torch

from dora_cache.backends.budget import BudgetBackend
from dora_cache.backends.dict import DictBackend
from dora_cache.backends.lru import LRUBackend
from dora_cache.backends.prefetch import Prefetch
from dora_cache.backends.storage import UncopyableBackend, checked_cap
from dora_cache.backends.transfer import HostEntry, Transfer
from dora_cache.errors import warn

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Hashable

    from dora_cache.backends.protocol import Entry

__all__ = ["CPUBackend"]

_AHEAD = 2
"""How many of the largest values may be on their way to the device at once."""

_PATIENCE = 256
"""Lookups without copies ahead, after one for which there was no memory."""


class _DeviceTier(BudgetBackend):
    """The bounded tier on the device: what it evicts may go to the host."""

    def __init__(self, max_bytes: int, offload: Callable[[Hashable, Entry], object]) -> None:
        super().__init__(max_bytes)
        self._offload = offload

    @property
    def room(self) -> int:
        """Bytes that are free."""
        return self._max_bytes - self._used

    def holds(self, key: Hashable) -> bool:
        """Whether there is an entry under ``key``; not a use."""
        return key in self._held

    def put_back(self, key: Hashable, entry: Entry) -> bool:
        """Do what ``put`` does, for a copy of what was derived some time ago."""
        return self._put(key, entry, derived=False)

    def dropped(self, key: Hashable, entry: Entry) -> None:
        self._offload(key, entry)


class CPUBackend(UncopyableBackend):
    """Store entries in host memory, pinned where CUDA is present, and copy them back on use.

    With ``device_bytes``, the entries that save the most time per byte stay on their device, as
    ``budget`` keeps them. Those that have to leave it go to the host. The order in which entries
    are asked for is learned, and the next ones are copied back ahead, on a stream of their own, so
    that the copies run beside the model's own work. The copies on their way count as well.

    An entry that takes less time to derive than to copy is not worth a place on the host. Values
    that live on the CPU anyway are stored as they are.

    Args:
        max_bytes: cap on the host's bytes (least recently used go first); None for no cap.
        device_bytes: cap on the device's bytes; None for nothing there.

    Attributes:
        fetches: how often an entry was copied back for a ``get``.
        prefetched: how many of these copies had begun before.
        copying: seconds that these copies took by themselves, as estimated from those timed.
    """

    host_sizes = frozenset({"max_bytes"})
    """Settings that are sizes of host memory, whatever device the model is on."""

    def __init__(self, max_bytes: int | None = None, device_bytes: int | None = None) -> None:
        self.fetches = 0
        self.prefetched = 0
        self.copying = 0.0
        self._transfer = Transfer()
        self._device_bytes = 0 if device_bytes is None else checked_cap(device_bytes)
        self._device = None if device_bytes is None else _DeviceTier(device_bytes, self._drop)
        self._prefetch = Prefetch()
        self._window = 0  # of the device's bytes, those for copies on their way
        self._largest = 0  # bytes of the largest entry offloaded
        self._warned = False
        self._patience = 0  # lookups until copies are begun ahead again
        self._away: dict[Hashable, int] = {}  # bytes of what is on the host alone, by key
        # Keys that left a tier in the present call; evicted are those that none holds at its end.
        self._dropped: list[Hashable] = []
        self._host: DictBackend | LRUBackend = (
            DictBackend() if max_bytes is None else self._bounded_host(max_bytes)
        )

    @property
    def max_bytes(self) -> int | None:
        """The caps of both tiers together; None where the host's is unbounded."""
        if self._host.max_bytes is None:
            return None
        return self._host.max_bytes + self._device_bytes

    @property
    def nbytes(self) -> int:
        """Bytes held by both tiers."""
        return self._host.nbytes + self.device_nbytes

    @property
    def device_nbytes(self) -> int:
        """Bytes held on the device, copies on their way there included."""
        return self._prefetch.nbytes + (0 if self._device is None else self._device.nbytes)

    def get(self, key: Hashable) -> Entry | None:
        """Return the entry under ``key`` with its tensors on their own device, or None."""
        if self._device is None:
            stored = self._host.get(key)
            return self._fetched(stored) if isinstance(stored, HostEntry) else stored
        entry = self._device.get(key)
        if entry is None and key in self._away:
            entry = self._host.get(key)
            if isinstance(entry, HostEntry):
                entry = self._fetched(entry, self._prefetch.take(key))
                # Never in another's place: only put() may lose an entry.
                if entry.nbytes <= self._device.room and self._device.put_back(key, entry):
                    self._away.pop(key, None)
        self._prefetch.asked(key)
        if self._away and self._window:
            if self._patience:
                self._patience -= 1
            else:
                self._fill(key)
        return entry

    def _fetched(self, stored: HostEntry, ahead: Entry | None = None) -> Entry:
        self.fetches += 1
        self.prefetched += ahead is not None
        self.copying += self._transfer.seconds(stored.nbytes)
        if ahead is not None:
            return ahead
        with suppress(torch.OutOfMemoryError):
            return self._transfer.to_device(stored)
        self._prefetch.clear()  # not needed yet, and this is
        return self._transfer.to_device(stored)

    def _fill(self, key: Hashable) -> None:
        """Have copies of what is expected next on their way."""
        try:
            self._prefetch.fill(key, self._away, self._window, self._load)
        except RuntimeError:  # no memory there for what is not needed yet
            self._prefetch.clear()
            self._patience = _PATIENCE

    def _load(self, key: Hashable) -> Entry | None:
        stored = self._host.get(key)
        return self._transfer.to_device(stored) if isinstance(stored, HostEntry) else None

    def resize(self, max_bytes: int) -> None:
        """Change the cap on the host's bytes; what was used least recently goes at once.

        Where there was no cap, what was stored first goes first.
        """
        if isinstance(self._host, LRUBackend):
            self._host.resize(max_bytes)
        else:
            bounded = self._bounded_host(max_bytes)
            for key in list(self._host.keys()):
                entry = self._host.get(key)
                self._host.delete(key)
                if entry is not None and not bounded.put(key, entry):
                    self._drop_from_host(key)
            self._host = bounded
        self._report()

    def put(self, key: Hashable, entry: Entry) -> bool:
        """Store ``entry`` on its device, or else on the host if that is worth it."""
        self.delete(key)
        try:
            self._place(key, entry)
        finally:
            self._report(putting=[key])
        return self._holds(key)

    def _place(self, key: Hashable, entry: Entry) -> None:
        if not self._transfer.is_elsewhere(entry):
            if self._host.put(key, entry):
                self._away[key] = entry.nbytes
            return
        if self._device is None or not self._device.put(key, entry):
            self._offload(key, entry)
        self._apportion()

    def delete(self, key: Hashable) -> bool:
        """Drop the entry under ``key``; return whether there was one."""
        resident = self._device is not None and self._device.delete(key)
        stored = self._host.delete(key)
        self._left_host(key)
        return resident or stored

    def clear(self) -> None:
        """Drop every entry."""
        self._host.clear()
        self._prefetch.clear()
        self._away.clear()
        self._window = self._largest = 0
        if self._device is not None:
            self._device.clear()
            self._device.resize(self._device_bytes)

    def keys(self) -> Collection[Hashable]:
        """Return the keys held now."""
        held = self._away.keys()
        return held if self._device is None else held | self._device.keys()

    def __len__(self) -> int:
        """Return the number of entries."""
        return len(self._away) + (0 if self._device is None else len(self._device))

    def close(self) -> None:
        """Drop every entry."""
        self.clear()

    def _holds(self, key: Hashable) -> bool:
        return key in self._away or (self._device is not None and self._device.holds(key))

    def _drop(self, key: Hashable, entry: Entry) -> None:
        """Have what the device has no room for on the host, or nowhere."""
        if not self._offload(key, entry):
            self._dropped.append(key)

    def _bounded_host(self, max_bytes: int) -> LRUBackend:
        host = LRUBackend(max_bytes)
        host.on_evict(self._drop_from_host)
        return host

    def _drop_from_host(self, key: Hashable) -> None:
        self._left_host(key)
        self._dropped.append(key)

    def _report(self, putting: Collection[Hashable] = ()) -> None:
        """Report what this call has evicted; what it puts is kept or refused, but not evicted."""
        dropped, self._dropped = dict.fromkeys(self._dropped), []
        for key in dropped:
            if key not in putting and not self._holds(key):
                self._evicted(key)

    def _offload(self, key: Hashable, entry: Entry) -> bool:
        """Have an entry that is not on the device any more on the host, if that is worth it."""
        try:
            stored = self._host.get(key)  # a copy made earlier
            if stored is None:
                cost, expected = self._costs(key, entry)
                if 0.0 < expected < self._transfer.seconds(entry.nbytes) or not entry.intact:
                    return False
                stored = self._transfer.to_host(entry, cost)
                if not self._host.put(key, stored):
                    return False
        except RuntimeError as error:  # no memory to pin, most often
            self._warn(error)
            return False
        self._away[key] = stored.nbytes
        if isinstance(stored, HostEntry):
            self._largest = max(self._largest, stored.nbytes)
        return True

    def _costs(self, key: Hashable, entry: Entry) -> tuple[float, float]:
        """Return the seconds that deriving a value took, as far as is known, and usually takes.

        The device may not have come to it yet. Then what it took the times before counts.
        """
        latest = (entry.ready.seconds() if entry.ready is not None else None) or 0.0
        usual = (self._device.expected(key) if self._device is not None else None) or 0.0
        cost = max(entry.cost, latest)
        return cost, max(cost, usual) if cost and not latest else cost

    def _warn(self, error: RuntimeError) -> None:
        if self._warned:
            return
        self._warned = True
        text = f"a value could not be copied to the host, so it is derived again: {error}"
        warn(text)

    def _left_host(self, key: Hashable) -> None:
        self._away.pop(key, None)
        self._prefetch.take(key)

    def _apportion(self) -> None:
        """Leave a part of the device's bytes to copies on their way, once there can be any."""
        half = self._device_bytes // 2
        window = min(half, _AHEAD * self._largest) if self._largest <= half else 0
        if self._device is not None and window > self._window:
            self._window = window
            self._device.resize(self._device_bytes - window)
