"""The state machines; `make test-deep` runs them at length and prints how long that was."""

import pytest
from decorator_machine import DecoratorMachine
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test
from kinds_machine import FastKindsMachine, KindsMachine
from model_machine import (
    CompiledModelMachine,
    ContentModelMachine,
    FastModelMachine,
    ModelMachine,
)

MACHINES = {
    # The decorator's machine is fast, so it may run longer.
    DecoratorMachine: 2.5,
    ModelMachine: 1,
    FastModelMachine: 0.25,
    ContentModelMachine: 0.25,
    CompiledModelMachine: 0.05,  # it compiles again and again
    KindsMachine: 0.25,
    FastKindsMachine: 0.1,
}


@pytest.mark.machine
@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.__name__)
def test_machine(machine, record_property):
    """No run of any machine finds a wrong output, a wrong sum, too many bytes, or a deadlock."""
    runs = int(settings.default.max_examples * MACHINES[machine])

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
