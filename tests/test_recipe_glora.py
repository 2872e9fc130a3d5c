"""GLoRA: what is left to PEFT."""

import pytest
import torch

import dora_cache
from dora_cache.recipes.examples import make_model
from dora_cache.recipes.glora import RECIPE


@pytest.mark.parametrize("numerics", ["peft", "fast"])
def test_an_adapter_for_each_sample(numerics):
    """A mixed batch is PEFT's to compute."""
    (model, x), (plain, _) = (make_model(RECIPE.examples[0], adapters=("a", "b")) for _ in "12")
    batch = torch.cat([x, x + 1, x - 1])
    names = ["a", "b", "__base__"]
    with dora_cache.attach(model, numerics=numerics) as cache, torch.no_grad():
        found = model(batch, adapter_names=names)
        assert torch.equal(found, plain(batch, adapter_names=names))
        assert cache.stats().misses == 0


@pytest.mark.parametrize("numerics", ["peft", "fast"])
def test_a_hook_on_a_path(numerics):
    """A hook may return something else every time, so PEFT's forward calls it."""
    model, x = make_model(RECIPE.examples[0])
    layer = model.base_model.model.layer
    with dora_cache.attach(model, numerics=numerics), torch.no_grad():
        calm = model(x)
        layer.glora_B["first"].register_forward_hook(lambda *_: _[-1] + torch.rand(()))
        assert len({model(x).sum().item() for _ in range(3)} | {calm.sum().item()}) == 4
