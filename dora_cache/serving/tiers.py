"""What of the adapters is on the device, and what on the host, each under a cap."""

from __future__ import annotations

import functools
import logging
import sys
import threading
import time
from bisect import bisect_left
from collections import Counter, deque
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING

import torch

from dora_cache.backends import Entry, create
from dora_cache.core.history import History
from dora_cache.core.tracing import span
from dora_cache.errors import BackendError, CapError, PinError, warn_once
from dora_cache.serving.residents import Resident
from dora_cache.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Sequence

    from torch import Tensor

    from dora_cache.backends import Backend
    from dora_cache.core.tracing import Attributes
    from dora_cache.serving.files import AdapterFiles
    from dora_cache.serving.residents import Layout

__all__ = ["LOAD_SECONDS", "Adapter", "Tiers"]

LOAD_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Times by which loads are counted."""

_log = logging.getLogger(__name__)


class Adapter:
    """One version of an adapter: what was added under a name, once.

    Attributes:
        number: no other one has it.
        resident: what it has on the device; None while it is not there.
        loading: whether a thread is bringing it there.
        users: how many routes have it now.
        pinned: whether it stays on the device.
        retired: whether it was removed, or replaced by another one of its name.
        hits: lookups of it while it was on the device.
        misses: the others.
    """

    _last = 0

    def __init__(self, files: AdapterFiles, layouts: Sequence[Layout], layers: int) -> None:
        Adapter._last += 1
        self.number = Adapter._last
        self.files = files
        self.layouts = tuple(layouts)
        self.layers = layers
        self.nbytes = sum(layout.nbytes for layout in layouts)
        self.resident: Resident | None = None
        self.loading = False
        self.users = 0
        self.pinned = False
        self.retired = False
        self.hits = self.misses = 0

    @property
    def name(self) -> str:
        """Its name in the pool."""
        return self.files.name


class Tiers:
    """The adapters' memory.

    On the device, adapters in use and pinned ones stay, and of the others the backend decides.
    What the host has is a copy, so that leaving the device costs nothing.

    Args:
        device_bytes: the cap there; None for none.
        policy: the backend that chooses what leaves the device; it can pin and be resized.
        host: of the host, or None to have none.
        pinned: whether host memory is pinned.

    Attributes:
        lock: held while anything here is read or changed, never while an adapter is read.
        hits: lookups of adapters that were on the device.
        misses: the others.
        loads: adapters brought to the device.
        load_seconds: what that took, all together.
        load_times: loads by the first of ``LOAD_SECONDS`` that they did not exceed; the last number
            is of those that exceeded all.
        failures: how often an adapter could not be brought there.
        reads: of those, how many from their files.
        evictions: adapters that left the device for others.
        history: the counters over time.
    """

    def __init__(
        self, device_bytes: int | None, policy: str, host: Backend | None, *, pinned: bool
    ) -> None:
        self.lock = threading.Condition()  # of a reentrant lock
        self.hits = self.misses = self.loads = self.reads = self.evictions = self.failures = 0
        self.load_seconds = 0.0
        self.load_times = [0] * (len(LOAD_SECONDS) + 1)
        self.history = History()
        self.device_bytes = device_bytes
        self.host = host
        self._pinned = pinned
        self._reserved = 0
        self._device = create(policy, max_bytes=sys.maxsize)
        self._device.on_evict(self._evicted)
        self._present: dict[Hashable, Adapter] = {}
        self._pinned_ones: set[Adapter] = set()
        self._holding: Counter[int] = Counter()  # uses, by the thread that began them
        self._waiting: set[int] = set()  # threads that wait for memory
        self._queue: dict[object, None] = {}  # batches that wait for memory, in order
        self._told: deque[Callable[[], object]] = deque()  # to be logged without the lock

    @property
    def device_nbytes(self) -> int:
        """Bytes that adapters have on the device, those on their way included."""
        return self._device.nbytes + self._reserved

    @property
    def host_nbytes(self) -> int:
        """Bytes that the host has."""
        return 0 if self.host is None else self.host.nbytes

    # The device

    def tier(self, adapter: Adapter) -> str:
        """Return the fastest tier that has an adapter."""
        with self.lock:
            if adapter.resident is not None:
                return "device"
            hosted = () if self.host is None else self.host.keys()
            return "host" if adapter.number in hosted else "files"

    @property
    def in_use(self) -> bool:
        """Whether adapters have been acquired and not been released."""
        return self._holding.total() > 0

    def acquire(self, wanted: Sequence[Adapter]) -> int:
        """Bring adapters to the device and keep them there until :meth:`release`.

        All at once or none, so that two batches do not wait for each other.

        Args:
            wanted: distinct ones.

        Returns:
            What tells :meth:`release` who it was.

        Raises:
            CapError: they do not fit.
            AdapterFileError: one cannot be read.
        """
        counted = False
        thread = threading.get_ident()
        while True:
            with self.lock:
                self._wait_for_room(wanted)
                self._holding[thread] += 1
                missing = [one for one in wanted if one.resident is None and not one.loading]
                present = [one for one in wanted if one.resident is not None]
                for one in present:
                    self._device.get(one.number)  # a use, for the order of eviction
                if not counted:
                    counted = True
                    self._count(wanted, len(present))
                for one in missing:
                    one.loading = True
            try:
                for index, one in enumerate(missing):
                    try:
                        self._bring(one)
                    except BaseException:
                        for other in missing[index + 1 :]:
                            self._give_up(other)
                        raise
                with self.lock:
                    while any(one.loading for one in wanted):
                        self.lock.wait()
                    if all(one.resident is not None for one in wanted):
                        return thread
            except BaseException:
                self.release(wanted, thread)
                raise
            self.release(wanted, thread)  # another thread could not read one; try it here

    def _count(self, wanted: Sequence[Adapter], present: int) -> None:
        """Count a lookup of each adapter, of which so many are on the device."""
        self.hits += present
        self.misses += len(wanted) - present
        for one in wanted:
            if one.resident is None:
                one.misses += 1
            else:
                one.hits += 1

    def threads(self) -> set[int]:
        """Return the threads that use adapters, or the base model, at present."""
        with self.lock:
            return set(self._holding)

    def release(self, adapters: Sequence[Adapter], thread: int) -> None:
        """Let go of adapters that :meth:`acquire` has brought for a thread."""
        with self.lock:
            self._holding[thread] -= 1
            if not self._holding[thread]:
                del self._holding[thread]
            for one in adapters:
                self._use(one, -1)
            self.lock.notify_all()

    def _use(self, adapter: Adapter, change: int) -> None:
        adapter.users += change
        self._settle(adapter)

    def _settle(self, adapter: Adapter) -> None:
        """Do what follows from an adapter's users and pin."""
        if adapter.retired and not adapter.users and not adapter.loading:
            self._forget(adapter)
        elif adapter.users or adapter.pinned:
            self._device.pin(adapter.number)  # type: ignore[attr-defined]
        else:
            self._device.unpin(adapter.number)  # type: ignore[attr-defined]

    def _forget(self, adapter: Adapter) -> None:
        self._device.unpin(adapter.number)  # type: ignore[attr-defined]
        self._device.delete(adapter.number)
        self._left(adapter.number)
        if self.host is not None:
            self.host.delete(adapter.number)
        adapter.files.close()

    def _wait_for_room(self, wanted: Sequence[Adapter]) -> None:
        """Reserve what is missing of some adapters, and count a use of each.

        It waits for threads that go on. One that waits here lets go of nothing, and neither does
        this one, be it a block around this one that holds memory or another task.

        Batches that need little would keep one that needs much waiting for ever. So they let those
        before them go first, but for a limited time: who runs may be waiting for them.
        """
        thread, ticket = threading.get_ident(), object()
        last = time.monotonic() + _GIVE_WAY
        self._waiting.add(thread)
        self._queue[ticket] = None
        try:
            while True:
                left = last - time.monotonic()
                if (
                    next(iter(self._queue)) is not ticket
                    and thread not in self._holding
                    and left > 0
                ):
                    self.lock.wait(left)
                    continue
                for one in wanted:
                    self._use(one, 1)
                missing = [one for one in wanted if one.resident is None and not one.loading]
                need = sum(one.nbytes for one in missing)
                if self._make_room(need):
                    return
                for one in wanted:
                    self._use(one, -1)
                if not self._reserved and self._waiting.issuperset(self._holding):
                    raise CapError(self._too_much(wanted))
                self.lock.wait()
        finally:
            self._waiting.discard(thread)
            del self._queue[ticket]
            self.lock.notify_all()

    def _make_room(self, need: int) -> bool:
        """Reserve bytes on the device, evicting what nobody uses; return whether they fit."""
        if self.device_bytes is not None and need > self._room():
            return False
        self._reserved += need
        self._apportion()
        return True

    def _room(self) -> int:
        """Return the bytes that there are beside what is in use, pinned or on its way."""
        assert self.device_bytes is not None  # noqa: S101 - asked by those who know
        return self.device_bytes - self._reserved - self._kept()

    def _kept(self) -> int:
        present = self._present.values()
        return sum(one.nbytes for one in present if one.users or one.pinned)

    def _apportion(self) -> None:
        """Have the device's backend evict what is above its part of the cap."""
        if self.device_bytes is not None:
            self._device.resize(self.device_bytes - self._reserved)  # type: ignore[attr-defined]

    def _too_much(self, wanted: Sequence[Adapter]) -> str:
        each = ", ".join(f"{one.name} {format_bytes(one.nbytes)}" for one in wanted)
        others = [one for one in self._present.values() if one not in wanted]
        kept = sum(one.nbytes for one in others if one.users or one.pinned)
        beside = kept + self._reserved
        cap = format_bytes(self.device_bytes or 0)
        return (
            f"the batch needs {format_bytes(sum(one.nbytes for one in wanted))} on the device "
            f"({each}), the cap is device_bytes={cap}, and {format_bytes(beside)} of it are taken "
            "by what is pinned or in use around it: use fewer adapters in one batch, "
            "unpin some, or pool.resize(device_bytes=...)"
        )

    def _bring(self, adapter: Adapter) -> None:
        """Bring an adapter, for which there is room, to the device; the lock is not held."""
        try:
            with span("load") as attributes:
                fields = {} if attributes is None else attributes
                fields.update(adapter=adapter.name, bytes=adapter.nbytes)
                self._place(adapter, fields)
        finally:
            self.log()

    def _place(self, adapter: Adapter, fields: Attributes) -> None:
        start = time.perf_counter()
        try:
            resident, fields["source"] = self._load(adapter)
        except BaseException as error:
            reason = f"{type(error).__name__}: {error}"
            with self.lock:
                self.failures += 1
                self._tell(
                    logging.WARNING, "adapter %s was not loaded", fields | {"reason": reason}
                )
                self._give_up(adapter)
            raise
        seconds = fields["seconds"] = time.perf_counter() - start
        entry = Entry(tuple(resident.memory), cost=seconds)
        with self.lock:
            self.load_seconds += seconds
            self.load_times[bisect_left(LOAD_SECONDS, seconds)] += 1
            self._tell(logging.INFO, "loaded adapter %s", fields)
            self._give_up(adapter)
            adapter.resident = resident
            self._present[adapter.number] = adapter
            self.loads += 1
            if not self._device.put(adapter.number, entry):
                self._left(adapter.number)
                if adapter.users:
                    msg = f"the device's backend refused {adapter.name}, for which it had room"
                    raise BackendError(msg)
            self._settle(adapter)
            if self.history.is_due:
                self.sample()

    def sample(self) -> None:
        """Take a sample of the counters; the lock is held."""
        self.history.add(self.hits, self.misses, self.evictions, self.device_nbytes)

    def _give_up(self, adapter: Adapter) -> None:
        """Take back what was reserved for an adapter."""
        with self.lock:
            adapter.loading = False
            self._reserved -= adapter.nbytes
            self._apportion()
            self.lock.notify_all()

    def _tell(self, level: int, text: str, fields: Attributes) -> None:
        if _log.isEnabledFor(level):
            self._told.append(partial(_log.log, level, text, fields["adapter"], extra=dict(fields)))

    def log(self) -> None:
        """Log what has happened; the lock is not held, since handlers run anybody's code."""
        while self._told:
            with suppress(Exception):  # another thread may have taken the last one
                self._told.popleft()()

    def _load(self, adapter: Adapter) -> tuple[Resident, str]:
        """Return an adapter on the device, and whether it was on the ``host`` or in ``files``."""
        with torch.inference_mode(mode=False), torch.no_grad():
            packed, source = self._packed(adapter)
            resident = Resident(adapter.layers)
            for layout, weights in zip(adapter.layouts, packed, strict=True):
                with self._loading_on(layout.device) as caller:
                    resident.place(layout, weights)
                    if caller is not None:  # which may have written the base weights
                        torch.cuda.current_stream(layout.device).wait_stream(caller)
                    resident.refresh(layout)
                    resident.set_ready(layout.device)
        return resident, source

    @contextmanager
    def _loading_on(self, device: torch.device) -> Iterator[torch.cuda.Stream | None]:
        """Run copies to a device on a stream of their own; yield the caller's stream."""
        if device.type != "cuda":
            yield None
            return
        caller = torch.cuda.current_stream(device)
        with torch.cuda.stream(_loading_stream(device)):
            yield caller

    def _packed(self, adapter: Adapter) -> tuple[tuple[Tensor, ...], str]:
        """Return an adapter's weights from the host, or else from its files; and which it was."""
        number, entry = adapter.number, None
        if self.host is not None:
            with self._forgiving(), self.lock:
                entry = self.host.get(number)
            if entry is not None:
                return entry.tensors, "host"
        start = time.perf_counter()
        try:
            packed = tuple(
                layout.pack(adapter.files, pinned=self._pinned) for layout in adapter.layouts
            )
        finally:
            adapter.files.close()  # a process may have some ten thousand mapped files, no more
        cost = time.perf_counter() - start
        with self._forgiving(), self.lock:
            self.reads += 1
            if self.host is not None and not adapter.retired:
                self.host.put(number, Entry(packed, cost=cost))
        return packed, "files"

    @contextmanager
    def _forgiving(self) -> Iterator[None]:
        """Go on without the host where its backend fails."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - whatever a backend raises
            kind = type(error).__name__
            warn_once(f"the host's backend failed, adapters are read again: {kind}: {error}")

    def _evicted(self, number: Hashable) -> None:
        self.evictions += 1
        gone = self._present.get(number)
        if gone is not None:
            self._tell(
                logging.INFO, "evicted adapter %s", {"adapter": gone.name, "bytes": gone.nbytes}
            )
        self._left(number)

    def _left(self, number: Hashable) -> None:
        """Take note that an adapter is not on the device any more."""
        adapter = self._present.pop(number, None)
        if adapter is not None and adapter.resident is not None:
            adapter.resident.leave()
            adapter.resident = None

    # Without a batch

    def expect(self, adapters: Sequence[Adapter]) -> None:
        """Have those that are on the device be evicted after others."""
        with self.lock:
            for one in adapters:
                if one.resident is not None:
                    self._device.get(one.number)

    def prefetch(self, adapter: Adapter) -> None:
        """Bring an adapter to the device if there is room beside what is in use."""
        with self.lock:
            if adapter.resident is not None or adapter.loading or adapter.retired:
                return
            if not self._make_room(adapter.nbytes):
                return
            adapter.loading = True
        self._bring(adapter)

    def pin(self, adapter: Adapter, *, pinned: bool) -> None:
        """Keep an adapter that is on the device there, or let it go again.

        Raises:
            PinError: it does not fit beside what is pinned.
        """
        with self.lock:
            others = (one for one in self._pinned_ones if one is not adapter)
            taken = adapter.nbytes + sum(one.nbytes for one in others)
            if pinned and self.device_bytes is not None and taken > self.device_bytes:
                msg = (
                    f"{adapter.name} takes {format_bytes(adapter.nbytes)}, and with what is pinned "
                    f"that is more than device_bytes={format_bytes(self.device_bytes)}: unpin "
                    "others, or pool.resize(device_bytes=...)"
                )
                raise PinError(msg)
            adapter.pinned = pinned
            (self._pinned_ones.add if pinned else self._pinned_ones.discard)(adapter)
            self._settle(adapter)
            self.lock.notify_all()

    def retire(self, adapter: Adapter) -> None:
        """Drop an adapter, once no batch uses it."""
        with self.lock:
            adapter.retired = True
            adapter.pinned = False
            self._pinned_ones.discard(adapter)
            self._settle(adapter)
            self.lock.notify_all()

    def resize(self, device_bytes: int | None) -> None:
        """Change the device's cap.

        Raises:
            CapError: what is in use or pinned takes more; nothing has changed.
        """
        with self.lock:
            taken = self._reserved + self._kept()
            if device_bytes is not None and device_bytes < taken:
                msg = (
                    f"device_bytes={format_bytes(device_bytes)} is less than the "
                    f"{format_bytes(taken)} that are in use or pinned: unpin adapters, or resize "
                    "outside `use`"
                )
                raise CapError(msg)
            self.device_bytes = device_bytes
            if device_bytes is None:
                self._device.resize(sys.maxsize)  # type: ignore[attr-defined]
            self._apportion()
            self.lock.notify_all()

    def close(self) -> None:
        """Drop everything."""
        with self.lock:
            for number in list(self._present):
                self._left(number)
            self._device.close()
            if self.host is not None:
                self.host.close()


_GIVE_WAY = 1.0
"""Seconds for which a batch lets those go first that have waited longer for memory."""


@functools.cache
def _loading_stream(device: torch.device) -> torch.cuda.Stream:
    """Return one stream for all pools: cuBLAS keeps a workspace for each that it has run on."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
