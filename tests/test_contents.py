"""Hashes of contents: equal exactly for equal contents, on the host and elsewhere."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model
from torch import nn
from zoo import Block, dora_config, loha_config, oft_config, quiet, run, sample

import dora_cache
from dora_cache.core.contents import Contents, _sums

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.uint8, torch.bool, torch.complex64]


def on_device(tensor):
    """What is computed where there is no host's hash; the operations run on any device."""
    return _sums(tensor.contiguous().view(-1).view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [0, 1, 3, 7, 1000])
def test_each_element_and_its_place_count(dtype, size):
    """One element changed, or two exchanged, is another content."""
    tensor = torch.randint(0, 2, (size,)).to(dtype)
    before, there = Contents([tensor]), on_device(tensor)
    assert before == Contents([tensor.clone()])
    assert torch.equal(there, on_device(tensor.clone()))
    for index in {0, size // 2, size - 1} if size else ():
        changed = tensor.clone()
        changed[index] = (tensor[index] == 0).to(dtype)
        assert before != Contents([changed])
        assert not torch.equal(there, on_device(changed))


@given(values=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=2, max_size=40), data=st.data())
def test_exchanged_elements_are_seen(values, data):
    """Position-sensitive, with whatever values."""
    one, two = data.draw(st.permutations(range(len(values))))[:2]
    tensor = torch.tensor(values, dtype=torch.int32)
    changed = tensor.clone()
    changed[one], changed[two] = tensor[two], tensor[one]
    same = torch.equal(tensor, changed)
    assert (Contents([tensor]) == Contents([changed])) == same
    assert torch.equal(on_device(tensor), on_device(changed)) == same


def test_blocks_have_their_places(monkeypatch):
    """Whole blocks exchanged are seen, and so is a change in the last, shorter one."""
    monkeypatch.setattr("dora_cache.core.contents._WORDS_AT_ONCE", 8)
    tensor = torch.randn(29)
    changed = [
        tensor,
        torch.cat([tensor[8:16], tensor[:8], tensor[16:]]),
        torch.cat([tensor[:28], tensor[28:] + 1]),
        torch.cat([tensor, torch.zeros(1)]),
    ]
    assert len({tuple(on_device(one).tolist()) for one in changed}) == 4


def test_layouts_do_not_matter_but_order_does():
    """Contents are compared as they are indexed, not as they lie in memory."""
    tensor = torch.randn(4, 6)
    assert Contents([tensor.T.contiguous().T]) == Contents([tensor])
    assert Contents([tensor, -tensor]) != Contents([-tensor, tensor])
    assert Contents([tensor]) != Contents([tensor, tensor])


def test_hashing_leaves_storages_resizable():
    """What was hashed can be resized as before, as FSDP does with weights."""
    whole = torch.randn(8, 6)
    for tensor in (
        whole,
        whole.T,
        whole[2:, 1:],
        nn.Parameter(whole),
        whole[:0],
        whole.to(torch.cfloat),
    ):
        Contents([tensor])
        assert tensor.untyped_storage().resizable()


@pytest.mark.parametrize("left", [0, 100])
def test_freed_memory_is_not_read(left):
    """A tensor whose storage was shrunk differs from what it was, until it is filled again."""
    tensor, other = torch.randn(64, 64), torch.randn(3)
    parts = [tensor, tensor[1:], tensor.T, tensor[:, 60:], other]
    values, before = tensor.clone(), Contents(parts)
    tensor.untyped_storage().resize_(left)
    freed = Contents(parts)
    assert freed != before
    assert freed == Contents(parts)
    assert freed != Contents([*parts[:-1], other + 1])
    tensor.untyped_storage().resize_(values.untyped_storage().nbytes())
    tensor.copy_(values)
    assert Contents(parts) == before


@pytest.mark.parametrize("guard", ["content", "version"])
@pytest.mark.parametrize("make", [dora_config, loha_config, oft_config])
def test_an_attached_model_keeps_resizable_storages(make, guard):
    """While a cache is attached, and after it is detached, weights can be freed and refilled."""
    with quiet():
        model = get_peft_model(Block(nn.Linear(12, 8)), make(), adapter_name="first").eval()
    x = sample("linear")

    def free_and_refill():
        for parameter in model.parameters():
            storage, values = parameter.untyped_storage(), parameter.detach().clone()
            assert storage.resizable()
            size = storage.nbytes()
            storage.resize_(0)
            storage.resize_(size)
            with torch.no_grad():
                parameter.copy_(values)

    expected = run(model, x)
    with dora_cache.attach(model, guard=guard) as cache:
        for _ in range(3):
            assert torch.equal(run(model, x), expected)
        assert cache.stats().hits
        free_and_refill()
        assert torch.equal(run(model, x), expected)
    free_and_refill()
    assert torch.equal(run(model, x), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_a_gpu_nothing_waits_until_contents_are_compared():
    """Hashing enqueues work only; comparing gives the answer."""
    tensor = torch.randn(3000, 1000, device="cuda")
    changed = tensor.clone()
    changed[-1, -1] += 1
    Contents([tensor])  # the coefficients are there from now on
    with quiet():  # it warns that it is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        first, second, third = (Contents([t]) for t in (tensor, tensor.clone(), changed))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert first == second
    assert first != third
    assert torch.equal(_sums(tensor.view(-1).view(torch.uint8)).cpu(), on_device(tensor.cpu()))
