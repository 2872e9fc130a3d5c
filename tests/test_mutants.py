"""The state machine bites: each seeded bug makes it fail."""

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from test_model_machine import ModelMachine

from dora_cache import cache as core
from dora_cache.recipes import dora

SCALE = dora._stored_scale.__dora_cache_derivation__


def without(name):
    """A dependency list that lacks the parameters of one kind."""

    def depends_on(layer, adapter, dtype=None):
        attribute = getattr(layer, name)
        left_out = attribute[adapter] if adapter in attribute else None
        ids = {id(left_out), id(getattr(left_out, "weight", None))}
        return [part for part in dora._depends_on(layer, adapter, dtype) if id(part) not in ids]

    return depends_on


MUTANTS = {
    "keyed by adapter name alone": lambda patch: patch.setattr(
        core, "sign", lambda dependencies, **_: (b"", False)
    ),
    "scaling missing from the stamp": lambda patch: patch.setattr(
        SCALE, "depends_on", without("scaling")
    ),
    "base weight missing from the stamp": lambda patch: patch.setattr(
        dora, "weights_of", lambda base: ()
    ),
    "autocast missing from the key": lambda patch: patch.setattr(core, "environment", tuple),
    "no events at all": lambda patch: patch.setattr(
        core.AdapterCache, "_void", lambda self, binding, adapter: 0
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_model_machine_finds_seeded_bugs(mutant, monkeypatch):
    """A cache with this bug does not survive the machine."""
    MUTANTS[mutant](monkeypatch)
    with pytest.raises(Exception) as caught:
        run_state_machine_as_test(
            ModelMachine,
            settings=settings(
                max_examples=200,
                stateful_step_count=30,
                deadline=None,
                derandomize=True,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
                report_multiple_bugs=False,
            ),
        )
    assert isinstance(caught.value, AssertionError | BaseExceptionGroup), repr(caught.value)
