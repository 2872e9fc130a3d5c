"""From a call to its value: stored and valid, on its way in another thread, or derived now."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager, nullcontext, suppress
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from dora_cache.audit import EVERY
from dora_cache.backends import Entry, Ready
from dora_cache.contents import Contents
from dora_cache.dependencies import Listed, listed, made_anew
from dora_cache.explain import UNSETTLED, UNUSED, why_unsettled, why_unused
from dora_cache.keys import PLAIN_KEYS, UnkeyableError, freeze, own_state
from dora_cache.reasons import Reason
from dora_cache.results import described
from dora_cache.results import storable as _storable
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
from dora_cache.store import Flight, Record, Store

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from dora_cache.backends import Value
    from dora_cache.binding import Binding
    from dora_cache.decorator import Derivation
    from dora_cache.keys import Adapters
    from dora_cache.usage import Usage

__all__ = ["Lookup", "NotCachedError", "bypassed_here", "warming_here"]

bypassed_here: ContextVar[tuple[int, ...]] = ContextVar("dora_cache_bypassed", default=())
warming_here: ContextVar[bool] = ContextVar("dora_cache_warming", default=False)
_AUDITED = EVERY - 1
_SPELLINGS = 4096  # calls whose keys each binding remembers


class _Call(NamedTuple):
    """One call, ready to be looked up."""

    key: Hashable
    adapter: Adapters
    signature: Signature
    dependencies: list[object]
    contents: Contents | None
    listed: Listed | None = None


class NotCachedError(Exception):
    """Raised within ``warm()``, where a value that cannot be stored is not derived.

    Args:
        name: of the derivation.
        reason: why it cannot be stored.
    """

    def __init__(self, name: str, reason: Reason) -> None:
        super().__init__(f"{name} is not cached: {reason.value}")
        self.name = name
        self.reason = reason


class Lookup(Store):
    """Finds the value of a call, or derives it, once for all threads, and stores it if it holds."""

    def lookup(
        self,
        derivation: Derivation,
        binding: Binding,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Return the valid stored value of a call, or derive it, once for all threads."""
        bypassed = bypassed_here.get()
        spelled = None if kwargs else _spelled(derivation, binding, args)
        if spelled is not None and not bypassed:
            shortcut = binding.shortcuts.get(spelled)
            if shortcut is not None:
                owner = binding._owner  # what _bars() looks at, without calls
                entry = None
                try:
                    if owner is None or (
                        owner() is args[0] and not getattr(args[0], "training", False)
                    ):
                        entry = self.recall(shortcut, derivation.depends_on(*args))  # type: ignore[arg-type, misc]
                except Exception:  # noqa: BLE001 - the long way deals with it
                    entry = None
                if entry is not None:
                    return entry.value
        reason = self._bars(binding, args)
        if reason is not None:
            return self._past(reason, derivation, args, kwargs)
        try:
            call = self._prepare(derivation, binding, args, kwargs)
        except UncheckableError as error:
            return self._past(error.reason, derivation, args, kwargs)
        except UnkeyableError:
            return self._past(Reason.UNKEYABLE, derivation, args, kwargs)
        except Exception as error:  # noqa: BLE001 - a broken depends_on must not break inference
            result = self._past(Reason.DEPENDS_ON_FAILED, derivation, args, kwargs)
            self.failed(f"depends_on of {derivation.name!r}", error)
            return result
        return self._answer(call, spelled, derivation, binding, args, kwargs)

    def _answer(
        self,
        call: _Call,
        spelled: Hashable,
        derivation: Derivation,
        binding: Binding,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Return the stored value of a signed call, wait for another thread's, or derive it."""
        offers = audited = True
        while True:
            flight, join, declined = None, False, False
            with self._lock:
                usage = self._usages.of(
                    call.key, derivation, call.adapter, binding.token, self._records
                )
                entry = self._valid(call, binding)
                if entry is not None:
                    if spelled is not None:
                        self._shorten(spelled, derivation, binding, call, entry)
                else:
                    flying = self._flights.get(call.key, ())
                    flight = next((f for f in flying if self._joinable(f, call, binding)), None)
                    join = flight is not None
                    declined = flight is None and offers and self._declines(call, usage, binding)
                    if flight is None and not declined:
                        flight = self._take_off(derivation, binding, call)
                uses = usage.add(hit=entry is not None or join)
            if entry is not None and audited and (usage.due or uses % EVERY == 0):
                usage.due = False
                audited = self._passes_audit(entry.stamp, uses, call.dependencies, entry)
                if not audited:
                    with self._lock:
                        usage.add(hit=True, count=-1)
                    continue
            if self._later or self._warnings:
                self._catch_up()
            if declined:
                with suppress(torch.OutOfMemoryError):
                    return self._only_derive(usage, derivation, binding, call, args, kwargs)
                offers = False  # the long way makes room
            if flight is not None:
                if not join:
                    return self._fly(flight, call, derivation, binding, args, kwargs)
                entry = _awaited(flight)
            if entry is not None:
                return _joined(entry)
            with self._lock:  # declined, or the one waited for came to nothing: no lookup yet
                usage.add(hit=not declined, count=-1)
            if flight is not None and not flight.storable:  # each thread derives its own
                return self._past(Reason.UNSTORABLE, derivation, args, kwargs)

    def recall(self, shortcut: Shortcut, dependencies: Sequence[object]) -> Entry | None:
        """Return what a shortcut leads to, if everything is as it was; else make the call.

        The caller sees to it that this thread does not bypass the cache, and that the shortcut is
        its owner's own, outside training mode.

        Without the lock where the backend drops nothing of its own accord. That is safe: whatever
        voids an entry clears its shortcuts before it returns, so a call that comes later finds them
        empty; and a call that comes at the same time may be taken to have come before.

        Args:
            shortcut: of an earlier call, from ``binding.shortcuts``.
            dependencies: what the derivation's ``depends_on`` returns, in its order.
        """
        entry = shortcut.entry
        if entry is None and self._keeps_everything:
            return None
        try:
            if not shortcut.check(dependencies, shortcut):
                return None
        except Exception:  # noqa: BLE001 - other dependencies than before, or worse: the long way
            return None
        if entry is None:
            stamp = shortcut.stamp
            if stamp is None or self._memory.reserved or self._lock._is_owned():
                return None  # the backend may copy it to the device, and caps are held elsewhere
            with self._lock:
                try:
                    entry = self._backend.get(shortcut.key)
                except Exception:  # noqa: BLE001 - the long way deals with it
                    return None
                if entry is None or entry.stamp is not stamp or shortcut.stamp is not stamp:
                    return None
        value, holds = entry.value, shortcut.holds
        if holds is None:
            if not entry.intact:
                return None
        elif type(value) is Tensor:  # what entry.intact does, without the calls
            version, address = entry._marks[0]
            if (
                value._version != version
                or value.data_ptr() != address
                or not holds(value)
                or value.grad is not None
            ):
                return None
        else:
            if not holds(*value):
                return None
            for tensor, (version, address) in zip(value, entry._marks, strict=True):
                if (
                    tensor._version != version
                    or tensor.data_ptr() != address
                    or tensor.grad is not None
                ):
                    return None
        if entry.ready is not None:
            entry.ready.join(entry.tensors)
        uses = shortcut.count()
        if uses & _AUDITED == shortcut.phase:
            # Iterators are spent by now, and mappings are listed by the long way alone.
            plain = type(dependencies) is tuple or type(dependencies) is list
            stamp = shortcut.stamp
            if (
                not plain
                or stamp is None
                or not self._passes_audit(stamp, uses, dependencies, entry)
            ):
                self._uncount(shortcut, due=not plain)
                return None
        return entry

    def _passes_audit(
        self, stamp: object, uses: int, dependencies: Sequence[object], entry: Entry
    ) -> bool:
        """Compare some contents; on a difference drop everything and return False."""
        audit = stamp.audit if type(stamp) is Stamp else None
        if audit is None or self._auditor is None:
            return True
        try:
            name = self._auditor.changed(audit, uses, dependencies, entry.tensors)
        except Exception as error:  # noqa: BLE001 - never an inference failure
            self.failed("the audit", error)
            return True
        if name is None:
            return True
        self._uncounted(name)
        return False

    def _uncount(self, shortcut: Shortcut, *, due: bool) -> None:
        """Take back the hit of a call that goes the long way, and is audited there if it is due."""
        with self._lock:
            usage = self._usages.get(shortcut.key)
            if usage is not None:
                usage.due = due
                usage.add(hit=True, count=-1)

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
        returned = call.listed
        if (
            self._guards_content
            or record is None
            or returned is None
            or returned.form is None
            or len(returned) != len(call.dependencies)  # tensors among the arguments
        ):
            return
        if spelled not in binding.shortcuts and len(binding.shortcuts) >= _SPELLINGS:
            return
        gradients = not derivation.detach and any(
            tensor.requires_grad for tensor in tensors_in(call.dependencies)
        )
        shortcut = make_shortcut(
            call.dependencies, gradients=gradients, value=entry.value, form=returned.form
        )
        if shortcut is None or sign(call.dependencies)[0] != call.signature:
            return  # a write since the call was signed: the facts are not those of the entry
        shortcut.spelled, shortcut.key, shortcut.stamp = spelled, call.key, record.stamp
        shortcut.entry = entry if self._keeps_everything else None
        shortcut.ready = entry.ready
        shortcut.count = record.usage.short.__next__
        audited = record.stamp.audit is not None
        shortcut.phase = binding.token & _AUDITED if audited else -1
        old = binding.shortcuts.get(spelled)
        if old is not None:
            old.clear()
        # One entry may be spelled in several ways, and all must be cleared with it.
        record.shortcuts[:] = [one for one in record.shortcuts if one is not old] + [shortcut]
        binding.shortcuts[spelled] = shortcut

    @property
    def bypassing(self) -> bool:
        """Whether this thread is within :meth:`bypass`."""
        return self.token in bypassed_here.get()

    def passed_by(self, reason: Reason) -> None:
        """Count a call that went past the cache without asking it."""
        with self._locked():
            self._counts["bypasses"] += 1
            self._reasons[reason] += 1

    def _bars(self, binding: Binding, args: tuple[Any, ...]) -> Reason | None:
        """Return why a call has to go past the cache whatever it asks for, or None."""
        if self._closed:
            return Reason.DETACHED
        if self.bypassing:
            return Reason.BYPASS
        if not binding.owned_by(args):
            return Reason.COPY
        if binding.in_training(args):
            return Reason.TRAINING
        if untraceable():
            return Reason.TRACED
        if self._lock._is_owned():  # a __del__ that the garbage collector runs in there
            return Reason.REENTERED
        return None

    def _past(
        self, reason: Reason, derivation: Derivation, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        # A depends_on that fails may do so as the function does, which says more.
        if warming_here.get() and reason is not Reason.DEPENDS_ON_FAILED:
            raise NotCachedError(derivation.name, reason)
        with self._lock:
            self._counts["bypasses"] += 1
            self._reasons[reason] += 1
        return derivation.function(*args, **kwargs)

    def _prepare(
        self,
        derivation: Derivation,
        binding: Binding,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> _Call:
        """Key and sign a call.

        Raises:
            UnkeyableError: an argument cannot be part of a key.
            UncheckableError: it cannot be told whether the value holds.
            Exception: whatever ``depends_on`` raises.
        """
        frozen, adapter, dependencies = self._bind(derivation, binding, args, kwargs)
        depends_on, returned = derivation.depends_on, None
        if depends_on is not None:
            returned = listed(depends_on(*args, **kwargs))
            dependencies += returned
        elif isinstance(binding.owner, nn.Module):
            dependencies += own_state(binding.owner)
        signature, requires_grad = sign(dependencies)
        contents = Contents(tensors_in(dependencies)) if self._guards_content else None
        if requires_grad and not derivation.detach and torch.is_grad_enabled():
            msg = "gradients are wanted through the value"
            raise UncheckableError(msg, Reason.GRADIENTS)
        key = (derivation.number, binding.token, frozen, environment())
        return _Call(key, adapter, signature, dependencies, contents, returned)

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
            self._evicted(call.key)  # unless it was reported, as it should have been
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
        if record is not None and record.derivation.depends_on is None:
            self._tell_unused(record, binding, call)
        self._discard(call.key)
        return None

    def _tell_unused(self, record: Record, binding: Binding, call: _Call) -> None:
        """Warn where values are void before their first use, time after time; the lock is held."""
        if record.usage.derived == UNUSED and not record.usage.hits:
            signatures = (record.stamp.signature, call.signature)
            with suppress(Exception):
                text = why_unused(record.derivation, binding.owner, call.dependencies, *signatures)
                if text is not None:
                    self._warn_once(("unused", text), text)

    def _declines(self, call: _Call, usage: Usage, binding: Binding) -> bool:
        """Whether the backend would not keep the value of a call anyway.

        After an event the value is offered once: its size and device may be others.
        """
        if (
            self._declining is None
            or usage.born <= binding.voided(call.adapter)
            or self._memory.pins_hold(call.adapter)
        ):
            return False
        try:
            return self._declining.declines(call.key) is True
        except Exception as error:  # noqa: BLE001 - whatever a third party's backend raises
            self._warn("the backend's declines", error)
            return False

    def _only_derive(
        self,
        usage: Usage,
        derivation: Derivation,
        binding: Binding,
        call: _Call,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Derive a value that would not be kept, in each thread that asks for it."""
        value, cost = self._timed(partial(derivation.function, *args, **kwargs))
        with self._lock:
            self._counts["rejections"] += 1
            self._reasons[Reason.DECLINED] += 1
            usage.derive(cost)
        self._refill(binding, call)
        return value

    @staticmethod
    def _refill(binding: Binding, call: _Call) -> None:
        """Fill what compiled code reads, which what made this a miss may concern."""
        buffer = binding.buffers.get(call.adapter)  # type: ignore[arg-type]
        if buffer is not None:
            buffer.fill()

    def _joinable(self, flight: Flight, call: _Call, binding: Binding) -> bool:
        """Whether a value being derived is the one that the call wants."""
        return (
            flight.stamp.signature == call.signature
            and not flight.touched
            and flight.stamp.born > binding.voided(call.adapter)
            and flight.thread != threading.get_ident()  # a function that calls itself
            and all(contents == call.contents for contents in flight.stamp.contents)
        )

    def _take_off(self, derivation: Derivation, binding: Binding, call: _Call) -> Flight:
        stamp = Stamp(call.key, call.signature, call.dependencies, next(self._clock))
        if call.contents is not None:
            stamp.contents = (call.contents,)
        flight = Flight(derivation, binding, call.adapter, stamp)
        derivation.caches.add(self)
        self._flights.setdefault(call.key, []).append(flight)
        return flight

    def _fly(
        self,
        flight: Flight,
        call: _Call,
        derivation: Derivation,
        binding: Binding,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Derive a value, store it if it still holds, and hand it to those who wait."""
        entry = None
        try:
            self._begin_audit(flight, call)
            value, entry = self._derive(flight, partial(derivation.function, *args, **kwargs), call)
            flight.entry = entry
            if entry is not None:
                self._audit_value(flight, entry)
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
            changed = again is not None and again.signature != call.signature
            try:
                with self._locked():
                    flying = self._flights[call.key]
                    flying.remove(flight)
                    if not flying:
                        del self._flights[call.key]
                    usage = self._usages.get(call.key)
                    if entry is not None and usage is not None:
                        usage.derive(entry.cost)
                        usage.unsettled = usage.unsettled + 1 if changed else 0
                    if (
                        entry is not None
                        and again is not None
                        and again.key == call.key
                        and not changed
                        and _read_before(call, again) is None
                        and not flight.touched
                        and not self._closed
                        and flight.stamp.born > binding.voided(call.adapter)
                    ):
                        self._store(call.key, call.adapter, entry, derivation, binding)
                    elif entry is not None:
                        self._reasons[Reason.CHANGED] += 1
                    elif flight.error is None:
                        self._reasons[flight.unstored] += 1
            finally:
                flight.done.set()
        if (
            again is not None
            and not self._advise(derivation, call, again)
            and usage is not None
            and usage.unsettled == UNSETTLED
        ):
            self._tell_unsettled(derivation, binding, call, again)
        self._refill(binding, call)
        return value

    def _begin_audit(self, flight: Flight, call: _Call) -> None:
        if self._auditor is not None:
            try:
                name = flight.derivation.name
                flight.stamp.audit = self._auditor.begin(name, call.dependencies)
            except Exception as error:  # noqa: BLE001 - never an inference failure
                self.failed("the audit", error)

    def _audit_value(self, flight: Flight, entry: Entry) -> None:
        audit = flight.stamp.audit
        if audit is not None:
            try:
                audit.add_value(entry.tensors)
            except Exception as error:  # noqa: BLE001 - never an inference failure
                self.failed("the audit", error)

    def _tell_unsettled(
        self, derivation: Derivation, binding: Binding, before: _Call, after: _Call
    ) -> None:
        """Warn that a value is never stored: what it depends on changes while it is derived."""
        with suppress(Exception), self._locked():
            states = [(one.dependencies, one.signature) for one in (before, after)]
            text = why_unsettled(derivation, binding.owner, *states)
            self._warn_once(("unsettled", text), text)

    def _derive(
        self, flight: Flight, function: Callable[[], Any], call: _Call
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
                # What the device takes is asked for where something has to be chosen by it.
                timed = not self._keeps_everything
                began = Ready.begin(tensors_in(call.dependencies)) if timed else None
                value, cost = self._timed(function)
                break
            self._relieve(call.dependencies, everything=everything)
        else:
            flight.unstored = Reason.OUT_OF_MEMORY
            return self._timed(function)[0], None
        for last in (False, True):
            with suppress(torch.OutOfMemoryError), _plainly():
                kept = _storable(value, flight.stamp)
                break
            if last:
                flight.unstored = Reason.OUT_OF_MEMORY
                return value, None
            self._relieve(call.dependencies)
        if kept is None:
            self._pass_on(flight, value)
            return value, None
        tensors = kept if isinstance(kept, tuple) else (kept,)
        return value, Entry(kept, flight.stamp, cost, Ready.now(tensors, began))

    def _pass_on(self, flight: Flight, value: object) -> None:
        """Count a result that can never be stored as a call past the cache, and say so once."""
        flight.storable = False
        name = flight.derivation.name
        with self._locked():
            usage = self._usages.get(flight.stamp.key)
            if usage is not None:
                usage.add(hit=False, count=-1)
            self._counts["bypasses"] += 1
            text = (
                f"{name!r} is never stored, since it returned {described(value)}: return a tensor "
                "or a plain tuple of tensors, such as (one, two) or tuple(result)"
            )
            self._warn_once(("result", flight.derivation.number), text)

    def _advise(self, derivation: Derivation, call: _Call, again: _Call) -> bool:
        """Say once what in depends_on keeps values from being stored; return whether it does."""
        read = _read_before(call, again)
        if read is not None:
            text = (
                f"{derivation.name!r} is never stored, since its depends_on returns the same "
                f"{read} each time, which can be read only once: return a list"
            )
        elif call.signature != again.signature and made_anew(call.dependencies, again.dependencies):
            text = (
                f"{derivation.name!r} is never stored, since its depends_on returns new tensors "
                "each time: return the weights themselves, such as [self.weight] rather than "
                "[self.weight.T], and state_dict(keep_vars=True) rather than state_dict()"
            )
        else:
            return False
        with self._locked():
            self._warn_once(("depends_on", derivation.number), text)
        return True

    @staticmethod
    def _timed(function: Callable[[], Any]) -> tuple[Any, float]:
        """Derive a value, and say how many seconds that took.

        Without autocast's own cache of weights that it has cast: it does not notice writes, and
        lives shorter than the value.
        """
        began = time.perf_counter()
        caching = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        try:
            with _plainly():
                value = function()
        finally:
            torch.set_autocast_cache_enabled(caching)
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


def _awaited(flight: Flight) -> Entry | None:
    """Return what another thread derives, once it is there; None if it came to nothing."""
    flight.done.wait()
    if flight.error is not None:
        raise flight.error
    entry = flight.entry
    return entry if entry is not None and entry.intact else None  # its caller may have changed it


def _joined(entry: Entry) -> Value:
    """Return an entry's value, for the current stream."""
    if entry.ready is not None:
        entry.ready.join(entry.tensors)
    return entry.value


def _plainly() -> AbstractContextManager[object]:
    """Return a context without gradients and without inference mode; where it is so, an empty one.

    To enter an inference mode costs more than most of what is done within.
    """
    if torch.is_inference_mode_enabled():
        return _outside_inference_mode()
    return torch.no_grad() if torch.is_grad_enabled() else _NOTHING


@contextmanager
def _outside_inference_mode() -> Iterator[None]:
    with torch.inference_mode(mode=False), torch.no_grad():
        yield


_NOTHING: AbstractContextManager[object] = nullcontext()


def _read_before(call: _Call, again: _Call) -> str | None:
    """Return the kind of an iterator that ``depends_on`` returned twice, or None.

    The second time it gave nothing.
    """
    if call.listed is None or again.listed is None:
        return None
    return again.listed.read_before(call.listed)


def _spelled(derivation: Derivation, binding: Binding, args: tuple[Any, ...]) -> Hashable:
    """Return what stands for a call as it is spelled; None if an argument is not plain."""
    if binding._owner is None:
        rest = args
    elif len(args) == 1:
        return derivation.number
    elif len(args) == 2:  # noqa: PLR2004 - the owner, and an adapter's name most often
        one = args[1]
        return (derivation.number, one) if type(one) in PLAIN_KEYS else None
    elif len(args) == 3:  # noqa: PLR2004 - DoRA's
        _, one, two = args
        plain = type(one) in PLAIN_KEYS and type(two) in PLAIN_KEYS
        return (derivation.number, one, two) if plain else None
    else:
        rest = args[1:]
    for value in rest:
        if type(value) not in PLAIN_KEYS:
            return None
    return (derivation.number, rest)
