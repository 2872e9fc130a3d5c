"""Micro costs: `make bench-micro` times them, every other run only goes through them once."""

from contextlib import ExitStack

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from zoo import quiet

import dora_cache
from dora_cache import cached
from dora_cache.attributes import SLOT
from dora_cache.recipes.entry import EntryCheck

WIDTH, RANK = 768, 8
LAYERS = 224  # of a model of 8 billion parameters
SOME = 32


class Owner(nn.Module):
    """Derives a value from four tensors, decorated and not."""

    def __init__(self):
        super().__init__()
        self.tensors = [torch.randn(16) for _ in range(4)]
        self.value = torch.zeros(16)
        self.eval()

    @cached("value", depends_on=lambda self: self.tensors)
    def decorated(self):
        return self.value

    def plain(self):
        return self.value


class Block(nn.Module):
    """One linear layer, which PEFT can wrap."""

    def __init__(self, width=WIDTH):
        super().__init__()
        self.layer = nn.Linear(width, width, bias=False)

    def forward(self, x):
        return self.layer(x)


def adapted(*, use_dora, width=WIDTH):
    config = LoraConfig(
        r=RANK, target_modules=["layer"], use_dora=use_dora, init_lora_weights=False
    )
    with quiet():
        return get_peft_model(Block(width), config).eval()


@pytest.mark.benchmark(group="method")
@pytest.mark.parametrize("method", ["plain", "decorated"])
def test_unattached_method(benchmark, method):
    """What the decorator costs where no cache is attached."""
    owner = Owner()
    assert benchmark(getattr(owner, method)) is owner.value


@pytest.mark.benchmark(group="method")
@pytest.mark.parametrize("guard", ["version", "content"])
def test_hit(benchmark, guard):
    """A hit, whose freshness is checked by four tensors."""
    owner = Owner()
    with dora_cache.attach(owner, guard=guard) as cache, torch.no_grad():
        owner.decorated()
        assert torch.equal(benchmark(owner.decorated), owner.value)
        assert cache.stats().misses == 1


@pytest.mark.benchmark(group=f"forward {WIDTH} -> {WIDTH}, r={RANK}, one token")
@pytest.mark.parametrize("way", ["no adapter", "LoRA", "PEFT", "peft", "fast"])
def test_forward(benchmark, way):
    """A layer's forward: without an adapter, LoRA, uncached DoRA, and both numerics attached."""
    x = torch.randn(1, 1, WIDTH)
    model = Block() if way == "no adapter" else adapted(use_dora=way != "LoRA")
    layer = model.get_submodule("layer" if way == "no adapter" else "base_model.model.layer")
    with torch.inference_mode():
        if way not in {"peft", "fast"}:
            assert benchmark(layer, x).shape == x.shape
            return
        expected = layer(x)
        with dora_cache.attach(model, numerics=way) as cache:
            layer(x)
            torch.testing.assert_close(benchmark(layer, x), expected)
            assert cache.stats().misses == 1


@pytest.mark.benchmark(group="a layer of 1024 x 1024, written to at every call")
@pytest.mark.parametrize("way", ["PEFT", "tries", "backed off"])
def test_always_missing(benchmark, way):
    """What it costs to store values that are never used again, and to have given that up."""
    model = adapted(use_dora=True, width=1024)
    layer = model.base_model.model.layer
    x = torch.randn(1, 1024)

    def forward():
        layer.lora_magnitude_vector["default"].weight.mul_(1)
        if way == "tries":
            layer.__dict__[SLOT].resting.clear()
        return model(x)

    with torch.no_grad():
        if way == "PEFT":
            assert benchmark(forward).shape == x.shape
            return
        with dora_cache.attach(model) as cache:
            for _ in range(40):
                forward()
            assert torch.equal(benchmark(forward), forward())
            assert cache.stats().hits == 0


@pytest.mark.benchmark(group=f"before a call of compiled code that reads {LAYERS} layers")
@pytest.mark.parametrize("way", ["compiled as a whole", "block by block", "after a write"])
def test_entry(benchmark, way):
    """What it costs to see that nothing has been written to, or to make up for one write."""
    base = nn.Sequential(*[Block(16) for _ in range(LAYERS)])
    config = LoraConfig(r=RANK, target_modules=["layer"], use_dora=True, init_lora_weights=False)
    with quiet():
        model = get_peft_model(base, config).eval()
    layers = [block.layer for block in base]
    with dora_cache.attach(model) as cache, torch.no_grad():
        torch.compile(layers[0], backend="eager", fullgraph=True)(torch.randn(1, 16))
        holders = [layer.__dict__[SLOT].holder for layer in layers]
        entry = EntryCheck()
        for holder in holders:
            with cache._engine.mutex.lock:
                entry.add(holder)
        (traced,) = holders[0].face.key
        weight = layers[-1].lora_magnitude_vector["default"].weight

        def check():
            if way == "block by block":
                return all(holder.face.key[0] == traced for holder in holders)
            if way == "after a write":
                weight.add_(0)
            return entry.check()

        assert benchmark(check)
        (buffer,) = layers[-1].__dict__[SLOT].buffers.values()
        before = buffer.values.clone()
        weight.add_(1)
        assert check()
        assert not torch.equal(buffer.values, before)


@pytest.mark.benchmark(group=f"a call of compiled code of {SOME} layers that computes nothing")
@pytest.mark.parametrize("way", ["LoRA", "peft", "fast"])
def test_compiled_call(benchmark, way):
    """The guards, the check at entry and the collection of inputs, for DoRA in both numerics."""
    base = nn.Sequential(*[Block(16) for _ in range(SOME)])
    config = LoraConfig(
        r=RANK, target_modules=["layer"], use_dora=way != "LoRA", init_lora_weights=False
    )
    with quiet():
        model = get_peft_model(base, config).eval().requires_grad_(requires_grad=False)
    x = torch.randn(1, 16)

    def nothing(_, __):
        return lambda *_: (x,)

    with ExitStack() as stack, torch.no_grad():
        if way != "LoRA":
            cache = stack.enter_context(dora_cache.attach(model, numerics=way))
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=nothing, fullgraph=True)
        compiled(x)
        assert benchmark(compiled, x) is x
        if way != "LoRA":
            holders = [block.layer.__dict__[SLOT].holder for block in base]
            assert all(holder.view is not None and holder.watch.holds() for holder in holders)
            assert cache.stats().nbytes
    torch._dynamo.reset()
