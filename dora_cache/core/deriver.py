"""Derive values once for all waiting threads, and handle lack of memory."""

from __future__ import annotations

import logging
import math
import threading
import time
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from dora_cache.backends import Declining, Entry, Ready
from dora_cache.copying import Uncopyable
from dora_cache.core.cells import VARIANTS, Pending
from dora_cache.core.dependencies import made_anew
from dora_cache.core.explain import (
    UNSETTLED,
    why_made_anew,
    why_read_once,
    why_unsettled,
    why_unstorable,
    why_unused,
)
from dora_cache.core.keys import concerns
from dora_cache.core.results import storable
from dora_cache.core.tracing import span
from dora_cache.reasons import Reason

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator
    from contextlib import AbstractContextManager

    from dora_cache.core.audit import Auditor
    from dora_cache.core.calls import Call
    from dora_cache.core.cells import Cell, Family
    from dora_cache.core.facts import Reading
    from dora_cache.core.holdings import Holdings
    from dora_cache.core.tracing import Attributes

__all__ = ["Deriver"]

_log = logging.getLogger(__name__)
_WASTED = 8  # derivations in a row without a later use, after which calls go past the cache
_LONGEST_REST = 128  # calls that go past before the next attempt


class Deriver(Uncopyable):
    """Derives the values of one cache.

    Args:
        holdings: stores them.
        auditor: audits them later; None if nothing is audited.

    Attributes:
        closed: whether nothing is to be stored any more.
        pending: the derivations under way.
    """

    def __init__(self, holdings: Holdings, auditor: Auditor | None) -> None:
        self.closed = False
        self.pending: list[Pending] = []
        self._auditor = auditor
        self._cells = holdings.cells
        self._holdings = holdings
        self._memory = holdings.memory
        self._mutex = holdings.mutex
        backend = self._memory.backend
        self._declining = backend if isinstance(backend, Declining) else None
        # What the device takes is asked for where something has to be chosen by it.
        self._times_device = getattr(backend, "keeps_everything", False) is not True

    def joins(self, pending: Pending, call: Call) -> bool:
        """Whether a value being derived is the one that the call wants."""
        return (
            pending.facts.rows == call.reading.rows
            and not pending.touched
            and pending.born > call.binding.voided(call.adapter)
            and pending.thread != threading.get_ident()  # a function that calls itself
            and all(contents == call.contents for contents in pending.contents)
        )

    def begin(self, call: Call, cell: Cell) -> Pending:
        """Take note that a call derives its value from now on; the lock is held."""
        pending = Pending(cell, call.reading, call.contents, self._holdings.now())
        cell.pending.append(pending)
        self.pending.append(pending)
        while len(cell.family) > VARIANTS:
            oldest = next((one for one in cell.family if not one.pending), None)
            if oldest is None:
                break
            self._tell_unused(oldest, call)
            self._holdings.discard(oldest)
            self._cells.retire(oldest)
            self.waste(cell.family, call)
        return pending

    def derive(self, pending: Pending, call: Call) -> Any:
        """Derive a value, store it if it still holds, and hand it to those who wait."""
        with span("derive") as attributes:
            fields = _fields_of(call, attributes)
            value = self._derive(pending, call)
            if fields is not None:
                self._tell_derived(fields, pending.unstored, pending.entry)
            return value

    def _derive(self, pending: Pending, call: Call) -> Any:
        again = None
        try:
            value, entry = self._attempt(pending, call)
            if entry is not None:
                try:
                    again = call.again()
                except Exception:  # noqa: BLE001 - then it cannot be told whether the value holds
                    again = None
            with self._mutex.held():
                self._end(pending)
                self._settle(pending, call, again)
                self._holdings.sample()
        except Exception as error:  # not an interrupt: that is this thread's own
            pending.error = error
            raise
        finally:
            try:
                with self._mutex.lock:
                    self._end(pending)
            finally:
                pending.done.set()
            self._mutex.catch_up()
        family = pending.cell.family
        if again is not None and not self._advise(call, again) and family.unsettled == UNSETTLED:
            self._tell_unsettled(call, again)
        _refill(call)
        return value

    def _attempt(self, pending: Pending, call: Call) -> tuple[Any, Entry | None]:
        self._begin_audit(pending, call)
        value, entry = _entry_of(
            pending,
            call.run,
            call.reading,
            self._relieve,
            on_device=self._times_device,
        )
        pending.entry = entry
        if entry is not None:
            self._audit_value(pending, entry)
        elif pending.unstored is Reason.UNSTORABLE:
            self._tell_unstorable(pending, call, value)
        return value, entry

    def _end(self, pending: Pending) -> None:
        """Have nobody join a derivation any more; the lock is held."""
        for known in (pending.cell.pending, self.pending):
            if pending in known:
                known.remove(pending)

    def _settle(self, pending: Pending, call: Call, again: Call | None) -> None:
        """Store what a derivation came to, if it holds; the lock is held.

        Args:
            pending: the derivation.
            call: as it was before.
            again: as it is after it; None if that cannot be told.
        """
        cell, entry, family = pending.cell, pending.entry, pending.cell.family
        if entry is None:
            if pending.unstored is not None:
                self._holdings.note(pending.unstored, call.binding)
                self.waste(family, call)
            return
        self._holdings.derived(cell, entry.cost)
        same = again is not None and again.equals(call)
        family.unsettled = 0 if same else family.unsettled + 1
        if (
            again is None
            or not same
            or again.read_before(call) is not None
            or pending.touched
            or self.closed
            or pending.born <= call.binding.voided(call.adapter)
            or self._cells.get(cell.key) is not cell
        ):
            pending.unstored = Reason.CHANGED
            self._holdings.note(Reason.CHANGED, call.binding)
            self.waste(family, call)
            return
        if again.contents is not None:
            # Compared when the value is used, so that nothing has to wait for a device here.
            pending.contents = (*pending.contents, again.contents)
        pending.unstored = self._holdings.store(cell, entry, pending)

    @staticmethod
    def waste(family: Family, call: Call) -> None:
        """Count a value that was never used; after many, have calls go past for a while.

        Then two calls in a row try again: the first derives, the second could use it.
        """
        family.wasted += 1
        if family.wasted >= _WASTED and family.wasted % 2 == 0 and call.spelled is not None:
            family.rest = min(_LONGEST_REST, max(_WASTED, 2 * family.rest))
            call.binding.resting[call.spelled] = family.rest

    def _begin_audit(self, pending: Pending, call: Call) -> None:
        if self._auditor is not None:
            try:
                pending.audit = self._auditor.begin(pending.cell.kind, call.reading.tensors)
            except Exception as error:  # noqa: BLE001 - never an inference failure
                self._mutex.failed("the audit", error)

    def _audit_value(self, pending: Pending, entry: Entry) -> None:
        if pending.audit is not None:
            try:
                pending.audit.add_value(entry.tensors)
            except Exception as error:  # noqa: BLE001 - never an inference failure
                self._mutex.failed("the audit", error)

    def declines(self, call: Call, cell: Cell) -> bool:
        """Whether the backend would not keep the value of a call anyway.

        After an event the value is offered once: its size and device may be others.
        """
        if (
            self._declining is None
            or cell.born <= call.binding.voided(call.adapter)
            or self._memory.pins_hold(call.adapter)
        ):
            return False
        try:
            return self._declining.declines(call.key) is True
        except Exception as error:  # noqa: BLE001 - whatever a third party's backend raises
            self._mutex.failed("the backend's declines", error)
            return False

    def only_derive(self, call: Call, cell: Cell) -> Any:
        """Derive a value that would not be kept, in each thread that asks for it."""
        with span("derive") as attributes:
            fields = _fields_of(call, attributes)
            value, cost = timed(call.run)
            with self._mutex.lock:
                self._holdings.counts["rejections"] += 1
                self._holdings.note(Reason.DECLINED, call.binding)
                self._holdings.derived(cell, cost)
                self._holdings.sample()
            self._mutex.catch_up()
            if fields is not None:
                fields["seconds"] = cost
                self._tell_derived(fields, Reason.DECLINED)
        _refill(call)
        return value

    def _tell_derived(
        self, fields: Attributes, unstored: Reason | None, entry: Entry | None = None
    ) -> None:
        """Complete what a span says of a derivation, and log it."""
        fields["reason"] = None if unstored is None else unstored.value
        if entry is not None:
            fields.update(bytes=entry.nbytes, seconds=entry.cost)
        if _log.isEnabledFor(logging.DEBUG):
            self._mutex.tell(partial(_log_derivation, dict(fields)))
            self._mutex.catch_up()

    def _relieve(self, devices: Collection[torch.device], everything: bool) -> None:  # noqa: FBT001
        """Free memory on the devices that a value is derived on."""
        with self._mutex.held():
            names = ", ".join(sorted(map(str, devices))) or "the device"
            text = (
                f"deriving a value ran out of memory on {names}: entries were evicted to make room "
                "for it, and values are derived again; a smaller cap leaves more room"
            )
            self._mutex.warn("out of memory", text)
            self._holdings.evict(devices, everything=everything)

    def touch(self, storages: set[int], before: float = math.inf) -> None:
        """Have what is being derived from some memory, and began before a time, not stored."""
        for pending in list(self.pending):
            if pending.born < before and not storages.isdisjoint(pending.facts.storages):
                pending.touched = True

    def touch_derivation(self, number: int) -> None:
        """Likewise what one derivation derives."""
        for pending in self.pending:
            if pending.cell.number == number:
                pending.touched = True

    def touch_adapter(self, owners: set[int], adapter: str) -> None:
        """Likewise what some owners derive for an adapter."""
        for pending in self.pending:
            if pending.cell.owner in owners and concerns(adapter, pending.cell.adapter):
                pending.touched = True

    # What is said once

    def _tell_unstorable(self, pending: Pending, call: Call, value: object) -> None:
        """Take a result that can never be stored out of the misses, and say so once."""
        with self._mutex.held():
            pending.cell.add(hit=False, count=-1)
            text = why_unstorable(call.derivation, value)
            self._mutex.warn(("result", call.derivation.number), text)

    def _tell_unused(self, oldest: Cell, call: Call) -> None:
        """Warn where values are void before their first use, time after time; the lock is held."""
        before = oldest.family[-2]  # the last one is the call's own
        if call.derivation.depends_on is None and not any(cell.hits for cell in oldest.family):
            state = before.key[-1], () if before.facts is None else before.facts.rows
            with suppress(Exception):
                text = why_unused(call.derivation, call.binding.owner, state, call.state)
                if text is not None:
                    self._mutex.warn(("unused", text), text)

    def _tell_unsettled(self, call: Call, again: Call) -> None:
        """Warn that a value is never stored: what it depends on changes while it is derived."""
        with suppress(Exception), self._mutex.held():
            text = why_unsettled(call.derivation, call.binding.owner, call.state, again.state)
            self._mutex.warn(("unsettled", text), text)

    def _advise(self, call: Call, again: Call) -> bool:
        """Say once what in depends_on keeps values from being stored; return whether it does."""
        derivation, found = call.derivation, again.read_before(call)
        if found is not None:
            text = why_read_once(derivation, found)
        elif not call.equals(again) and made_anew(call.dependencies, again.dependencies):
            text = why_made_anew(derivation)
        else:
            return False
        with self._mutex.held():
            self._mutex.warn(("depends_on", derivation.number), text)
        return True


def _fields_of(call: Call, attributes: Attributes | None) -> Attributes | None:
    """Return whose value a call derives, for its span and the log; None if neither is wanted."""
    if attributes is None:
        if not _log.isEnabledFor(logging.DEBUG):
            return None
        attributes = {}
    attributes.update(adapter=call.adapter, kind=call.derivation.name)
    with suppress(Exception):  # another thread may change the model just now
        attributes["layer"] = call.binding.cache.layer_of(call.binding)
    return attributes


def _log_derivation(fields: Attributes) -> None:
    kind, adapter, layer = fields["kind"], fields["adapter"], fields.get("layer")
    _log.debug("derived the %s of adapter %s in %s", kind, adapter, layer, extra=fields)


def _refill(call: Call) -> None:
    """Fill what compiled code reads, which what made this a miss may concern."""
    holder = call.binding.holder
    if holder is not None and holder.used:
        holder.update()


def _entry_of(
    pending: Pending,
    function: Callable[[], Any],
    reading: Reading,
    relieve: Callable[[Collection[torch.device], bool], None],
    *,
    on_device: bool,
) -> tuple[Any, Entry | None]:
    """Derive a value, and make an entry of it if it can be stored.

    If the device's memory does not suffice, all goes that may be evicted there, and the value is
    derived once more. Then everything there goes, what is pinned and what compiled code reads
    included, and the value is derived as if there were no cache, and not stored. If memory does not
    suffice for that, nor would it without a cache.

    Args:
        pending: told why there is no entry.
        function: derives the value.
        reading: of the dependencies.
        relieve: evicts what is on some devices; everything there, if the second argument is true.
        on_device: whether to measure what deriving takes on a CUDA device as well.

    Returns:
        The value, and the entry or None.
    """
    devices = {tensor.device for tensor in reading.tensors}
    # No attempt is made in an exception's handler: the exception holds what it came from, and with
    # it the memory of the failed attempt.
    for everything in (False, True):
        try:
            began = Ready.begin(reading.tensors) if on_device else None
            value, cost = timed(function)
            break
        except torch.OutOfMemoryError:
            pass
        relieve(devices, everything)
    else:
        pending.unstored = Reason.OUT_OF_MEMORY
        return timed(function)[0], None
    for last in (False, True):
        try:
            with _plainly():
                kept = storable(value, pending.facts.storages)
            break
        except torch.OutOfMemoryError:
            pass
        if last:
            pending.unstored = Reason.OUT_OF_MEMORY
            return value, None
        relieve(devices, False)  # noqa: FBT003
    if kept is None:
        pending.unstored = Reason.UNSTORABLE
        return value, None
    tensors = kept if isinstance(kept, tuple) else (kept,)
    return value, Entry(kept, pending.facts, cost, Ready.now(tensors, began))


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """Derive a value, and say how many seconds that took.

    Without autocast's own cache of weights that it has cast: it does not notice writes, and lives
    shorter than the value.
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
