"""Adapters on base weights that HQQ has quantized."""

import pytest
import torch
from field_setups import check, ids
from quantized import Counted, dequantizes_as_plain_lora_does, notices

from dora_cache.lab.field import setups

SETUPS = setups("hqq")
CACHED = [setup for setup in SETUPS if setup.reason is None]
each = pytest.mark.parametrize("setup", CACHED, ids=ids)


@pytest.mark.parametrize("setup", SETUPS, ids=ids)
def test_setup(setup):
    """Outputs are PEFT's; cached, or the report says why not."""
    check(setup)


@each
def test_hits_dequantize_nothing(setup, monkeypatch):
    """Beside what the base layers do by themselves, no weight is dequantized."""
    from hqq.core.quantize import Quantizer

    dequantizes_as_plain_lora_does(setup, Counted(monkeypatch, (Quantizer, "dequantize")))


@each
@pytest.mark.parametrize("name", ["scale", "zero"])
def test_a_write_to_the_scales(setup, name):
    """A write to the scales or the zero points is noticed, though no module has them."""
    notices(setup, lambda layer: layer.meta[name].mul_(1.5))


@each
@pytest.mark.parametrize("name", ["scale", "zero"])
def test_other_scales(setup, name):
    """Others in their place are noticed."""
    notices(setup, lambda layer: layer.meta.update({name: layer.meta[name] * 1.5}))


@each
def test_a_write_to_the_packed_weights(setup):
    """A write to the packed weights is noticed."""
    notices(setup, lambda layer: layer.W_q[0].zero_())


@each
def test_other_packed_weights(setup):
    """Another parameter in their place is noticed."""

    def change(layer):
        layer.W_q = torch.nn.Parameter(layer.W_q.flip(0), requires_grad=False)

    notices(setup, change)


@each
def test_load_state_dict(setup):
    """Loading other weights and scales is noticed."""

    def change(layer):
        state = dict(layer.state_dict())
        state["scale"] = state["scale"] * 1.5
        layer.load_state_dict(state)

    notices(setup, change)
