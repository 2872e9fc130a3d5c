"""Tiny float64 models, adapters of many kinds for them, and what plain PEFT makes of each alone."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
from zoo import quiet

from dora_cache.lab.models import twin

VOCABULARY = 23
WEIGHTS = "adapter_model.safetensors"


class Block(nn.Module):
    """Two linear layers, one of them without a bias, around something that is not linear."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8, bias=False)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    """Tokens (rows, length) to (rows, length, 5). A flat batch (tokens,) has no neighbours."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.body = nn.ModuleDict({"layers": nn.ModuleList([Block(), Block()])})
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 5)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.body["layers"]:
            x = layer(x)
        if ids.dim() > 1:
            image = x.unflatten(-1, (2, 4)).transpose(1, 2)  # (rows, 2, length, 4)
            x = x + torch.tanh(self.conv(image)).transpose(1, 2).flatten(-2)
        return self.head(self.norm(x))


def _llama_config(**more):
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        attention_bias=True,
        attn_implementation="sdpa",
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        **more,
    )


def _made(make, seed=0, *, dtype=torch.float64):
    """Return a model in eval mode whose parameters are all random."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make().to(dtype).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.4)
    return model.requires_grad_(requires_grad=False)


def net():
    return _made(Net)


def language_model():
    return _made(lambda: LlamaForCausalLM(_llama_config()))


def classifier():
    return _made(lambda: LlamaForSequenceClassification(_llama_config(num_labels=3)))


# Seven kinds for each model: settings of LoraConfig.
NET_KINDS = {
    "lora": {"target_modules": ["up", "down", "head"], "r": 4},
    "rslora": {"target_modules": ["up", "down"], "r": 3, "use_rslora": True},
    "dora": {"target_modules": ["up", "down", "head"], "r": 4, "use_dora": True},
    "patterns": {
        "target_modules": ["up", "down", "conv"],
        "r": 2,
        "use_dora": True,
        "rank_pattern": {"up": 7, "layers.1.down": 1},
        "alpha_pattern": {"down": 9.0},
    },
    "biases": {
        "target_modules": ["up", "down", "conv"],
        "r": 3,
        "use_dora": True,
        "bias": "lora_only",
    },
    "embedding": {"target_modules": ["embed", "up", "conv"], "r": 5, "use_dora": True},
    "layers": {
        "target_modules": ["up", "down"],
        "r": 6,
        "use_dora": True,
        "layers_to_transform": [1],
    },
}
# What the seven leave out.
MORE_NET_KINDS = {
    "lora_bias": {"target_modules": ["up", "head", "conv"], "r": 2, "lora_bias": True},
    "all biases": {"target_modules": ["up", "down"], "r": 2, "use_dora": True, "bias": "all"},
    "lora biases": {"target_modules": ["up", "conv"], "r": 2, "bias": "lora_only"},
    "embedding lora": {"target_modules": ["embed", "conv", "head"], "r": 2},
    "a whole layer": {"target_modules": ["up"], "r": 2, "modules_to_save": ["head"]},
    "a whole embedding": {"target_modules": ["down"], "r": 2, "modules_to_save": ["embed"]},
    "regular expression": {
        "target_modules": r"body\.layers\.0\.(up|down)",
        "r": 2,
        "use_dora": True,
    },
    "all linear": {"target_modules": "all-linear", "r": 2, "use_dora": True},
    "excluded": {"target_modules": ["up", "down"], "exclude_modules": ["body.layers.0.up"], "r": 2},
}
LLAMA_KINDS = {
    "lora": {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 4},
    "rslora": {"target_modules": ["k_proj", "o_proj", "gate_proj"], "r": 3, "use_rslora": True},
    "dora": {"target_modules": "all-linear", "r": 4, "use_dora": True},
    "patterns": {
        "target_modules": ["q_proj", "up_proj"],
        "r": 2,
        "use_dora": True,
        "rank_pattern": {"q_proj": 7, "layers.1.mlp.up_proj": 1},
        "alpha_pattern": {"up_proj": 9.0},
    },
    "biases": {
        "target_modules": ["q_proj", "o_proj", "up_proj"],
        "r": 3,
        "use_dora": True,
        "bias": "all",
    },
    "embedding": {
        "target_modules": ["embed_tokens", "v_proj", "lm_head"],
        "r": 5,
        "use_dora": True,
    },
    "layers": {
        "target_modules": ["q_proj", "down_proj"],
        "r": 6,
        "use_dora": True,
        "layers_to_transform": [1],
    },
}
CLASSIFIER_KINDS = {
    "first": {"target_modules": ["q_proj", "v_proj"], "r": 3, "task_type": "SEQ_CLS"},
    "second": {
        "target_modules": ["k_proj", "up_proj"],
        "r": 4,
        "use_dora": True,
        "modules_to_save": ["score"],
    },
}


def save(base, path, *, seed=0, **settings):
    """Save an adapter for ``base`` with random weights to a folder, and return that.

    Nothing of it is at its initial value: B is not zero, the magnitudes are not the norms, the
    biases not the base layer's. ``base`` stays as it is.
    """
    copy_of = twin_with_biases(base)
    config = LoraConfig(lora_alpha=6, init_lora_weights=False, **settings)
    with quiet(), torch.random.fork_rng():
        torch.manual_seed(seed)
        model = get_peft_model(copy_of, config)
        own = {id(one) for one in base.parameters()}
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if id(parameter) in own:
                    continue
                noise = torch.randn_like(parameter)
                if "magnitude" in name:
                    parameter.mul_(1 + 0.5 * noise)
                else:
                    parameter.copy_(0.4 * noise)
        model.save_pretrained(path)
    return Path(path)


def twin_with_biases(base):
    """Return a model that shares all parameters with ``base`` but the biases, which it owns."""
    found = twin(base)
    for module in found.modules():
        bias = module._parameters.get("bias")
        if bias is not None:
            module._parameters["bias"] = nn.Parameter(
                bias.detach().clone(), requires_grad=bias.requires_grad
            )
    return found


def alone(base, path):
    """Return ``base`` with the adapter of a folder, in plain PEFT; ``base`` itself if it is None.

    A later write to a weight of ``base`` concerns both, but not to a bias if the adapter has any.
    """
    if path is None:
        return base
    with (Path(path) / "adapter_config.json").open() as file:
        own_biases = json.load(file)["bias"] != "none"
    with quiet():
        model = PeftModel.from_pretrained(
            twin_with_biases(base) if own_biases else twin(base), path
        )
    return model.eval()


def tokens(rows, length=6, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (rows, length), generator=generator)


def output(model, ids):
    """Return what a model makes of tokens: for those of Transformers the logits."""
    found = model(ids) if isinstance(ids, torch.Tensor) else model(**ids)
    return getattr(found, "logits", found)


def error(found, expected):
    """Return the largest difference, relative to the largest number that is expected."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    assert found.dtype is expected.dtype
    assert found.isfinite().all()
    return float((found - expected).abs().max() / expected.abs().max())


def state_of(model):
    """What a pool must leave as it was: classes, and the names of all there is on a module."""
    return {
        name: (
            type(module),
            sorted(vars(module)),
            [list(vars(module)[key]) for key in ("_parameters", "_buffers", "_modules")],
            [len(value) for key, value in sorted(vars(module).items()) if key.endswith("_hooks")],
        )
        for name, module in model.named_modules()
    }


def objects_of(model):
    """The identities of a model's parameters, buffers, modules, and other attributes."""
    return {
        name: [
            {key: id(value) for key, value in part.items() if not key.startswith("_")}
            for part in (vars(module), module._parameters, module._buffers, module._modules)
        ]
        for name, module in model.named_modules()
    }


def assert_rows(found, expected, *, within=1e-9):
    """Each row is the one expected."""
    assert len(found) == len(expected)
    errors = [error(row, other) for row, other in zip(found, expected, strict=True)]
    assert max(errors) <= within, errors


class Folders:
    """Adapters' folders of a model by their kind, each made once."""

    def __init__(self, base, kinds, root):
        self.base = base
        self.kinds = kinds
        self.root = Path(root)
        self.made = {}
        self.oracle = Oracle(base)

    def __getitem__(self, kind):
        return self.get(kind)

    def get(self, kind, seed=0):
        """Return the folder of a kind with the weights of a seed; None for None."""
        if kind is None:
            return None
        if (kind, seed) not in self.made:
            path = self.root / f"{kind.replace(' ', '_')}-{seed}"
            self.made[kind, seed] = save(self.base, path, seed=seed + 1, **self.kinds[kind])
        return self.made[kind, seed]

    def copied(self, kind, path, seed=0):
        """Return a copy of a folder that the caller may spoil."""
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(path)
        return Path(shutil.copytree(self.get(kind, seed), path))


class Oracle:
    """What plain PEFT makes of each row alone, with its adapter alone."""

    def __init__(self, base):
        self.base = base
        self.models = {}

    def model(self, path):
        if path not in self.models:
            self.models[path] = alone(self.base, path)
        return self.models[path]

    def rows(self, paths, ids):
        """Return the outputs for rows (rows, ...) of tokens and as many folders or None."""
        with torch.no_grad():
            return [
                output(self.model(path), ids[index : index + 1])[0]
                for index, path in enumerate(paths)
            ]
