"""The state machines; `make test-deep` runs them at length and prints how long that was."""

import pytest
from compiled_machine import (
    CompiledKindsMachine,
    FastCompiledKindsMachine,
    UncheckedKindsMachine,
)
from decorator_machine import DecoratorMachine
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test
from kinds_machine import FastKindsMachine, KindsMachine
from model_machine import (
    AuditedModelMachine,
    CompiledModelMachine,
    ContentModelMachine,
    FastModelMachine,
    ModelMachine,
)
from pool_machine import PoolMachine

from dora_cache.reasons import Reason

# Runs in the quick profile and in the deep one, and tests that the latter are divided among, for as
# many workers. The model's machine has two rows, for two workers in the quick profile.
MACHINES = [
    (DecoratorMachine, 125, 2500, 5),
    (ModelMachine, 15, 200, 4),
    (ModelMachine, 15, 200, 4),
    (FastModelMachine, 8, 125, 5),
    (ContentModelMachine, 8, 125, 5),
    (AuditedModelMachine, 2, 50, 5),  # each step is 35 forwards
    (CompiledModelMachine, 2, 20, 5),  # it compiles again and again
    (CompiledKindsMachine, 5, 200, 10),
    (FastCompiledKindsMachine, 3, 100, 5),
    (UncheckedKindsMachine, 2, 50, 5),
    (KindsMachine, 12, 125, 5),
    (FastKindsMachine, 5, 50, 5),
    (PoolMachine, 20, 500, 5),
]


def _rows():
    for machine, quick, deep, parts in MACHINES:
        if settings.get_current_profile_name() == "deep":
            yield from [(machine, deep // parts)] * parts
        else:
            yield machine, quick


@pytest.mark.machine
@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize(("machine", "runs"), list(_rows()))
def test_machine(machine, runs, record_property):
    """No run of any machine finds a wrong output, a wrong sum, too many bytes, or a deadlock."""

    class Counted(machine):
        runs = 0
        steps = 0

        def teardown(self):
            type(self).runs += 1
            super().teardown()

    try:
        run_state_machine_as_test(Counted, settings=settings(max_examples=runs))
    finally:
        record_property("machine", (machine.__name__, Counted.runs, Counted.steps))
    assert Counted.runs >= runs


def test_what_is_put_off_while_a_derivation_fails_is_done():
    """A weight is replaced while the lock is held for a moment: the entry goes as well."""
    machine = DecoratorMachine()
    machine.start(which={"backend": "paused-dict"})
    try:
        machine.replaces(name="a", back=False, quietly=True)
        machine.calls_value(name="a", keyword=False, far=100)
        machine.calls_value(name="b", keyword=False, far=1, fails=True)
        machine.replaces(name="a", back=True, quietly=True)
        machine.all_go_on()  # compares what is counted with what the backend holds
    finally:
        machine.teardown()


@pytest.mark.parametrize("how", ["touched", "clear", "adapter"])
def test_a_call_that_signed_earlier_displaces_nobody(how):
    """What a later call derives is voided by an event, though an earlier one derived beside it."""
    machine = DecoratorMachine()
    machine.start(which={"backend": "paused-dict"})
    try:
        machine.calls_value(name="a", keyword=False, far=1)  # has the lock
        machine.calls_value(name="a", keyword=False, far=5)  # has signed, and waits for the lock
        first, earlier = machine.schedule.tasks
        machine.replaces(name="a", back=False)
        machine.resume(first, 100)
        assert not earlier.done
        machine.calls_value(name="a", keyword=False, far=4)  # derives from the new weight
        later = machine.schedule.tasks[-1]
        machine.resume(earlier, 100)
        assert earlier.done
        assert not later.done
        machine.writes_past_the_counter_and_says_so(name="a", how=how, far=100)
        machine.all_go_on()
        assert later.done
    finally:
        machine.teardown()


def test_a_weight_replaced_for_a_while_spoils_what_is_derived():
    """A value of two weights is not stored, though the first is back when it is finished."""
    machine = DecoratorMachine()
    machine.start(which={"backend": "paused-dict"})
    try:
        machine.calls_value(name="b", keyword=False, far=0)
        (task,) = machine.schedule.tasks
        while not machine.deriving["b"]:
            machine.resume(task, 0)
        machine.replaces(name="b", back=False)
        machine.resume(task, 0)  # reads the other
        machine.replaces(name="b", back=True)
        machine.all_go_on()
        assert task.done
    finally:
        machine.teardown()


def _a_refused_value(machine):
    DecoratorMachine.resizes(machine, size=0, far=100)
    for _ in range(4):
        machine.calls_value(name="a", keyword=False, far=100)


def _values_that_are_not_used(machine):
    for _ in range(2):
        machine.calls_value(name="a", keyword=False, far=100)
    machine.returns(form="tuple", aliases=False)  # the shortcut leads to the list's value still
    for _ in range(10):
        machine.calls_value(name="a", keyword=False, far=100)
        machine.writes(name="a", inference=False)


@pytest.mark.parametrize(
    ("which", "prepare", "reason"),
    [
        ({"backend": "paused-budget", "max_bytes": 16}, _a_refused_value, Reason.DECLINED),
        ({"backend": "paused-dict"}, _values_that_are_not_used, Reason.NEVER_REUSED),
    ],
)
def test_what_is_derived_without_the_cache_may_be_derived_at_the_same_time(which, prepare, reason):
    """Values that the backend declines, or that are not used again, are each caller's own."""
    machine = DecoratorMachine()
    machine.start(which=which)
    try:
        prepare(machine)
        before = machine.cache._engine.reasons[reason]
        for _ in range(2):
            machine.calls_value(name="a", keyword=False, far=2)
        assert len(machine.schedule.tasks) == 2
        machine.all_go_on()
        assert machine.cache._engine.reasons[reason] >= before + 2
    finally:
        machine.teardown()
