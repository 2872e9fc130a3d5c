"""The entries of a cache: store them, and drop them on events."""

from __future__ import annotations

import itertools
import logging
import time
from collections import Counter
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

import torch

from dora_cache.copying import Uncopyable
from dora_cache.core.binding import with_children
from dora_cache.core.buffers import Buffers
from dora_cache.core.cells import Cells
from dora_cache.core.history import History
from dora_cache.core.keys import concerns
from dora_cache.core.memory import Memory
from dora_cache.core.mutex import Mutex
from dora_cache.reasons import Reason

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from dora_cache.backends import Backend, Entry
    from dora_cache.config import CacheConfig
    from dora_cache.core.binding import Binding
    from dora_cache.core.cells import Cell, Pending

__all__ = ["Holdings"]

_log = logging.getLogger(__name__)
_TIDY = 64  # values stored between two times that all cells are looked at, at least
_FRUITLESS = 32  # calls for each owner without one hit, after which a warning says why


class Holdings(Uncopyable):
    """The cells of a cache, and the backend that holds their entries.

    Every method but :meth:`now` is called with the lock held.

    Args:
        config: the settings.
        devices: where the model is.

    Attributes:
        bindings: of the owners, by token.
        buffers: what compiled code reads.
        cells: what is known of each value.
        counts: events by name, as in ``CacheStats``.
        history: the counters over time.
        memory: the backend, the caps and the pins.
        mutex: the lock.
        reasons: how often calls went past the cache, or values were not kept, and why.
        seconds: spent deriving.
    """

    def __init__(self, config: CacheConfig, devices: Sequence[torch.device]) -> None:
        self.bindings: dict[int, Binding] = {}
        self.cells = Cells()
        self.counts: Counter[str] = Counter()
        self.history = History()
        self.memory = Memory(config, devices)
        self.mutex = Mutex(self.note_evictions)
        self.buffers = Buffers(self.mutex, self.memory, self.bindings.values)
        self.reasons: Counter[Reason] = Counter()
        self.seconds = 0.0
        self._backend: Backend = self.memory.backend
        self._clock = itertools.count(1)
        self._fruitless: Counter[Reason] = Counter()
        self._calls_left = _FRUITLESS  # until it is looked whether any call has hit
        self._tidy_at = _TIDY  # how many values will have been stored then

    def now(self) -> int:
        """Return a time of the cache's clock, later than all before."""
        return next(self._clock)

    def sample(self) -> None:
        """Take a sample of the counters, unless the last one was not long ago."""
        if not self.history.is_due:
            return
        began = time.monotonic()
        hits, misses = self.cells.count()
        nbytes = self.mutex.attempt("nbytes", lambda: self._backend.nbytes, 0)
        nbytes += self.memory.reserved
        cost = time.monotonic() - began
        self.history.add(hits, misses, self.counts["evictions"], nbytes, cost)

    def note(self, reason: Reason, binding: Binding | None) -> None:
        """Count a call that went past the cache, or a value that is not kept; the lock is held.

        After many of them without a hit, warn once. Those that the caller asks for do not count
        towards that: ``bypass()``, a detached cache, and training with gradients.

        Args:
            reason: why.
            binding: whose call or value it is; None if its owner is gone.
        """
        self.counts["bypasses"] += reason.is_bypass
        self.reasons[reason] += 1
        if binding is not None:
            binding.reasons[reason] += 1
        if not (
            reason is Reason.BYPASS
            or reason is Reason.DETACHED
            or ((reason in {Reason.TRAINING, Reason.DROPOUT}) and torch.is_grad_enabled())
        ):
            self._fruitless[reason] += 1
            self._calls_left -= 1
            if self._calls_left == 0:
                self._tell_fruitless()

    def _tell_fruitless(self) -> None:
        count = self._fruitless.total()
        self._calls_left = max(0, _FRUITLESS * len(self.bindings) - count)
        # Compiled code reads its buffers past any lookup.
        if self._calls_left or self.memory.reserved or self.cells.count()[0]:
            return
        reason, times = self._fruitless.most_common(1)[0]
        text = (
            f"no call has been answered from the cache so far. Of {count:,} calls that went past "
            f"it, or whose values were not kept, {times:,} have the reason {reason.value!r}. What "
            f"to do: {reason.advice}. cache.report() names the layers"
        )
        self.mutex.warn("fruitless", text)

    def derived(self, cell: Cell, seconds: float) -> None:
        """Count a derivation."""
        cell.derive(seconds)
        self.seconds += seconds

    def store(self, cell: Cell, entry: Entry, pending: Pending) -> Reason | None:
        """Give what a computation came to to the backend; return why it is not kept, or None."""
        self.discard(cell, why="replacements")
        cell.nbytes, cell.device = entry.nbytes, entry.tensors[0].device
        cell.born = pending.born
        kept = self.mutex.attempt("put", lambda: self._put(cell, entry), None)
        if kept is None:  # the backend failed and may hold it or not
            self.mutex.attempt("delete", lambda: self._backend.delete(cell.key), None)
            self.note(Reason.BACKEND_FAILED, self.bindings.get(cell.owner))
            return Reason.BACKEND_FAILED
        if not kept:
            self.counts["rejections"] += 1
            self.note(Reason.CAP, self.bindings.get(cell.owner))
            return Reason.CAP
        self.counts["stores"] += 1
        self.cells.hold(cell, pending.facts)
        cell.contents, cell.audit = pending.contents, pending.audit
        if self.counts["stores"] >= self._tidy_at:
            self._tidy()
            self._tidy_at = self.counts["stores"] + len(self.cells.held()) + _TIDY
        return None

    def _put(self, cell: Cell, entry: Entry) -> bool:
        """Give an entry to the backend; once more after evicting others if memory runs out."""
        with suppress(torch.OutOfMemoryError):
            return self.memory.put(cell.key, entry, cell.adapter)
        self.mutex.attempt("delete", lambda: self._backend.delete(cell.key), None)
        self.evict({tensor.device for tensor in entry.tensors})
        kept = self.memory.put(cell.key, entry, cell.adapter)
        text = "storing a value ran out of memory: entries were evicted to make room for it"
        self.mutex.warn("out of memory", text)
        return kept

    def evict(self, devices: Collection[torch.device], *, everything: bool = False) -> None:
        """Evict the entries on some devices; with ``everything``, pinned ones and buffers too."""
        self.note_evictions()
        for cell in self.cells.held():
            if cell.device in devices and (everything or not self.memory.is_pinned(cell.key)):
                self.discard(cell, why="evictions")
        if everything:
            self.buffers.evict(devices)

    def _tidy(self) -> None:
        """Drop what was derived from freed memory, and forget what was evicted without a report."""
        self.note_evictions()
        cells = self.cells.held()
        held = set(self.mutex.attempt("keys", self._backend.keys, [cell.key for cell in cells]))
        for cell in cells:
            if cell.facts is not None and cell.facts.expired:
                self.discard(cell)
            elif cell.key not in held:
                self.evicted(cell)

    def note_evictions(self) -> None:
        """Take note of what was evicted since the last time; the lock is held."""
        evicted = self.memory.evicted
        while evicted:
            cell = self.mutex.attempt(
                "report of an eviction", partial(self.cells.get, evicted.popleft()), None
            )
            if cell is not None:
                self.evicted(cell)

    def evicted(self, cell: Cell) -> None:
        """Take note that the backend holds the entry of a cell no longer."""
        if cell.facts is not None:
            self._forget(cell)
            self.counts["evictions"] += 1
            self._tell_evicted(cell)

    def _tell_evicted(self, cell: Cell) -> None:
        if _log.isEnabledFor(logging.DEBUG):
            self.mutex.tell(partial(_log_eviction, cell, cell.nbytes))

    def void(self, binding: Binding, adapter: str | None) -> int:
        """Drop what a binding and its children hold of an adapter, and void what is being derived.

        Returns:
            How many entries went.
        """
        gone = 0
        for member in with_children(binding):
            member.void(adapter, self.now())
            member.resting.clear()
            for buffer in member.buffers.values():
                if concerns(adapter, buffer.adapters):
                    buffer.void()
            for cell in self.cells.of_owner(member.token):
                if cell.facts is not None and concerns(adapter, cell.adapter):
                    gone += self.discard(cell)
        return gone

    def discard(self, cell: Cell, why: str = "invalidations") -> int:
        """Drop an entry and count it; return 1 if there was one."""
        self._forget(cell)
        if why == "invalidations":
            cell.born = 0
        deleted = self.mutex.attempt("delete", lambda: self._backend.delete(cell.key), False)  # noqa: FBT003
        self.counts[why] += bool(deleted)
        if deleted and why == "evictions":
            self._tell_evicted(cell)
        return int(bool(deleted))

    def _forget(self, cell: Cell) -> None:
        if cell.facts is not None:
            self.cells.release(cell)
            self.mutex.attempt("unpin", lambda: self.memory.forgotten(cell.key), None)


def _log_eviction(cell: Cell, nbytes: int) -> None:
    binding = cell.binding()
    layer = None if binding is None else binding.cache.layer_of(binding)
    fields = {"adapter": cell.adapter, "kind": cell.kind, "layer": layer, "bytes": nbytes}
    _log.debug("evicted the %s of adapter %s in %s", cell.kind, cell.adapter, layer, extra=fields)
