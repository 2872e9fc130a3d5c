"""What is read of dependencies: everything that can change what a value would be."""

import collections
import enum
import os
import threading

import pytest
import torch
from torch import nn

import dora_cache
from dora_cache import cached
from dora_cache.core import engine
from dora_cache.reasons import Reason


class Holder(nn.Module):
    """Derives a value from whatever it holds."""

    def __init__(self, held, use):
        super().__init__()
        self.held = held
        self.use = use
        self.eval()

    @cached("value", depends_on=lambda self: [self.held])
    def value(self):
        return self.use(self.held)


class Mapping(dict):
    factor = 1.0


class Sequence(list):
    factor = 1.0


class Flag(enum.IntFlag):
    A = 1


def with_default(number):
    def function(x, by=number):
        return x * by

    return function


TENSOR = torch.ones(2)


def of_function(function):
    return function(torch.ones(2))


def replaced(holder, held):
    holder.held = held


# What is held, what uses it, and how it is changed.
CHANGES = {
    "default of a function": (
        with_default(TENSOR.clone()),
        of_function,
        lambda holder: holder.held.__defaults__[0].fill_(3),
    ),
    "attribute of a function": (
        with_default(2.0),
        lambda held: torch.full((2,), getattr(held, "factor", 1.0)),
        lambda holder: setattr(holder.held, "factor", 3.0),
    ),
    "dict with an attribute": (
        Mapping(a=1.0),
        lambda held: torch.full((2,), held["a"] * held.factor),
        lambda holder: setattr(holder.held, "factor", 3.0),
    ),
    "list with an attribute": (
        Sequence([1.0]),
        lambda held: torch.full((2,), held[0] * held.factor),
        lambda holder: setattr(holder.held, "factor", 3.0),
    ),
    "defaultdict": (
        collections.defaultdict(lambda: 1.0),
        lambda held: torch.full((2,), held.default_factory()),
        lambda holder: setattr(holder.held, "default_factory", lambda: 3.0),
    ),
    "flag without a name": (
        Flag(8),
        lambda held: torch.full((2,), float(held.value)),
        lambda holder: replaced(holder, Flag(16)),
    ),
    "mode of a module": (
        nn.Dropout(0.5).eval(),
        lambda held: held(torch.ones(64)).count_nonzero() // 64,
        lambda holder: holder.held.train(),
    ),
    "hook of a module": (
        nn.Identity().eval(),
        lambda held: held(torch.ones(2)),
        lambda holder: holder.held.register_forward_hook(lambda *_: torch.full((2,), 3.0)),
    ),
    "hook of all modules": (
        nn.Identity().eval(),
        lambda held: held(torch.ones(2)),
        lambda holder: torch.nn.modules.module.register_module_forward_hook(
            lambda module, *_: torch.full((2,), 3.0) if module is holder.held else None
        ),
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_is_noticed(what):
    """Of whatever is among the dependencies, by comparison or by going past the cache."""
    held, use, change = CHANGES[what]
    holder = Holder(held, use)
    with dora_cache.attach(holder) as cache:
        for _ in range(3):
            before = holder.value()
        assert torch.equal(before, use(held))
        handle = change(holder)
        try:
            for _ in range(3):
                assert torch.equal(holder.value(), use(holder.held))
            if not isinstance(holder.held, nn.Dropout):
                assert not torch.equal(holder.value(), before)
        finally:
            if hasattr(handle, "remove"):
                handle.remove()
    assert set(cache.stats().reasons) <= {
        reason.value
        for reason in (Reason.UNSIGNABLE, Reason.UNKEYABLE, Reason.TRAINING, Reason.HOOKED)
    }


def test_a_default_that_changes_is_an_argument_that_changes():
    """The short way to a hit knows the arguments as they are spelled, without defaults."""
    ranks = [1.0, 2.0]

    class Owner(nn.Module):
        @cached("sum", depends_on=lambda self, ranks=ranks: [TENSOR])
        def sum(self, ranks=ranks):
            return TENSOR * sum(ranks)

    owner = Owner().eval()
    with dora_cache.attach(owner) as cache:
        for _ in range(3):
            owner.sum()
        assert cache.stats().hits == 2
        ranks.append(5.0)
        assert owner.sum().tolist() == [8.0, 8.0]


@pytest.mark.parametrize("delete", [True, False])
def test_a_parameter_made_anew_over_the_same_memory(delete):
    """It may get the address, storage and version of the old one, written past the counter."""

    class Owner(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3), requires_grad=False)

        @cached("double", depends_on=lambda self: [self.weight])
        def double(self):
            return self.weight * 2

    owner = Owner().eval()
    with dora_cache.attach(owner):
        for _ in range(20):
            owner.double(), owner.double()
            data = owner.weight.data
            if delete:
                del owner.weight
            owner.weight = nn.Parameter(data.mul_(1.5), requires_grad=False)
            assert torch.equal(owner.double(), owner.weight * 2)


class Slow(nn.Module):
    """Derives a value as the test says."""

    def __init__(self):
        super().__init__()
        self.derive = lambda: torch.ones(2)
        self.listed = lambda: [TENSOR]
        self.eval()

    @cached("value", depends_on=lambda self: self.listed())
    def value(self):
        return self.derive()


class Put(nn.Module):
    """Derives a value from a weight, a tensor and a number, which the test may change meanwhile."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2), requires_grad=False)
        self.tensor = torch.ones(2)
        self.number = 1.0
        self.meanwhile = lambda: None
        self.eval()

    @cached("value", depends_on=lambda self: [self.weight, self.tensor, self.number])
    def value(self):
        self.meanwhile()
        return self.weight * self.tensor * self.number


OTHERS = {
    "number": 2.0,
    "tensor": torch.full((2,), 2.0),
    "weight": nn.Parameter(torch.full((2,), 2.0), requires_grad=False),
}


@pytest.mark.parametrize("by_a_thread", [False, True])
@pytest.mark.parametrize("what", OTHERS)
def test_what_is_other_while_a_value_is_derived_and_put_back_later(what, by_a_thread):
    """The value is of neither state, and is not used when everything is as before."""
    owner = Put()
    places = owner._parameters if what == "weight" else owner.__dict__  # as functional_call() does
    before = places[what]

    def put():
        places[what] = OTHERS[what]

    def meanwhile():
        owner.meanwhile = lambda: None
        if by_a_thread:
            thread = threading.Thread(target=put)
            thread.start()
            thread.join(20)
        else:
            put()

    with dora_cache.attach(owner) as cache:
        owner.meanwhile = meanwhile
        assert owner.value().tolist() == [2.0, 2.0]
        places[what] = before
        assert owner.value().tolist() == [1.0, 1.0]
        assert cache.stats().reasons[Reason.CHANGED.value] == 1


@pytest.mark.timeout(30)
@pytest.mark.parametrize("place", ["derivation", "second look"])
def test_an_interrupt_leaves_nothing_behind(place):
    """Other threads are answered."""
    owner = Slow()
    with dora_cache.attach(owner) as cache:
        calls = []

        def interrupts():
            calls.append(None)
            if place == "derivation" or len(calls) == 2:
                raise KeyboardInterrupt
            return [TENSOR]

        if place == "derivation":
            owner.derive = interrupts
        else:
            owner.listed = interrupts
        with pytest.raises(KeyboardInterrupt):
            owner.value()
        owner.derive, owner.listed = lambda: torch.ones(2), lambda: [TENSOR]
        found = []
        thread = threading.Thread(target=lambda: found.append(owner.value().tolist()))
        thread.start()
        thread.join(20)
        assert found == [[1.0, 1.0]]
        assert not cache._engine._deriver.pending


@pytest.mark.timeout(30)
def test_a_wait_for_a_thread_that_waits_for_this_one_ends(monkeypatch):
    """The function takes a lock that the one who waits for its value holds."""
    monkeypatch.setattr(engine, "_PATIENCE", 0.1)
    owner, lock, began = Slow(), threading.RLock(), threading.Event()

    def derive():
        began.set()
        with lock:
            return torch.ones(2)

    owner.derive = derive
    with dora_cache.attach(owner):
        with lock:
            thread = threading.Thread(target=owner.value)
            thread.start()
            began.wait(20)
            assert owner.value().tolist() == [1.0, 1.0]
        thread.join(20)
        assert not thread.is_alive()


@pytest.mark.timeout(60)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_while_a_thread_derives():
    """The child waits for no thread that it does not have."""
    owner, began, go = Slow(), threading.Event(), threading.Event()

    def derive():
        began.set()
        go.wait(20)
        return torch.ones(2)

    owner.derive = derive
    with dora_cache.attach(owner):
        thread = threading.Thread(target=owner.value)
        thread.start()
        began.wait(20)
        child = os.fork()
        if not child:
            owner.derive = lambda: torch.ones(2)
            os._exit(0 if owner.value().tolist() == [1.0, 1.0] else 1)
        _, status = os.waitpid(child, 0)
        go.set()
        thread.join(20)
    assert os.waitstatus_to_exitcode(status) == 0
