"""Every recipe keeps its promises, on every example it has."""

from functools import partial

import pytest
import torch
from depth import first, thinned

from dora_cache.recipes import RECIPES, load_recipes
from dora_cache.recipes.examples import make_model
from dora_cache.testing import check_recipe

BUILT_IN = {recipe.name: recipe for recipe in load_recipes() if recipe.name in RECIPES}
CASES = [
    pytest.param(example, numerics, dtype, id=f"{example.name}-{numerics}-{str(dtype)[6:]}")
    for recipe in BUILT_IN.values()
    for example in recipe.examples
    for numerics in example.numerics
    for dtype in example.dtypes
]


def quick(example, numerics, dtype):
    """Of each kind's first example nearly all; of the others the form that is the recipe's own."""
    if dtype is not torch.float32:
        return first(example) and numerics == example.numerics[0]
    return first(example) or numerics == example.numerics[-1]


@pytest.mark.parametrize(("example", "numerics", "dtype"), thinned(CASES, quick))
def test_recipe(example, numerics, dtype):
    """Equal, fresh, exact after detach, with PEFT's gradients, and nothing leaked."""
    # Errors are compared on many outputs: on a few, either way of adding up may be the luckier.
    tokens = 3 if numerics == "peft" else 24
    make = partial(make_model, example, dtype=dtype, adapters=("first", "second"), tokens=tokens)
    check_recipe(make, numerics=numerics)


@pytest.mark.parametrize("recipe", BUILT_IN.values(), ids=lambda recipe: recipe.name)
def test_a_recipe_has_examples(recipe):
    """So that the tests above, and the page of coverage, leave none out."""
    assert recipe.examples
    assert all(torch.float32 in example.dtypes for example in recipe.examples)
