"""MiSS: one value for several adapters, and modes without one."""

from functools import partial

import pytest
import torch
from peft import MissConfig

import dora_cache
from dora_cache.errors import NothingToCacheError
from dora_cache.recipes.examples import TARGETS, Example, make_model
from dora_cache.testing import check_recipe


def example(mode, **more):
    return Example(
        "MiSS",
        lambda *_: MissConfig(r=4, init_weights=mode, mini_r=4, target_modules=TARGETS),
        **more,
    )


def test_the_order_of_adapters_counts():
    """Two adapters are another value in another order, and neither is that of one of them."""
    model, x = make_model(example("bat"), adapters=("a", "b"))
    plain, _ = make_model(example("bat"), adapters=("a", "b"))
    outputs = []
    with dora_cache.attach(model), torch.no_grad():
        for names in (["a"], ["a", "b"], ["b", "a"], ["b"]) * 2:
            for one in (model, plain):
                one.base_model.set_adapter(names)
            outputs.append(model(x))
            assert torch.equal(outputs[-1], plain(x))
    assert not any(torch.equal(outputs[0], other) for other in outputs[1:4])
    assert not torch.equal(outputs[1], outputs[2])


def test_adapters_in_half_precision():
    """PEFT sets such parameters anew when it derives; the values are stored all the same."""
    bfloat16 = example("bat", prepare=lambda model: model.bfloat16())
    check_recipe(partial(make_model, bfloat16, dtype=torch.bfloat16, adapters=("a", "b"), layers=1))


def test_other_modes_are_left_alone():
    """They derive nothing worth keeping."""
    for mode in (True, "mini"):
        model, _ = make_model(example(mode))
        with pytest.raises(NothingToCacheError):
            dora_cache.attach(model)
