"""Adapters on base weights that bitsandbytes has quantized."""

from contextlib import nullcontext

import bitsandbytes
import pytest
import torch
from field_setups import check, ids
from peft import LoraConfig
from quantized import Counted, base_layers, dequantizes_as_plain_lora_does, notices

import dora_cache
from dora_cache.lab.field import setups

SETUPS = setups("bitsandbytes")
FOUR = [setup for setup in SETUPS if setup.name != "8 bit"]
[EIGHT] = [setup for setup in SETUPS if setup.name == "8 bit"]
each = pytest.mark.parametrize("setup", FOUR, ids=ids)
functional = bitsandbytes.functional


@pytest.mark.parametrize("setup", SETUPS, ids=ids)
def test_setup(setup):
    """Outputs are PEFT's, and cached."""
    check(setup)


@pytest.mark.parametrize("setup", SETUPS, ids=ids)
def test_hits_dequantize_nothing(setup, monkeypatch):
    """Beside what the base layers do by themselves, no weight is dequantized."""
    names = ("dequantize_4bit", "int8_vectorwise_dequant")
    counted = Counted(monkeypatch, *((functional, name) for name in names))
    dequantizes_as_plain_lora_does(setup, counted)


@each
def test_a_write_to_the_scales(setup):
    """A write to the scales of the quantization state is noticed."""
    notices(setup, lambda layer: layer.weight.quant_state.absmax.mul_(2))


@each
def test_another_quantization_state(setup):
    """Other scales in the quantization state are noticed, and another state."""

    def scales(layer):
        state = layer.weight.quant_state
        state.absmax = state.absmax * 2

    def types(layer):
        state = layer.weight.quant_state
        state.code = state.code.flip(0)
        state.quant_type = "fp4" if state.quant_type == "nf4" else "nf4"

    notices(setup, scales)
    notices(setup, types)


@each
def test_a_write_to_the_packed_weights(setup):
    """A write to the packed weights is noticed."""
    notices(setup, lambda layer: layer.weight[:8].zero_())


@each
def test_another_weight(setup):
    """A parameter made anew over the same memory is the old weight; written to, it is another."""

    def change(layer):
        layer.weight = layer.weight.to("cpu")
        layer.weight[:8].zero_()

    notices(setup, change)


@each
def test_load_state_dict(setup):
    """Loading other weights is noticed."""

    def change(layer):
        # state_dict() gives the weights in another order than a CPU multiplies with; and
        # load_state_dict() takes no scales.
        layer.load_state_dict({"weight": layer.weight.flip(0)})

    notices(setup, change)


@torch.no_grad()
@each
def test_deriving_leaves_the_weight_in_place(setup):
    """PEFT puts another parameter in the weight's place whenever it dequantizes on a CPU."""
    built = setup.build(True, 64)
    before = [layer.weight for layer in base_layers(built.model)]
    with dora_cache.attach(built.model):
        built.run()
    after = [layer.weight for layer in base_layers(built.model)]
    assert all(one is other for one, other in zip(before, after, strict=True))
    built.run()
    after = [layer.weight for layer in base_layers(built.model)]
    assert not any(one is other for one, other in zip(before, after, strict=True))


def test_8_bit_scales():
    """A write to the scales is noticed, which the module has taken over from the weight."""
    notices(EIGHT, lambda layer: scales_of(layer).mul_(2), twice=False)


def test_other_8_bit_scales():
    """Others in their place are noticed."""

    def change(layer):
        owner = layer.state if layer.weight.SCB is None else layer.weight
        owner.SCB = owner.SCB * 2
        layer.state.SCB = owner.SCB

    notices(EIGHT, change, twice=False)


def scales_of(layer):
    return layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB


@each
def test_values_hold_where_peft_has_put_the_same_weight_in_place(setup):
    """On a CPU, PEFT's own dequantization replaces the parameter by one over the same memory."""
    built = setup.build(True, 64)
    layers = base_layers(built.model)
    with torch.no_grad(), dora_cache.attach(built.model) as cache:
        for turn in range(4):
            before = [layer.weight for layer in layers]
            with cache.bypass():
                expected = built.run()
            assert any(layer.weight is not old for layer, old in zip(layers, before, strict=True))
            misses = cache.stats().misses
            assert torch.equal(built.run(), expected)
            assert torch.equal(built.run(), expected)
            if turn:  # the first time, nothing was derived before
                assert cache.stats().misses == misses
        for layer in layers:
            layer.weight[:8].zero_()  # through the new object
        changed = built.run()
        with cache.bypass():
            assert torch.equal(changed, built.run())
        assert not torch.equal(changed, expected)


@each
def test_a_weight_that_was_written_to_before_it_is_replaced(setup):
    """A new object over memory that has changed since does not keep what was derived."""
    built = setup.build(True, 64)
    layers = base_layers(built.model)
    with torch.no_grad(), dora_cache.attach(built.model) as cache:
        before = built.run()
        for layer in layers:
            layer.weight[:8].zero_()
            layer.weight = layer.weight.to("cpu")
        changed = built.run()
        with cache.bypass():
            assert torch.equal(changed, built.run())
        assert not torch.equal(changed, before)


@pytest.mark.parametrize("setup", SETUPS, ids=ids)
@torch.no_grad()
def test_a_mixed_batch(setup):
    """Rows are as each alone, and a hit dequantizes nothing."""
    mixed, plain = (setup.build(True, 64) for _ in "12")
    for built in (mixed, plain):
        torch.manual_seed(3)
        built.model.add_adapter(
            "lora", LoraConfig(target_modules="all-linear", init_lora_weights=False)
        )
        built.model.eval()
    rows = torch.arange(20).view(4, 5)
    names = ["lora", "default", "__base__", "default"]
    with dora_cache.attach(mixed.model) as cache:
        mixed.model(rows, adapter_names=names)
        misses = cache.stats().misses
        found = mixed.model(rows, adapter_names=names).logits
        assert cache.stats().misses == misses > 0
    with dora_cache.attach(plain.model):  # PEFT's own 8-bit DoRA fails on a CPU
        for row, name in enumerate(names):
            with plain.model.disable_adapter() if name == "__base__" else nullcontext():
                if name != "__base__":
                    plain.model.set_adapter(name)
                expected = plain.model(rows[row : row + 1]).logits
            torch.testing.assert_close(found[row : row + 1], expected, rtol=1e-3, atol=1e-4)
