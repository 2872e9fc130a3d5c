"""What is special about FRoD: bases that are not as the input needs them, and other layers."""

from functools import partial

import pytest
import torch
from peft import FrodConfig
from transformers.pytorch_utils import Conv1D

from dora_cache import attach
from dora_cache.recipes.examples import TARGETS, Base, Example, linear, make_model

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # PEFT's tensors
CONV1D = Base("Conv1D", lambda inputs, outputs: Conv1D(outputs, inputs), linear.sample)


def config(*_, **more):
    settings = {"init_weights": False, "progressbar": False, "sparse_rate": 0.02, **more}
    return FrodConfig(target_modules=TARGETS, **settings)


def pair(example):
    made = [make_model(example, adapters=("first", "second")) for _ in range(2)]
    (plain, x), (model, _) = made
    return plain, model, x


def compare(plain, model, x):
    with torch.no_grad():
        expected = plain(x)
        for _ in range(3):
            assert torch.equal(model(x), expected)


def test_an_input_of_another_dtype():
    """The bases are converted once, and again after a change of them."""
    plain, model, x = pair(Example("FRoD", config, layers=1))
    with attach(model) as cache:
        compare(plain, model, x)
        held = cache.stats().nbytes
        compare(plain, model, x.double())
        assert cache.stats().nbytes > held
        for one in (plain, model):
            one.base_model.model.layer.frod_V["first"].mul_(2)
        compare(plain, model, x.double())


@pytest.mark.parametrize(
    "example",
    [
        Example("Conv1D", partial(config, fan_in_fan_out=True), CONV1D),
        Example("no rotation", partial(config, sparse_rate=0.0)),
        Example("dropout", partial(config, frod_dropout=0.5)),
    ],
    ids=lambda example: example.name,
)
def test_other_layers(example):
    """A transposed base weight, no entries in the rotation, dropout in eval mode: all the same."""
    plain, model, x = pair(example)
    with attach(model) as cache:
        compare(plain, model, x)
        for one in (plain, model):
            one.base_model.set_adapter(["second", "first"])
            one.eval()
        compare(plain, model, x)
        if example.name != "no rotation":
            assert cache.stats().hits


def test_offloaded_weights_are_left_to_peft():
    """Where PEFT moves the base weight about, its own forward runs."""
    plain, model, x = pair(Example("FRoD", partial(config, runtime_offload_base_weight=True)))
    with attach(model) as cache:
        compare(plain, model, x)
        assert cache.stats().stores == 0
