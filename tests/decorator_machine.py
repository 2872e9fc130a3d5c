"""The decorator under threads whose order Hypothesis decides.

A weight holds the number of the last write to it, so every value says what it was derived from.
A call must see every write that was over, and noticed, before the call began.
"""

import contextlib
import gc
import itertools
import threading
from types import MappingProxyType, SimpleNamespace

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from schedule import Schedule
from torch import nn
from zoo import balanced

import dora_cache
from dora_cache import backends, cached
from dora_cache.core import binding, cells, deriver, mutex

NAMES = ("a", "b")
BYTES = 8  # of one value
SETTINGS = [
    {"backend": "paused-dict"},
    {"backend": "paused-dict"},
    {"backend": "paused-lru", "max_bytes": BYTES - 1},
    {"backend": "paused-lru", "max_bytes": BYTES},
    {"backend": "paused-lru", "max_bytes": 3 * BYTES},
    {"backend": "paused-budget", "max_bytes": 2 * BYTES},
]
names = st.sampled_from(["a", "a", "b"])
# What depends_on returns of a weight. The text is refused, so calls go past the cache.
FORMS = {
    "list": lambda weight: [weight],
    "tuple": lambda weight: (weight, "more"),
    "generator": lambda weight: iter([weight]),
    "tensor": lambda weight: weight,
    "dict": lambda weight: {"weight": weight},
    "mapping": lambda weight: MappingProxyType({"weight": weight}),
    "nested": lambda weight: [{"weight": [weight]}],
    "text": lambda weight: "weight",
}


def _swap(value):
    torch.utils.swap_tensors(value, torch.full((2,), -1.0))


# What callers do to what they got, each so that the next to use it would notice.
DAMAGE = {
    "written": lambda value: value.fill_(-1),
    "graph": lambda value: value.requires_grad_(),
    "grad": lambda value: setattr(value, "grad", torch.ones(2)),
    "data": lambda value: setattr(value, "data", torch.full((2,), -1.0)),
    "strides": lambda value: setattr(value, "data", value.data.expand(2, 2)),
    "swapped": _swap,
    "freed": lambda value: value.untyped_storage().resize_(0),
}
# How often a task goes on at once.
far = st.sampled_from([100, 100, 100, 0, 1, 1, 2, 2, 3, 3, 4, 5, 8])

_machine = None
_NOTHING = contextlib.nullcontext()


def make_owner(machine):
    """Return an owner of a class of its own: what failed before has no part in its values.

    Its value is on the default device, and in memory that a later derivation will use again.
    """

    class Owner(nn.Module):
        """Derives a value by reading its weight twice; others may write in between."""

        def __init__(self, machine):
            super().__init__()
            self.machine = [machine]  # in a list, so that it is no part of the state
            self.weight = nn.ParameterDict({name: torch.zeros(1) for name in NAMES})
            self.requires_grad_(requires_grad=False)
            self.eval()

        def depends(self, name):
            machine = self.machine[0]
            machine.schedule.pause()
            machine.signs(name)
            if machine.form == "text":
                machine.signed.pop(threading.get_ident(), None)
            return FORMS[machine.form](self.weight[name])

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
                parts = torch.cat([first, second, first, second])
                if torch.empty(0).is_meta:
                    return parts[:2].to("meta")
                if machine.aliases:
                    return machine.buffer().copy_(parts[:2]).data
                return parts[:2]  # a view of twice its size
            finally:
                machine.ends(name)

    return Owner(machine)


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

    if issubclass(kind, backends.Declining):

        class Paused(Paused):
            def declines(self, key):
                declined = super().declines(key)
                if declined:  # each call derives the value for itself
                    _machine.signed.pop(threading.get_ident(), None)
                return declined

    return Paused


backends.register("paused-dict", paused(backends.DictBackend))
backends.register("paused-lru", paused(backends.LRUBackend))
backends.register("paused-budget", paused(backends.BudgetBackend))


class DecoratorMachine(RuleBasedStateMachine):
    """Calls, writes, events and invalidations, each a task; one more rule lets a task go on."""

    steps = 0
    inference = False  # whether calls by keyword are under inference_mode

    @initialize(
        which=st.sampled_from(SETTINGS),
        form=st.sampled_from(["list", *FORMS]),
        aliases=st.booleans(),
    )
    def start(self, which, form="list", aliases=False):
        global _machine  # noqa: PLW0603 - a backend is made by its name and knows of no machine
        _machine = self
        gc.disable()  # what it frees may ask for the lock, and a run that is repeated must repeat
        self.schedule = Schedule()
        self.real = mutex.threading, cells.threading, deriver.threading, deriver.time
        mutex.threading = cells.threading = deriver.threading = self.schedule.threading()
        # What the budget keeps goes by what values cost, and a run that is repeated must repeat.
        deriver.time = SimpleNamespace(perf_counter=itertools.count().__next__)
        # When a hit is audited goes by the number of the owner's binding; likewise.
        self.tokens, binding._tokens = binding._tokens, itertools.count(1)
        self.owner = make_owner(self)
        self.form = form  # what depends_on returns
        self.aliases = aliases  # whether values are in memory that is used again
        self.free = []  # such memory
        self.buffers = set()  # where it all is
        self.damaged = []  # values that their callers have changed
        self.taken = {}  # by thread: such memory, in use
        self.failing = False
        self.failures = 0
        self.failed_in = set()  # threads whose derivation has failed, and that still work on it
        self.numbers = itertools.count(1)
        self.history = {name: [0] for name in NAMES}  # what the weight has held, in order
        self.noticed = dict.fromkeys(NAMES, 0)  # from where in it the cache may take a value
        self.replaced = {name: [] for name in NAMES}
        self.events = dict.fromkeys(NAMES, 0)  # how often anything happened that voids values
        self.passed_by = 0
        self.may_pass = form == "text"
        self.voiding = 0  # events that are on their way
        self.signed = {}  # by thread: how many events there had been when it signed
        # How many there had been when each derivation under way signed, and when it began.
        self.deriving = {name: set() for name in NAMES}
        self.begun = {}  # by thread: the same, of the derivation it is in
        # What the cap may be now; empty without one.
        self.caps = {which["max_bytes"]} if "max_bytes" in which else set()
        self.resizing = self.resizes = 0
        self.cache = dora_cache.attach(self.owner, **which)
        self.rests = self.cache._engine._rests
        self.cache._engine._rests = self.passes

    def teardown(self):
        if not hasattr(self, "schedule"):
            return
        try:
            self.failing = False
            self.all_go_on()
        finally:
            mutex.threading, cells.threading, deriver.threading, deriver.time = self.real
            binding._tokens = self.tokens
            # Some task may have the lock and never go on; and what hears of all optimizers must go.
            self.cache._engine.mutex.lock = threading.RLock()
            self.cache.detach()
            gc.enable()

    # What the owner tells

    def signs(self, name):
        self.signed[threading.get_ident()] = self.count(name)  # the last time before it derives

    def begins(self, name):
        signed = self.signed.get(threading.get_ident())
        if signed is not None:  # else it goes past the cache
            # An event between the two keeps it from waiting for another that signed with it.
            events = signed, self.count(name), torch.empty(0).device
            assert events not in self.deriving[name], "one value is derived twice"
            self.deriving[name].add(events)
            self.begun[threading.get_ident()] = events

    def passes(self, *call):
        """Tell whether a call goes past the cache since its values were not used again."""
        rests = self.rests(*call)
        if rests:
            self.passed_by += 1
            self.signed.pop(threading.get_ident(), None)
        return rests

    def count(self, name):
        """Return how many events there have been."""
        if self.voiding:  # which values hold is not settled: take each as its own
            self.events[name] += 1
        return self.events[name]

    def ends(self, name):
        self.deriving[name].discard(self.begun.pop(threading.get_ident(), None))

    def buffer(self):
        """Return memory that the call has for itself until it is over."""
        with torch.inference_mode(mode=False):  # other calls are to write to it as well
            buffer = self.free.pop() if self.free else torch.zeros(2)
        self.taken.setdefault(threading.get_ident(), []).append(buffer)
        self.buffers.add(buffer.data_ptr())
        return buffer.data

    def fail(self, name):
        self.failing = False
        self.failures += 1
        self.failed_in.add(threading.get_ident())
        raise ArithmeticError(name)

    # Tasks

    def call(self, name, far, *, keyword=False, meta=False, damage=None):
        def run():
            wanted = self.noticed[name]
            failures, failing = self.failures, set(self.failed_in)
            undamaged = len(self.damaged)
            self.signed.pop(threading.get_ident(), None)
            try:
                with (
                    torch.inference_mode(mode=self.inference and keyword),
                    torch.device("meta" if meta else "cpu") if meta or keyword else _NOTHING,
                ):
                    found = self.owner.value(name=name) if keyword else self.owner.value(name)
            except ArithmeticError:
                assert self.failures > failures or failing, "an error of nobody's derivation"
                self.failed_in.discard(threading.get_ident())
                return
            finally:
                self.signed.pop(threading.get_ident(), None)
                self.free += self.taken.pop(threading.get_ident(), ())
            if any(found is other for other in self.damaged[undamaged:]):
                return  # shared with one who got it at the same time
            assert found.shape == (2,)
            assert found.is_meta == meta
            assert not found.requires_grad
            assert found.grad is None
            assert found.data_ptr() or meta, "freed memory"
            allowed = self.history[name][wanted:]
            assert meta or set(found.tolist()) <= set(allowed), (found, allowed)
            if damage is None or meta or found.is_inference():  # of a call past the cache
                return
            if found.data_ptr() not in self.buffers:
                self.damaged.append(found)
                DAMAGE[damage](found)

        self.begin(run, far)

    def begin(self, function, far):
        type(self).steps += 1
        self.resume(self.schedule.start(function), far)

    def resume(self, task, far):
        while task.runnable:
            self.schedule.resume(task)
            if task.done and task.error is not None:
                raise task.error
            self.check_bytes()
            if not far:
                return
            far -= 1

    @rule(
        name=names,
        keyword=st.booleans(),
        far=far,
        fails=st.sampled_from([False] * 4 + [True]),
        meta=st.sampled_from([False] * 5 + [True]),
        damage=st.sampled_from([None] * 14 + [*DAMAGE]),
    )
    def calls_value(self, name, keyword, far, fails=False, meta=False, damage=None):
        """A call; the next derivation, its own or another's, may have to fail.

        The caller may do something to the value that it gets. By keyword, there is a default device
        in any case.
        """
        self.failing = self.failing or fails
        self.call(name, far, keyword=keyword, meta=meta, damage=damage)

    @rule(form=st.sampled_from(["list", *FORMS]), aliases=st.booleans())
    def returns(self, form, aliases):
        """From now on depends_on returns something else, and values are in other memory."""
        type(self).steps += 1
        self.aliases = aliases
        if form != self.form:
            self.form = form
            self.may_pass = self.may_pass or form == "text"
            for name in NAMES:
                self.events[name] += 1

    def happened(self, name, number, *, noticed=True):
        """Note what the weight holds from now on."""
        self.events[name] += 1
        self.history[name].append(number)
        if noticed:
            self.noticed[name] = len(self.history[name]) - 1

    @rule(name=names, inference=st.booleans())
    def writes(self, name, inference):
        """A write that the version counter shows."""
        type(self).steps += 1
        number = next(self.numbers)
        with torch.inference_mode() if inference else torch.no_grad():
            self.owner.weight[name].fill_(number)
        self.happened(name, number)

    @rule(name=names, back=st.booleans(), quietly=st.sampled_from([True, True, False]))
    def replaces(self, name, back, quietly=False):
        """Another parameter in the weight's place, or the one that was replaced last.

        Writes to that one that the cache had not been told of then are as little noticed now.
        Quietly, as functional_call() does it, no module registers a parameter. It is not put back
        so while a value is derived, since it would be as if nothing had happened.
        """
        type(self).steps += 1
        if back and self.replaced[name]:
            old, unnoticed = self.replaced[name].pop()
            self.put(name, old, quietly=quietly and not self.schedule.tasks)
            self.happened(name, unnoticed[0])
            self.history[name] += unnoticed[1:]
        else:
            number = next(self.numbers)
            unnoticed = self.history[name][self.noticed[name] :]
            self.replaced[name].append((self.owner.weight[name], unnoticed))
            new = nn.Parameter(torch.full((1,), float(number)), requires_grad=False)
            self.put(name, new, quietly=quietly)
            self.happened(name, number)

    def put(self, name, parameter, *, quietly):
        if quietly:
            self.owner.weight._parameters[name] = parameter
        else:
            self.owner.weight[name] = parameter

    @rule(
        name=names,
        how=st.sampled_from(["touched", "touched", "adapter", "all", "module", "clear", "mode"]),
        far=far,
    )
    def writes_past_the_counter_and_says_so(self, name, how, far):
        """A write through .data, and then what makes the cache forget."""
        number = next(self.numbers)
        self.owner.weight[name].data.fill_(number)
        self.happened(name, number, noticed=False)
        place = len(self.history[name]) - 1

        def run():
            self.voiding += 1
            if how == "adapter":
                self.cache.invalidate(adapter=name)
            elif how == "all":
                self.cache.invalidate()
            elif how == "module":
                self.cache.invalidate(module=self.owner)
            elif how == "clear":
                type(self.owner).value.cache_clear()
            elif how == "touched":
                self.cache._engine.touched([self.owner.weight[name]])
            else:
                self.may_pass = True
                self.owner.train()
                self.owner.eval()
            self.voiding -= 1
            for other in NAMES:
                self.events[other] += 1
            self.noticed[name] = max(self.noticed[name], place)

        self.begin(run, far)

    @rule(name=names, far=far)
    def bypasses(self, name, far):
        def run():
            self.passed_by += 1
            with self.cache.bypass():
                wanted = len(self.history[name]) - 1  # with or without an event
                try:
                    found = self.owner.value(name)
                except ArithmeticError:
                    self.failed_in.discard(threading.get_ident())
                    return
                assert set(found.tolist()) <= set(self.history[name][wanted:])

        self.begin(run, far)

    @rule(name=names, pin=st.booleans(), far=far)
    def pins(self, name, pin, far):
        def run():
            with contextlib.suppress(dora_cache.ConfigError):  # it does not fit
                (self.cache.pin if pin else self.cache.unpin)(name)

        self.begin(run, far)

    @precondition(lambda self: self.caps)
    @rule(size=st.sampled_from([0, BYTES - 1, BYTES, 2 * BYTES, 4 * BYTES]), far=far)
    def resizes(self, size, far):
        def run():
            self.resizes += 1
            mine, alone = self.resizes, not self.resizing
            self.resizing += 1
            self.caps.add(size)
            try:
                with contextlib.suppress(dora_cache.PinError):
                    self.cache.resize(size)
                    if alone and self.resizes == mine:  # else any of them may be the last
                        self.caps = {size}
            finally:
                self.resizing -= 1

        self.begin(run, far)

    @precondition(lambda self: self.schedule.tasks)
    @rule(which=st.integers(0, 9), far=far)
    def goes_on(self, which, far):
        type(self).steps += 1
        ready = self.schedule.runnable()
        assert ready, "a deadlock"
        self.resume(ready[which % len(ready)], far)

    @precondition(lambda self: self.schedule.tasks)
    @rule(back=st.booleans())
    def all_go_on(self, back=False):
        """All tasks end; then parameters may be put back, and calls must be right."""
        type(self).steps += 1
        self.all_end()
        self.sums()
        for name in NAMES if back else ():
            if self.replaced[name]:
                self.replaces(name, back=True, quietly=True)
        for name in NAMES:  # what has been stored meanwhile must be right
            self.call(name, 100)

    def all_end(self):
        while self.schedule.tasks:
            ready = self.schedule.runnable()
            assert ready, "a deadlock"
            self.resume(ready[0], 100)

    # What holds

    def check_bytes(self):
        backend = self.cache._engine.memory.backend
        entries = self.entries(backend)
        assert not self.caps or self.held(entries) <= max(self.caps)
        for entry in entries:
            assert not entry.value.requires_grad or not entry.intact
            assert not entry.value.is_inference()

    @staticmethod
    def entries(backend):
        """The entries in a backend, without a use of any."""
        if isinstance(backend, backends.BudgetBackend):
            return [known.entry for known in backend._held.values()]
        parts = [backend._entries]
        if isinstance(backend, backends.LRUBackend):
            parts = [backend._entries._Cache__data, backend._pinned._Cache__data]
        return [entry for part in parts for entry in part.values()]

    @staticmethod
    def held(entries):
        """Bytes of distinct storages."""
        found = [entry.value.untyped_storage() for entry in entries]
        return sum({storage._cdata: storage.nbytes() for storage in found}.values())

    def sums(self):
        stats = balanced(self.cache)
        assert (stats.entries == 0) == (stats.nbytes == 0)
        assert stats.evictions == 0 or stats.max_bytes is not None
        assert stats.bypasses == self.passed_by or self.may_pass


class InferenceMachine(DecoratorMachine):
    """The same, with some of the calls under inference_mode."""

    inference = True
