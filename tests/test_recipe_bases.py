"""What recipes take for granted about layers, and what they do where it does not hold."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import dora_cache
from dora_cache.recipes import c3a, delora, glora, hira, miss, osf
from dora_cache.recipes.examples import make_model

RECIPES = [module.RECIPE for module in (c3a, delora, glora, hira, miss, osf)]
each_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
each_numerics = pytest.mark.parametrize("numerics", ["peft", "fast"])


def twins(recipe):
    (model, x), (plain, _) = (make_model(recipe.examples[0], layers=1) for _ in "12")
    return model, plain, x


def same(found, expected, numerics):
    if numerics == "peft":
        assert torch.equal(found, expected)
    else:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


class Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2


@each_numerics
@each_recipe
def test_hooks_of_the_base_layer(recipe, numerics):
    """A hook on the base layer does what it does without a cache, from when it is registered."""
    model, plain, x = twins(recipe)
    with dora_cache.attach(model, numerics=numerics), torch.no_grad():
        same(model(x), plain(x), numerics)
        for one in (model, plain):
            base = one.base_model.model.layer.base_layer
            base.register_forward_hook(lambda *args: args[-1] + 1)
        for _ in range(2):
            same(model(x), plain(x), numerics)


@each_numerics
@each_recipe
def test_a_parametrized_base_weight(recipe, numerics):
    """The weight is then computed from another parameter, and what is done to that shows."""
    model, plain, x = twins(recipe)
    with dora_cache.attach(model, numerics=numerics), torch.no_grad():
        for one in (model, plain):
            base = one.base_model.model.layer.base_layer
            parametrize.register_parametrization(base, "weight", Doubled())
        for _ in range(3):
            same(model(x), plain(x), numerics)
            for one in (model, plain):
                one.base_model.model.layer.base_layer.parametrizations.weight.original.mul_(1.5)


@each_numerics
@each_recipe
def test_a_parametrized_adapter(recipe, numerics):
    """An adapter's weights may be computed from others; they still apply, and stay fresh."""
    for attribute in twins(recipe)[0].base_model.model.layer.adapter_layer_names:
        model, plain, x = twins(recipe)
        with dora_cache.attach(model, numerics=numerics) as cache, torch.no_grad():
            model(x)
            for one in (model, plain):
                part = getattr(one.base_model.model.layer, attribute, {})
                if isinstance(part, nn.ModuleDict):
                    part = next(iter(part.values()))
                name = next(iter(dict(part.named_parameters(recurse=False))), None)
                if name is None:
                    break
                parametrize.register_parametrization(part, name, Doubled())
            else:
                for _ in range(2):
                    same(model(x), plain(x), numerics)
                    for one in (model, plain):
                        for key, weight in one.named_parameters():
                            if "original" in key:
                                weight.mul_(1.5)
                cache.warm()
