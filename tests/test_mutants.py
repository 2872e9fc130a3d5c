"""The state machines bite: each seeded bug makes one of them fail."""

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from mutants import MUTANTS
from zoo import quiet


def caught(machine, examples):
    """Run a machine until it fails; return the steps that took and the failure, or None."""
    counted = type(machine.__name__, (machine,), {"steps": 0})
    with quiet():
        try:
            run_state_machine_as_test(
                counted,
                settings=settings(
                    max_examples=examples,
                    stateful_step_count=50,
                    deadline=None,
                    derandomize=True,
                    database=None,
                    phases=[Phase.generate],
                    suppress_health_check=list(HealthCheck),
                    report_multiple_bugs=False,
                ),
            )
        except Exception as error:  # noqa: BLE001 - looked at by the test
            return counted.steps, error
    return counted.steps, None


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_seeded_bug_is_caught(mutant, monkeypatch, record_property):
    """A cache with this bug does not survive its machine."""
    if settings.get_current_profile_name() == "quick":
        pytest.skip("a search that may take long: make test-deep runs it")
    mutant.seed(monkeypatch)
    steps, error = caught(mutant.machine, examples=600)
    record_property("mutant", (mutant.name, mutant.machine.__name__, steps))
    assert error is not None, f"not caught in {steps} steps"
