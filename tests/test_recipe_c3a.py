"""C3A: adapters that feed one another."""

from functools import partial

import pytest
import torch
from peft import C3AConfig
from torch import nn

from dora_cache.recipes.examples import TARGETS, Base, Example, make_model
from dora_cache.testing import check_recipe

SQUARE = Base(
    "Linear", lambda inputs, _: nn.Linear(inputs, inputs), lambda i, n: torch.randn(1, n, i)
)


@pytest.mark.parametrize("numerics", ["peft", "fast"])
@pytest.mark.parametrize("block", [1, 8])
def test_a_chain(block, numerics):
    """Of two active adapters the second gets the first's output, as in PEFT."""
    chain = Example(
        "C3A",
        lambda *_: C3AConfig(block_size=block, target_modules=TARGETS, init_weights=False),
        SQUARE,
    )
    check_recipe(partial(make_model, chain, adapters=("a", "b"), layers=1), numerics=numerics)
