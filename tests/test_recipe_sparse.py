"""Sparse deltas (SHiRA, Super-Tuning): their products, and what their recipes leave to PEFT."""

import pytest
import torch
from peft import ShiraConfig, SupertuningConfig
from torch import nn

from dora_cache import CacheWarning, attach
from dora_cache.recipes.examples import TARGETS, Example, make_model
from dora_cache.recipes.sparse import compress, multiply

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # PEFT's tensors
CONFIGS = {
    "SHiRA": lambda *_: ShiraConfig(r=1, random_seed=0, init_weights=False, target_modules=TARGETS),
    "Super-Tuning": lambda *_: SupertuningConfig(
        sparsity=0.95, init_weights=False, target_modules=TARGETS
    ),
}


@pytest.mark.parametrize("shape", [(6,), (1, 6), (5, 6), (2, 1, 3, 6)])
def test_a_product_is_the_dense_one(shape):
    """Entries may come in any order, twice in one place, and leave rows empty."""
    places = torch.tensor([17, 3, 3, 40, 0, 39], dtype=torch.int32)
    values = torch.randn(6, dtype=torch.float64)
    dense = torch.zeros(48, dtype=torch.float64)
    dense.index_add_(0, places.long(), values)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    found = multiply(x, *compress(places, values, 8, 6))
    expected = nn.functional.linear(x, dense.view(8, 6))
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in (found, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("kind", CONFIGS)
def test_many_tokens_hold_nothing(kind):
    """Under fast numerics many tokens are PEFT's to the bit, and few share one sparse delta."""
    (plain, _), (model, _) = (make_model(Example(kind, CONFIGS[kind])) for _ in range(2))
    with attach(model, numerics="fast") as cache, torch.no_grad():
        many = torch.randn(200, 16)
        assert torch.equal(model(many), plain(many))
        assert cache.stats().nbytes == 0
        for few in (many[:1], many[:3], many[0], many[:0]):
            torch.testing.assert_close(model(few), plain(few))
        assert cache.stats().entries == 2  # one in each layer
        weights = sum(layer.weight.nbytes for layer in plain.modules() if type(layer) is nn.Linear)
        assert cache.stats().nbytes < weights


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("numerics", ["peft", "fast"])
def test_hooks_of_the_base_layer_are_told_of(kind, numerics):
    """PEFT warns that such hooks do not run; with a cache it does as well, and they do not."""
    model, x = make_model(Example(kind, CONFIGS[kind]))
    calls = []
    model.base_model.model.layer.base_layer.register_forward_hook(lambda *_: calls.append(1))
    with attach(model, numerics=numerics) as cache, torch.no_grad():
        with pytest.warns(UserWarning, match="hooks"):
            model(x)
        model(x)
        assert cache.stats().hits
        assert not calls


def test_a_quantized_base_is_declined():
    """Nothing as large as a dequantized weight is stored; the reason is told."""
    model, x = make_model(Example("SHiRA", CONFIGS["SHiRA"]))

    class Backend:
        supports_merge = True

        def get_base_weight(self, layer):
            return layer.weight.data

    expected = model(x)
    model.base_model.model.layer.quantization_backend = Backend()
    with pytest.warns(CacheWarning, match="quantized"):
        cache = attach(model)
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    assert cache.stats().entries == 1
    cache.detach()
