"""The cap is a cap: bytes held never exceed it, and outputs do not depend on it."""

import pytest
import torch
from torch import nn
from zoo import balanced, dora_config, quiet

import dora_cache


class Stack(nn.Module):
    """Several layers of different sizes, visited in a cycle as in any model."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(16, 24)
        self.second = nn.Linear(24, 8)
        self.third = nn.Linear(8, 32)

    def forward(self, x):
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))


@pytest.fixture
def model():
    from peft import get_peft_model

    config = dora_config()
    config.target_modules = {"first", "second", "third"}
    with quiet():
        model = get_peft_model(Stack(), config, adapter_name="one")
        model.add_adapter("two", config)
    return model.eval()


WORKING_SET = 2 * (24 + 8 + 32) * 4


def serve(model, cache):
    """Run both adapters in turn, watching the bytes after every layer; return the outputs."""
    outputs = []

    def watch(*_):
        if cache is not None:
            stats = cache.stats()
            assert stats.nbytes <= stats.max_bytes

    layers = [m for n, m in model.named_modules() if n.endswith(("first", "second", "third"))]
    handles = [layer.register_forward_hook(watch) for layer in layers]
    torch.manual_seed(1)
    with torch.no_grad():
        for step in range(12):
            model.base_model.set_adapter(["one", "two"][step // 2 % 2])
            outputs.append(model(torch.randn(2, 16)))
    for handle in handles:
        handle.remove()
    return outputs


@pytest.mark.parametrize("backend", ["lru", "cpu"])
@pytest.mark.parametrize("cap", [WORKING_SET, WORKING_SET // 2, WORKING_SET // 10, 20, 0])
def test_bytes_never_exceed_the_cap(model, backend, cap):
    """At 100 %, 50 % and 10 % of the working set, and below any entry, outputs are equal."""
    expected = serve(model, None)
    with dora_cache.attach(model, backend=backend, max_bytes=cap) as cache:
        found = serve(model, cache)
        stats = balanced(cache)
    assert all(map(torch.equal, found, expected))
    assert stats.max_bytes == cap
    if cap == WORKING_SET:
        assert stats.nbytes == WORKING_SET
        assert stats.misses == stats.entries == 6
    elif cap < 32:
        assert stats.stores == stats.nbytes == 0
        assert stats.rejections == stats.misses
    else:
        assert stats.evictions > 0
        assert 0 < stats.nbytes <= cap


def test_a_share_of_the_free_memory_is_a_cap(model):
    """max_bytes="1%" is resolved to bytes at attach."""
    with dora_cache.attach(model, backend="lru", max_bytes="1%") as cache:
        assert cache.stats().max_bytes > 2**20


def test_an_oversize_value_takes_its_older_entry_along():
    """When a value outgrows the cap it is returned, not stored, and its older entry is dropped."""

    class Growing(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4), requires_grad=False)
            self.eval()

        @dora_cache.cached("double", depends_on=lambda self: [self.weight])
        def double(self):
            return self.weight * 2

    owner = Growing()
    with dora_cache.attach(owner, backend="lru", max_bytes=16) as cache:
        owner.double()
        assert cache.stats().nbytes == 16
        owner.weight.data = torch.ones(5)
        assert owner.double().shape == (5,)
        stats = balanced(cache)
    assert stats.entries == stats.nbytes == 0
    assert stats.rejections == 1
    assert stats.invalidations == 1
