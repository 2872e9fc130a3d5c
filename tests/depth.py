"""Which examples of adapters a test runs on: each kind's first, and in the deep profile all."""

import pytest
from hypothesis import settings

from dora_cache.recipes import load_recipes

DEEP = settings.get_current_profile_name() == "deep"
FIRST = {recipe.examples[0].name for recipe in load_recipes() if getattr(recipe, "examples", ())}


def first(example):
    """Whether no other example of its kind comes before it."""
    return example.name in FIRST


def thinned(cases, keep):
    """Return the parameters that are kept; in the deep profile the others too, marked as its own.

    Args:
        cases: made by ``pytest.param``.
        keep: called with the values of one; returns whether the quick profile has it.
    """
    kept = [case for case in cases if keep(*case.values)]
    if not DEEP:
        return kept
    others = [case for case in cases if not keep(*case.values)]
    return kept + [
        pytest.param(*case.values, id=case.id, marks=pytest.mark.machine) for case in others
    ]
