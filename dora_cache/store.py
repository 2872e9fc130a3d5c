"""What is held, and everything that makes the cache forget it."""

from __future__ import annotations

import itertools
import threading
import warnings
import weakref
from collections import Counter, deque
from contextlib import ExitStack, contextmanager, suppress
from functools import partial, wraps
from itertools import chain
from typing import TYPE_CHECKING, Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from dora_cache.audit import Auditor
from dora_cache.backends import Declining
from dora_cache.backends.storage import storage_id
from dora_cache.binding import Binding, next_token
from dora_cache.copying import Uncopyable
from dora_cache.errors import (
    CacheWarning,
)
from dora_cache.keys import ALL_ADAPTERS, concerns
from dora_cache.memory import Memory
from dora_cache.reasons import Reason
from dora_cache.stamps import (
    Stamp,
)
from dora_cache.usage import Usage, Usages

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Hashable, Iterable, Iterator, Sequence

    from dora_cache.backends import Backend, Entry
    from dora_cache.binding import Buffer
    from dora_cache.config import CacheConfig
    from dora_cache.decorator import Derivation
    from dora_cache.keys import Adapters
    from dora_cache.report import Declined
    from dora_cache.shortcut import Shortcut

__all__ = ["Flight", "Record", "Store", "exclusive"]

_TIDY = 64  # values stored between two times that all records are looked at, at least


class Flight(Uncopyable):
    """A value on its way: derived by one thread, awaited by others."""

    __slots__ = (
        "adapter",
        "binding",
        "derivation",
        "done",
        "entry",
        "error",
        "stamp",
        "storable",
        "thread",
        "touched",
        "unstored",
    )

    def __init__(
        self, derivation: Derivation, binding: Binding, adapter: Adapters, stamp: Stamp
    ) -> None:
        self.binding = binding
        self.derivation = derivation
        self.adapter = adapter
        self.stamp = stamp
        self.thread = threading.get_ident()
        self.done = threading.Event()
        self.touched = False
        self.storable = True
        self.entry: Entry | None = None
        self.error: Exception | None = None
        self.unstored = Reason.UNSTORABLE  # why there is no entry, if there is none


class Record(NamedTuple):
    """What the cache itself remembers of an entry that it gave to the backend."""

    derivation: Derivation
    binding: weakref.ref[Binding]
    adapter: Adapters
    stamp: Stamp
    usage: Usage
    shortcuts: list[Shortcut]


P = ParamSpec("P")
S = TypeVar("S", bound="Store")


def exclusive(
    method: Callable[Concatenate[S, P], int],
) -> Callable[Concatenate[S, P], int]:
    """Give a method the lock.

    The garbage collector may run a ``__del__`` that calls the method inside the lock, in the thread
    that has it. Then it is put off until the lock is released, and returns 0.
    """

    @wraps(method)
    def wrapper(self: S, /, *args: P.args, **kwargs: P.kwargs) -> int:
        if self._lock._is_owned():
            self._later.append(partial(wrapper, self, *args, **kwargs))
            return 0
        with self._locked():
            return method(self, *args, **kwargs)

    return wrapper


class Store:
    """Gives entries to the backend, remembers what each was derived from, and forgets in time.

    Every method may be called from any thread; those under "Storing and forgetting" with the lock
    held.

    Args:
        config: the settings.
        devices: where the model is.
    """

    def __init__(self, config: CacheConfig, devices: Sequence[torch.device] = ()) -> None:
        self.config = config
        self.token = next_token()
        self._memory = Memory(config, devices or [torch.device("cpu")])
        self._backend: Backend = self._memory.backend
        self._guards_content = config.guard == "content"
        self._auditor = Auditor() if config.audit and not self._guards_content else None
        # Then whatever is stored stays until it is discarded here, and shortcuts need not ask.
        self._keeps_everything = getattr(self._backend, "keeps_everything", False) is True
        self._declining = self._backend if isinstance(self._backend, Declining) else None
        # Reentrant, because the garbage collector may run anybody's code inside it; what that code
        # asks for is put off (see exclusive), so that nothing is changed half-way through.
        self._lock: Any = threading.RLock()
        self._later: deque[Callable[[], object]] = deque()
        self._clock = itertools.count(1)
        self._bindings: dict[int, Binding] = {}
        # By key; several, where a call that signed earlier derives beside one that signed later.
        self._flights: dict[Hashable, list[Flight]] = {}
        self._records: dict[Hashable, Record] = {}
        self._by_storage: dict[int, set[Hashable]] = {}
        self._counts: Counter[str] = Counter()
        self._tidy_at = _TIDY  # how many values will have been stored then
        self._reasons: Counter[Reason] = Counter()
        self._usages = Usages()
        self._declined: dict[Declined, None] = {}
        self._warned: set[Hashable] = set()
        self._warnings: deque[str] = deque()
        self._undo = ExitStack()
        self._closed = False

    # Events

    @exclusive
    def event(self, binding: Binding, adapter: str | None = ALL_ADAPTERS) -> int:
        """Void the values of a binding and its children after something has happened to them.

        Returns:
            How many entries went.
        """
        self._refill_later(self._family(binding))
        return self._void(binding, adapter)

    @exclusive
    def suspect(self) -> int:
        """Void everything, and leave buffers void: something is being written to just now."""
        return sum(self._void(binding, ALL_ADAPTERS) for binding in list(self._bindings.values()))

    @exclusive
    def _uncounted(self, name: str) -> int:
        """Drop everything: contents have changed that nothing counted, so others may have too."""
        text = (
            f"the audit of {name!r} found contents that had changed past version counters, as by "
            "p.data.copy_(), numpy, a collective, or another process: outputs since then may be "
            "wrong. Everything held was dropped. Call cache.invalidate() after such writes, or "
            'attach with guard="content"'
        )
        self._warn_once("uncounted", text)
        bindings = list(self._bindings.values())
        self._refill_later(bindings)
        return sum(self._void(binding, ALL_ADAPTERS) for binding in bindings)

    @exclusive
    def touched(self, tensors: Iterable[Tensor | torch.UntypedStorage]) -> int:
        """Void every value derived from memory that may have been written to.

        Returns:
            How many entries went.
        """
        touched = _storages_of(tensors)
        self._spoil(touched)
        for binding in self._bindings.values():
            for buffer in binding.buffers.values():
                if buffer.derived_from(touched):
                    buffer.void()
        self._refill_later(self._bindings.values())
        keys = [key for storage in touched for key in self._by_storage.get(storage, ())]
        return sum(self._discard(key) for key in dict.fromkeys(keys))

    def replaced(self, tensors: Sequence[Tensor]) -> None:
        """Store nothing that is being derived from tensors one of which takes another's place.

        Needs no lock. What is put in place before a derivation's end is noted before it is in
        place, so before the dependencies are signed again and the note is read.
        """
        if self._flights:
            self._spoil(_storages_of(tensors))

    def _spoil(self, storages: set[int]) -> None:
        """Have what is being derived from some memory not stored."""
        for flying in list(self._flights.values()):
            for flight in list(flying):
                if not storages.isdisjoint(flight.stamp.storages):
                    flight.touched = True

    @exclusive
    def revalidate(self, binding: Binding) -> int:
        """Drop those entries of a binding whose dependencies' memory has been freed.

        For operations that replace some dependencies or none, to free memory early: what this
        misses would still not be used. Buffers, which nothing checks at their use, are filled
        again if any of their dependencies has changed.

        Returns:
            How many entries went.
        """
        gone = 0
        for member in self._family(binding):
            for key in list(member.keys):
                record = self._records.get(key)
                if record is not None and record.stamp.expired:
                    gone += self._discard(key)
            for buffer in list(member.buffers.values()):
                self._later.append(buffer.fill)
        return gone

    @exclusive
    def invalidate_derivation(self, derivation: Derivation) -> int:
        """Drop every entry of one derivation; return how many went."""
        for flight in chain.from_iterable(self._flights.values()):
            if flight.derivation is derivation:
                flight.touched = True
        keys = [key for key, record in self._records.items() if record.derivation is derivation]
        return sum(self._discard(key) for key in keys)

    def owner_died(self, token: int) -> None:
        """Drop everything of an owner that has been garbage collected.

        Called by the garbage collector, anywhere: it must not wait for a lock.
        """
        self._later.append(partial(self._bury, token))
        if not self._lock._is_owned() and self._lock.acquire(blocking=False):
            self._release()

    @exclusive
    def _bury(self, token: int) -> int:
        binding = self._bindings.pop(token, None)
        if binding is None:
            return 0
        self._drop_buffers(binding)
        gone = self._void(binding, ALL_ADAPTERS)
        self._usages.depart(token, ALL_ADAPTERS)
        return gone

    @exclusive
    def _adapter_deleted(self, binding: Binding, adapter: str) -> int:
        gone = self._void(binding, adapter)
        for flight in chain.from_iterable(self._flights.values()):
            if flight.binding is binding and concerns(adapter, flight.adapter):
                flight.touched = True
        for member in self._family(binding):
            self._drop_buffer(member.buffers.pop(adapter, None))
            self._usages.depart(member.token, adapter)
            member.forget(adapter)
        return gone

    def counts(self, derivation: Derivation) -> tuple[int, int, int]:
        """Return hits, misses and entries of one derivation."""
        with self._locked():
            hits, misses = self._usages.count(of=derivation)
            entries = sum(record.derivation is derivation for record in self._records.values())
            return hits, misses, entries

    # Storing and forgetting

    def _evict(self, devices: Container[torch.device], *, everything: bool = False) -> None:
        """Evict the entries on some devices; with ``everything``, pinned ones and buffers too."""
        self._note_evictions()
        for key, record in list(self._records.items()):
            if record.usage.device in devices and (everything or not self._memory.is_pinned(key)):
                self._discard(key, why="evictions")
        if everything:
            for buffer in self._memory.buffers_on(devices):
                self._drop_buffer(buffer)

    def _keep(self, key: Hashable, entry: Entry, adapter: Adapters) -> bool:
        """Give an entry to the backend; once more after evicting others if memory runs out."""
        with suppress(torch.OutOfMemoryError):
            return self._memory.put(key, entry, adapter)
        self._try("delete", lambda: self._backend.delete(key), None)
        self._evict({tensor.device for tensor in entry.tensors})
        kept = self._memory.put(key, entry, adapter)
        text = "storing a value ran out of memory: entries were evicted to make room for it"
        self._warn_once("out of memory", text)
        return kept

    def _store(
        self,
        key: Hashable,
        adapter: Adapters,
        entry: Entry,
        derivation: Derivation,
        binding: Binding,
    ) -> None:
        stamp = entry.stamp
        assert isinstance(stamp, Stamp)  # noqa: S101 - for the type checker
        self._discard(key, why="replacements")
        usage = self._usages.of(key, derivation, adapter, binding.token, self._records)
        usage.nbytes, usage.device = entry.nbytes, entry.tensors[0].device
        usage.born = stamp.born
        kept = self._try("put", lambda: self._keep(key, entry, adapter), None)
        if kept is None:  # the backend failed and may hold it or not
            self._try("delete", lambda: self._backend.delete(key), None)
            self._reasons[Reason.BACKEND_FAILED] += 1
            return
        if not kept:
            self._counts["rejections"] += 1
            self._reasons[Reason.CAP] += 1
            return
        self._counts["stores"] += 1
        record = Record(derivation, weakref.ref(binding), adapter, stamp, usage, [])
        self._records[key] = record
        binding.keys.add(key)
        for storage in stamp.storages:
            self._by_storage.setdefault(storage, set()).add(key)
        if self._counts["stores"] >= self._tidy_at:
            self._tidy()
            self._tidy_at = self._counts["stores"] + len(self._records) + _TIDY

    def _tidy(self) -> None:
        """Drop what was derived from freed memory, and forget what was evicted without a report."""
        self._note_evictions()
        held = set(self._try("keys", self._backend.keys, self._records))
        for key, record in list(self._records.items()):
            if record.stamp.expired:
                self._discard(key)
            elif key not in held:
                self._evicted(key)

    def _note_evictions(self) -> None:
        """Take note of what was evicted since the last time; the lock is held."""
        evicted = self._memory.evicted
        while evicted:
            self._try("report of an eviction", partial(self._evicted, evicted.popleft()), None)

    def _evicted(self, key: Hashable) -> None:
        if key in self._records:
            self._forget(key)
            self._counts["evictions"] += 1

    def _adapter_of(self, key: Hashable) -> Adapters:
        record = self._records.get(key)
        return None if record is None else record.adapter

    def _discard(self, key: Hashable, why: str = "invalidations") -> int:
        """Drop an entry and count it; return 1 if there was one."""
        self._forget(key)
        if why == "invalidations":
            usage = self._usages.get(key)
            if usage is not None:
                usage.born = 0
        deleted = self._try("delete", lambda: self._backend.delete(key), False)  # noqa: FBT003
        self._counts[why] += bool(deleted)
        return int(bool(deleted))

    def _forget(self, key: Hashable) -> None:
        record = self._records.pop(key, None)
        if record is None:
            return
        self._try("unpin", lambda: self._memory.forgotten(key), None)
        binding = record.binding()
        for shortcut in record.shortcuts:
            shortcut.clear()
            if binding is not None and binding.shortcuts.get(shortcut.spelled) is shortcut:
                del binding.shortcuts[shortcut.spelled]
        if binding is not None:
            binding.keys.discard(key)
        for storage in record.stamp.storages:
            keys = self._by_storage.get(storage)
            if keys is not None:
                keys.discard(key)
                if not keys:
                    del self._by_storage[storage]

    def _void(self, binding: Binding, adapter: str | None) -> int:
        gone = 0
        for member in self._family(binding):
            member.void(adapter, next(self._clock))
            for name, buffer in member.buffers.items():
                if adapter in (ALL_ADAPTERS, name):
                    buffer.void()
            for key in list(member.keys):
                record = self._records.get(key)
                if record is not None and concerns(adapter, record.adapter):
                    gone += self._discard(key)
        return gone

    def _family(self, binding: Binding) -> Iterator[Binding]:
        yield binding
        for reference in binding.children:
            child = reference()
            if child is not None:
                yield from self._family(child)

    def _drop_buffers(self, binding: Binding) -> None:
        while binding.buffers:
            self._drop_buffer(binding.buffers.popitem()[1])

    def _drop_buffer(self, buffer: Buffer | None) -> None:
        if buffer is not None:
            self._try("resize", lambda: self._memory.release(buffer), None)
            buffer.drop()

    def _refill_later(self, bindings: Iterable[Binding]) -> None:
        """Fill the buffers that an event voids, as far as that can be done, after the event."""
        for binding in bindings:
            for buffer in binding.buffers.values():
                self._later.append(partial(_fill_stale, buffer))

    def _add(self, binding: Binding) -> Binding:
        with self._locked():
            self._bindings[binding.token] = binding
        return binding

    # The lock

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self._lock.acquire()
        try:
            self._note_evictions()
            yield
        finally:
            self._release()

    def _release(self) -> None:
        self._note_evictions()
        self._lock.release()
        self._catch_up()

    def _catch_up(self) -> None:
        """Do what had to wait until this thread had released the lock."""
        if self._lock._is_owned():
            return
        while self._later:
            try:
                action = self._later.popleft()
            except IndexError:  # another thread took the last one
                break
            action()
        while self._warnings:  # never an error, whatever the filters
            with suppress(IndexError, CacheWarning):
                warnings.warn(self._warnings.popleft(), CacheWarning, stacklevel=2)

    # Failures

    def failed(self, what: str, error: Exception) -> None:
        """Warn, once per cause, of something that failed and will be made up for."""
        self._warn(what, error)
        self._catch_up()

    def _try(self, operation: str, action: Callable[[], Any], otherwise: Any) -> Any:
        """Call the backend; a failure costs one warning per cause, never an inference."""
        try:
            return action()
        except Exception as error:  # noqa: BLE001 - whatever a third party's backend raises
            self._warn(f"the backend's {operation}", error)
            return otherwise

    def _warn(self, what: str, error: Exception) -> None:
        text = f"{what} failed, so values are derived again: {type(error).__name__}: {error}"
        self._warn_once((what, type(error)), text)

    def _warn_once(self, cause: Hashable, text: str) -> None:
        if cause not in self._warned:
            self._warned.add(cause)
            self._warnings.append(text)


def _fill_stale(buffer: Buffer) -> None:
    if buffer.stale:
        buffer.fill()


def _storages_of(tensors: Iterable[Tensor | torch.UntypedStorage]) -> set[int]:
    found = set()
    for one in tensors:
        with suppress(RuntimeError, NotImplementedError):  # no storage: nothing is derived from it
            found.add(storage_id(one) if isinstance(one, Tensor) else one._cdata)
    return found
