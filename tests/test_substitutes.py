"""LoRA on bare parameters and on attention: what the shared machinery of both has to keep apart."""

import contextlib
import copy
import pickle
import threading
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import dora_cache
from dora_cache.recipes import load_recipes
from dora_cache.recipes.examples import make_model

EXAMPLES = {
    example.name: example
    for recipe in load_recipes()
    if recipe.name in {"LoRA on parameters", "LoRA on attention"}
    for example in recipe.examples
}
PARAMETERS = EXAMPLES["LoRA on parameters"]
EXPERTS = EXAMPLES["LoRA on parameters, two of stacked experts"]
ATTENTION = EXAMPLES["LoRA on attention"]


class Double(nn.Module):
    """A parametrization."""

    def forward(self, weight):
        return 2 * weight


def _make(example, **more):
    return make_model(example, **{"adapters": ("first", "second")} | more)


def _run(model, x):
    with torch.no_grad():
        return model(x)


def _settled(example):
    """Return a model whose weights PEFT's forward leaves as they are, an input, its output."""
    model, x = _make(example)
    for _ in range(3):
        expected = _run(model, x)
    return model, x, expected


@pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES)
def test_threads(example):
    """Cached, bypassing and gradient-wanting forwards on one model at once are all right."""
    model, x, expected = _settled(example)
    with torch.enable_grad():
        with_gradients = model(x).detach()  # attention takes another way then
    wrong = []

    def forwards(contexts, right, times):
        for _ in range(times):
            with contextlib.ExitStack() as stack:
                for context in contexts:
                    stack.enter_context(context())
                if not torch.equal(model(x), right):
                    wrong.append(contexts)

    with dora_cache.attach(model) as cache:
        jobs = [
            *[((torch.no_grad,), expected, 60)] * 3,
            *[((torch.no_grad, cache.bypass), expected, 20)] * 2,
            ((torch.enable_grad,), with_gradients, 20),
        ]
        threads = [threading.Thread(target=forwards, args=job) for job in jobs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert cache.stats().hits > 0
    assert torch.equal(_run(model, x), expected)


@pytest.mark.parametrize("example", [EXPERTS, ATTENTION], ids=["experts", "attention"])
def test_an_error_inside_leaves_nothing(example):
    """After a forward that fails within the base module, weights are read as they are."""
    model, x, expected = _settled(example)
    with dora_cache.attach(model) as cache:
        _run(model, x)
        with pytest.raises(RuntimeError):
            _run(model, x[..., :-1])
        assert torch.equal(_run(model, x), expected)
        with model.disable_adapter():
            plain, _ = _make(example)
            for _ in range(3):
                _run(plain, x)
            with plain.disable_adapter():
                assert torch.equal(_run(model, x), _run(plain, x))
        assert cache.stats().hits > 0


def test_nobody_else_sees_a_substitute():
    """Within a forward other threads read the parameter itself, and afterwards everybody does."""
    model, x = _make(PARAMETERS)
    layer = model.base_model.model.layer.base_layer
    weight = layer.weight
    seen = []

    def look(*_):
        thread = threading.Thread(target=lambda: seen.append(layer.weight))
        thread.start()
        thread.join()
        seen.append(layer.weight)

    with dora_cache.attach(model):
        hook = layer.register_forward_hook(look)
        _run(model, x)
        hook.remove()
        other, own = seen
        assert other is weight
        assert own is not weight
        assert layer.weight is weight
        assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]


def test_a_parametrization_of_ones_own_is_heeded():
    """A parametrization registered after attaching goes into the output; removed, it is gone."""
    model, x = _make(PARAMETERS)
    plain, _ = _make(PARAMETERS)
    with dora_cache.attach(model):
        assert torch.equal(_run(model, x), _run(plain, x))
        for one in (model, plain):
            layer = one.base_model.model.layer.base_layer
            parametrize.register_parametrization(layer, "bias", Double())
        assert torch.equal(_run(model, x), _run(plain, x))
        for one in (model, plain):
            layer = one.base_model.model.layer.base_layer
            parametrize.remove_parametrizations(layer, "bias", leave_parametrized=False)
        assert torch.equal(_run(model, x), _run(plain, x))
    assert type(model.base_model.model.layer.base_layer) is nn.Linear


def test_detach_within_a_forward():
    """Detaching in a hook of the base module leaves that forward right, and the class restored."""
    model, x = _make(PARAMETERS)
    expected = _run(model, x)
    layer = model.base_model.model.layer.base_layer
    cache = dora_cache.attach(model)
    _run(model, x)
    hook = layer.register_forward_pre_hook(lambda *_: cache.detach())
    assert torch.equal(_run(model, x), expected)
    hook.remove()
    assert type(layer) is nn.Linear
    assert torch.equal(_run(model, x), expected)


def test_a_parametrized_parameter_is_declined():
    """Where the parameter is computed already, PEFT's own forward runs, and people are told."""
    model, x = _make(PARAMETERS)
    inner = model.base_model.model
    parametrize.register_parametrization(inner.layer.base_layer, "weight", Double())
    expected = _run(model, x)
    with pytest.warns(dora_cache.CacheWarning, match="no plain parameter"):
        cache = dora_cache.attach(model)
    with cache:
        for _ in range(2):
            assert torch.equal(_run(model, x), expected)
        assert cache.stats().entries == 1  # the other layer's


def test_listing_modules_costs_no_entry():
    """PEFT's attention makes new parameters whenever modules are listed; attached, it does not."""
    model, x, expected = _settled(ATTENTION)
    with dora_cache.attach(model) as cache:
        _run(model, x)
        before = cache.stats()
        list(model.parameters())
        model.state_dict()
        assert torch.equal(_run(model, x), expected)
        assert cache.stats().misses == before.misses


def test_a_write_between_two_listings_is_seen():
    """A write to attention weights is not lost in the new parameters that listing makes."""
    model, x, _ = _settled(ATTENTION)
    plain, _, _ = _settled(ATTENTION)
    with dora_cache.attach(model):
        _run(model, x)
        for one in (model, plain):
            attention = one.base_model.model.layer.attention.base_layer
            attention.in_proj_weight.requires_grad_()
            list(one.modules())
            with torch.no_grad():
                attention.in_proj_weight.mul_(1.5)
            list(one.modules())
            attention.in_proj_weight.requires_grad_(requires_grad=False)
            list(one.modules())
        for _ in range(3):
            assert torch.equal(_run(model, x), _run(plain, x))


@pytest.mark.filterwarnings("ignore:Already following adapters")
def test_several_adapters_on_attention_are_pefts():
    """With several active adapters the drift of PEFT's weights goes on, bit for bit."""
    model, x = _make(ATTENTION)
    plain, _ = _make(ATTENTION)
    for one in (model, plain):
        one.base_model.set_adapter(["first", "second"])
    with dora_cache.attach(model):
        for _ in range(6):
            assert torch.equal(_run(model, x), _run(plain, x))


@pytest.mark.parametrize("masked", [False, True])
def test_arguments_of_attention(masked):
    """Masks, keys and values of their own, and attention weights go through."""
    model, x, _ = _settled(ATTENTION)
    attention = model.base_model.model.layer.attention
    other = torch.randn(1, 5, x.shape[-1])
    mask = torch.rand(x.shape[1], 5) > 0.5 if masked else None
    call = partial(attention, x, other, other, attn_mask=mask, average_attn_weights=False)
    with torch.no_grad():
        expected = call()
        with dora_cache.attach(model) as cache:
            for _ in range(2):
                for found, right in zip(call(), expected, strict=True):
                    assert torch.equal(found.nan_to_num(), right.nan_to_num())
            assert cache.stats().hits > 0


def test_copies_while_attached():
    """Copies and pickles of an attached base module are of its plain class."""
    model, x = _make(PARAMETERS)
    with dora_cache.attach(model):
        _run(model, x)
        layer = model.base_model.model.layer.base_layer
        for one in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert type(one) is nn.Linear
            assert torch.equal(one.weight, layer.weight)
