"""The decorator under threads whose order Hypothesis decides.

A weight holds the number of the last write to it, so every value says what it was derived from.
A call must see every write that was over, and noticed, before the call began.
"""

import threading

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from schedule import Schedule
from torch import nn

import dora_cache
from dora_cache import backends, cached
from dora_cache import cache as core

NAMES = ("a", "b")
BYTES = 8  # of one value
SETTINGS = [
    {"backend": "paused-dict"},
    {"backend": "paused-lru", "max_bytes": BYTES - 1},
    {"backend": "paused-lru", "max_bytes": BYTES},
    {"backend": "paused-lru", "max_bytes": 3 * BYTES},
]
names = st.sampled_from(NAMES)

_machine = None


class Owner(nn.Module):
    """Derives a value by reading its weight twice; others may write in between."""

    def __init__(self, machine):
        super().__init__()
        self.machine = [machine]  # in a list, so that it is no part of the state
        self.weight = nn.ParameterDict({name: torch.zeros(1) for name in NAMES})
        self.requires_grad_(requires_grad=False)
        self.eval()

    def depends(self, name):
        self.machine[0].schedule.pause()
        self.machine[0].signs(name)
        return [self.weight[name]]

    @cached("value", adapter="name", depends_on=depends)
    def value(self, name):
        machine = self.machine[0]
        machine.begins(name)
        try:
            first = self.weight[name].clone()
            machine.schedule.pause()
            second = self.weight[name].clone()
            machine.schedule.pause()
            if machine.failing:
                machine.fail(name)
            return torch.cat([first, second, first, second])[:2]  # a view of twice its size
        finally:
            machine.ends(name)


def paused(kind):
    """A backend that pauses before and after each operation, with the cache's lock held."""

    class Paused(kind):
        def get(self, key):
            _machine.schedule.pause()
            return super().get(key)

        def put(self, key, entry):
            _machine.schedule.pause()
            kept = super().put(key, entry)
            _machine.schedule.pause()
            return kept

        def delete(self, key):
            _machine.schedule.pause()
            return super().delete(key)

    return Paused


backends.register("paused-dict", paused(backends.DictBackend))
backends.register("paused-lru", paused(backends.LRUBackend))


class DecoratorMachine(RuleBasedStateMachine):
    """Calls, writes, events and invalidations, each a task; one more rule lets a task go on."""

    steps = 0

    @initialize(which=st.sampled_from(SETTINGS))
    def start(self, which):
        global _machine
        _machine = self
        self.schedule = Schedule()
        self.real, core.threading = core.threading, self.schedule.threading()
        self.owner = Owner(self)
        self.failing = False
        self.failures = 0
        self.failed_in = set()  # threads whose derivation has failed, and that still work on it
        self.written = dict.fromkeys(NAMES, 0)  # the last write
        self.noticed = dict.fromkeys(NAMES, 0)  # the last write that the cache must know of
        self.events = dict.fromkeys(NAMES, 0)  # how often anything happened that voids values
        self.voiding = 0  # events that are on their way
        self.signed = {}  # by thread: how many events there had been when it signed
        self.deriving = {name: set() for name in NAMES}
        self.cache = dora_cache.attach(self.owner, **which)

    def teardown(self):
        if not hasattr(self, "schedule"):
            return
        try:
            self.failing = False
            self.all_end()
            self.sums()
            self.cache.detach()
        finally:
            core.threading = self.real

    # What the owner tells

    def signs(self, name):
        if self.voiding:  # which values hold is not settled: take each as its own
            self.events[name] += 1
        self.signed.setdefault(threading.get_ident(), self.events[name])

    def begins(self, name):
        events = self.signed.get(threading.get_ident())
        if events is not None:  # else it goes past the cache
            assert events not in self.deriving[name], "one value is derived twice"
            self.deriving[name].add(events)

    def ends(self, name):
        self.deriving[name].discard(self.signed.get(threading.get_ident()))

    def fail(self, name):
        self.failures += 1
        self.failed_in.add(threading.get_ident())
        raise ArithmeticError(name)

    # Tasks

    def call(self, name, *, keyword=False):
        def run():
            wanted = self.noticed[name]
            failures, failing = self.failures, set(self.failed_in)
            self.signed.pop(threading.get_ident(), None)
            try:
                found = self.owner.value(name=name) if keyword else self.owner.value(name)
            except ArithmeticError:
                assert self.failures > failures or failing, "an error of nobody's derivation"
                self.failed_in.discard(threading.get_ident())
                return
            finally:
                self.signed.pop(threading.get_ident(), None)
            assert found.shape == (2,)
            for seen in found.tolist():
                assert wanted <= seen <= self.written[name], (wanted, seen, self.written[name])

        self.begin(run)

    def begin(self, function):
        type(self).steps += 1
        task = self.schedule.start(function)
        self.resume(task)

    def resume(self, task):
        self.schedule.resume(task)
        if task.done and task.error is not None:
            raise task.error
        self.check_bytes()

    @rule(name=names, keyword=st.booleans())
    def calls_value(self, name, keyword):
        self.call(name, keyword=keyword)

    @rule(name=names, inference=st.booleans())
    def writes(self, name, inference):
        """A write that the version counter shows."""
        type(self).steps += 1
        self.events[name] += 1
        self.written[name] += 1
        with torch.inference_mode() if inference else torch.no_grad():
            self.owner.weight[name].fill_(self.written[name])
        self.noticed[name] = self.written[name]

    @rule(name=names, how=st.sampled_from(["adapter", "all", "module", "clear", "touched", "mode"]))
    def writes_past_the_counter_and_says_so(self, name, how):
        """A write through .data, and then what makes the cache forget."""
        self.events[name] += 1
        self.written[name] += 1
        number = self.written[name]
        self.owner.weight[name].data.fill_(number)

        def run():
            self.voiding += 1
            if how == "adapter":
                self.cache.invalidate(adapter=name)
            elif how == "all":
                self.cache.invalidate()
            elif how == "module":
                self.cache.invalidate(module=self.owner)
            elif how == "clear":
                Owner.value.cache_clear()
            elif how == "touched":
                self.cache.touched([self.owner.weight[name]])
            else:
                self.owner.train()
                self.owner.eval()
            self.voiding -= 1
            for other in NAMES:
                self.events[other] += 1
            self.noticed[name] = max(self.noticed[name], number)

        self.begin(run)

    @rule(name=names)
    def replaces(self, name):
        type(self).steps += 1
        self.events[name] += 1
        self.written[name] += 1
        new = nn.Parameter(torch.full((1,), float(self.written[name])), requires_grad=False)
        self.owner.weight[name] = new
        self.noticed[name] = self.written[name]

    @rule(failing=st.booleans())
    def fails(self, failing):
        type(self).steps += 1
        self.failing = failing

    @rule(name=names)
    def bypasses(self, name):
        def run():
            with self.cache.bypass():
                wanted = self.written[name]  # with or without an event
                try:
                    found = self.owner.value(name)
                except ArithmeticError:
                    self.failed_in.discard(threading.get_ident())
                    return
                assert wanted <= min(found.tolist())

        self.begin(run)

    @precondition(lambda self: self.schedule.tasks)
    @rule(data=st.data())
    def goes_on(self, data):
        type(self).steps += 1
        ready = self.schedule.runnable()
        assert ready, "a deadlock"
        self.resume(data.draw(st.sampled_from(ready)))

    @precondition(lambda self: self.schedule.tasks)
    @rule()
    def all_go_on(self):
        type(self).steps += 1
        self.all_end()
        self.sums()

    def all_end(self):
        while self.schedule.tasks:
            ready = self.schedule.runnable()
            assert ready, "a deadlock"
            self.resume(ready[0])

    # What holds

    def check_bytes(self):
        backend = self.cache._backend
        entries = list(dict.values(getattr(backend._entries, "_Cache__data", backend._entries)))
        assert backend.max_bytes is None or self.held(entries) <= backend.max_bytes
        for entry in entries:
            assert not entry.value.requires_grad
            assert not entry.value.is_inference()

    @staticmethod
    def held(entries):
        """Bytes of distinct storages."""
        found = [entry.value.untyped_storage() for entry in entries]
        return sum({storage._cdata: storage.nbytes() for storage in found}.values())

    def sums(self):
        stats = self.cache.stats()
        gone = stats.evictions + stats.invalidations + stats.replacements
        assert stats.stores == stats.entries + gone
        assert stats.evictions >= 0
        assert (stats.entries == 0) == (stats.nbytes == 0)


DecoratorMachine.TestCase.settings = settings(settings.default)
TestDecorator = pytest.mark.machine(DecoratorMachine.TestCase)
