"""Storages that are freed and filled again with their version counters preserved, as FSDP does."""

import contextlib

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import dora_cache
from dora_cache.reasons import Reason

X = torch.ones(3, 16)


def make(layers=2):
    torch.manual_seed(0)
    names = [str(index) for index in range(layers)]
    config = LoraConfig(use_dora=True, r=4, target_modules=names, init_lora_weights=False)
    return get_peft_model(nn.Sequential(*[nn.Linear(16, 16) for _ in names]), config).eval()


def refill(tensor, factor):
    """Do what FSDP2 does between two forwards; most allocators give the same address again."""
    storage, new = tensor.untyped_storage(), tensor.detach() * factor
    size = storage.nbytes()
    storage.resize_(0)
    storage.resize_(size)
    with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(tensor):
        tensor.copy_(new)


def write_preserving(tensor, factor):
    with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(tensor):
        tensor.mul_(factor)


def resize_typed(tensor, factor):
    """Do it by the older interface, which FSDP1 uses."""
    storage, new = tensor._typed_storage(), tensor.detach() * factor
    size = storage._size()
    storage._resize_(0)
    storage._resize_(size)
    tensor.data.copy_(new)


def same_as_uncached(model, cache, x=X):
    with torch.no_grad():
        output = model(x)
        with cache.bypass():
            return torch.equal(output, model(x))


@pytest.mark.parametrize("write", [refill, write_preserving, resize_typed])
@pytest.mark.parametrize("part", ["lora_A", "lora_B", "lora_magnitude_vector", "base_layer"])
def test_a_refilled_storage_is_not_taken_for_what_it_was(write, part):
    """After the first refill what was stored goes, and from then on calls go past the cache."""
    model = make()
    owner = getattr(model.base_model.model[0], part)
    weight = (owner if part == "base_layer" else owner["default"]).weight
    with dora_cache.attach(model) as cache:
        for _ in range(5):
            assert same_as_uncached(model, cache)
            write(weight, 1.5)
        stats = cache.stats()
        assert stats.reasons[Reason.REFILLED.value] == 4
        assert stats.entries == 1  # the other layer's
        assert Reason.REFILLED.value in str(cache.report())


def test_a_new_parameter_is_cached_again():
    """The mark is the storage's, not the layer's."""
    model = make(1)
    layer = model.base_model.model[0]
    with dora_cache.attach(model) as cache:
        refill(layer.lora_B["default"].weight, 2.0)
        same_as_uncached(model, cache)
        assert cache.stats().misses == 0
        old = layer.lora_B["default"].weight
        layer.lora_B["default"].weight = nn.Parameter(old.detach().clone())
        assert same_as_uncached(model, cache)
        assert same_as_uncached(model, cache)
        assert cache.stats().hits == 1


def test_a_refill_while_a_value_is_derived_is_noticed():
    """The value goes to its caller and is not stored."""

    class Owner(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))
            self.during = lambda: None

        @dora_cache.cached("doubled", depends_on=lambda self: [self.weight])
        def doubled(self):
            found = self.weight.detach() * 2
            self.during()
            return found

    owner = Owner().eval()
    with dora_cache.attach(owner) as cache, torch.no_grad():
        owner.during = lambda: refill(owner.weight, 3.0)
        owner.doubled()
        assert cache.stats().entries == 0
        assert cache.stats().reasons[Reason.CHANGED.value] == 1
        owner.during = lambda: None
        assert torch.equal(owner.doubled(), torch.full((4,), 6.0))


def test_detaching_gives_pytorch_its_methods_back():
    """They are followed for as long as any cache is attached."""
    preserving = torch.autograd._unsafe_preserve_version_counter
    before = torch.UntypedStorage.resize_, preserving.__exit__
    first, second = dora_cache.attach(make()), dora_cache.attach(make())
    assert torch.UntypedStorage.resize_ is not before[0]
    first.detach()
    assert torch.UntypedStorage.resize_ is not before[0]
    second.detach()
    assert (torch.UntypedStorage.resize_, preserving.__exit__) == before
    assert "resize_" not in vars(torch.UntypedStorage)


def test_compiled_code_reads_no_buffer_of_refilled_storage():
    """Its buffers are void, so that the values are derived in the graph."""
    torch._dynamo.reset()
    model, plain = make(), make()
    with dora_cache.attach(model), torch.no_grad():
        compiled = torch.compile(model, backend="eager")
        for _ in range(3):
            with contextlib.suppress(dora_cache.CacheWarning):
                assert torch.equal(compiled(X), plain(X))
            for one in (model, plain):
                refill(one.base_model.model[0].lora_B["default"].weight, 1.5)
    torch._dynamo.reset()
