"""Other adapters than DoRA on quantized base weights: cached, or not and why."""

import ast
from pathlib import Path

import peft
import pytest
import torch
from peft import (
    BOFTConfig,
    HiraConfig,
    HRAConfig,
    LoHaConfig,
    LoraConfig,
    MissConfig,
    OFTConfig,
    RandLoraConfig,
    ShiraConfig,
    get_peft_model,
)
from torchao.quantization import Int8WeightOnlyConfig
from transformers import BitsAndBytesConfig
from zoo import quiet

import dora_cache
from dora_cache.lab.field import of_bitsandbytes, of_quanto, of_torchao
from dora_cache.lab.field.of_hqq import in_hqq
from dora_cache.lab.field.of_transformers import running
from dora_cache.lab.field.quantized import loaded
from dora_cache.reasons import Reason
from dora_cache.recipes.bases import ON_QUANTIZED

BASES = {
    "torchao": lambda: of_torchao.quantized(64, Int8WeightOnlyConfig()),
    "quanto": lambda: of_quanto.quantized(64, "qint8"),
    "4 bit": lambda: loaded(64, quantization_config=BitsAndBytesConfig(load_in_4bit=True)),
    "8 bit": lambda: loaded(64, quantization_config=BitsAndBytesConfig(load_in_8bit=True)),
    "Linear4bit": lambda: of_bitsandbytes.quantized(64, of_bitsandbytes.in_4_bit),
    "Linear8bitLt": lambda: of_bitsandbytes.quantized(64, of_bitsandbytes.in_8_bit),
    "hqq": lambda: of_bitsandbytes.quantized(64, in_hqq),
}
AT = {"target_modules": r".*q_proj", "init_weights": False}
CONFIGS = {
    "BOFT": lambda: BOFTConfig(boft_block_size=4, **AT),
    "HiRA": lambda: HiraConfig(r=4, **AT),
    "HRA": lambda: HRAConfig(r=4, **AT),
    "LoHa": lambda: LoHaConfig(r=4, **AT),
    "MiSS": lambda: MissConfig(r=4, **AT | {"init_weights": "bat"}),
    "OFT": lambda: OFTConfig(r=0, oft_block_size=32, **AT),
    "RandLoRA": lambda: RandLoraConfig(r=4, **AT),
    "SHiRA": lambda: ShiraConfig(r=1, **AT),
}


def built(kind, base):
    torch.manual_seed(0)
    with quiet():
        return running(get_peft_model(BASES[base](), CONFIGS[kind]()).eval())


@pytest.mark.parametrize(
    ("kind", "base"),
    [
        *(("RandLoRA", base) for base in BASES if base != "hqq"),
        *(("OFT", base) for base in BASES),
        *(("BOFT", base) for base in BASES),
        ("LoHa", "torchao"),
        ("LoHa", "quanto"),
        ("LoHa", "8 bit"),
    ],
)
@torch.no_grad()
def test_cached(kind, base):
    """What is stored does not depend on how the base layer has its weight."""
    one = built(kind, base)
    one.run()  # some base layers convert their weights in their first forward
    expected = one.run()
    with dora_cache.attach(one.model) as cache:
        assert all(torch.equal(one.run(), expected) for _ in range(3))
        stats = cache.stats()
        assert stats.hits == 4
        assert not stats.reasons


@pytest.mark.parametrize(
    ("kind", "base"),
    [
        ("HiRA", "quanto"),
        ("HRA", "quanto"),
        *(("MiSS", base) for base in BASES),
    ],
)
@torch.no_grad()
def test_a_dense_value_is_not_stored(kind, base):
    """It would undo the quantization; the report says so."""
    one = built(kind, base)
    one.run()
    expected = one.run()
    with dora_cache.attach(one.model) as cache:
        assert torch.equal(one.run(), expected)
        assert cache.stats().reasons == {Reason.QUANTIZED.value: 2}
        assert Reason.QUANTIZED.advice in str(cache.report())


@pytest.mark.parametrize(
    ("kind", "base"),
    [("HiRA", "4 bit"), ("HiRA", "8 bit"), ("SHiRA", "4 bit"), ("SHiRA", "Linear8bitLt")],
)
def test_declined(kind, base):
    """Where that is known of the class or the layer beforehand, attaching says so."""
    with pytest.raises(dora_cache.errors.NothingToCacheError, match=ON_QUANTIZED):
        dora_cache.attach(built(kind, base).model)


NOT_CACHED = {
    "adalora": "its factors are multiplied with the input one by one",
    "ia3": "a vector is multiplied with the output",
    "pvera": "its factors are multiplied with the input one by one",
    "road": "the output is rotated by elementwise products",
}
"""Adapters for which nothing is derived from weights in each forward."""

REFUSED = ("AqlmLoraLinear", "AwqLoraLinear", "EetqLoraLinear", "GPTQLoraLinear")
"""Classes of LoRA layers for which PEFT refuses DoRA."""

KNOWN = {
    "lora": {
        "HqqLoraLinear",
        "IncLoraLinear",
        "Linear4bit",
        "Linear8bitLt",
        "TorchaoLoraLinear",
        *REFUSED,
    },
    "hira": {"Linear4bit", "Linear8bitLt"},
    "randlora": {"Linear4bit", "Linear8bitLt"},
}
_MODULES = ("aqlm", "awq", "bnb", "eetq", "gptq", "hqq", "inc", "torchao")


def classes():
    """Yield the tuner, the name and the source of each class of quantized layers of PEFT's."""
    for file in sorted(Path(peft.__file__).parent.glob("tuners/*/*.py")):
        if file.stem in _MODULES:
            text = file.read_text()
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.ClassDef):
                    yield file.parent.name, node.name, ast.get_source_segment(text, node)


def test_every_class_of_quantized_layers_is_known():
    """A class that PEFT adds for another library, or another adapter, has to be looked at."""
    found = {}
    for tuner, name, _ in classes():
        if tuner not in NOT_CACHED:
            found.setdefault(tuner, set()).add(name)
    assert found == KNOWN


@pytest.mark.parametrize("name", REFUSED)
def test_what_peft_refuses(name):
    """PEFT raises an error for DoRA on these."""
    [source] = [source for _, other, source in classes() if other == name]
    assert "does not support DoRA yet" in source


def test_gguf_layers():
    """PEFT's DoRA fails on the packed weights of Diffusers' GGUF layers, where its LoRA runs."""
    import gguf
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    kind = gguf.GGMLQuantizationType.Q8_0
    packed = gguf.quants.quantize(torch.randn(64, 64).numpy(), kind)
    layer = GGUFLinear(64, 64, compute_dtype=torch.float32)
    layer.weight = GGUFParameter(torch.from_numpy(packed), quant_type=kind)
    layer.requires_grad_(requires_grad=False)
    net = torch.nn.Sequential(layer)
    get_peft_model(net, LoraConfig(target_modules=["0"]))(torch.randn(2, 64))
    with pytest.raises(RuntimeError, match="must match the size"):
        get_peft_model(torch.nn.Sequential(layer), LoraConfig(use_dora=True, target_modules=["0"]))
