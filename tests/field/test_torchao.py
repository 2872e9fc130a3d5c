"""Adapters on base weights that torchao has quantized."""

import pytest
import torch
from field_setups import check, ids
from peft import LoraConfig, get_peft_model
from quantized import Counted, base_layers, dequantizes_as_plain_lora_does, notices

import dora_cache
from dora_cache.lab.field import setups

SETUPS = setups("torchao")
HERE = [setup for setup in SETUPS if not setup.missing]
each = pytest.mark.parametrize("setup", HERE, ids=ids)


@pytest.mark.parametrize("setup", SETUPS, ids=ids)
def test_setup(setup):
    """Outputs are PEFT's, and cached."""
    check(setup)


@each
def test_hits_dequantize_nothing(setup, monkeypatch):
    """Beside what the base layers do by themselves, no weight is dequantized."""
    from torchao.quantization import Float8Tensor, Int8Tensor, IntxUnpackedToInt8Tensor

    kinds = (Float8Tensor, Int8Tensor, IntxUnpackedToInt8Tensor)
    counted = Counted(monkeypatch, *((kind, "dequantize") for kind in kinds))
    dequantizes_as_plain_lora_does(setup, counted)


@each
def test_a_write_to_the_scales(setup):
    """A write to the tensor of the scales is noticed."""
    notices(setup, lambda layer: layer.weight.scale.mul_(1.5))


@each
def test_a_write_to_the_packed_weights(setup):
    """A write to the tensor of the integers is noticed."""
    notices(setup, lambda layer: layer.weight.qdata[0].zero_())


def _put(name, change):
    def put(layer):
        tensor = layer.weight
        setattr(tensor, name, change(getattr(tensor, name)))

    return put


@each
def test_other_scales(setup):
    """Other scales in the old ones' place are noticed."""
    notices(setup, _put("scale", lambda scale: scale * 1.5))


@each
def test_a_copy_of_the_whole_weight(setup):
    """``copy_`` to the wrapping tensor writes to what it wraps, uncounted there."""

    def change(layer):
        weight = layer.weight
        other = weight.detach().clone()
        other.scale.mul_(1.5)
        weight.copy_(other)

    notices(setup, change)


@each
def test_another_weight(setup):
    """Another parameter in the weight's place is noticed."""

    def change(layer):
        other = layer.weight.detach().clone()
        other.scale.mul_(1.5)
        layer.weight = torch.nn.Parameter(other, requires_grad=False)

    notices(setup, change)


@each
def test_load_state_dict(setup):
    """Loading other weights is noticed, whether they are copied or assigned."""
    for assign in (False, True):

        def change(layer, assign=assign):
            state = {name: value.clone() for name, value in layer.state_dict().items()}
            state["weight"].scale.mul_(1.5)
            layer.load_state_dict(state, assign=assign)

        notices(setup, change)


@torch.no_grad()
def test_the_attributes_are_compared_at_every_hit():
    """An attribute that changes by itself is noticed."""
    [setup] = [one for one in HERE if one.name == "int8 weights and activations"]
    built = setup.build(True, 64)
    with dora_cache.attach(built.model) as cache:
        for _ in range(3):
            built.run()
        misses = cache.stats().misses
        for layer in base_layers(built.model):
            layer.weight.act_quant_kwargs.reduce_range = True
        built.run()
        assert cache.stats().misses == 2 * misses


def test_an_attribute_of_the_weight():
    """What a wrapping tensor is beside the tensors that it wraps counts as well."""
    [setup] = [one for one in HERE if one.name == "4-bit weights (intx)"]

    def change(layer):
        columns = layer.weight.shape[1]
        layer.weight.block_size = (1, columns)
        layer.weight.scale = layer.weight.scale[:, :1].contiguous()
        layer.weight.zero_point = layer.weight.zero_point[:, :1].contiguous()

    notices(setup, change)


def test_what_peft_refuses():
    """PEFT puts no LoRA layer on torchao's plain 4-bit tensors."""
    from torchao.quantization import Int4Tensor

    layer = torch.nn.Linear(64, 64, bias=False)
    packed = torch.zeros(64, 32, dtype=torch.int8)
    scales = torch.ones(2, 64)
    weight = Int4Tensor(packed, scales, scales, [1, 32], torch.Size((64, 64)))
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    config = LoraConfig(target_modules=["0"])
    with (
        pytest.warns(UserWarning, match="instantiated"),
        pytest.raises(TypeError, match="only supports int8"),
    ):
        get_peft_model(torch.nn.Sequential(layer), config)
