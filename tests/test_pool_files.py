"""What a pool reads of PEFT's folders is what PEFT makes of them; all else is refused by name."""

import copy
import json
import math
import os
import struct
import sys
from pathlib import Path
from typing import NamedTuple

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
from transformers.pytorch_utils import Conv1D
from zoo import quiet

from dora_cache import AdapterFileError, DoraCacheError
from dora_cache.serving.files import open_adapter

PREFIX = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Linear(6, 8)
        self.v = nn.Linear(6, 10, bias=False)
        self.c = Conv1D(12, 6)  # of its weight, the first dimension is the input
        self.norm = nn.LayerNorm(6)


class Net(nn.Module):
    def __init__(self, blocks=3):
        super().__init__()
        self.embed = nn.Embedding(17, 6)
        self.layers = nn.ModuleList(Block() for _ in range(blocks))
        self.conv1d = nn.Conv1d(4, 6, 3, padding=1)
        self.conv2d = nn.Conv2d(4, 6, (3, 2), stride=2)
        self.conv3d = nn.Conv3d(2, 4, 2, bias=False)
        self.head = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))


ALL = ["embed", "q", "v", "c", "conv1d", "conv2d", "conv3d"]
CONVOLUTIONS = ["conv1d", "conv2d", "conv3d"]


class Made(NamedTuple):
    """A folder, and the model that its adapter was made for."""

    base: nn.Module
    path: Path


@torch.no_grad()
def train(model):
    """Change what training would."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn_like(parameter))


def save(base, folder, config, **how):
    """Make an adapter of random weights for a copy of a model, and save it."""
    with quiet():
        model = get_peft_model(copy.deepcopy(base), config)
        train(model)
        model.save_pretrained(str(folder), **how)
    return Made(base, folder)


def adapter(folder, base=None, *, r=4, lora_alpha=6, init_lora_weights=False, **config):
    config.setdefault("target_modules", ["q"])
    base = Net().eval() if base is None else base
    return save(
        base,
        folder,
        LoraConfig(r=r, lora_alpha=lora_alpha, init_lora_weights=init_lora_weights, **config),
    )


def loaded(made):
    """Return what PEFT makes of the folder."""
    with quiet():
        return PeftModel.from_pretrained(copy.deepcopy(made.base), str(made.path)).eval()


def expected(layer, name="default"):
    """Return the tensors of a PEFT layer, as a part has them."""
    if name in layer.lora_embedding_A:
        found = {"A": layer.lora_embedding_A[name], "B": layer.lora_embedding_B[name]}
    else:
        found = {"A": layer.lora_A[name].weight, "B": layer.lora_B[name].weight}
        if layer.lora_B[name].bias is not None:
            found["bias_B"] = layer.lora_B[name].bias
        found["B"] = found["B"].flatten(1)
    if name in layer.lora_magnitude_vector:
        found["magnitude"] = layer.lora_magnitude_vector[name].weight.flatten()
    return found


def agrees(made, model=None, prefix=""):
    """Compare all that a folder gives with PEFT's own modules; return the parts by module."""
    with_peft = loaded(made)
    files = open_adapter("one", made.path, made.base if model is None else model)
    parts = {part.module.removeprefix(prefix): part for part in files.parts}
    assert len(parts) == len(files.parts)
    layers = {
        name.removeprefix(PREFIX): module
        for name, module in with_peft.named_modules()
        if isinstance(module, BaseTunerLayer)
    }
    assert {module for module, part in parts.items() if part.rank} == layers.keys()
    for module, layer in layers.items():
        part = parts[module]
        assert (part.rank, part.scaling) == (layer.r["default"], layer.scaling["default"])
        found, wanted = files.read(part), expected(layer)
        if "bias" in found:
            wanted["bias"] = layer.get_base_layer().bias
        same_tensors(part, found, wanted)
    for module in parts.keys() - layers.keys():
        part, owner = parts[module], with_peft.get_submodule(PREFIX + module)
        if isinstance(owner, ModulesToSaveWrapper):
            wanted = owner.modules_to_save["default"].state_dict()
        else:
            wanted = {"bias": owner.bias}
        same_tensors(part, files.read(part), wanted)
    return parts


def same_tensors(part, found, wanted):
    assert found.keys() == part.shapes.keys() == wanted.keys()
    for name, tensor in found.items():
        assert tuple(tensor.shape) == part.shapes[name]
        assert tensor.is_contiguous()
        assert torch.equal(tensor, wanted[name])


def refusal(made, model=None):
    before = {key: value.clone() for key, value in made.base.state_dict().items()}
    with pytest.raises(AdapterFileError) as caught:
        open_adapter("one", made.path, made.base if model is None else model)
    after = made.base.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    text = str(caught.value)
    assert "'one'" in text
    assert str(made.path) in text
    return text


def configure(made, **fields):
    """Write fields into the configuration."""
    path = made.path / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return made


def rewrite(made, change):
    """Change the tensors of the file."""
    path = str(made.path / WEIGHTS)
    tensors = load_file(path)
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    change(tensors)
    save_file(tensors, path)
    return made


def rename(old, new):
    def change(tensors):
        for key in [key for key in tensors if key.endswith(old)]:
            tensors[key.removesuffix(old) + new] = tensors.pop(key)

    return change


Q0 = PREFIX + "layers.0.q"


# What is served


SPELLINGS = {
    "names": {"target_modules": ["q", "v"]},
    "a path": {"target_modules": ["layers.1.q"]},
    "a pattern": {"target_modules": r".*layers\.[02]\.(q|c)"},
    "all linear": {"target_modules": "all-linear", "exclude_modules": CONVOLUTIONS},
    "layers": {
        "target_modules": ["q"], "layers_to_transform": [0, 2], "layers_pattern": ["layers"],
    },
    "a layer": {"target_modules": ["q"], "layers_to_transform": 1, "layers_pattern": "layers"},
    "exclude names": {"target_modules": ["q", "v"], "exclude_modules": ["layers.1.v"]},
    "exclude a pattern": {"target_modules": ["q", "v"], "exclude_modules": r".*0\.q"},
    "ranks": {"target_modules": ["q", "v"], "rank_pattern": {"v": 2, r"layers\.0\.q": 3}},
    "alphas": {"target_modules": ["q", "v"], "alpha_pattern": {r".*\.1\.(q|v)": 5, "^layers": 7}},
    "both": {"target_modules": ALL, "rank_pattern": {"q": 2}, "alpha_pattern": {"q": 9}},
    "the first pattern": {"target_modules": ["q"], "rank_pattern": {"0.q": 2, "q": 3}},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "mica": {"init_lora_weights": "mica"},
    "dropout": {"lora_dropout": 0.3},
    "a fraction": {"lora_alpha": 1.5},
}  # fmt: skip


FLAVOURS = [{}, {"use_rslora": True}, {"use_dora": True}]


@pytest.mark.parametrize(("spelling", "flavour"), [
    (spelling, flavour)
    for spelling in SPELLINGS
    for flavour in FLAVOURS
    if not (spelling == "mica" and "use_dora" in flavour)  # PEFT does not combine them
], ids=str)  # fmt: skip
def test_every_spelling(spelling, flavour, tmp_path):
    """Modules, ranks, scalings and tensors are PEFT's, however the configuration spells them."""
    agrees(adapter(tmp_path, **SPELLINGS[spelling], **flavour))


@pytest.mark.parametrize("flavour", FLAVOURS, ids=str)
def test_every_kind_of_layer(flavour, tmp_path):
    """Linear layers, Conv1D, embeddings and convolutions of each dimension are read."""
    parts = agrees(adapter(tmp_path, target_modules=ALL, **flavour))
    kinds = {module.rpartition(".")[2]: part.kind for module, part in parts.items()}
    linear, conv = dict.fromkeys(("q", "v", "c"), "linear"), dict.fromkeys(CONVOLUTIONS, "conv")
    assert kinds == {"embed": "embedding"} | linear | conv
    assert parts["layers.0.c"].shapes["A"] == (4, 6)
    assert parts["layers.0.c"].shapes["B"] == (12, 4)
    assert parts["conv2d"].shapes["A"] == (4, 4, 3, 2)
    assert parts["conv2d"].shapes["B"] == (6, 4)


def test_parts_come_in_the_order_of_the_model(tmp_path):
    """Parts are in the order in which the model has its modules, not in that of the file."""
    made = adapter(tmp_path, Net(blocks=12), target_modules=["q"])
    files = open_adapter("one", made.path, made.base)
    assert [part.module for part in files.parts] == [f"layers.{one}.q" for one in range(12)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_the_dtype_is_that_of_the_file(dtype, tmp_path):
    made = adapter(tmp_path, target_modules=ALL, use_dora=True)
    rewrite(made, lambda tensors: tensors.update({k: v.to(dtype) for k, v in tensors.items()}))
    files = open_adapter("one", made.path, made.base)
    found = [tensor for part in files.parts for tensor in files.read(part).values()]
    assert {tensor.dtype for tensor in found} == {dtype}


@pytest.mark.parametrize("targets", [["q", "v"], CONVOLUTIONS], ids=str)
def test_the_bias_of_b(targets, tmp_path):
    parts = agrees(adapter(tmp_path, target_modules=targets, lora_bias=True))
    assert all("bias_B" in part.shapes for part in parts.values())


@pytest.mark.parametrize("flavour", [{}, {"use_dora": True}], ids=str)
@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases(bias, flavour, tmp_path):
    """A trained bias is part of its layer's adapter, or a part of its own."""
    made = adapter(tmp_path, bias=bias, target_modules=["q", "v", "conv1d"], **flavour)
    parts = agrees(made)
    assert "bias" in parts["layers.0.q"].shapes
    assert "bias" not in parts["layers.0.v"].shapes
    assert "bias" in parts["conv1d"].shapes
    assert ("layers.0.c" in parts) == ("layers.0.norm" in parts) == (bias == "all")
    if bias == "all":
        assert (parts["layers.0.c"].kind, parts["layers.0.c"].rank) == ("linear", 0)
        assert (parts["conv2d"].kind, parts["conv2d"].rank) == ("conv", 0)
        assert parts["layers.0.norm"].kind == "replaced"


@pytest.mark.parametrize("bias", ["none", "all"])
@pytest.mark.parametrize("saved", [["head"], ["head.0", "layers.1.norm"]], ids=str)
def test_saved_modules(saved, bias, tmp_path):
    """A module of modules_to_save is a part with its parameters and buffers, by their names."""
    made = adapter(tmp_path, modules_to_save=saved, bias=bias)
    parts = agrees(made)
    for module in saved:
        own = made.base.get_submodule(module).state_dict()
        assert parts[module].kind == "replaced"
        assert parts[module].shapes == {name: tuple(one.shape) for name, one in own.items()}


def test_the_old_spelling_of_magnitudes(tmp_path):
    """A magnitude is known with .weight after its name and without."""
    made = adapter(tmp_path, target_modules=ALL, use_dora=True)
    rewrite(made, rename("lora_magnitude_vector", "lora_magnitude_vector.weight"))
    agrees(made)


def llama(kind=LlamaForCausalLM, **config):
    torch.manual_seed(1)
    settings = {
        "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0,
    }  # fmt: skip
    return kind(LlamaConfig(**(settings | config))).eval()


def test_a_transformers_model(tmp_path):
    config = {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]}
    parts = agrees(adapter(tmp_path, llama(), use_dora=True, **config))
    assert len(parts) == 2


@pytest.mark.parametrize("says_so", [True, False])
def test_a_classifier(says_so, tmp_path):
    """PEFT saves a classifier's head for its task, whether the configuration names it or not."""
    base = llama(LlamaForSequenceClassification, num_labels=3)
    made = adapter(tmp_path, base, target_modules=["q_proj"], task_type="SEQ_CLS")
    if not says_so:
        configure(made, modules_to_save=None)
    assert agrees(made)["score"].kind == "replaced"


@pytest.mark.parametrize("config", [
    {"modules_to_save": ["embed_tokens"], "target_modules": ["q_proj"]},
    {"target_modules": ["embed_tokens", "q_proj"]},
], ids=str)  # fmt: skip
def test_tied_weights(config, tmp_path):
    """With ensure_weight_tying the file has both tied modules, and both are parts."""
    base = llama(tie_word_embeddings=True)
    parts = agrees(adapter(tmp_path, base, ensure_weight_tying=True, **config))
    assert {"model.embed_tokens", "lm_head"} <= parts.keys()


def test_models_that_have_adapters(tmp_path):
    """In a PeftModel, and where Transformers put adapters, a part names PEFT's layer."""
    made = adapter(tmp_path / "one", target_modules=["q", "embed"], modules_to_save=["head"])
    other = LoraConfig(target_modules=["q", "v", "conv2d"], modules_to_save=["head"])
    wrapped = get_peft_model(copy.deepcopy(made.base), other)
    agrees(made, wrapped, PREFIX)
    named = dict(wrapped.named_modules())
    files = open_adapter("one", made.path, wrapped)
    assert all(part.module in named for part in files.parts)
    injected = peft.inject_adapter_in_model(other, copy.deepcopy(made.base))
    agrees(made, injected)
    prompted = get_peft_model(
        llama(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    text = adapter(tmp_path / "text", llama(), target_modules=["q_proj"])
    agrees(text, prompted, "base_model.")


def test_compiled_models(tmp_path):
    """The wrappers of torch.compile have no names in the file; the model's names have them."""
    made = adapter(tmp_path)
    agrees(made, torch.compile(copy.deepcopy(made.base)), "_orig_mod.")
    by_block = copy.deepcopy(made.base)
    by_block.layers[0] = torch.compile(by_block.layers[0])
    by_block.layers[1].q = torch.compile(by_block.layers[1].q)
    parts = open_adapter("one", made.path, by_block).parts
    assert [part.module for part in parts] == [
        "layers.0._orig_mod.q", "layers.1.q._orig_mod", "layers.2.q",
    ]  # fmt: skip


def run_part(part, tensors, base, x):
    """Compute a layer's output from what was read, as the pool's layers are to do."""
    a, b = tensors["A"], tensors["B"]
    if part.kind == "embedding":
        inner = nn.functional.embedding(x, a.T) @ b.T
    elif part.kind == "conv":
        run = {1: nn.functional.conv1d, 2: nn.functional.conv2d, 3: nn.functional.conv3d}[
            len(base.kernel_size)
        ]
        inner = run(x, a, None, base.stride, base.padding)
        inner = torch.movedim(torch.movedim(inner, 1, -1) @ b.T, -1, 1)
    else:
        inner = x @ a.T @ b.T
    return base(x) + part.scaling * inner


SAMPLES = {
    "embed": lambda: torch.randint(0, 17, (2, 5)),
    "q": lambda: torch.randn(2, 5, 6),
    "c": lambda: torch.randn(2, 5, 6),
    "conv1d": lambda: torch.randn(2, 4, 9),
    "conv2d": lambda: torch.randn(2, 4, 7, 7),
    "conv3d": lambda: torch.randn(2, 2, 4, 4, 4),
    "grouped": lambda: torch.randn(2, 4, 7, 7),
}


@torch.no_grad()
@pytest.mark.parametrize("target", SAMPLES)
def test_what_is_read_computes_what_peft_does(target, tmp_path):
    """Base output plus scaling times B times A is PEFT's output, grouped convolutions included."""
    base = Net(blocks=1)
    base.grouped = nn.Conv2d(4, 6, 3, padding=1, groups=2)
    made = adapter(tmp_path, base.double().eval(), target_modules=[target])
    files = open_adapter("one", made.path, base)
    (part,) = files.parts
    tensors = {name: tensor.double() for name, tensor in files.read(part).items()}
    x = SAMPLES[target]()
    x = x.double() if x.is_floating_point() else x
    wanted = loaded(made).get_submodule(PREFIX + part.module)(x)
    found = run_part(part, tensors, base.get_submodule(part.module), x)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(base.get_submodule(part.module)(x), wanted)


def test_what_is_read_is_its_own_memory(tmp_path):
    """Tensors do not change with the file, and nothing of the file stays mapped after close."""
    made = adapter(tmp_path)
    files = open_adapter("one", made.path, made.base)
    found = files.read(files.parts[0])
    kept = {name: tensor.clone() for name, tensor in found.items()}
    path = made.path / WEIGHTS
    with path.open("r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    assert all(torch.equal(found[name], tensor) for name, tensor in kept.items())
    files.close()
    files.close()
    if sys.platform == "linux":
        assert str(path) not in Path("/proc/self/maps").read_text()


def test_reading_after_close(tmp_path):
    made = adapter(tmp_path)
    files = open_adapter("one", made.path, made.base)
    before = files.read(files.parts[0])
    files.close()
    after = files.read(files.parts[0])
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


# Base weights that are saved with the adapter


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "embed_tokens"]], ids=str)
@pytest.mark.parametrize("changed", [False, True])
def test_saved_embeddings(targets, changed, tmp_path, monkeypatch):
    """A saved base embedding must be the model's own; that is found when weights are read."""
    monkeypatch.setattr("dora_cache.serving.files._CHUNK", 50)
    base = llama()
    config = LoraConfig(r=4, target_modules=targets)
    with quiet():
        get_peft_model(copy.deepcopy(base), config).save_pretrained(
            tmp_path, save_embedding_layers=True
        )
    with torch.no_grad():
        base.model.embed_tokens.weight[-1] += changed
    files = open_adapter("one", tmp_path, base)
    assert {part.module.rpartition(".")[2] for part in files.parts} == set(targets)
    if changed:
        with pytest.raises(AdapterFileError, match=r"embed_tokens.*modules_to_save") as caught:
            files.read(files.parts[0])
        assert "cannot be read" not in str(caught.value)
    else:
        for part in files.parts:
            files.read(part)


def test_saved_embeddings_that_cannot_be_compared(tmp_path):
    base = llama()
    with quiet():
        get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["q_proj"])).save_pretrained(
            tmp_path, save_embedding_layers=True
        )
    files = open_adapter("one", tmp_path, base)
    base.to("meta")
    with pytest.raises(AdapterFileError, match="cannot be compared"):
        files.read(files.parts[0])


def test_saved_embeddings_of_another_size(tmp_path):
    base = llama()
    with quiet():
        get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["q_proj"])).save_pretrained(
            tmp_path, save_embedding_layers=True
        )
    text = refusal(Made(base, tmp_path), llama(vocab_size=40))
    assert "(32, 16)" in text
    assert "(40, 16)" in text


# Files that change


def replace(made, again):
    for name in (CONFIG, WEIGHTS):
        (again.path / name).replace(made.path / name)


def test_a_replaced_file(tmp_path):
    """After the files were replaced, an open adapter says so; opened again, it reads the new."""
    made = adapter(tmp_path / "one")
    files = open_adapter("one", made.path, made.base)
    files.read(files.parts[0])
    replace(made, adapter(tmp_path / "two", made.base))
    with pytest.raises(AdapterFileError, match="add it again"):
        files.read(files.parts[0])
    agrees(made)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("how", ["written", "shorter", "removed", "replaced"])
def test_a_changed_file(how, name, tmp_path):
    """Time of writing, size and identity of both files count, each alone."""
    made = adapter(tmp_path)
    files = open_adapter("one", made.path, made.base)
    path = made.path / name
    content, times = path.read_bytes(), path.stat()
    if how == "removed":
        path.unlink()
    elif how == "shorter":
        path.write_bytes(content[: len(content) // 2])
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    elif how == "replaced":
        other = tmp_path / "other"
        other.write_bytes(content)
        os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
        other.replace(path)
    else:
        os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))
    with pytest.raises(AdapterFileError, match="add it again"):
        files.read(files.parts[0])


def test_a_file_that_changes_while_it_is_read(tmp_path, monkeypatch):
    """What was read of a file that another process writes meanwhile is not used."""
    made = adapter(tmp_path)

    def touch(*_):
        os.utime(made.path / CONFIG, ns=(1, 1))
        return torch.block_diag

    files = open_adapter("one", made.path, made.base)
    monkeypatch.setattr("dora_cache.serving.files.AdapterFiles._require_base_weights", touch)
    with pytest.raises(AdapterFileError, match="add it again"):
        files.read(files.parts[0])
    monkeypatch.setattr("dora_cache.serving.files._places", touch)
    made = adapter(tmp_path / "two")
    read = "dora_cache.serving.files._Reader.read"
    monkeypatch.setattr(read, lambda self: os.utime(made.path / WEIGHTS, ns=(1, 1)))
    assert "add it again" in refusal(made)


# Bad files


def test_it_is_a_dora_cache_error_and_a_value_error():
    assert issubclass(AdapterFileError, DoraCacheError)
    assert issubclass(AdapterFileError, ValueError)


@pytest.mark.parametrize("path", ["missing", "a file"])
def test_no_folder(path, tmp_path):
    (tmp_path / "a file").write_text("")
    assert "no such folder" in refusal(Made(Net(), tmp_path / path))


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_missing_file(name, tmp_path):
    made = adapter(tmp_path)
    (made.path / name).unlink()
    assert f"the folder has no {name}" in refusal(made)


def test_a_pickle(tmp_path):
    """Nothing is unpickled; the error has the lines that convert, and they do."""
    made = adapter(tmp_path)
    tensors = load_file(str(made.path / WEIGHTS))
    (made.path / WEIGHTS).unlink()
    torch.save(tensors, made.path / "adapter_model.bin")
    text = refusal(made)
    assert "pickle" in text
    line = text[text.index("peft.PeftModel") :]
    with quiet():
        eval(line, {"peft": peft, "base_model": copy.deepcopy(made.base)})
    agrees(made)


@pytest.mark.parametrize("content", [
    b"", b"{", b"[]", b"3", b"\xff\xfe", b'{"r": 1', b"[" * 100_000, b'{"peft_type": []}', b"{}",
])  # fmt: skip
def test_a_bad_configuration(content, tmp_path):
    made = adapter(tmp_path)
    (made.path / CONFIG).write_bytes(content)
    refusal(made)


def test_a_truncated_file(tmp_path):
    made = adapter(tmp_path)
    content = (made.path / WEIGHTS).read_bytes()
    for length in (0, 4, 8, 100, len(content) - 1):
        (made.path / WEIGHTS).write_bytes(content[:length])
        assert "damaged" in refusal(made)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    made = adapter(tmp_path_factory.mktemp("small"), Net(blocks=1), use_dora=True)
    return made, (made.path / WEIGHTS).read_bytes(), (made.path / CONFIG).read_bytes()


@given(data=st.data())
def test_damaged_bytes(small, data):
    """Whatever is cut off or overwritten, there is a clear error or a readable file."""
    made, weights, config = small
    contents = {WEIGHTS: weights, CONFIG: config}
    name = data.draw(st.sampled_from([WEIGHTS, CONFIG]))
    content = bytearray(contents[name])
    (header,) = struct.unpack("<Q", weights[:8])
    limit = 8 + header if name == WEIGHTS else len(content)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, limit - 1))
        new = data.draw(st.binary(min_size=1, max_size=8) | st.sampled_from([b'"', b"{", b"9"]))
        content[at : at + len(new)] = new
    content = content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))]
    for one, original in contents.items():
        (made.path / one).write_bytes(content if one == name else original)
    try:
        files = open_adapter("one", made.path, made.base)
        for part in files.parts:
            found = files.read(part)
            assert {one: tuple(tensor.shape) for one, tensor in found.items()} == part.shapes
    except AdapterFileError:
        pass


# What a pool does not serve


@pytest.mark.parametrize("kind", ["LOHA", "IA3", "PROMPT_TUNING", "ADALORA", "OFT"])
def test_other_kinds_of_adapters(kind, tmp_path):
    text = refusal(configure(adapter(tmp_path), peft_type=kind))
    assert kind in text
    assert "rsLoRA and DoRA" in text
    assert "dora_cache.attach" in text


@pytest.mark.parametrize("kind", ["WHATEVER", None, ["LORA"], "lora"])
def test_unknown_kinds_of_adapters(kind, tmp_path):
    text = refusal(configure(adapter(tmp_path), peft_type=kind))
    assert repr(kind) in text
    assert "does not know" in text


REFUSED = {
    "target_parameters": ["layers.0.q.weight"],
    "trainable_token_indices": [1, 2],
    "layer_replication": [[0, 2], [1, 3]],
    "alora_invocation_tokens": [1],
    "use_qalora": True,
    "arrow_config": {"top_k": 2},
    "megatron_config": {"a": 1},
    "kasa_config": {"beta": 1e-4},
    "velora_config": {"num_groups": 2},
    "use_bdlora": {"nblocks": 2},
    "monteclora_config": {"num_samples": 2},
    "a_field_of_the_future": 3,
    "another": "on",
    "a_third": True,
    "a_fourth": 0,
}


@pytest.mark.parametrize("field", REFUSED)
def test_fields_that_are_not_served(field, tmp_path):
    text = refusal(configure(adapter(tmp_path), **{field: REFUSED[field]}))
    assert f"{field} = {REFUSED[field]!r}" in text


def test_every_field_of_peft_is_known_or_refused(tmp_path):
    """Each field of LoraConfig that is neither harmless nor served is refused when it is set."""
    from dora_cache.serving.files import _HARMLESS, _SERVED

    fields = LoraConfig.__dataclass_fields__.keys()
    assert fields - _HARMLESS - _SERVED == {field for field in REFUSED if field in fields}
    assert fields >= _HARMLESS | _SERVED
    off = {"of_the_future": None, "another": False, "a_third": [], "a_fourth": {}}
    agrees(configure(adapter(tmp_path), target_parameters=[], **off))


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "lora_ga"])
def test_initial_values_that_change_the_base(init, tmp_path):
    text = refusal(configure(adapter(tmp_path), init_lora_weights=init))
    assert init in text
    assert "path_initial_model_for_weight_conversion" in text


@pytest.mark.parametrize("init", ["loftq", "new", 1, None, ["gaussian"]])
def test_other_initial_values(init, tmp_path):
    text = refusal(configure(adapter(tmp_path), init_lora_weights=init))
    assert repr(init) in text
    assert "init_lora_weights=True" in text
    assert ("PEFT changes the base model's weights" in text) == (init == "loftq")


def test_a_converted_adapter_is_served(tmp_path):
    """What the error about PiSSA says to do makes an adapter that can be added."""
    base = Net(blocks=1)
    config = LoraConfig(r=2, target_modules=["q"], init_lora_weights="pissa")
    with quiet():
        model = get_peft_model(copy.deepcopy(base), config)
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(tmp_path / "initial")
        model.peft_config["default"].init_lora_weights = "pissa"
        train(model)
        model.save_pretrained(tmp_path / "pissa")
        model.save_pretrained(
            tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
        )
    assert "pissa" in refusal(Made(base, tmp_path / "pissa"))
    assert agrees(Made(base, tmp_path / "plain"))["layers.0.q"].rank == 4


@pytest.mark.parametrize(("fields", "says"), [
    ({"r": 0}, "rank"),
    ({"r": "8"}, "rank"),
    ({"r": True}, "rank"),
    ({"rank_pattern": {"q": 1.5}}, "rank"),
    ({"r": 5}, "(5, 6)"),
    ({"rank_pattern": {"q": 3}}, "(3, 6)"),
    ({"lora_alpha": None}, "lora_alpha"),
    ({"lora_alpha": math.nan}, "lora_alpha"),
    ({"alpha_pattern": {"q": "6"}}, "lora_alpha"),
    ({"alpha_pattern": [1]}, "alpha_pattern"),
    ({"rank_pattern": {"(": 2}}, "pattern"),
    ({"modules_to_save": "head"}, "modules_to_save"),
    ({"modules_to_save": [1]}, "modules_to_save"),
    ({"use_dora": True, "lora_bias": True}, "lora_bias and use_dora"),
    ({"use_dora": True}, "no lora_magnitude_vector for layers.0.q"),
    ({"lora_bias": True}, "no lora_B.bias for layers.0.q"),
], ids=str)  # fmt: skip
def test_configurations_that_do_not_fit(fields, says, tmp_path):
    assert says in refusal(configure(adapter(tmp_path), **fields))


def test_a_null_pattern(tmp_path):
    made = configure(adapter(tmp_path), rank_pattern=None)
    assert open_adapter("one", made.path, made.base).parts[0].rank == 4


def drop(suffix):
    def change(tensors):
        for key in [key for key in tensors if key.endswith(suffix)]:
            del tensors[key]

    return change


def put(key, make):
    return lambda tensors: tensors.update({key: make()})


def cast(dtype):
    return lambda tensors: tensors.update({key: t.to(dtype) for key, t in tensors.items()})


@pytest.mark.parametrize(("change", "says"), [
    (drop("0.q.lora_A.weight"), "no lora_A for layers.0.q"),
    (drop("0.q.lora_B.weight"), "no lora_B for layers.0.q"),
    (drop("magnitude_vector"), "no lora_magnitude_vector for layers.0.q"),
    (drop("weight"), "no lora_A"),
    (lambda tensors: tensors.clear(), "no adapter's weights"),
    (put(f"{Q0}.lora_magnitude_vector.weight", lambda: torch.ones(8)), "it has both"),
    (put(f"{Q0}.lora_B.bias", lambda: torch.ones(8)), "does not have lora_bias"),
    (put(f"{Q0}.lora_C.weight", lambda: torch.ones(8)), "no module 'layers.0.q.lora_C'"),
    (put(f"{Q0}.extra", lambda: torch.ones(8)), "has no extra"),
    (put(f"{Q0}.bias", lambda: torch.ones(8)), f"{Q0}.base_layer.bias"),
    (put(f"{PREFIX}layers.0.v.bias", lambda: torch.ones(10)), "has no bias"),
    (put(f"{Q0}.base_layer.bias", lambda: torch.ones(9)), "(9,), but"),
    (put("layers.0.q.lora_A.weight", lambda: torch.ones(4, 6)), "does not begin with"),
    (rename("0.q.lora_A.weight", "0.q.lora_embedding_A"), "does not serve"),
    (rename("0.q.lora_magnitude_vector", "7.q.lora_magnitude_vector"), "no lora_magnitude_vector"),
    (put(f"{PREFIX}layers.7.q.lora_A.weight", lambda: torch.ones(4, 6)), "no module 'layers.7.q'"),
    (cast(torch.int8), "I8"),
    (cast(torch.float8_e4m3fn), "F8_E4M3"),
    (put(f"{Q0}.lora_B.weight", lambda: torch.ones(8, 3)), "(8, 3), but the model's layers.0.q"),
    (put(f"{Q0}.lora_A.weight", lambda: torch.ones(4)), "(4,), but the model's layers.0.q"),
    (put(f"{PREFIX}lora_A.weight", lambda: torch.ones(4)), "no module 'lora_A'"),
    (put(f"{PREFIX}conv1d.weight", lambda: torch.ones(4)), "(6, 4, 3)"),
    (put(PREFIX, lambda: torch.ones(4)), "neither"),
])  # fmt: skip
def test_tensors_that_do_not_fit(change, says, tmp_path):
    made = adapter(tmp_path, use_dora=True)
    assert says in refusal(rewrite(made, change))


def test_a_magnitude_without_dora(tmp_path):
    made = configure(adapter(tmp_path, use_dora=True), use_dora=False)
    assert "does not have use_dora" in refusal(made)


@pytest.mark.parametrize(("change", "says"), [
    (drop("head.0.bias"), "no head.0.bias"),
    (drop("num_batches_tracked"), "no head.1.num_batches_tracked"),
    (put(f"{PREFIX}head.0.new", lambda: torch.ones(5)), "has no 0.new"),
    (put(f"{PREFIX}head.0.lora_A.weight", lambda: torch.ones(5)), "has no 0.lora_A.weight"),
    (put(f"{PREFIX}head.0.weight", lambda: torch.ones(6, 6)), "(6, 6)"),
    (put(f"{PREFIX}head.1.num_batches_tracked", lambda: torch.tensor(1.0)), "F32"),
    (put(f"{PREFIX}head.0.weight", lambda: torch.ones(5, 6).int()), "I32"),
])  # fmt: skip
def test_saved_modules_that_do_not_fit(change, says, tmp_path):
    made = adapter(tmp_path, modules_to_save=["head"])
    assert says in refusal(rewrite(made, change))


def test_a_missing_saved_module(tmp_path):
    made = configure(adapter(tmp_path), modules_to_save=["head"])
    assert "modules_to_save has head" in refusal(made)


def test_a_model_of_other_shapes(tmp_path):
    made = adapter(tmp_path)
    other = Net()
    other.layers[1].q = nn.Linear(7, 8)
    text = refusal(made, other)
    assert "layers.1.q" in text
    assert "(4, 6)" in text
    assert "(4, 7)" in text


def test_a_model_of_other_names(tmp_path):
    made = adapter(tmp_path, target_modules=["conv3d"])
    other = Net()
    other.conv_3d = other._modules.pop("conv3d")
    text = refusal(made, other)
    assert "no module 'conv3d' (the nearest is 'conv_3d')" in text


def test_another_class_of_layer(tmp_path):
    made = adapter(tmp_path)
    other = Net()
    other.layers[1].q = nn.Embedding(6, 8)
    assert "Embedding" in refusal(made, other)
    other.layers[1].q = nn.Bilinear(6, 6, 8)
    assert "Bilinear, which a pool does not serve" in refusal(made, other)


def test_a_file_without_a_tied_module(tmp_path):
    made = adapter(
        tmp_path, llama(tie_word_embeddings=True), ensure_weight_tying=True,
        target_modules=["embed_tokens", "q_proj"],
    )  # fmt: skip
    rewrite(made, lambda tensors: [tensors.pop(k) for k in list(tensors) if "lm_head" in k])
    assert "lm_head, which shares its weight" in refusal(made)


class Scaled(nn.Embedding):
    def forward(self, x):
        return super().forward(x) * 2


class WithScale(nn.Embedding):
    embed_scale = 2.0


class Other(nn.Conv2d):
    def _conv_forward(self, *args):
        return super()._conv_forward(*args) * 2


UNSERVED = {
    "a scaled embedding": (Scaled(9, 6), "forward or scale of its own"),
    "embed_scale": (WithScale(9, 6), "forward or scale of its own"),
    "max_norm": (nn.Embedding(9, 6, max_norm=1.0), "max_norm"),
    "a convolution of its own": (Other(4, 6, 3), "forward of its own"),
    "dilation": (nn.Conv2d(4, 6, 3, dilation=2), "dilation"),
    "padding": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), "padding_mode"),
    "attention": (nn.MultiheadAttention(8, 2), "MultiheadAttention"),
}


@pytest.mark.parametrize("what", UNSERVED)
def test_layers_that_are_not_served(what, tmp_path):
    layer, says = UNSERVED[what]
    base = Net(blocks=1)
    base.special = layer
    text = refusal(adapter(tmp_path, base, target_modules=["special"]))
    assert says in text
    assert "special" in text


@pytest.mark.parametrize("target", ["out_proj", "linear1"])
def test_layers_whose_weight_another_module_reads(target, tmp_path):
    base = Net(blocks=1)
    base.encoder = nn.TransformerEncoderLayer(8, 2, 16)
    assert "reads that layer's weight" in refusal(adapter(tmp_path, base, target_modules=[target]))
    made = adapter(tmp_path / "bias", base, bias="all")
    assert "reads that layer's weight" in refusal(made)


def test_grouped_convolutions(tmp_path):
    """PEFT's DoRA norm of a grouped convolution is not that of its weight; ranks must fit."""
    base = Net(blocks=1)
    base.grouped = nn.Conv2d(4, 6, 3, groups=2)
    made = adapter(tmp_path / "one", base, target_modules=["grouped"], use_dora=True)
    assert "grouped" in refusal(made)
    made = adapter(tmp_path / "two", base, target_modules=["grouped"])
    assert "no multiple of its 2 groups" in refusal(configure(made, r=3))


def test_a_module_with_two_names(tmp_path):
    """PEFT adapts such a module under one of its names only."""
    base = Net(blocks=1)
    base.again = base.layers[0].q
    for target in ("q", "again"):
        made = adapter(tmp_path / target, Net(blocks=1) if target == "q" else base)
        assert "several names" in refusal(made, base)
    # Under a parent with two names, there is one place that PEFT replaces.
    base = Net(blocks=2)
    base.layers[1] = base.layers[0]
    agrees(adapter(tmp_path / "parent", base))
