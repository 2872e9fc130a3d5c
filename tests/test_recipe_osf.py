"""OSF: shapes for which the product of the factors is not the smaller form."""

import pytest
import torch

import dora_cache
from dora_cache.recipes.examples import make_model
from dora_cache.recipes.osf import RECIPE


@pytest.mark.parametrize(("example", "dense"), [(0, True), (1, False)])
def test_the_smaller_form_is_stored(example, dense):
    """Fast numerics hold the delta or its factors, whichever takes fewer bytes."""
    held = {}
    for numerics in ("peft", "fast"):
        model, x = make_model(RECIPE.examples[example], 64, 64, layers=1)
        with dora_cache.attach(model, numerics=numerics) as cache, torch.no_grad():
            model(x)
            held[numerics] = cache.stats().nbytes
    assert (held["fast"] < held["peft"]) is dense
    assert held["fast"] <= held["peft"]
