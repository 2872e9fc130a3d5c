"""Forms of numerics="fast" that small layers do not get, and what is left to PEFT's forward."""

import pytest
import torch
from torch import nn

from dora_cache import attach
from dora_cache.recipes import folding, load_recipes
from dora_cache.recipes.examples import make_model
from dora_cache.testing import check_recipe

EXAMPLES = {e.name: e for recipe in load_recipes() for e in recipe.examples}
COMPACT = ["LoHa", "LoKr", "LoKr, w2", "LoKr, Conv2d", "PEANuT", "WaveFT, use_idwt=False"]
FOLDED = ["FourierFT", "LoHa", "LoKr", "PEANuT", "RandLoRA", "WaveFT"]


@pytest.mark.parametrize("name", COMPACT)
def test_the_forms_of_large_layers(name, monkeypatch):
    """The smaller forms keep the promises as well, and take less memory than the weight."""
    monkeypatch.setattr(folding, "LARGE", 0)

    def make():
        return make_model(EXAMPLES[name], 32, 48, adapters=("first", "second"), tokens=64)

    check_recipe(make, numerics="fast")
    model, x = make()
    with attach(model, numerics="fast") as cache, torch.no_grad():
        model(x)
        weights = [p for n, p in model.named_parameters() if n.endswith("base_layer.weight")]
        assert cache.stats().nbytes < 0.6 * sum(w.numel() * w.element_size() for w in weights)


@pytest.mark.parametrize("name", FOLDED)
def test_a_folded_weight_takes_no_more_than_the_weight(name):
    """One entry as large as the weight for each layer, whatever goes into it."""
    model, x = make_model(EXAMPLES[name], adapters=("first", "second"))
    model.base_model.set_adapter(["second", "first"])
    with attach(model, numerics="fast") as cache, torch.no_grad():
        model(x)
        weights = [p for n, p in model.named_parameters() if n.endswith("base_layer.weight")]
        assert cache.stats().nbytes == sum(w.numel() * w.element_size() for w in weights)
        assert cache.stats().entries == len(weights)


@pytest.mark.parametrize("name", FOLDED)
def test_hooks_of_the_base_layer_run(name):
    """Whoever follows the base layer sees its calls, with the same outputs."""
    model, x = make_model(EXAMPLES[name])
    layer = model.base_model.model.layer.base_layer
    seen = []
    handle = layer.register_forward_hook(lambda _, __, output: seen.append(output) or output * 2)
    with torch.no_grad():
        expected = model(x)
        with attach(model, numerics="fast"):
            model(x)
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
            assert len(seen) == 3
            handle.remove()
            assert not torch.allclose(model(x), expected)


def test_a_base_layer_of_another_class_is_called():
    """A base layer with arithmetic of its own keeps it."""

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model, x = make_model(EXAMPLES["FourierFT"], layers=1)
    model.base_model.model.layer.base_layer.__class__ = Doubled
    with torch.no_grad():
        expected = model(x)
        with attach(model, numerics="fast"):
            assert torch.equal(model(x), expected)
            assert torch.equal(model(x), expected)


def test_a_method_that_a_recipe_relies_on_is_overridden():
    """A subclass whose deltas are others' is left to itself, and that is told."""
    model, x = make_model(EXAMPLES["RandLoRA"])
    layer = model.base_model.model.layer

    class Other(type(layer)):
        def get_scaled_bases(self, adapter, device=None):
            first, second = super().get_scaled_bases(adapter, device=device)
            return 2 * first, second

    layer.__class__ = Other
    with torch.no_grad():
        expected = model(x)
        with pytest.warns(match="get_scaled_bases"):
            cache = attach(model)
        with cache:
            assert torch.equal(model(x), expected)
            assert torch.equal(model(x), expected)
            assert cache.declined
