"""Small real PEFT models, one for each kind of layer, and how to run them."""

from __future__ import annotations

import contextlib
import warnings
from dataclasses import dataclass

import torch
from peft import LoHaConfig, LoraConfig, OFTConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D


class Block(nn.Module):
    """One layer by the name of ``layer``, and something after it that is not linear."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return torch.tanh(self.layer(x))


@dataclass(frozen=True)
class Kind:
    make: object
    sample: object
    fan_in_fan_out: bool = False


def _values(*shape):
    return lambda dtype: torch.randn(*shape).to(dtype)


KINDS = {
    "linear": Kind(lambda bias: nn.Linear(12, 8, bias=bias), _values(3, 5, 12)),
    "conv1d_transformers": Kind(lambda bias: Conv1D(8, 12), _values(3, 5, 12), fan_in_fan_out=True),
    "embedding": Kind(lambda bias: nn.Embedding(17, 8), lambda dtype: torch.randint(0, 17, (3, 5))),
    "conv1d": Kind(lambda bias: nn.Conv1d(4, 6, 3, padding=1, bias=bias), _values(2, 4, 9)),
    "conv2d": Kind(lambda bias: nn.Conv2d(4, 6, 3, stride=2, bias=bias), _values(2, 4, 7, 7)),
    "conv3d": Kind(lambda bias: nn.Conv3d(2, 4, 2, bias=bias), _values(1, 2, 4, 4, 4)),
}


# Embeddings have no bias, and Conv1D always has one.
CASES = [
    (kind, bias)
    for kind in KINDS
    for bias in ([True] if kind in {"embedding", "conv1d_transformers"} else [True, False])
]


def dora_config(kind="linear", *, r=4, alpha=6, use_dora=True, **more):
    return LoraConfig(
        use_dora=use_dora,
        r=r,
        lora_alpha=alpha,
        target_modules=["layer"],
        init_lora_weights=False,
        fan_in_fan_out=KINDS[kind].fan_in_fan_out,
        **more,
    )


def loha_config(*, targets=("layer",)):
    return LoHaConfig(r=4, alpha=6, target_modules=list(targets), init_weights=False)


def oft_config(*, targets=("layer",), **more):
    settings = {"oft_block_size": 4, "r": 0, "init_weights": False} | more
    return OFTConfig(target_modules=list(targets), **settings)


def shake(model, scale=0.1):
    """Move every parameter a little, so that no value keeps its initial special case."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.mul_((1 + scale * noise).to(parameter))


def dora_model(kind="linear", *, bias=True, dtype=torch.float32, adapters=("first",), **more):
    """Return a PEFT model with DoRA adapters on one layer, in eval mode."""
    base = Block(KINDS[kind].make(bias)).to(dtype)
    cast = more.pop("autocast_adapter_dtype", True)
    configs = [
        dora_config(kind, r=4 + index, alpha=6 + 3 * index, **more)
        for index in range(len(adapters))
    ]
    with quiet():
        model = get_peft_model(
            base, configs[0], adapter_name=adapters[0], autocast_adapter_dtype=cast
        )
        for name, config in zip(adapters[1:], configs[1:], strict=True):
            model.add_adapter(name, config, autocast_adapter_dtype=cast)
    shake(model)
    return model.eval()


def sample(kind, dtype=torch.float32):
    return KINDS[kind].sample(dtype)


@contextlib.contextmanager
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def activate(model, *adapters):
    """Make adapters the active ones, in this order."""
    model.base_model.set_adapter(list(adapters))


def balanced(cache):
    """Return the statistics, whose counters must agree with what the backend holds."""
    stats = cache.stats()
    gone = stats.evictions + stats.invalidations + stats.replacements
    backend = cache._engine.memory.backend
    held = len(set(backend.keys()))
    assert stats.stores - gone == held == stats.entries == len(backend)
    assert sum(row.entries for row in cache.report().rows) == held
    return stats


def run(model, x):
    with torch.no_grad():
        return model(x)
