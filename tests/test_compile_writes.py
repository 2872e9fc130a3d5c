"""Writes that are a part of the compiled code: its layers see them, as they do uncompiled."""

import copy

import pytest
import torch
from test_compile import NUMERICS, Compiled, _fresh  # noqa: F401 - a fixture
from torch.func import functional_call
from zoo import run

from dora_cache.reasons import Reason


def in_place(layer):
    layer.lora_magnitude_vector["first"].weight.mul_(1.5)


def base_in_place(layer):
    layer.base_layer.weight.add_(0.5)


def other_data(layer):
    weight = layer.lora_A["first"].weight
    weight.data = weight.data * 1.5


def scaling(layer):
    layer.scaling["first"] = 7.5


def scalings(layer):
    layer.scaling = {"first": 3.5, "second": 1.0}


@pytest.mark.parametrize("write", [in_place, base_in_place, other_data, scaling, scalings])
@pytest.mark.parametrize("numerics", NUMERICS)
def test_code_that_writes_before_it_runs_a_layer(write, numerics):
    """Whether it was compiled for that or runs a second time."""
    setup = Compiled(numerics=numerics, fullgraph=False)
    plain = copy.deepcopy(setup.model)

    def of(model):
        def act(x):
            write(model.base_model.model.layer)
            return model(x)

        return act

    compiled = torch.compile(of(setup.model), backend="eager")
    assert Reason.WRITTEN.value not in setup.cache.stats().reasons
    for _ in range(3):
        expected = run(of(plain), setup.x)
        torch.testing.assert_close(run(compiled, setup.x), expected, rtol=1e-5, atol=1e-5)
    # PyTorch does not trace an assignment that the layer observes: it runs before the rest.
    assert (Reason.WRITTEN.value in setup.cache.stats().reasons) is (write is not scalings)
    setup.check()
    assert setup.values()


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("part", ["base_layer", "lora_A.first", "lora_magnitude_vector.first"])
def test_functional_call(part, inside):
    """Around the compiled model, and compiled with it: with other weights, then with its own."""
    setup = Compiled(fullgraph=False)
    before = setup.check()
    name = f"base_model.model.layer.{part}.weight"
    new = {name: torch.randn_like(setup.model.get_parameter(name))}

    def call(model, new, x):
        return functional_call(model, new, (x,))

    act = torch.compile(call, backend="eager") if inside else call
    model = setup.model if inside else setup.compiled
    expected = run(lambda x: call(copy.deepcopy(setup.model), new, x), setup.x)
    names = new if inside else {f"_orig_mod.{one}": value for one, value in new.items()}
    for _ in range(2):
        found = run(lambda x: act(model, names, x), setup.x)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(setup.check(), before)
