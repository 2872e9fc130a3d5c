"""Adapters on base weights that optimum-quanto has quantized."""

import pytest
import torch
from field_setups import check, ids
from quantized import Counted, dequantizes_as_plain_lora_does, notices

from dora_cache.lab.field import setups

SETUPS = setups("optimum.quanto")
each = pytest.mark.parametrize("setup", SETUPS, ids=ids)


@each
def test_setup(setup):
    """Outputs are PEFT's, and cached."""
    check(setup)


@each
def test_hits_dequantize_nothing(setup, monkeypatch):
    """Beside what the base layers do by themselves, no weight is dequantized."""
    from optimum.quanto import WeightQBitsTensor, WeightQBytesTensor

    counted = Counted(
        monkeypatch, (WeightQBitsTensor, "dequantize"), (WeightQBytesTensor, "dequantize")
    )
    dequantizes_as_plain_lora_does(setup, counted)


@each
def test_a_write_to_the_scales(setup):
    """A write to the tensor of the scales is noticed."""
    notices(setup, lambda layer: layer.weight._scale.mul_(1.5))


@each
def test_a_write_to_the_packed_weights(setup):
    """A write to the integers is noticed, packed ones included."""

    def change(layer):
        data = layer.weight._data
        data = getattr(data, "_data", data)
        data[0].copy_(data[1].clone())

    notices(setup, change)


@each
def test_another_weight(setup):
    """Another parameter in the weight's place is noticed."""

    def change(layer):
        layer.weight = torch.nn.Parameter(1.5 * layer.weight.dequantize(), requires_grad=False)
        layer.freeze()

    notices(setup, change)


@each
def test_load_state_dict(setup):
    """Loading other weights is noticed."""

    def change(layer):
        state = {name: value.clone() for name, value in layer.state_dict().items()}
        state["weight._scale"].mul_(1.5)
        layer.load_state_dict(state)

    notices(setup, change)
