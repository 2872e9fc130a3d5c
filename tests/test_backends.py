"""What the conformance machine cannot show of the built-in backends and what they store."""

import gc

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from dora_cache.backends import (
    Backend,
    CPUBackend,
    DictBackend,
    Entry,
    Ledger,
    LRUBackend,
    NullBackend,
    Ready,
    storage_bytes,
)
from dora_cache.errors import ConfigError

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def entry_of(nbytes, **fields):
    return Entry(torch.zeros(nbytes, dtype=torch.uint8), **fields)


def test_ledger_counts_a_storage_once_until_its_last_use_goes():
    """A storage counts from its first use on, once, and whole, until nobody uses it any more."""
    whole, other, ledger = torch.zeros(100), torch.zeros(10), Ledger()
    first, second = (whole[:1],), (whole[5:], other)
    ledger.add(first)
    assert ledger.nbytes == 400
    ledger.add(second)
    assert ledger.nbytes == 440
    ledger.remove(first)
    assert ledger.nbytes == 440
    ledger.remove(second)
    assert ledger.nbytes == 0


def test_ledger_counts_two_views_in_one_addition_as_one_use():
    """A tuple of two views of one storage goes as it came: in one removal."""
    whole, ledger = torch.zeros(100), Ledger()
    ledger.add((whole[:1], whole[1:]))
    ledger.add((whole,))
    ledger.remove((whole[:1], whole[1:]))
    assert ledger.nbytes == 400
    ledger.clear()
    assert ledger.nbytes == 0


def test_ledger_keeps_no_tensor_alive():
    """The ledger counts; what is counted may go."""
    ledger, tensor = Ledger(), torch.zeros(10)
    storage = StorageWeakRef(tensor.untyped_storage())
    ledger.add((tensor,))
    del tensor
    assert storage.expired()


@pytest.mark.parametrize(
    ("tensors", "nbytes"),
    [
        ((), 0),
        ((torch.zeros(0),), 0),
        ((torch.zeros(10, dtype=torch.bfloat16),), 20),
        ((torch.zeros(10)[:0],), 40),
        ((torch.zeros(1).expand(1000),), 4),
        ((torch.zeros(10), torch.zeros(10)), 80),
        ((torch.zeros(4).view(2, 2).t(),), 16),
    ],
    ids=["nothing", "no elements", "bfloat16", "empty view", "expanded", "two", "transposed"],
)
def test_bytes_are_those_of_storages(tensors, nbytes):
    """What a tensor keeps alive counts, not what it shows."""
    assert storage_bytes(tensors) == nbytes


def test_entry_counts_views_of_one_storage_once():
    """The size of a tuple of views is that of the storage under them."""
    whole = torch.zeros(100)
    assert Entry((whole[:3], whole[3:])).nbytes == 400
    assert Entry(whole[:3]).tensors[0].shape == (3,)


@pytest.mark.parametrize(
    "write",
    [
        lambda tensor: tensor.add_(1),
        lambda tensor: tensor[:1].zero_(),
        lambda tensor: tensor.detach().mul_(2),
        lambda tensor: tensor.copy_(torch.ones(4)),
        lambda tensor: tensor.resize_(2),
    ],
    ids=["add_", "through a view", "through detach", "copy_", "resize_"],
)
def test_entry_notices_a_write_into_its_tensors(write):
    """An entry somebody has written into is no longer intact, whichever tensor it was."""
    value = (torch.zeros(4), torch.zeros(4))
    entry = Entry(value)
    assert entry.intact
    write(value[1])
    assert not entry.intact


def test_entry_starts_from_tensors_that_were_written_before():
    """Writes count from the making of the entry on, and reads never do."""
    tensor = torch.zeros(4).add_(1).mul_(2)
    entry = Entry(tensor)
    assert torch.equal(tensor + 1, torch.full((4,), 3.0))
    assert entry.intact


def test_lru_evicts_what_was_used_longest_ago():
    """A read counts as a use: the entry not read goes first."""
    backend = LRUBackend(max_bytes=30)
    for key in "abc":
        assert backend.put(key, entry_of(10))
    assert backend.get("a") is not None
    assert backend.put("d", entry_of(10))
    assert set(backend.keys()) == {"a", "c", "d"}
    assert backend.put("e", entry_of(20))
    assert set(backend.keys()) == {"d", "e"}


def test_lru_evicts_no_more_than_it_must():
    """A value that fits beside the newest entries leaves them there."""
    backend = LRUBackend(max_bytes=30)
    for key, nbytes in (("a", 5), ("b", 5), ("c", 20)):
        assert backend.put(key, entry_of(nbytes))
    assert backend.put("d", entry_of(4))
    assert set(backend.keys()) == {"b", "c", "d"}


def test_lru_takes_a_value_of_exactly_its_cap():
    """The cap itself still fits; one byte more does not, and evicts nothing else."""
    backend = LRUBackend(max_bytes=10)
    assert backend.put("a", entry_of(10))
    assert not backend.put("b", entry_of(11))
    assert list(backend.keys()) == ["a"]


def test_lru_replaces_an_entry_by_one_that_only_fits_without_it():
    """The older value makes room for the newer one under its key before any other has to."""
    backend = LRUBackend(max_bytes=30)
    assert backend.put("a", entry_of(10))
    assert backend.put("b", entry_of(20))
    assert backend.put("b", entry_of(20))
    assert set(backend.keys()) == {"a", "b"}
    assert not backend.put("b", entry_of(31))
    assert list(backend.keys()) == ["a"]


def test_lru_counts_shared_storage_twice_towards_its_cap():
    """Eviction is decided by the sum of sizes; what is really held can only be less."""
    backend, shared = LRUBackend(max_bytes=30), torch.zeros(15, dtype=torch.uint8)
    assert backend.put("a", Entry(shared))
    assert backend.put("b", Entry(shared[:1]))
    assert backend.nbytes == 15
    assert backend.put("c", entry_of(1))
    assert set(backend.keys()) == {"b", "c"}
    assert backend.nbytes == 16


@pytest.mark.parametrize("make", [LRUBackend, CPUBackend])
def test_negative_cap_is_refused(make):
    """A cap below zero is a mistake, and the message says what to give."""
    with pytest.raises(ConfigError, match="max_bytes is -1: give a size of zero bytes or more"):
        make(max_bytes=-1)


@pytest.mark.parametrize(
    "backend",
    [
        DictBackend(),
        LRUBackend(10),
        NullBackend(),
        CPUBackend(),
        CPUBackend(max_bytes=10, device_bytes=10),
    ],
    ids=["dict", "lru", "null", "cpu", "tiered cpu"],
)
def test_backends_satisfy_the_protocol(backend):
    """Every built-in backend is a Backend, and empty at first."""
    assert isinstance(backend, Backend)
    assert (len(backend), backend.nbytes, list(backend.keys())) == (0, 0, [])


@pytest.mark.parametrize(
    ("host", "device", "cap"), [(None, None, None), (None, 5, None), (10, None, 10), (10, 5, 15)]
)
def test_cap_of_the_cpu_backend_covers_both_tiers(host, device, cap):
    """max_bytes says how much both tiers may hold together, if the host's is bounded."""
    assert CPUBackend(max_bytes=host, device_bytes=device).max_bytes == cap


def test_cpu_backend_keeps_values_of_the_cpu_in_one_tier():
    """A value on the CPU is held once, as it is, and takes nothing from the device's tier."""
    backend, entry = CPUBackend(device_bytes=100), entry_of(10)
    assert backend.put("a", entry)
    assert backend.get("a") is entry
    assert (backend.nbytes, backend.device_nbytes) == (10, 0)


@pytest.mark.parametrize("backend", [CPUBackend(), CPUBackend(100), CPUBackend(100, 100)])
def test_cpu_backend_frees_what_it_drops(backend):
    """Deleted and replaced values are freed at once, from every tier."""
    storages = []
    for key in "aab":
        tensor = torch.zeros(10)
        storages.append(StorageWeakRef(tensor.untyped_storage()))
        backend.put(key, Entry(tensor))
        del tensor
    assert [storage.expired() for storage in storages] == [True, False, False]
    backend.delete("a")
    backend.close()
    assert all(storage.expired() for storage in storages)


def test_nothing_on_the_cpu_needs_waiting_for():
    """Readiness is CUDA's affair: values elsewhere have none."""
    assert Ready.now((torch.zeros(1),)) is None


def cuda_entry(*sizes, **fields):
    tensors = tuple(torch.randn(size, device="cuda") for size in sizes)
    return Entry(tensors if len(sizes) > 1 else tensors[0], ready=Ready.now(tensors), **fields)


@needs_cuda
def test_cuda_values_wait_in_pinned_memory():
    """Host copies are pinned, count as host bytes, and leave no bytes on the device."""
    backend, entry = CPUBackend(), cuda_entry(1000)
    assert backend.put("a", entry)
    (stored,) = backend._host.get("a").tensors
    assert stored.is_pinned()
    assert (backend.nbytes, backend.device_nbytes) == (4000, 0)
    device = StorageWeakRef(entry.tensors[0].untyped_storage())
    del entry
    gc.collect()
    assert device.expired()


@needs_cuda
@pytest.mark.parametrize("device_bytes", [None, 1 << 20])
def test_cuda_values_come_back_where_they_were(device_bytes):
    """What get returns is on the original device, equal in contents, stamp, cost and strides."""
    backend, stamp = CPUBackend(device_bytes=device_bytes), object()
    value = (
        torch.randn(30, 40, device="cuda").t(),
        torch.randn(7, device="cuda").to(torch.bfloat16),
        torch.randn(100, device="cuda")[10:20],
    )
    assert backend.put("a", Entry(value, stamp=stamp, cost=2.0, ready=Ready.now(value)))
    for _ in range(2):
        found = backend.get("a")
        found.ready.join(found.tensors)
        assert found.stamp is stamp
        assert found.cost == 2.0
        assert isinstance(found.value, tuple)
        for got, expected in zip(found.tensors, value, strict=True):
            assert got.device == expected.device
            assert got.stride() == expected.stride()
            assert torch.equal(got, expected)


@needs_cuda
def test_cuda_hot_tier_stays_within_its_bytes():
    """What the device has no room for comes back from the host, through copies that count too."""
    backend = CPUBackend(device_bytes=10_000)
    entries = {key: cuda_entry(1000) for key in "abcdef"}
    for key, entry in entries.items():
        assert backend.put(key, entry)
        assert backend.device_nbytes <= 10_000
    for _ in range(4):
        for key, entry in entries.items():
            found = backend.get(key)
            found.ready.join(found.tensors)
            assert torch.equal(found.value, entry.value)
            assert backend.device_nbytes <= 10_000
    assert len(backend) == 6
    assert backend.prefetched > 0


@needs_cuda
def test_cuda_value_above_the_hot_tier_waits_on_the_host_only():
    """A value too large for the device's tier is kept all the same, on the host."""
    backend, entry = CPUBackend(device_bytes=1000), cuda_entry(1000)
    assert backend.put("a", entry)
    assert (backend.nbytes, backend.device_nbytes) == (4000, 0)
    assert torch.equal(backend.get("a").value, entry.value)


@needs_cuda
def test_cuda_values_that_no_tier_has_room_for():
    """Under a cap of the host, too, whatever is held is whole, and what is not is a miss."""
    backend = CPUBackend(max_bytes=8000, device_bytes=4000)
    entries = {key: cuda_entry(1000) for key in "abcdef"}
    for key, entry in entries.items():
        backend.put(key, entry)
    for _ in range(3):
        for key, entry in entries.items():
            found = backend.get(key)
            assert (found is None) == (key not in backend.keys())
            if found is not None:
                found.ready.join(found.tensors)
                assert torch.equal(found.value, entry.value)
            assert backend.nbytes <= backend.max_bytes
    backend.clear()
    assert backend.nbytes == 0


@needs_cuda
def test_cuda_value_is_right_on_a_stream_that_joins():
    """A reader on another stream that joins sees the value that a slow writer is still making."""
    source = torch.randn(1 << 20, device="cuda")
    torch.cuda.synchronize()
    writer, reader = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(writer):
        torch.cuda._sleep(200_000_000)
        value = source * 2
        entry = Entry(value, ready=Ready.now((value,)))
    with torch.cuda.stream(reader):
        entry.ready.join(entry.tensors)
        seen = value + 0
    reader.synchronize()
    assert torch.equal(seen, source * 2)


@needs_cuda
def test_cuda_value_fetched_on_one_stream_is_right_on_another():
    """A copy from the host that one stream has begun may be read on any stream that joins."""
    backend = CPUBackend(device_bytes=1 << 26)
    expected = torch.randn(1 << 22, device="cuda")
    assert backend.put("a", Entry(expected.clone()))
    backend._device.resize(0)  # to the host
    backend._device.resize(1 << 26)
    torch.cuda.synchronize()
    fetcher, reader = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(fetcher):
        torch.cuda._sleep(200_000_000)
        assert backend.get("a") is not None
    with torch.cuda.stream(reader):
        found = backend.get("a")
        found.ready.join(found.tensors)
        seen = found.value + 0
    reader.synchronize()
    assert torch.equal(seen, expected)


@needs_cuda
def test_cuda_memory_is_not_reused_while_another_stream_reads_it():
    """Joining tells the allocator of the reader, so an eviction cannot pull the value away."""
    entry = Entry(torch.ones(1 << 20, device="cuda"))
    entry = Entry(entry.value, ready=Ready.now(entry.tensors))
    torch.cuda.synchronize()
    reader = torch.cuda.Stream()
    with torch.cuda.stream(reader):
        entry.ready.join(entry.tensors)
        torch.cuda._sleep(200_000_000)
        seen = entry.value + 0
    del entry
    overwritten = torch.zeros(1 << 20, device="cuda")
    reader.synchronize()
    assert torch.equal(seen, torch.ones_like(seen))
    assert not overwritten.any()
