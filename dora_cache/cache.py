"""The cache itself: looks up, derives once, stores, and forgets in time."""

from __future__ import annotations

import itertools
import threading
import time
import warnings
import weakref
from collections import Counter, deque
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from functools import partial, wraps
from itertools import chain
from typing import TYPE_CHECKING, Any, Concatenate, NamedTuple, ParamSpec, Self

import torch
from torch import Tensor, nn

from dora_cache.backends import Entry, Ready
from dora_cache.backends.storage import storage_id
from dora_cache.binding import ALL_ADAPTERS, Binding, concerns, next_token
from dora_cache.contents import Contents
from dora_cache.decorator import SLOT
from dora_cache.errors import (
    AdapterNotFoundError,
    AlreadyAttachedError,
    CacheWarning,
    DetachedError,
)
from dora_cache.keys import PLAIN_KEYS, UnkeyableError, freeze, own_state
from dora_cache.memory import Memory
from dora_cache.report import CacheReport, Declined, rows_of, seen_of
from dora_cache.shortcut import Shortcut, make_shortcut
from dora_cache.stamps import (
    Signature,
    Stamp,
    UncheckableError,
    environment,
    sign,
    tensors_in,
    untraceable,
)
from dora_cache.stats import CacheStats
from dora_cache.usage import Usage, Usages

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Hashable, Iterable, Iterator, Sequence

    from dora_cache.backends import Backend, Value
    from dora_cache.binding import Adapters, Buffer
    from dora_cache.config import CacheConfig
    from dora_cache.decorator import Derivation

__all__ = ["AdapterCache"]

_bypassed: ContextVar[tuple[int, ...]] = ContextVar("dora_cache_bypassed", default=())
_SPELLINGS = 4096  # calls whose keys each binding remembers


class _Flight:
    """A value on its way: derived by one thread, awaited by others."""

    __slots__ = ("derivation", "done", "entry", "error", "stamp", "thread", "touched")

    def __init__(self, derivation: Derivation, stamp: Stamp) -> None:
        self.derivation = derivation
        self.stamp = stamp
        self.thread = threading.get_ident()
        self.done = threading.Event()
        self.touched = False
        self.entry: Entry | None = None
        self.error: Exception | None = None


class _Record(NamedTuple):
    """What the cache itself remembers of an entry that it gave to the backend."""

    derivation: Derivation
    binding: weakref.ref[Binding]
    adapter: Adapters
    stamp: Stamp
    usage: Usage
    shortcuts: list[Shortcut]


class _Call(NamedTuple):
    """One call, ready to be looked up."""

    key: Hashable
    adapter: Adapters
    signature: Signature
    dependencies: list[object]
    contents: Contents | None


P = ParamSpec("P")


def _exclusive(
    method: Callable[Concatenate[AdapterCache, P], int],
) -> Callable[Concatenate[AdapterCache, P], int]:
    """Give a method the lock.

    The garbage collector may run a ``__del__`` that calls the method inside the lock, in the thread
    that has it. Then it is put off until the lock is released, and returns 0.
    """

    @wraps(method)
    def wrapper(self: AdapterCache, /, *args: P.args, **kwargs: P.kwargs) -> int:
        if self._lock._is_owned():
            self._later.append(partial(wrapper, self, *args, **kwargs))
            return 0
        with self._locked():
            return method(self, *args, **kwargs)

    return wrapper


class AdapterCache:
    """Holds the derived values of one model, and knows when each may be used.

    Made by :func:`dora_cache.attach`. Every method may be called from any thread.

    Args:
        config: the settings.
        devices: where the model is; each has a cap of its own, and its free memory is what a share
            like ``"10%"`` means.
    """

    def __init__(self, config: CacheConfig, devices: Sequence[torch.device] = ()) -> None:
        self.config = config
        self.token = next_token()
        self._memory = Memory(config, devices or [torch.device("cpu")], self._forget)
        self._backend: Backend = self._memory.backend
        self._guards_content = config.guard == "content"
        # Then whatever is stored stays until it is discarded here, and shortcuts need not ask.
        self._keeps_everything = getattr(self._backend, "keeps_everything", False) is True
        # Reentrant, because the garbage collector may run anybody's code inside it; what that code
        # asks for is put off (see _exclusive), so that nothing is changed half-way through.
        self._lock: Any = threading.RLock()
        self._later: deque[Callable[[], object]] = deque()
        self._clock = itertools.count(1)
        self._bindings: dict[int, Binding] = {}
        # By key; several, where a call that signed earlier derives beside one that signed later.
        self._flights: dict[Hashable, list[_Flight]] = {}
        self._records: dict[Hashable, _Record] = {}
        self._by_storage: dict[int, set[Hashable]] = {}
        self._counts: Counter[str] = Counter()
        self._usages = Usages()
        self._declined: dict[Declined, None] = {}
        self._warned: set[Hashable] = set()
        self._warnings: deque[str] = deque()
        self._undo = ExitStack()
        self._closed = False

    # What users call

    def stats(self) -> CacheStats:
        """Return the counters as they are now."""
        with self._locked():
            entries = self._try("len", lambda: len(self._backend), len(self._records))
            nbytes = self._try("nbytes", lambda: self._backend.nbytes, 0)
            max_bytes = self._try("max_bytes", lambda: self._memory.max_bytes, None)
            counts = dict(self._counts)
            usages = self._usages.values()
            reserved = self._memory.reserved
            # A backend need not say when it evicts: what is stored and has not gone otherwise is
            # either there or evicted.
            gone = self._counts["invalidations"] + self._counts["replacements"]
            evictions = self._counts["stores"] - gone - entries
        hits, misses = self._usages.count(usages)
        return CacheStats(
            hits=hits,
            misses=misses,
            evictions=evictions,
            entries=entries,
            nbytes=nbytes + reserved,
            max_bytes=max_bytes,
            **counts,
        )

    @_exclusive
    def invalidate(self, adapter: str | None = None, *, module: nn.Module | None = None) -> int:
        """Drop entries, and void values that are being derived now.

        Args:
            adapter: only this adapter's; by default every adapter's.
            module: only those of this module and its submodules.

        Returns:
            How many entries went.
        """
        wanted = None if module is None else {id(part) for part in module.modules()}
        bindings = list(self._bindings.values())
        self._refill_later(bindings)
        return sum(
            self._void(binding, adapter)
            for binding in bindings
            if wanted is None or id(binding.owner) in wanted
        )

    def refresh(self) -> int:
        """Bring what compiled code reads up to date with the weights.

        Call it between a change that nothing reports and the next use of a compiled model: a write
        to a weight in place, a new tensor in a weight's place, a scaling set by hand. Of optimizer
        steps, loading, scaling by PEFT's methods, hotswaps, merges and moves the cache knows by
        itself, and code that is not compiled notices all of these. Writes that PyTorch does not
        count (through ``p.data``) need :meth:`invalidate` instead, compiled or not.

        Returns:
            For how many layers and adapters the values were derived again, at the same addresses
            and without a recompilation.

        Raises:
            DetachedError: the cache is detached.
        """
        self._check_open()
        return sum(
            buffer.fill()
            for binding in list(self._bindings.values())
            for buffer in list(binding.buffers.values())
        )

    @contextmanager
    def bypass(self) -> Iterator[None]:
        """Go past the cache for a while, in this thread (or task) only; entries are kept."""
        _bypassed.set((*_bypassed.get(), self.token))
        try:
            yield
        finally:  # no reset to what was before: generators may end in another order
            rest = list(_bypassed.get())
            with suppress(ValueError):
                rest.remove(self.token)
            _bypassed.set(tuple(rest))

    def warm(self, adapters: Iterable[str] | None = None) -> int:
        """Derive values ahead of their first use, in the present autocast state.

        Args:
            adapters: names of the adapters to derive for; by default all that the model has.

        Returns:
            How many values were derived; those that were there already do not count.

        Raises:
            AdapterNotFoundError: no cached layer has such an adapter.
            ValueError: the model is in training mode, where nothing is cached.
        """
        self._check_open()
        if isinstance(adapters, str):
            adapters = [adapters]
        wanted = None if adapters is None else list(dict.fromkeys(adapters))
        known, jobs, training = self._jobs(wanted)
        missing = [name for name in wanted or () if name not in known]
        if missing:
            raise AdapterNotFoundError(_unknown(missing[0], known))
        if training:
            msg = "nothing is cached in training mode: call model.eval() before warm()"
            raise ValueError(msg)
        before = self.stats().misses
        with torch.no_grad():
            for job in jobs:
                job()
        return self.stats().misses - before

    def _jobs(self, wanted: list[str] | None) -> tuple[set[str], list[Callable[[], object]], bool]:
        """Return the adapters there are, what derives the wanted ones' values, and if any trains.

        Args:
            wanted: names of adapters; None for all.
        """
        known: set[str] = set()
        jobs: list[Callable[[], object]] = []
        training = False
        for binding in list(self._bindings.values()):
            owner = binding.owner
            if binding.warmers is None or owner is None:
                continue
            for adapter, job in binding.warmers(owner, wanted):
                if adapter is not None:
                    known.add(adapter)
                if wanted is None or adapter is None or adapter in wanted:
                    jobs.append(job)
                    training = training or getattr(owner, "training", False)
        return known, jobs, training

    def resize(self, max_bytes: int | str) -> None:
        """Change the cap; what does not fit any more is evicted at once.

        What compiled code reads counts towards the cap. It is dropped where even that does not
        fit, and the code is then compiled again at its next use and derives the values itself.

        Args:
            max_bytes: bytes like 268435456, or ``"256MiB"``, ``"1.5GB"``, ``"10%"`` (of the memory
                that is free now). Each device of a model that spans several gets such a cap.

        Raises:
            ConfigError: not a size, or the backend has no cap that can be changed.
            PinError: the pinned adapters' values seen so far take more; nothing is changed.
            DetachedError: the cache is detached.
        """
        with self._ours():
            buffers = [pair for one in self._bindings.values() for pair in one.buffers.items()]
            usages = [usage for _, usage in self._seen()]
            self._memory.resize(max_bytes, buffers, self._drop_buffer, usages)
            self._sweep()

    def pin(self, adapter: str) -> int:
        """Keep an adapter's values: they are not evicted, and new ones find room.

        Those held are pinned now, those derived later as they come. Events still drop what no
        longer holds; the pin stays, for what is derived after that. A value that does not fit
        beside what else is pinned is derived at every use, as any that does not fit.

        Args:
            adapter: its name.

        Returns:
            How many entries are held and pinned; :meth:`warm` derives those that are missing.

        Raises:
            AdapterNotFoundError: no cached layer has such an adapter.
            ConfigError: the backend cannot pin.
            PinError: the pinned adapters' values seen so far, held or not, take more than the cap.
            DetachedError: the cache is detached.
        """
        known, _, _ = self._jobs([adapter])
        with self._ours():
            usages = self._seen()
            seen = any(concerns(adapter, usage.adapter) for _, usage in usages)
            if known and adapter not in known and not seen:
                raise AdapterNotFoundError(_unknown(adapter, known))
            return self._memory.pin(adapter, usages, set(self._backend.keys()))

    def unpin(self, adapter: str) -> None:
        """Let an adapter's entries be evicted again; one that is not pinned is fine.

        Raises:
            DetachedError: the cache is detached.
        """
        with self._ours():
            self._memory.unpin(adapter, self._adapter_of)

    @property
    def pins(self) -> tuple[str, ...]:
        """Names of the pinned adapters, sorted."""
        return tuple(sorted(self._memory.pins))

    def report(self) -> CacheReport:
        """Say what is held, by kind and adapter, and what it has saved."""
        stats = self.stats()
        with self._locked():
            held = set(self._try("keys", self._backend.keys, ())) & self._records.keys()
            adapters = {usage.adapter for usage in self._usages.values()}
            pinned = [adapter for adapter in adapters if self._memory.pins_hold(adapter)]
            seen = seen_of(usage for _, usage in self._seen())
            caps = self._try("nbytes", self._memory.caps, ())
            return CacheReport(
                backend=self.config.backend,
                rows=rows_of(self._usages, held, pinned),
                stats=stats,
                working_set=sum(one.nbytes for one in seen),
                buffers=self._memory.reserved,
                caps=caps,
                pins=self.pins,
                declined=tuple(self._declined),
                seen=seen,
            )

    def _seen(self) -> list[tuple[Hashable, Usage]]:
        """Return the usages of the values that no event has voided, held or not."""
        found = []
        for key, usage in self._usages.items():
            binding = self._bindings.get(usage.owner)
            if binding is not None and usage.born > binding.voided(usage.adapter):
                found.append((key, usage))
        return found

    @property
    def declined(self) -> list[Declined]:
        """What could have been cached and is not: kind, adapter or None, where, and why."""
        return list(self._declined)

    def detach(self) -> None:
        """Free every entry and give the model back as it was; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        self._undo.close()
        for binding in list(self._bindings.values()):
            binding.undo.close()
        self._free()

    @_exclusive
    def _free(self) -> int:
        gone = 0
        for binding in list(self._bindings.values()):
            gone += self._void(binding, ALL_ADAPTERS)
            self._drop_buffers(binding)
        self._bindings.clear()
        self._counts["invalidations"] += self._try("len", lambda: len(self._backend), 0)
        self._try("close", self._backend.close, None)
        self._records.clear()
        self._by_storage.clear()
        return gone

    def __enter__(self) -> Self:
        """Return the cache itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Detach."""
        self.detach()

    def __repr__(self) -> str:
        """Return the backend, its contents, and the hits so far."""
        if self._closed:
            return "<AdapterCache, detached>"
        stats = self.stats()
        return (
            f"<AdapterCache backend={self.config.backend!r} entries={stats.entries} "
            f"nbytes={stats.nbytes} hit_rate={stats.hit_rate:.2f}>"
        )

    # What recipes and lifecycle call

    def bind(self, owner: object, *, adapter: str | None = None) -> Binding:
        """Take on an owner; its decorated methods use this cache from now on.

        Args:
            owner: an object with a ``__dict__`` that can be weakly referenced.
            adapter: the adapter that all its values belong to, where no parameter says.

        Raises:
            AlreadyAttachedError: the owner belongs to a cache already.
        """
        self._check_open()
        if owner.__dict__.get(SLOT) is not None:
            raise AlreadyAttachedError(_twice(owner))
        binding = self._add(Binding(self, owner, adapter))
        owner.__dict__[SLOT] = binding
        binding.undo.callback(_unbind, weakref.ref(owner), binding.token)
        return binding

    def bind_function(self, derivation: Derivation) -> Binding:
        """Take on a plain decorated function.

        Raises:
            AlreadyAttachedError: the function belongs to a cache already.
        """
        self._check_open()
        if derivation.binding is not None:
            raise AlreadyAttachedError(_twice(derivation.function))
        derivation.binding = self._add(Binding(self, None, None))
        derivation.binding.undo.callback(setattr, derivation, "binding", None)
        return derivation.binding

    def on_detach(self, undo: Callable[[], object]) -> None:
        """Call ``undo`` on detach, last added first."""
        self._undo.callback(undo)

    def decline(self, kind: str, where: str, reason: str, *, adapter: str | None = None) -> None:
        """Note that something is not cached, and warn, once per kind and reason.

        Args:
            kind: the adapter kind, e.g. ``"OFT"``.
            where: the layer's name, or what else says where.
            reason: why not, as it goes on after a colon.
            adapter: the adapter's name, where it is one adapter's matter.
        """
        with self._locked():
            self._declined.setdefault(Declined(kind, adapter, where, reason))
            text = f"{kind} is not cached everywhere, as in {where}: {reason}"
            self._warn_once((kind, reason), text)

    @_exclusive
    def event(self, binding: Binding, adapter: str | None = ALL_ADAPTERS) -> int:
        """Void the values of a binding and its children after something has happened to them.

        Returns:
            How many entries went.
        """
        self._refill_later(self._family(binding))
        return self._void(binding, adapter)

    @_exclusive
    def suspect(self) -> int:
        """Void everything, and leave buffers void: something is being written to just now."""
        return sum(self._void(binding, ALL_ADAPTERS) for binding in list(self._bindings.values()))

    @_exclusive
    def touched(self, tensors: Iterable[Tensor]) -> int:
        """Void every value derived from memory that may have been written to.

        Returns:
            How many entries went.
        """
        touched = set()
        for tensor in tensors:
            try:
                touched.add(storage_id(tensor))
            except (RuntimeError, NotImplementedError):  # no storage: nothing is derived from it
                continue
        for flight in chain.from_iterable(self._flights.values()):
            if not touched.isdisjoint(flight.stamp.storages):
                flight.touched = True
        for binding in self._bindings.values():
            for buffer in binding.buffers.values():
                if buffer.derived_from(touched):
                    buffer.void()
        self._refill_later(self._bindings.values())
        keys = [key for storage in touched for key in self._by_storage.get(storage, ())]
        return sum(self._discard(key) for key in dict.fromkeys(keys))

    @_exclusive
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

    # Buffers

    def follow_buffer(self, binding: Binding, adapter: str, buffer: Buffer) -> None:
        """Take on what compiled code reads of an owner and adapter, in place of any older one."""
        with self._locked():
            self._drop_buffer(binding.buffers.get(adapter))
            binding.buffers[adapter] = buffer

    def unfollow_buffer(self, binding: Binding, adapter: str) -> None:
        """Drop what compiled code reads of an owner and adapter."""
        with self._locked():
            self._drop_buffer(binding.buffers.pop(adapter, None))

    def buffers(self, adapter: str) -> list[Buffer]:
        """Return what compiled code may read of an adapter, layer by layer."""
        bindings = list(self._bindings.values())
        found = [binding.buffers.get(adapter) for binding in bindings]
        return [buffer for buffer in found if buffer is not None]

    def reserve(self, buffer: Buffer, nbytes: int, device: torch.device) -> bool:
        """Set bytes of a device's cap aside for a buffer.

        Entries that are not pinned make room, other buffers do not.

        Returns:
            Whether there is room; if not, the buffer holds nothing any more.
        """
        with self._locked():
            self._try("resize", lambda: self._memory.release(buffer), None)
            buffer.nbytes = 0
            reserve = partial(self._memory.reserve, buffer, nbytes, device)
            if self._closed or not self._try("max_bytes", reserve, False):  # noqa: FBT003
                self._drop_buffer(buffer)
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
        with self._locked():
            if buffer.stale or self._closed or not buffer.nbytes:
                return False
            buffer.values, buffer.parameters = values, parameters
            return True

    def drop_buffer(self, buffer: Buffer) -> None:
        """Free a buffer's memory; it stays empty until it is prepared."""
        with self._locked():
            self._drop_buffer(buffer)

    def void_buffer(self, buffer: Buffer) -> None:
        """Keep compiled code from reading a buffer until it is filled."""
        with self._locked():
            buffer.void()

    def failed(self, what: str, error: Exception) -> None:
        """Warn, once per cause, of something that failed and will be made up for."""
        self._warn(what, error)
        self._catch_up()

    @property
    def compares_contents(self) -> bool:
        """Whether every use has to compare the contents of what a value was derived from."""
        return self._guards_content

    def owner_died(self, token: int) -> None:
        """Drop everything of an owner that has been garbage collected.

        Called by the garbage collector, anywhere: it must not wait for a lock.
        """
        self._later.append(partial(self._bury, token))
        if not self._lock._is_owned() and self._lock.acquire(blocking=False):
            self._release()

    @_exclusive
    def _bury(self, token: int) -> int:
        binding = self._bindings.pop(token, None)
        if binding is None:
            return 0
        self._drop_buffers(binding)
        return self._void(binding, ALL_ADAPTERS)

    def counts(self, derivation: Derivation) -> tuple[int, int, int]:
        """Return hits, misses and entries of one derivation."""
        with self._locked():
            hits, misses = self._usages.count(derivation=derivation.number)
            held = set(self._try("keys", self._backend.keys, ()))
            entries = sum(
                key in held
                for key, record in self._records.items()
                if record.derivation is derivation
            )
            return hits, misses, entries

    @_exclusive
    def invalidate_derivation(self, derivation: Derivation) -> int:
        """Drop every entry of one derivation; return how many went."""
        for flight in chain.from_iterable(self._flights.values()):
            if flight.derivation is derivation:
                flight.touched = True
        keys = [key for key, record in self._records.items() if record.derivation is derivation]
        return sum(self._discard(key) for key in keys)

    # Looking up

    def lookup(
        self,
        derivation: Derivation,
        binding: Binding,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Return the valid stored value of a call, or derive it, once for all threads."""
        bypassed = _bypassed.get()
        spelled = None if kwargs else _spelled(derivation, binding, args)
        if spelled is not None and not bypassed:
            shortcut = binding.shortcuts.get(spelled)
            if shortcut is not None:
                entry = self._recall(shortcut, derivation, binding, args)
                if entry is not None:
                    return entry.value
        if (
            self._closed
            or (bypassed and self.token in bypassed)
            or not binding.serves(args)
            or untraceable()
            or self._lock._is_owned()  # a __del__ that the garbage collector runs in there
        ):
            return self._past(derivation, args, kwargs)
        try:
            call = self._prepare(derivation, binding, args, kwargs)
        except Exception as error:  # noqa: BLE001 - a broken depends_on must not break inference
            result = self._past(derivation, args, kwargs)
            self._warn(f"depends_on of {derivation.name!r}", error)
            self._catch_up()
            return result
        if call is None:
            return self._past(derivation, args, kwargs)
        while True:
            flight, join = None, False
            with self._lock:
                usage = self._usages.of(call.key, derivation, call.adapter, self._records)
                entry = self._valid(call, binding)
                if entry is not None:
                    if spelled is not None:
                        self._shorten(spelled, derivation, binding, call, entry)
                else:
                    flying = self._flights.get(call.key, ())
                    flight = next((f for f in flying if self._joinable(f, call, binding)), None)
                    join = flight is not None
                    if flight is None:
                        flight = self._take_off(derivation, call)
                usage.add(hit=entry is not None or join)
            if self._later or self._warnings:
                self._catch_up()
            if flight is not None:
                if not join:
                    return self._fly(flight, call, derivation, binding, args, kwargs)
                flight.done.wait()
                if flight.error is not None:
                    raise flight.error
                entry = flight.entry
            if entry is not None:
                if entry.ready is not None:
                    entry.ready.join(entry.tensors)
                return entry.value
            with self._lock:  # the one waited for came to nothing: this was no lookup yet
                usage.add(hit=True, count=-1)

    def _recall(
        self, shortcut: Shortcut, derivation: Derivation, binding: Binding, args: tuple[Any, ...]
    ) -> Entry | None:
        """Return what a shortcut leads to, if everything is as it was.

        Without the lock where the backend drops nothing of its own accord. That is safe: whatever
        voids an entry clears its shortcuts before it returns, so a call that comes later finds them
        empty; and a call that comes at the same time may be taken to have come before.
        """
        entry = shortcut.entry
        depends_on = derivation.depends_on
        if depends_on is None or (entry is None and self._keeps_everything):
            return None
        if not binding.serves(args):
            return None
        try:
            if not shortcut.check(depends_on(*args), shortcut):  # type: ignore[arg-type]
                return None
        except Exception:  # noqa: BLE001 - other dependencies than before, or worse: the long way
            return None
        if entry is None:
            stamp = shortcut.stamp
            if stamp is None or self._lock._is_owned():
                return None
            with self._lock:
                try:
                    entry = self._backend.get(shortcut.key)
                except Exception:  # noqa: BLE001 - the long way deals with it
                    return None
                if entry is None or entry.stamp is not stamp or shortcut.stamp is not stamp:
                    return None
        if not entry.intact:
            return None
        if entry.ready is not None:
            entry.ready.join(entry.tensors)
        shortcut.count()
        return entry

    def _shorten(
        self,
        spelled: Hashable,
        derivation: Derivation,
        binding: Binding,
        call: _Call,
        entry: Entry,
    ) -> None:
        """Remember a hit, so that the next one is shorter; the lock is held."""
        record = self._records.get(call.key)
        if self._guards_content or record is None or derivation.depends_on is None:
            return
        if spelled not in binding.shortcuts and len(binding.shortcuts) >= _SPELLINGS:
            return
        gradients = not derivation.detach and any(
            tensor.requires_grad for tensor in tensors_in(call.dependencies)
        )
        shortcut = make_shortcut(call.dependencies, gradients=gradients)
        if shortcut is None or sign(call.dependencies)[0] != call.signature:
            return  # a write since the call was signed: the facts are not those of the entry
        shortcut.spelled, shortcut.key, shortcut.stamp = spelled, call.key, record.stamp
        shortcut.entry = entry if self._keeps_everything else None
        shortcut.ready = entry.ready
        shortcut.count = record.usage.short.__next__
        old = binding.shortcuts.get(spelled)
        if old is not None:
            old.clear()
        # One entry may be spelled in several ways, and all must be cleared with it.
        record.shortcuts[:] = [one for one in record.shortcuts if one is not old] + [shortcut]
        binding.shortcuts[spelled] = shortcut

    @property
    def bypassing(self) -> bool:
        """Whether this thread is within :meth:`bypass`."""
        return self.token in _bypassed.get()

    def passed_by(self) -> None:
        """Count a call that went past the cache without asking it."""
        with self._locked():
            self._counts["bypasses"] += 1

    def _past(self, derivation: Derivation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self._lock:
            self._counts["bypasses"] += 1
        return derivation.function(*args, **kwargs)

    def _prepare(
        self,
        derivation: Derivation,
        binding: Binding,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> _Call | None:
        """Key and sign a call; None if it has to go past the cache.

        Whatever ``depends_on`` raises comes through.
        """
        try:
            frozen, adapter, dependencies = self._bind(derivation, binding, args, kwargs)
            depends_on = derivation.depends_on
            if depends_on is not None:
                dependencies += depends_on(*args, **kwargs)
            elif isinstance(binding.owner, nn.Module):
                dependencies += own_state(binding.owner)
            signature, requires_grad = sign(dependencies)
            contents = Contents(tensors_in(dependencies)) if self._guards_content else None
        except (UnkeyableError, UncheckableError):
            return None
        if requires_grad and not derivation.detach and torch.is_grad_enabled():
            return None
        key = (derivation.number, binding.token, frozen, environment())
        return _Call(key, adapter, signature, dependencies, contents)

    def _bind(
        self,
        derivation: Derivation,
        binding: Binding,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[Hashable, Adapters, list[object]]:
        """Return a call's frozen arguments, its adapter, and the dependencies among the arguments.

        Raises:
            UnkeyableError: an argument cannot be part of a key, or the arguments are wrong (then
                the function itself will say so).
        """
        first = 0 if binding.plain else 1  # after the owner
        spelled = None if kwargs else _spelled(derivation, binding, args)
        if spelled is not None:
            known = binding.spellings.get(spelled)
            if known is not None:
                return (*known, [])
        try:
            bound = derivation.bind(*args, **kwargs)
        except TypeError as error:
            raise UnkeyableError(str(error)) from None
        index = derivation.adapter_index
        adapter = binding.adapter if index is None else bound[index]
        if type(adapter) is tuple and len(adapter) == 1:
            adapter = adapter[0]  # a value for several adapters, of which there is one
        dependencies: list[object] = []
        frozen = tuple([freeze(value, dependencies) for value in bound[first:]])
        plain = all(type(value) in PLAIN_KEYS for value in bound[first:])  # defaults as well
        if spelled is not None and plain and len(binding.spellings) < _SPELLINGS:
            binding.spellings[spelled] = (frozen, adapter)
        return frozen, adapter, dependencies

    def _valid(self, call: _Call, binding: Binding) -> Entry | None:
        """Return the entry of a call if it may be used; drop it if not."""
        try:
            entry = self._backend.get(call.key)
        except Exception as error:  # noqa: BLE001 - as in _try, without its cost at every hit
            self._warn("the backend's get", error)
            return None
        if entry is None:
            return None
        if self._memory.reserved:  # the backend may have made a copy of it on the device
            self._try("get", self._memory.settle, None)
        stamp = entry.stamp
        record = self._records.get(call.key)
        if (
            # Without its record it has been discarded, and the backend failed to delete it; or the
            # backend has mixed up its keys.
            record is not None
            and record.stamp is stamp
            and type(stamp) is Stamp
            and stamp.signature == call.signature
            and stamp.born > binding.voided(call.adapter)
            and entry.intact
            and all(contents == call.contents for contents in stamp.contents)
        ):
            return entry
        self._discard(call.key)
        return None

    def _joinable(self, flight: _Flight, call: _Call, binding: Binding) -> bool:
        """Whether a value being derived is the one that the call wants."""
        return (
            flight.stamp.signature == call.signature
            and not flight.touched
            and flight.stamp.born > binding.voided(call.adapter)
            and flight.thread != threading.get_ident()  # a function that calls itself
            and all(contents == call.contents for contents in flight.stamp.contents)
        )

    def _take_off(self, derivation: Derivation, call: _Call) -> _Flight:
        stamp = Stamp(call.key, call.signature, call.dependencies, next(self._clock))
        if call.contents is not None:
            stamp.contents = (call.contents,)
        flight = _Flight(derivation, stamp)
        derivation.caches.add(self)
        self._flights.setdefault(call.key, []).append(flight)
        return flight

    def _fly(
        self,
        flight: _Flight,
        call: _Call,
        derivation: Derivation,
        binding: Binding,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Derive a value, store it if it still holds, and hand it to those who wait."""
        entry = None
        try:
            value, entry = self._derive(flight, partial(derivation.function, *args, **kwargs), call)
            flight.entry = entry
        except Exception as error:  # not an interrupt: that is this thread's own
            flight.error = error
            raise
        finally:
            again = None
            if entry is not None:
                with suppress(Exception):  # then it cannot be told whether the value still holds
                    again = self._prepare(derivation, binding, args, kwargs)
            if again is not None and again.contents is not None:
                # Compared when the value is used, so that nothing has to wait for a device here.
                flight.stamp.contents = (*flight.stamp.contents, again.contents)
            try:
                with self._locked():
                    flying = self._flights[call.key]
                    flying.remove(flight)
                    if not flying:
                        del self._flights[call.key]
                    usage = self._usages.get(call.key)
                    if entry is not None and usage is not None:
                        usage.derive(entry.cost)
                    if (
                        entry is not None
                        and again is not None
                        and again.signature == call.signature
                        and not flight.touched
                        and not self._closed
                        and flight.stamp.born > binding.voided(call.adapter)
                    ):
                        self._store(call, entry, derivation, binding)
            finally:
                flight.done.set()
        buffer = binding.buffers.get(call.adapter)  # type: ignore[arg-type]
        if buffer is not None:  # what made this a miss may concern compiled code
            buffer.fill()
        return value

    def _derive(
        self, flight: _Flight, function: Callable[[], Any], call: _Call
    ) -> tuple[Any, Entry | None]:
        """Derive a value, and make an entry of it if it can be stored.

        If the device's memory does not suffice, all goes that may be evicted there, and the value
        is derived once more. Then everything there goes, what is pinned and what compiled code
        reads included, and the value is derived as if there were no cache, and not stored. If
        memory does not suffice for that, nor would it without a cache.
        """
        # No attempt is made in an exception's handler: the exception holds what it came from, and
        # with it the memory of the failed attempt.
        for everything in (False, True):
            with suppress(torch.OutOfMemoryError):
                value, cost = self._timed(function)
                break
            self._relieve(call.dependencies, everything=everything)
        else:
            return self._timed(function)[0], None
        for last in (False, True):
            with suppress(torch.OutOfMemoryError), torch.inference_mode(mode=False):
                kept = _storable(value, flight.stamp)
                break
            if last:
                return value, None
            self._relieve(call.dependencies)
        if kept is None:
            return value, None
        tensors = kept if isinstance(kept, tuple) else (kept,)
        return value, Entry(kept, flight.stamp, cost, Ready.now(tensors))

    @staticmethod
    def _timed(function: Callable[[], Any]) -> tuple[Any, float]:
        """Derive a value, and say how many seconds that took."""
        began = time.perf_counter()
        with torch.inference_mode(mode=False), torch.no_grad():
            value = function()
        return value, time.perf_counter() - began

    def _relieve(self, dependencies: Iterable[object], *, everything: bool = False) -> None:
        """Free memory on the devices that a value is derived on.

        Args:
            dependencies: what it is derived from.
            everything: also what is pinned, and what compiled code reads.
        """
        devices = {tensor.device for tensor in tensors_in(dependencies)}
        with self._locked():
            names = ", ".join(sorted(map(str, devices))) or "the device"
            text = (
                f"deriving a value ran out of memory on {names}: entries were evicted to make room "
                "for it, and values are derived again; a smaller cap leaves more room"
            )
            self._warn_once("out of memory", text)
            self._evict(devices, everything=everything)

    # Storing and forgetting; the lock is held

    def _evict(self, devices: Container[torch.device], *, everything: bool = False) -> None:
        """Evict the entries on some devices; with ``everything``, pinned ones and buffers too."""
        for key, record in list(self._records.items()):
            if record.usage.device in devices and (everything or not self._memory.is_pinned(key)):
                self._forget(key)
                self._try("delete", partial(self._backend.delete, key), False)  # noqa: FBT003
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

    def _store(self, call: _Call, entry: Entry, derivation: Derivation, binding: Binding) -> None:
        stamp = entry.stamp
        assert isinstance(stamp, Stamp)  # noqa: S101 - for the type checker
        self._discard(call.key, why="replacements")
        usage = self._usages.of(call.key, derivation, call.adapter, self._records)
        usage.nbytes, usage.device = entry.nbytes, entry.tensors[0].device
        usage.owner, usage.born = binding.token, stamp.born
        kept = self._try("put", lambda: self._keep(call.key, entry, call.adapter), None)
        if kept is None:  # the backend failed and may hold it or not
            self._try("delete", lambda: self._backend.delete(call.key), None)
            return
        if not kept:
            self._counts["rejections"] += 1
            return
        self._counts["stores"] += 1
        record = _Record(derivation, weakref.ref(binding), call.adapter, stamp, usage, [])
        self._records[call.key] = record
        binding.keys.add(call.key)
        for storage in stamp.storages:
            self._by_storage.setdefault(storage, set()).add(call.key)
        if len(self._records) > 2 * self._try("len", lambda: len(self._backend), 0) + 64:
            self._sweep()
        if self._counts["stores"] % (len(self._records) + 64) == 0:
            for key in [key for key, kept in self._records.items() if kept.stamp.expired]:
                self._discard(key)

    def _sweep(self) -> None:
        """Forget what the backend has evicted."""
        held = set(self._try("keys", self._backend.keys, ()))
        for key in [key for key in self._records if key not in held]:
            self._forget(key)

    def _adapter_of(self, key: Hashable) -> Adapters:
        record = self._records.get(key)
        return None if record is None else record.adapter

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

    def _add(self, binding: Binding) -> Binding:
        with self._locked():
            self._bindings[binding.token] = binding
        return binding

    @contextmanager
    def _ours(self) -> Iterator[None]:
        """Hold the lock of an open cache, for what may raise.

        Raises:
            DetachedError: the cache is detached.
            RuntimeError: the caller runs inside the cache, as a ``__del__`` may.
        """
        if self._lock._is_owned():
            msg = "called from within the cache: call it from outside, not in a backend or __del__"
            raise RuntimeError(msg)
        with self._locked():
            self._check_open()
            yield

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self._lock.acquire()
        try:
            yield
        finally:
            self._release()

    def _release(self) -> None:
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

    def _check_open(self) -> None:
        if self._closed:
            msg = "this cache is detached: call dora_cache.attach(model) for a new one"
            raise DetachedError(msg)


def _storable(value: object, stamp: Stamp) -> Value | None:
    """Return what to store for a result: it owns its memory and has no graph. None: nothing.

    A view would keep more memory alive than it shows, and an alias of a dependency would change
    with it, so both are copied.
    """
    if type(value) is tuple and value:
        parts = [_storable(part, stamp) for part in value if isinstance(part, Tensor)]
        tensors = tuple(part for part in parts if isinstance(part, Tensor))
        return tensors if len(tensors) == len(value) else None
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        return None
    try:
        sign([value])  # the same doubts as for dependencies: inference tensors, fake ones, ...
    except UncheckableError:
        return None
    tensor = value.detach() if type(value) is not Tensor or value.requires_grad else value
    own = tensor.untyped_storage().nbytes() <= tensor.numel() * tensor.element_size()
    return tensor if own and storage_id(tensor) not in stamp.storages else tensor.clone()


def _spelled(derivation: Derivation, binding: Binding, args: tuple[Any, ...]) -> Hashable:
    """Return what stands for a call as it is spelled; None if an argument is not plain."""
    if binding._owner is None:
        rest = args
    elif len(args) == 2:  # noqa: PLR2004 - the owner, and an adapter's name most often
        one = args[1]
        return (derivation.number, one) if type(one) in PLAIN_KEYS else None
    else:
        rest = args[1:]
    for value in rest:
        if type(value) not in PLAIN_KEYS:
            return None
    return (derivation.number, rest)


def _fill_stale(buffer: Buffer) -> None:
    if buffer.stale:
        buffer.fill()


def _unbind(reference: weakref.ref[Any], token: int) -> None:
    owner = reference()
    binding = None if owner is None else owner.__dict__.get(SLOT)
    if isinstance(binding, Binding) and binding.token == token:
        del owner.__dict__[SLOT]


def _unknown(adapter: str, known: Iterable[str]) -> str:
    names = ", ".join(map(repr, sorted(known))) or "none"
    return f"no cached layer has an adapter {adapter!r}; adapters are: {names}"


def _twice(owner: object) -> str:
    name = getattr(owner, "__qualname__", None) or type(owner).__name__
    return (
        f"{name} belongs to a cache already: use that one, or call its detach() before attaching "
        "again (one cache may cover the whole model)"
    )
