"""Bugs to seed: each is a way that a cache like this one has gone wrong, or could."""

import contextlib
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from decorator_machine import DecoratorMachine, InferenceMachine
from model_machine import AuditedModelMachine, ModelMachine

from dora_cache import ambient, attachment, backends, cache
from dora_cache.attributes import SLOT
from dora_cache.backends import lru, storage
from dora_cache.core import (
    calls,
    dependencies,
    deriver,
    engine,
    facts,
    memory,
    results,
    shortcuts,
)
from dora_cache.core.audit import Audit
from dora_cache.core.binding import Binding
from dora_cache.core.cells import Cell, Pending
from dora_cache.core.deriver import Deriver
from dora_cache.core.engine import Engine
from dora_cache.core.holdings import Holdings
from dora_cache.lifecycle import refills
from dora_cache.reasons import Reason
from dora_cache.recipes import dora, hotswap, merging, peft_layers
from dora_cache.recipes.dora import bound, linear, outputs, values, variants
from dora_cache.recipes.dora.bound import Bound

SCALE = values.stored_scale.__dora_cache_derivation__


@dataclass(frozen=True)
class Mutant:
    name: str
    machine: type
    seed: object
    rare: bool  # whether it takes a long search to see it


MUTANTS = []


def mutant(name, machine, *, rare=False):
    def enter(seed):
        MUTANTS.append(Mutant(name, machine, seed, rare))
        return seed

    return enter


def in_dora(patch, name, function):
    """Replace a function of the recipe wherever it has been imported to."""
    for module in (values, outputs, variants, linear):
        if hasattr(module, name):
            patch.setattr(module, name, function)


def without(pick):
    """Return DoRA's dependencies but for those that ``pick`` names."""

    def depends_on(layer, adapter, dtype=None):
        left_out = {id(part) for part in pick(layer, adapter)}
        return [
            part for part in values.depends_on(layer, adapter, dtype) if id(part) not in left_out
        ]

    return depends_on


# What a value depends on


@mutant("keyed by the adapter's name alone", ModelMachine)
def _(patch):
    def read(dependencies):
        found = facts.read(dependencies)
        found.rows, found.plain = [], ()
        return found

    patch.setattr(calls, "read", read)


@mutant("scaling missing from the dependencies", ModelMachine)
def _(patch):
    patch.setattr(SCALE, "depends_on", without(lambda layer, name: [layer.scaling[name]]))


@mutant("magnitude missing from the dependencies", ModelMachine)
def _(patch):
    patch.setattr(
        SCALE,
        "depends_on",
        without(lambda layer, name: [layer.lora_magnitude_vector[name].weight]),
    )


@mutant("base weight missing from the dependencies", ModelMachine)
def _(patch):
    patch.setattr(values, "weights_of", lambda base: ())


def read_by(patch, *what):
    """Have tensors read by some of their facts only."""

    class Reading(facts.Reading):
        __slots__ = ()

        def _add_tensor(self, item):
            super()._add_tensor(item)
            self.rows[-1] = tuple(getter(item) for getter in what)

    patch.setattr(facts, "Reading", Reading)


@mutant("facts without version counters", ModelMachine)
def _(patch):
    read_by(patch, id, torch.Tensor.data_ptr)


@mutant("facts of version counters alone", ModelMachine)
def _(patch):
    read_by(patch, lambda tensor: tensor._version)


@mutant("autocast missing from the key", ModelMachine)
def _(patch):
    patch.setattr(calls, "environment", tuple)


@mutant("shortcuts without version counters", ModelMachine)
def _(patch):
    _shortcuts_by(patch, id, torch.Tensor.data_ptr)


@mutant("shortcuts that outlive their entries", ModelMachine, rare=True)
def _(patch):
    patch.setattr(Cell, "clear_shortcuts", lambda self: None)


def _shortcuts_by(patch, *what, intact=lambda entry: entry.intact):
    """Have shortcuts compare some facts of the dependencies only.

    Args:
        patch: pytest's.
        what: gives one fact of a tensor.
        intact: whether the value may be used.
    """
    make = shortcuts.make_shortcut

    def noted(dependencies):
        return [
            tuple(getter(item) for getter in what) if isinstance(item, torch.Tensor) else item
            for item in dependencies
        ]

    def make_shortcut(dependencies, entry, **settings):
        found = make(dependencies, entry, **settings)
        if found is not None:
            before = noted(dependencies)
            found.check = lambda now, entry, _: noted(now) == before and intact(entry)
        return found

    patch.setattr(engine, "make_shortcut", make_shortcut)


# Events


@mutant("no events at all", ModelMachine)
def _(patch):
    patch.setattr(Holdings, "void", lambda self, binding, adapter: 0)
    patch.setattr(Engine, "touched", lambda self, tensors: 0)


@mutant("no optimizer hook", ModelMachine)
def _(patch):
    patch.setattr(attachment, "follow_optimizers", lambda cache: None)


@mutant("no hotswap events", ModelMachine, rare=True)
def _(patch):
    patch.setattr(hotswap, "follow_hotswap", lambda cache: None)


@mutant("no merge events", ModelMachine)
def _(patch):
    patch.setattr(merging, "follow_merges", lambda cache: None)
    follow = peft_layers.Observer

    def deaf(**arguments):
        calls = arguments.get("calls") or {}
        for name in ("merge", "unmerge"):
            calls.pop(name, None)
        return follow(**arguments)

    patch.setattr(peft_layers, "Observer", deaf)


@mutant("storages that are refilled", ModelMachine, rare=True)
def _(patch):
    patch.setattr(refills, "mark_refilled", lambda storage: False)


@mutant("a switch drops the active adapters' values only", ModelMachine, rare=True)
def _(patch):
    patch.setattr(attachment, "follow_modes", lambda cache: None)
    observer = peft_layers.Observer

    def partial_to_active(**arguments):
        def switched(layer):
            binding = layer.__dict__[SLOT]
            for adapter in layer.active_adapters:
                binding.cache.event(binding, adapter)

        return observer(**arguments | {"mode_switched": switched})

    patch.setattr(peft_layers, "Observer", partial_to_active)


@mutant("no switches of containers", ModelMachine, rare=True)
def _(patch):
    patch.setattr(attachment, "follow_modes", lambda cache: None)


@mutant("no events of libraries that write through .data", ModelMachine, rare=True)
def _(patch):
    patch.setattr(attachment, "follow_writers", lambda cache: None)


@mutant("no event when OLoRA writes the base weight", ModelMachine, rare=True)
def _(patch):
    wrap = merging.wrap

    def without(undo, owner, name, make):
        if name != "olora_init":
            wrap(undo, owner, name, make)

    patch.setattr(merging, "wrap", without)


# What the audit compares


@mutant("an audit that compares nothing", AuditedModelMachine, rare=True)
def _(patch):
    patch.setattr(Audit, "holds", lambda *_: True)


@mutant("an audit that drops what it has looked at alone", AuditedModelMachine, rare=True)
def _(patch):
    patch.setattr(Engine, "_drop_uncounted", lambda self, name: 0)


# How a value is used


@mutant("used in training mode", ModelMachine)
def _(patch):
    in_dora(patch, "why_unusual", lambda layer, adapter: None)
    patch.setattr(Binding, "why_training", lambda self, owner: None)
    patch.setattr(bound, "why_training", lambda layer, binding: None)


@mutant("the magnitude's gradient forgotten", ModelMachine)
def _(patch):
    in_dora(patch, "wants_gradient", lambda layer, adapter: False)


@mutant("hooks on adapter modules ignored", ModelMachine, rare=True)
def _(patch):
    in_dora(
        patch, "why_unusual", lambda layer, adapter: Reason.TRAINING if layer.training else None
    )


def _bound_blind_to(patch, **state):
    """Have bound layers see the layer in a state that it may not be in."""
    plain = Bound.run

    def run(self, layer, x):
        attributes = layer.__dict__
        before = {name: attributes[name] for name in state}
        attributes.update(state)
        try:
            return plain(self, layer, x)
        finally:
            attributes.update(before)

    patch.setattr(Bound, "run", run)


@mutant("a bound layer that ignores disabled adapters", ModelMachine, rare=True)
def _(patch):
    _bound_blind_to(patch, _disable_adapters=False)


@mutant("a bound layer that ignores what its value depends on", ModelMachine)
def _(patch):
    plain = Bound.run

    def run(self, layer, x):
        check, self.shortcut.check = self.shortcut.check, lambda *_: True
        try:
            return plain(self, layer, x)
        finally:
            self.shortcut.check = check

    patch.setattr(Bound, "run", run)


@mutant("entries stored under inference_mode", InferenceMachine)
def _(patch):
    fake = SimpleNamespace(**vars(torch))
    fake.inference_mode = lambda mode: contextlib.nullcontext()
    patch.setattr(deriver, "torch", fake)
    patch.setattr(deriver, "storable", lambda value, storages: value)
    patch.setattr(
        backends.Entry, "__post_init__", lambda self: object.__setattr__(self, "marks", ())
    )
    patch.setattr(backends.Entry, "intact", property(lambda self: True))
    patch.setattr(engine, "make_shortcut", lambda *_, **__: None)


@mutant("copies share what is stored", ModelMachine)
def _(patch):
    # The package's function of the same name hides the module.
    observe = importlib.import_module("dora_cache.lifecycle.observe")
    patch.setattr(observe, "OWN_ATTRIBUTES", (observe.OBSERVER,))
    for shared in (Binding, variants.CachedVariant):
        patch.setattr(shared, "__deepcopy__", lambda self, memo: self, raising=False)
    patch.setattr(Binding, "owned_by", lambda self, args: True)
    # The tensors' identities among the facts would show that it is another model.
    read_by(patch, lambda tensor: tensor._version)


@mutant("stand-ins left behind by detach", ModelMachine)
def _(patch):
    patch.setattr(dora, "_restore", lambda variants: None)


# What users of the decorator do


@mutant("the default device missing from the key", DecoratorMachine)
def _(patch):
    patch.setattr(calls, "environment", lambda: ambient.environment()[:2])


def _listed(kind, read):
    listed = dependencies.listed
    return lambda found: listed(read(found) if isinstance(found, kind) else found)


@mutant("a mapping signed by its keys alone", DecoratorMachine)
def _(patch):
    patch.setattr(calls, "listed", _listed(Mapping, list))


@mutant("a text signed by its letters", DecoratorMachine, rare=True)
def _(patch):
    patch.setattr(calls, "listed", _listed(str, list))


@mutant("a bare tensor signed by its type", DecoratorMachine, rare=True)
def _(patch):
    patch.setattr(calls, "listed", _listed(torch.Tensor, lambda found: [found.dtype]))


@mutant("values looked at by their versions alone", DecoratorMachine)
def _(patch):
    def intact(self):
        return tuple(one._version for one in self.tensors) == self.marks[::2]

    patch.setattr(backends.Entry, "intact", property(intact))
    patch.setattr(engine, "make_shortcut", lambda *_, **__: None)


@mutant("shortcuts that look at the address of a value alone", DecoratorMachine, rare=True)
def _(patch):
    def intact(entry):
        return tuple(one.data_ptr() for one in entry.tensors) == entry.marks[1::2]

    _shortcuts_by(patch, id, lambda tensor: tensor._version, torch.Tensor.data_ptr, intact=intact)


@mutant("memory that the function uses again stored as it is", DecoratorMachine)
def _(patch):
    patch.setattr(results, "_is_shared", lambda tensor: False)


@mutant("bytes counted out by what a caller has put in place", DecoratorMachine, rare=True)
def _(patch):
    def remove(self, tensors):
        for key in storage.storages(tensors):
            self._uses[key] -= 1
            if not self._uses[key]:
                del self._uses[key]
                self.nbytes -= self._sizes.pop(key)

    patch.setattr(storage.Ledger, "remove", remove)


# Storing and forgetting, under threads


@mutant("no generation check", DecoratorMachine, rare=True)
def _(patch):
    patch.setattr(Binding, "voided", lambda self, adapter: 0)


@mutant("no second look at the dependencies", DecoratorMachine, rare=True)
def _(patch):
    patch.setattr(calls.Call, "equals", lambda self, other: True)


@mutant("waiters take whatever is being derived", DecoratorMachine)
def _(patch):
    patch.setattr(Deriver, "joins", lambda self, pending, call: True)


@mutant("nobody waits", DecoratorMachine)
def _(patch):
    patch.setattr(Deriver, "joins", lambda self, pending, call: False)


@mutant("writes during a derivation are not noted", DecoratorMachine, rare=True)
def _(patch):
    patch.setattr(
        Pending, "touched", property(lambda self: False, lambda self, _: None), raising=False
    )


@mutant("waiters hang when a derivation fails", DecoratorMachine, rare=True)
def _(patch):
    run = Deriver.derive

    def hang(self, pending, *rest):
        done, pending.done = pending.done, SimpleNamespace(set=lambda: None, wait=pending.done.wait)
        result = run(self, pending, *rest)  # no set() if this raises
        done.set()
        return result

    patch.setattr(Deriver, "derive", hang)


@mutant("a failed derivation is stored", DecoratorMachine)
def _(patch):
    run = Deriver.derive

    def store(self, pending, *rest):
        try:
            return run(self, pending, *rest)
        except ArithmeticError:
            with self._mutex.held():
                entry = backends.Entry(torch.zeros(2), pending.facts)
                self._holdings.store(pending.cell, entry, pending)
            raise

    patch.setattr(Deriver, "derive", store)


@mutant("invalidations that are not counted", DecoratorMachine)
def _(patch):
    def discard(self, cell, why="invalidations"):
        self._forget(cell)
        return int(self.memory.backend.delete(cell.key))

    patch.setattr(Holdings, "discard", discard)


@mutant("evictions that are not reported", DecoratorMachine)
def _(patch):
    for backend in (backends.LRUBackend, backends.BudgetBackend):
        patch.setattr(backend, "on_evict", lambda self, evicted: None)


@mutant("evictions that are not counted", DecoratorMachine)
def _(patch):
    patch.setattr(Holdings, "evicted", lambda self, cell: self._forget(cell))


@mutant("evictions that are counted and not forgotten", DecoratorMachine)
def _(patch):
    def count(self, cell):
        self.counts["evictions"] += 1

    patch.setattr(Holdings, "evicted", count)


@mutant("a view counted by its elements", DecoratorMachine)
def _(patch):
    def by_elements(tensors):
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    for module in (storage, lru, backends.protocol):
        if hasattr(module, "storage_bytes"):
            patch.setattr(module, "storage_bytes", by_elements)
    patch.setattr(deriver, "storable", lambda value, storages: value)


@mutant("a smaller cap that evicts nothing", DecoratorMachine)
def _(patch):
    # Both would notice: what counts the bytes of a device, and its backend.
    patch.setattr(memory.Part, "room", lambda self, nbytes: True)
    patch.setattr(backends.LRUBackend, "_make_room", lambda self, nbytes: None)


@mutant("bypass in one thread is everybody's", DecoratorMachine)
def _(patch):
    class Shared:
        value = ()

        def get(self):
            return self.value

        def set(self, value):
            self.value = value

    shared = Shared()
    patch.setattr(engine, "bypassed_here", shared)
    patch.setattr(cache, "bypassed_here", shared)
