"""What a pool reads of adapters whose base layers a library has quantized."""

import pytest
import torch
from field_setups import ids
from peft.tuners.lora import LoraLayer
from zoo import quiet

from dora_cache.lab.field import setups
from dora_cache.serving.files import open_adapter

SETUPS = [
    setup for library in ("bitsandbytes", "hqq", "quanto", "torchao") for setup in setups(library)
]


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("setup", SETUPS, ids=ids)
def test_setup(setup, use_dora, tmp_path):
    """Shapes are those of the unquantized layer, and what is read is what PEFT has."""
    if setup.missing:
        pytest.skip(setup.missing)
    model = setup.build(use_dora, 64).model
    layers = {name: one for name, one in model.named_modules() if isinstance(one, LoraLayer)}
    with quiet():
        model.save_pretrained(tmp_path)
    (adapter,) = model.peft_config
    files = open_adapter("one", tmp_path, model)
    assert {part.module for part in files.parts} == layers.keys()
    for part in files.parts:
        layer, found = layers[part.module], files.read(part)
        assert part.kind == "linear"
        assert (part.rank, part.scaling) == (layer.r[adapter], layer.scaling[adapter])
        assert torch.equal(found["A"], layer.lora_A[adapter].weight.cpu())
        assert torch.equal(found["B"], layer.lora_B[adapter].weight.cpu())
        assert ("magnitude" in found) == use_dora
        if use_dora:
            assert torch.equal(found["magnitude"], layer.lora_magnitude_vector[adapter].weight)
