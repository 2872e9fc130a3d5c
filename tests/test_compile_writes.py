"""Writes that are a part of the compiled code: its layers see them, as they do uncompiled."""

import copy

import pytest
import torch
from test_compile import NUMERICS, Compiled, _fresh  # noqa: F401 - a fixture
from torch.func import functional_call, grad, jvp
from zoo import run

import dora_cache
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


@pytest.mark.parametrize("wanted", ["lora_A", "lora_B", "lora_magnitude_vector"])
@pytest.mark.parametrize("surroundings", ["written", "autocast"])
@pytest.mark.parametrize("numerics", NUMERICS)
def test_gradients_where_values_are_derived_in_the_graph(wanted, surroundings, numerics):
    """None flows through the norm, whichever parameters train."""
    setup = Compiled(numerics=numerics, fullgraph=False)
    plain = copy.deepcopy(setup.model)

    def of(model):
        def act(x):
            if surroundings == "written":
                scaling(model.base_model.model.layer)
            with torch.autocast("cpu", torch.bfloat16, enabled=surroundings == "autocast"):
                return model(x).square().sum()

        return act

    def gradient(model, function):
        weight = getattr(model.base_model.model.layer, wanted)["first"].weight
        weight.requires_grad_()
        return torch.autograd.grad(function(setup.x), weight)[0]

    found = gradient(setup.model, torch.compile(of(setup.model), backend="eager"))
    tolerance = 1e-4 if surroundings == "written" else 0.1
    expected = gradient(plain, of(plain))
    assert (found - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("numerics", NUMERICS)
def test_transforms_within_the_compiled_code(numerics, enabled):
    """Gradients and tangents of an adapter's parameters."""
    setup = Compiled(numerics=numerics, fullgraph=False)
    model, plain = setup.model, copy.deepcopy(setup.model)
    weights = {n: p.detach() for n, p in model.named_parameters() if ".first" in n}

    def of(model):
        def loss(weights):
            return functional_call(model, weights, (setup.x,)).square().sum()

        return lambda weights: (grad(loss)(weights), jvp(loss, (weights,), (weights,))[1])

    with torch.set_grad_enabled(enabled):
        found = torch.compile(of(model), backend="eager")(weights)
        expected = of(plain)(weights)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("numerics", NUMERICS)
def test_code_that_switches_adapters(numerics, recwarn):
    """What the event does is not compiled."""
    setup = Compiled(numerics=numerics, fullgraph=False)
    plain = copy.deepcopy(setup.model)

    def of(model):
        def act(x):
            outputs = [model(x)]
            for name in ("second", "first"):
                model.base_model.set_adapter([name], inference_mode=True)
                outputs.append(model(x))
            return torch.stack(outputs)

        return act

    compiled = torch.compile(of(setup.model), backend="eager")
    for _ in range(2):
        expected = run(of(plain), setup.x)
        torch.testing.assert_close(run(compiled, setup.x), expected, rtol=1e-5, atol=1e-5)
        for model in (setup.model, plain):
            run(base_in_place, model.base_model.model.layer)
    assert not [one for one in recwarn if one.category is dora_cache.CacheWarning]
