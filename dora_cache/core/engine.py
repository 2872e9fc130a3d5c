"""Look values up, have them derived and stored, and handle events."""

from __future__ import annotations

import math
import os
import weakref
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dora_cache.ambient import raw_stream, storage_of, untraceable
from dora_cache.attributes import SLOT
from dora_cache.copying import Uncopyable
from dora_cache.core.audit import EVERY, Auditor
from dora_cache.core.binding import Binding, next_token, with_children
from dora_cache.core.calls import SPELLINGS, Call, spelled_as
from dora_cache.core.deriver import Deriver
from dora_cache.core.facts import UncheckableError, read, tensors_in
from dora_cache.core.holdings import Holdings
from dora_cache.core.keys import ALL_ADAPTERS, PLAIN_KEYS, UnkeyableError
from dora_cache.core.moved import forget, let_go
from dora_cache.core.mutex import exclusive
from dora_cache.core.naming import names_of_owners
from dora_cache.core.refilled import is_refilled, note_written
from dora_cache.core.shortcuts import make_shortcut
from dora_cache.errors import AlreadyAttachedError, ConfigError, DetachedError
from dora_cache.reasons import Declined, Reason

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence

    from torch import nn

    from dora_cache.backends import Backend, Entry, Value
    from dora_cache.config import CacheConfig
    from dora_cache.core.cells import Cell
    from dora_cache.core.decorator import Derivation
    from dora_cache.core.keys import Adapters
    from dora_cache.core.shortcuts import Shortcut

__all__ = ["Engine", "NotCachedError", "bypassed_here", "warming_here"]

bypassed_here: ContextVar[tuple[int, ...]] = ContextVar("dora_cache_bypassed", default=())
warming_here: ContextVar[bool] = ContextVar("dora_cache_warming", default=False)
_AUDITED = EVERY - 1
_PATIENCE = 60.0  # seconds to wait for another thread, which may wait for a lock that this one has


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


class Engine(Uncopyable):
    """What recipes, events and decorated functions call; users hold an :class:`AdapterCache`.

    Every method may be called from any thread.

    Args:
        config: the settings.
        devices: where the model is.

    Attributes:
        token: a number that no other cache has.
        holdings: what is held. Its attributes ``bindings``, ``buffers``, ``cells``, ``counts``,
            ``memory``, ``mutex`` and ``reasons`` are attributes of the engine too.
        parts: the models that are attached, held weakly, by what their modules' names begin with.
        declined: what could have been cached and is not.
        closed: whether the cache is detached.
        bake: makes what the model derives constants of programs; see ``recipes.baking``.
        arrivals: what is called with modules that come into the models; see ``lifecycle``.
    """

    INSTEAD = "it belongs to one model; copy the AdapterCache, which gives a detached one"

    def __init__(self, config: CacheConfig, devices: Sequence[torch.device] = ()) -> None:
        self.config = config
        self.token = next_token()
        self.holdings = Holdings(config, devices or [torch.device("cpu")])
        self.bindings = self.holdings.bindings
        self.buffers = self.holdings.buffers
        self.cells = self.holdings.cells
        self.counts = self.holdings.counts
        self.memory = self.holdings.memory
        self.mutex = self.holdings.mutex
        self.reasons = self.holdings.reasons
        self.declined: dict[Declined, None] = {}
        self.parts: dict[str, weakref.ref[nn.Module]] = {}
        self.closed = False
        self.arrivals: Any = None
        self.bake: Any = None
        self.compares_contents = config.guard == "content"
        self.auditor = Auditor() if config.audit and not self.compares_contents else None
        self._backend: Backend = self.memory.backend
        # Then whatever is stored stays until it is discarded here, and shortcuts need not ask.
        self._keeps_everything = getattr(self._backend, "keeps_everything", False) is True
        self._deriver = Deriver(self.holdings, self.auditor)
        self._undo = ExitStack()
        _engines.add(self)

    # Calls

    def lookup(
        self,
        derivation: Derivation,
        binding: Binding,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Return the valid stored value of a call, or derive it, once for all threads."""
        spelled: Hashable = None
        if not kwargs:
            # Spelled out here for the common calls, since it runs at every hit.
            if len(args) == 2 and binding.has_owner and type(args[1]) in PLAIN_KEYS:  # noqa: PLR2004
                spelled = (derivation.number, args[1])
            else:
                spelled = spelled_as(derivation, binding, args)
            if spelled is not None and not bypassed_here.get():
                shortcut = binding.shortcuts.get(spelled)
                if shortcut is not None:
                    owner = binding.reference
                    try:
                        if owner is None or (
                            owner() is args[0]
                            and not (
                                getattr(args[0], "training", False)
                                and binding.why_training(args[0])
                            )
                        ):
                            entry = self.recall(shortcut, derivation.depends_on(*args))  # type: ignore[arg-type, misc]
                            if entry is not None:
                                return entry.value
                    except Exception:  # noqa: BLE001, S110 - the long way deals with it
                        pass
        reason = self._bars(binding, args)
        if reason is None and spelled in binding.resting and self._rests(binding, spelled):
            reason = Reason.NEVER_REUSED
        if reason is not None:
            return self._go_past(reason, derivation, binding, args, kwargs)
        try:
            call = Call(
                derivation, binding, args, kwargs, spelled, compares_contents=self.compares_contents
            )
        except UncheckableError as error:
            return self._go_past(error.reason, derivation, binding, args, kwargs)
        except UnkeyableError:
            return self._go_past(Reason.UNKEYABLE, derivation, binding, args, kwargs)
        except Exception as error:  # noqa: BLE001 - a broken depends_on must not break inference
            result = self._go_past(Reason.DEPENDS_ON_FAILED, derivation, binding, args, kwargs)
            self.failed(f"depends_on of {derivation.name!r}", error)
            return result
        return self._answer(call)

    def recall(self, shortcut: Shortcut, dependencies: Sequence[object]) -> Entry | None:
        """Return what a shortcut leads to, or None if something is not as it was.

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
        if entry is None:
            entry = self._fetch(shortcut)
            if entry is None:
                return None
        try:
            if not shortcut.check(dependencies, entry, shortcut):
                return None
        except Exception:  # noqa: BLE001 - other dependencies than before, or worse: the long way
            return None
        ready = entry.ready  # what join() looks at first, without the call
        if ready is not None and raw_stream(ready.device) != ready.stream:
            ready.join(entry.tensors)
        uses = shortcut.count()
        if uses & _AUDITED == shortcut.phase and not self._audited(
            shortcut, uses, dependencies, entry
        ):
            return None
        return entry

    def _fetch(self, shortcut: Shortcut) -> Entry | None:
        """Return the entry of a shortcut from the backend, or None."""
        facts = shortcut.facts
        # The backend may copy it to the device, and caps are held elsewhere.
        if self._keeps_everything or facts is None or self.memory.reserved or self.mutex.is_owned:
            return None
        entry: Entry | None = None
        with self.mutex.lock:
            with suppress(Exception):  # the long way deals with it
                entry = self._backend.get(shortcut.key)
            if entry is not None and (entry.stamp is not facts or shortcut.facts is not facts):
                entry = None
        self.mutex.catch_up()
        return entry

    def _audited(
        self, shortcut: Shortcut, uses: int, dependencies: Sequence[object], entry: Entry
    ) -> bool:
        """Audit a use by a shortcut; on a difference, or if it cannot be audited, return False.

        The call then goes the long way. Its hit is taken back.
        """
        # Iterators are spent by now, and mappings are listed by the long way alone.
        plain = type(dependencies) is tuple or type(dependencies) is list
        cell = self.cells.get(shortcut.key)
        if plain and cell is not None and self._passes_audit(cell, uses, dependencies, entry):
            return True
        with self.mutex.lock:
            if cell is not None:
                cell.due = not plain
                cell.add(hit=True, count=-1)
        self.mutex.catch_up()
        return False

    def _passes_audit(
        self, cell: Cell, uses: int, dependencies: Sequence[object], entry: Entry
    ) -> bool:
        """Compare some contents; on a difference drop everything and return False."""
        audit = cell.audit
        if audit is None or self.auditor is None:
            return True
        try:
            name = self.auditor.changed(audit, uses, dependencies, entry.tensors)
        except Exception as error:  # noqa: BLE001 - never an inference failure
            self.failed("the audit", error)
            return True
        if name is None:
            return True
        self._drop_uncounted(name)
        return False

    def _bars(self, binding: Binding, args: tuple[Any, ...]) -> Reason | None:
        """Return why a call has to go past the cache whatever it asks for, or None."""
        if self.closed:
            return Reason.DETACHED
        if self.bypassing:
            return Reason.BYPASS
        if not binding.owned_by(args):
            return Reason.COPY
        reason = None if binding.reference is None else binding.why_training(args[0])
        if reason is not None:
            return reason
        if untraceable():
            return Reason.TRACED
        if self.mutex.is_owned:  # a __del__ that the garbage collector runs in there
            return Reason.REENTERED
        return None

    @staticmethod
    def _rests(binding: Binding, spelled: Hashable) -> bool:
        """Whether a call goes past the cache since its values were not used again lately."""
        left = binding.resting.get(spelled, 0) - 1
        if left > 0 and not warming_here.get():
            binding.resting[spelled] = left
            return True
        binding.resting.pop(spelled, None)
        return False

    def _go_past(
        self,
        reason: Reason,
        derivation: Derivation,
        binding: Binding,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        # A depends_on that fails may do so as the function does, which says more.
        if warming_here.get() and reason is not Reason.DEPENDS_ON_FAILED:
            raise NotCachedError(derivation.name, reason)
        with self.mutex.lock:
            self.holdings.note(reason, binding)
        self.mutex.catch_up()
        return derivation.derive(args, kwargs)

    def _answer(self, call: Call) -> Any:
        """Return the stored value of a prepared call, wait for another thread's, or derive it."""
        binding, derivation = call.binding, call.derivation
        offers = audited = joins = True
        while True:
            pending, join, declined = None, False, False
            with self.mutex.lock:
                cell = self.cells.of(call.key, derivation, call.adapter, binding)
                entry = self._valid(cell, call)
                if entry is not None:
                    moved = bool(call.reading.moved) and self._follows(cell, call)
                    if call.is_plain and not moved:  # data that moves may move on before the next
                        self._shorten(call, cell, entry)
                    cell.family.wasted = cell.family.rest = 0
                else:
                    others = cell.pending if joins else ()
                    pending = next((p for p in others if self._deriver.joins(p, call)), None)
                    join = pending is not None
                    declined = pending is None and offers and self._deriver.declines(call, cell)
                    if pending is None and not declined:
                        pending = self._deriver.begin(call, cell)
                        derivation.caches.add(self)
                uses = cell.add(hit=entry is not None or join)
            if entry is not None and audited and (cell.due or uses % EVERY == 0):
                cell.due = False
                audited = self._passes_audit(cell, uses, call.dependencies, entry)
                if not audited:
                    with self.mutex.lock:
                        cell.add(hit=True, count=-1)
                    continue
            if pending is None or join:  # else an interrupt in there would leave others waiting
                self.mutex.catch_up()
            if declined:
                with suppress(torch.OutOfMemoryError):
                    return self._deriver.only_derive(call, cell)
                offers = False  # the long way makes room
            if pending is not None:
                if not join:
                    return self._deriver.derive(pending, call)
                joins = pending.done.wait(_PATIENCE) is not False
                entry = pending.result() if joins else None
            if entry is not None:
                return _joined(entry)
            with self.mutex.lock:  # declined, or the one waited for came to nothing: no lookup yet
                cell.add(hit=not declined, count=-1)
            # Each thread derives its own.
            if pending is not None and pending.unstored is Reason.UNSTORABLE:
                return self._go_past(Reason.UNSTORABLE, derivation, binding, call.args, call.kwargs)

    def _valid(self, cell: Cell, call: Call) -> Entry | None:
        """Return the entry of a call if it may be used; drop it if not."""
        try:
            entry = self._backend.get(cell.key)
        except Exception as error:  # noqa: BLE001 - as Mutex.attempt(), without its cost at each hit
            self.mutex.failed("the backend's get", error)
            return None
        self.holdings.note_evictions()  # some backends move entries when they are asked for one
        if entry is None:
            self.holdings.evicted(cell)  # unless it was reported, as it should have been
            return None
        if self.memory.reserved:  # the backend may have made a copy of it on the device
            self.mutex.attempt("get", self.memory.settle, None)
        facts = cell.facts
        if (
            # Without facts it has been discarded, and the backend failed to delete it; with others,
            # the backend has mixed up its keys.
            facts is not None
            and entry.stamp is facts
            and facts.rows == call.reading.rows
            and cell.born > call.binding.voided(call.adapter)
            and entry.intact
            and all(contents == call.contents for contents in cell.contents)
        ):
            return entry
        self.holdings.discard(cell)
        self._deriver.waste(cell.family, call)
        return None

    def _follows(self, cell: Cell, call: Call) -> bool:
        """Whether what a value is derived from has moved; the lock is held."""
        facts = cell.facts
        if facts is None or facts.is_at(call.reading):
            return False
        self.cells.follow(cell, facts, call.reading)
        return True

    def _shorten(self, call: Call, cell: Cell, entry: Entry) -> None:
        """Remember a hit, so that the next one is shorter; the lock is held."""
        binding, returned, spelled = call.binding, call.listed, call.spelled
        if (
            self.compares_contents
            or returned is None
            or returned.form is None
            or len(returned) != len(call.dependencies)  # tensors among the arguments
        ):
            return
        if spelled not in binding.shortcuts and len(binding.shortcuts) >= SPELLINGS:
            return
        gradients = not call.derivation.detach and call.reading.requires_grad
        shortcut = make_shortcut(
            call.dependencies,
            entry,
            gradients=gradients,
            fixed=self._keeps_everything,
            form=returned.form,
        )
        if shortcut is None or read(call.dependencies).rows != call.reading.rows:
            return  # a write since the call was read: the facts are not those of the entry
        shortcut.spelled, shortcut.key, shortcut.facts = spelled, call.key, cell.facts
        shortcut.ready = entry.ready
        shortcut.count = cell.short.__next__
        shortcut.phase = binding.token & _AUDITED if cell.audit is not None else -1
        old = binding.shortcuts.get(spelled)
        if old is not None:
            old.clear()
        # One entry may be spelled in several ways, and all must be cleared with it.
        cell.shortcuts = [one for one in cell.shortcuts if one is not old] + [shortcut]
        binding.shortcuts[spelled] = shortcut

    # Events

    @exclusive
    def event(self, binding: Binding, adapter: str | None = ALL_ADAPTERS) -> int:
        """Void the values of a binding and its children after something has happened to them.

        Returns:
            How many entries went.
        """
        self.buffers.refill_later(with_children(binding))
        return self.holdings.void(binding, adapter)

    @exclusive
    def invalidate(
        self, adapter: str | None = ALL_ADAPTERS, owners: Collection[int] | None = None
    ) -> int:
        """Void values, of one adapter or all, of the owners with these ids or all."""
        bindings = list(self.bindings.values())
        self.buffers.refill_later(bindings)
        return sum(
            self.holdings.void(binding, adapter)
            for binding in bindings
            if owners is None or id(binding.owner) in owners
        )

    @exclusive
    def suspect(self) -> int:
        """Void everything, and leave buffers void: something is being written to just now."""
        return self._void_all()

    @exclusive
    def _drop_uncounted(self, name: str) -> int:
        """Drop everything: contents have changed that nothing counted, so others may have too."""
        text = (
            f"the audit of {name!r} found contents that had changed past version counters, as by "
            "p.data.copy_(), numpy, a collective, or another process: outputs since then may be "
            "wrong. Everything held was dropped. Call cache.invalidate() after such writes, or "
            'attach with guard="content"'
        )
        self.mutex.warn("uncounted", text)
        self.buffers.refill_later(self.bindings.values())
        return self._void_all()

    def _void_all(self) -> int:
        bindings = list(self.bindings.values())
        return sum(self.holdings.void(binding, ALL_ADAPTERS) for binding in bindings)

    @exclusive
    def touched(
        self, tensors: Iterable[Tensor | torch.UntypedStorage], before: float = math.inf
    ) -> int:
        """Void every value derived from memory that may have been written to.

        Args:
            tensors: over that memory.
            before: when that was, by the cache's clock; what began to be derived later holds.

        Returns:
            How many entries went.
        """
        touched = _storages_of(tensors)
        note_written(touched)
        forget(touched)
        self._deriver.touch(touched, before)
        self.buffers.void_derived(touched)
        self.buffers.refill_later(self.bindings.values())
        cells = [cell for cell in self.cells.on(touched) if cell.born < before]
        return sum(self.holdings.discard(cell) for cell in cells)

    def replaced(self, tensors: Sequence[Tensor]) -> None:
        """Drop what was derived from tensors one of which takes another's place.

        Takes no lock, so that whoever replaces a parameter never waits. What is put in place before
        a derivation's end is noted before it is in place; so before the dependencies are read again
        and the note is looked at.
        """
        let_go(tensors)
        # Content has a number of its own where storages are refilled, as FSDP does: it replaces
        # sharded parameters by unsharded ones, and these by those.
        storages = {one for one in _storages_of(tensors) if not is_refilled(one)}
        if self._deriver.pending:
            self._deriver.touch(storages)
        # A parameter that was made anew over the same memory may have all the facts of the old one.
        cells = self.cells.on(storages)
        for cell in cells:
            cell.void()
        if cells:
            drop = partial(self.touched, tensors, before=self.holdings.now())
            self.mutex.later(drop, now=True)

    @exclusive
    def revalidate(self, binding: Binding) -> int:
        """Drop those entries of a binding whose dependencies' memory has been freed.

        For operations that replace some dependencies or none, to free memory early: what this
        misses would still not be used. Buffers are filled again if any of their dependencies has
        changed, so that compiled code need not be entered to notice it.

        Returns:
            How many entries went.
        """
        gone = 0
        for member in with_children(binding):
            for cell in self.cells.of_owner(member.token):
                if cell.facts is not None and cell.facts.expired:
                    gone += self.holdings.discard(cell)
        self.buffers.refill_later(with_children(binding))
        return gone

    @exclusive
    def invalidate_derivation(self, derivation: Derivation) -> int:
        """Drop every entry of one derivation; return how many went."""
        self._deriver.touch_derivation(derivation.number)
        cells = [cell for cell in self.cells.held() if cell.number == derivation.number]
        return sum(self.holdings.discard(cell) for cell in cells)

    def owner_died(self, token: int) -> None:
        """Drop everything of an owner that has been garbage collected.

        Called by the garbage collector, anywhere: it must not wait for a lock.
        """
        self.mutex.later(partial(self._remove_owner, token), now=True)

    @exclusive
    def _remove_owner(self, token: int) -> int:
        binding = self.bindings.pop(token, None)
        if binding is None:
            return 0
        self.buffers.drop_all(binding)
        gone = self.holdings.void(binding, ALL_ADAPTERS)
        self.cells.depart(token, ALL_ADAPTERS)
        return gone

    def adapter_deleted(self, binding: Binding, adapter: str) -> int:
        """Drop all that there is of an adapter that a layer has no more, its names included.

        Returns:
            How many entries went.
        """
        gone = self._adapter_deleted(binding, adapter)
        if adapter in self.memory.pins and adapter not in self.jobs([adapter])[0]:
            with self.ours():
                self.unpin(adapter)
        return gone

    @exclusive
    def _adapter_deleted(self, binding: Binding, adapter: str) -> int:
        gone = self.holdings.void(binding, adapter)
        members = list(with_children(binding))
        tokens = {member.token for member in members}
        self._deriver.touch_adapter(tokens, adapter)
        for member in members:
            self.buffers.drop_adapter(member, adapter)
            self.cells.depart(member.token, adapter)
            member.forget(adapter)
        return gone

    def passed_by(self, reason: Reason, binding: Binding) -> None:
        """Count a call that went past the cache without asking it, or a value that is not kept.

        Args:
            reason: why.
            binding: of the layer whose call it is.
        """
        with self.mutex.held():
            self.holdings.note(reason, binding)

    def decline(self, kind: str, where: str, reason: str, *, adapter: str | None = None) -> None:
        """Note that something is not cached, and warn, once per kind and reason.

        Args:
            kind: the adapter kind, e.g. ``"OFT"``.
            where: the layer's name, or what else says where.
            reason: why not, as it goes on after a colon.
            adapter: the adapter's name, where it is one adapter's matter.
        """
        with self.mutex.held():
            self.declined.setdefault(Declined(kind, adapter, where, reason))
            text = f"{kind} is not cached in {where}: {reason}"
            self.mutex.warn((kind, reason), text)

    @property
    def bypassing(self) -> bool:
        """Whether this thread is within ``bypass()``."""
        return self.token in bypassed_here.get()

    def derivation_counts(self, derivation: Derivation) -> tuple[int, int, int]:
        """Return hits, misses and entries of one derivation."""
        with self.mutex.held():
            hits, misses = self.cells.count(of=derivation)
            entries = sum(cell.number == derivation.number for cell in self.cells.held())
            return hits, misses, entries

    # Owners

    def bind(self, owner: object, *, adapter: str | None = None) -> Binding:
        """Take on an owner; its decorated methods use this cache from now on.

        Args:
            owner: an object with a ``__dict__`` that can be weakly referenced.
            adapter: the adapter that all its values belong to, where no parameter says.

        Raises:
            AlreadyAttachedError: the owner belongs to a cache already.
            ConfigError: the owner has no ``__dict__``, or cannot be weakly referenced.
        """
        self.check_open()
        _check_owner(owner)
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
        self.check_open()
        if derivation.binding is not None:
            raise AlreadyAttachedError(_twice(derivation.function))
        derivation.binding = binding = self._add(Binding(self, None, None))
        binding.undo.callback(setattr, derivation, "binding", None)
        return binding

    def _add(self, binding: Binding) -> Binding:
        with self.mutex.held():
            self.bindings[binding.token] = binding
        return binding

    def on_detach(self, undo: Callable[[], object]) -> None:
        """Call ``undo`` on detach, last added first."""
        self._undo.callback(undo)

    def close(self) -> None:
        """Free every entry and give the model back as it was; a second call does nothing."""
        if self.closed:
            return
        self.closed = self._deriver.closed = True
        self._undo.close()
        for binding in list(self.bindings.values()):
            binding.undo.close()
        self._free()

    @exclusive
    def _free(self) -> int:
        gone = 0
        for binding in list(self.bindings.values()):
            gone += self.holdings.void(binding, ALL_ADAPTERS)
        self.buffers.close()
        self.bindings.clear()
        gone += sum(self.holdings.discard(cell) for cell in self.cells.held())
        self.mutex.attempt("close", self._backend.close, None)
        if self.auditor is not None:
            self.auditor.close()
        return gone

    def jobs(self, wanted: list[str] | None) -> tuple[set[str], list[Callable[[], object]], bool]:
        """Return the adapters there are, what derives the wanted ones' values, and if any trains.

        Args:
            wanted: names of adapters; None for all.
        """
        known: set[str] = set()
        jobs: list[Callable[[], object]] = []
        training = False
        for binding in list(self.bindings.values()):
            owner = binding.owner
            if binding.warmers is None or owner is None:
                continue
            for adapter, job in binding.warmers(owner, wanted):
                if adapter is not None:
                    known.add(adapter)
                if wanted is None or adapter is None or adapter in wanted:
                    jobs.append(job)
                    training = training or binding.why_training(owner) is not None
        return known, jobs, training

    def layers(self) -> list[tuple[str, Binding]]:
        """Return the owners that have a name in the models, as they are at present."""
        parts = {name: part for name, weak in self.parts.items() if (part := weak()) is not None}
        names: dict[int, str] = {}
        with suppress(RuntimeError):  # another thread changes the model just now
            names = names_of_owners(parts)
        return [
            (name, binding)
            for binding in list(self.bindings.values())
            if (name := names.get(id(binding.owner)))
        ]

    def layer_of(self, binding: Binding) -> str | None:
        """Return the name of an owner's layer as it was first asked for, or None."""
        if binding.layer is None:
            for name, one in self.layers():
                one.layer = name
        if binding.layer is None:
            binding.layer = ""
        return binding.layer or None

    def seen(self) -> list[Cell]:
        """Return the cells of the values that no event has voided, held or not."""
        found = []
        for cell in self.cells:
            binding = self.bindings.get(cell.owner)
            if binding is not None and cell.born > binding.voided(cell.adapter):
                found.append(cell)
        return found

    def unpin(self, adapter: str) -> None:
        """Let an adapter's entries be evicted again; the lock is held."""
        self.memory.unpin(adapter, self._adapter_of)

    def _adapter_of(self, key: Hashable) -> Adapters:
        cell = self.cells.get(key)
        return None if cell is None else cell.adapter

    @contextmanager
    def ours(self) -> Iterator[None]:
        """Hold the lock of an open cache, for what may raise.

        Raises:
            DetachedError: the cache is detached.
            RuntimeError: the caller runs inside the cache, as a ``__del__`` may.
        """
        if self.mutex.is_owned:
            msg = "called from within the cache: call it from outside, not in a backend or __del__"
            raise RuntimeError(msg)
        with self.mutex.held():
            self.check_open()
            yield

    def check_open(self) -> None:
        """Raise DetachedError if the cache is detached."""
        if self.closed:
            msg = "this cache is detached: call dora_cache.attach(model) for a new one"
            raise DetachedError(msg)

    def failed(self, what: str, error: Exception) -> None:
        """Warn, once per cause, of something that failed and will be made up for."""
        self.mutex.failed(what, error)
        self.mutex.catch_up()


def _joined(entry: Entry) -> Value:
    """Return an entry's value, for the current stream."""
    if entry.ready is not None:
        entry.ready.join(entry.tensors)
    return entry.value


def _storages_of(tensors: Iterable[Tensor | torch.UntypedStorage]) -> set[int]:
    found = set()
    for one in tensors:
        if not isinstance(one, Tensor):
            found.add(one._cdata)
            continue
        # Those of one that wraps others. No storage: nothing is derived from it.
        with suppress(RuntimeError, NotImplementedError, UncheckableError):
            found.update(map(storage_of, tensors_in([one])))
    return found


def _unbind(reference: weakref.ref[Any], token: int) -> None:
    owner = reference()
    binding = None if owner is None else owner.__dict__.get(SLOT)
    if isinstance(binding, Binding) and binding.token == token:
        del owner.__dict__[SLOT]


def _check_owner(owner: object) -> None:
    missing = []
    if not isinstance(getattr(owner, "__dict__", None), dict):
        missing.append("__dict__")
    if not type(owner).__weakrefoffset__:
        missing.append("__weakref__")
    if missing:
        quoted = " and ".join(f'"{name}"' for name in missing)
        msg = (
            f"{type(owner).__name__} has no {' and no '.join(missing)}, which a cache needs: "
            f"add {quoted} to its __slots__, leave __slots__ (or slots=True) out, "
            "or keep its data in an ordinary class"
        )
        raise ConfigError(msg)


def _twice(owner: object) -> str:
    name = getattr(owner, "__qualname__", None) or type(owner).__name__
    return (
        f"{name} belongs to a cache already: use that one, or call its detach() before attaching "
        "again (one cache may cover the whole model)"
    )


def _after_fork() -> None:
    """Forget what threads of the parent process were doing: in the child there are none."""
    for engine in list(_engines):
        engine.mutex.reset()
        engine._deriver.pending.clear()
        for cell in engine.cells:
            cell.pending.clear()


_engines: weakref.WeakSet[Engine] = weakref.WeakSet()
if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork)
