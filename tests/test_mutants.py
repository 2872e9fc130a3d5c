"""The state machines bite: each seeded bug makes one of them fail.

Some bugs show themselves only after a long search, which `make test-deep` allows.
"""

import sys

import pytest
from compiled_machine import (
    CompiledKindsMachine,
    FastCompiledKindsMachine,
    UncheckedKindsMachine,
)
from compiled_mutants import MUTANTS
from decorator_machine import DecoratorMachine, InferenceMachine
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.errors import Flaky
from hypothesis.stateful import run_state_machine_as_test
from model_machine import AuditedModelMachine, ModelMachine
from pool_machine import PoolMachine
from zoo import quiet

from dora_cache import DoraCacheError

ROUND = 20
"""Examples for each seed: a longer search of Hypothesis mostly varies what it has tried already."""


def caught(machine, examples):
    """Run a machine until it fails; return the steps that took and the failure, or None."""
    steps = 0
    for number, done in enumerate(range(0, examples, ROUND)):
        taken, error = _searched(machine, min(ROUND, examples - done), number)
        steps += taken
        if error is not None:
            return steps, error
    return steps, None


def _searched(machine, examples, number):
    @seed(number)
    class Counted(machine):
        steps = 0
        failure = None

        def teardown(self):
            found = sys.exc_info()[1]
            if isinstance(found, Exception):  # not what Hypothesis stops a run with
                type(self).failure = type(self).failure or found
            super().teardown()

    with quiet():
        try:
            run_state_machine_as_test(
                Counted,
                settings=settings(
                    max_examples=examples,
                    stateful_step_count=50,
                    deadline=None,
                    database=None,
                    phases=[Phase.generate],
                    suppress_health_check=list(HealthCheck),
                    report_multiple_bugs=False,
                ),
            )
        except Flaky as error:  # e.g. it depends on where in memory a tensor came to lie
            inside = getattr(error, "exceptions", ())
            return Counted.steps, Counted.failure or next(iter(inside), error)
        except Exception as error:  # noqa: BLE001 - looked at by the test
            return Counted.steps, error
    return Counted.steps, None


@pytest.mark.machine
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_seeded_bug_is_caught(mutant, monkeypatch, record_property):
    """A cache with this bug does not survive its machine: it fails as what it checks fails."""
    deep = settings.get_current_profile_name() == "deep"
    if mutant.rare and not deep:
        pytest.skip("a search that may take long: make test-deep runs it")
    mutant.seed(monkeypatch)
    steps, error = caught(mutant.machine, examples=3000 if mutant.rare else 300)
    record_property("mutant", (mutant.name, mutant.machine.__name__, steps))
    assert error is not None, f"not caught in {steps} steps"
    assert isinstance(error, (AssertionError, DoraCacheError)), repr(error)


@pytest.mark.machine
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("machine", "examples"),
    [
        (DecoratorMachine, 300),
        (InferenceMachine, 100),
        (ModelMachine, 30),
        (AuditedModelMachine, 6),
        (PoolMachine, 45),
        (CompiledKindsMachine, 18),
        (FastCompiledKindsMachine, 9),
        (UncheckedKindsMachine, 9),
    ],
)
def test_without_a_bug_the_same_search_finds_none(machine, examples):
    """Otherwise bugs would be caught by something else that fails."""
    deep = settings.get_current_profile_name() == "deep"
    if machine is not InferenceMachine and not deep:
        pytest.skip("test_machines.py runs it, on other examples; make test-deep runs these")
    _, error = caught(machine, examples)
    assert error is None
