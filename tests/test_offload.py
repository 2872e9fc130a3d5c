"""The cpu backend's two tiers and its copies ahead, with a device that is only pretended.

What CUDA does with the copies is in test_cuda.py.
"""

import dataclasses
import threading

import pytest
import torch
from hypothesis.stateful import run_state_machine_as_test
from pretended import Pretended

from dora_cache import CacheWarning
from dora_cache.backends import CPUBackend, Entry, storage_bytes
from dora_cache.testing import BackendConformance

SIZE = 400  # bytes of a value


def make(**sizes):
    backend = CPUBackend(**sizes)
    backend._transfer = Pretended()
    return backend


def entry(number, *, cost=1.0):
    return Entry(torch.full((SIZE // 4,), float(number)), stamp=number, cost=cost)


def cycle(backend, count, *, cost=1.0):
    """Ask for some values in order, as a forward does; derive and put what is not held."""
    misses = 0
    for number in range(count):
        found = backend.get(number)
        if found is None:
            misses += 1
            backend.put(number, entry(number, cost=cost))
        else:
            assert found.stamp == number
            assert (found.value == number).all()
        assert backend._device is None or backend.device_nbytes <= backend._device_bytes
    return misses


class Machine(BackendConformance):
    """Deletes, replacements and reads leave both tiers and the copies ahead in step."""

    sizes: dict = {}  # noqa: RUF012

    def make_backend(self):
        return make(**self.sizes)

    def expected_nbytes(self, entries):
        """Count again what is held; a value to come takes at least what its tensors show."""
        backend = self.backend
        tiers = (
            list(backend._host._entries.values()),
            [known.entry for known in backend._device._held.values()],
            list(backend._prefetch._copies.values()),
        )
        held = [entry for tier in tiers for entry in tier]
        if {id(entry.stamp) for entry in entries} != {id(entry.stamp) for entry in held}:
            tensors = [tensor for entry in entries for tensor in entry.tensors]
            return min(storage_bytes(tensors), sum(tensor.nbytes for tensor in tensors))
        return sum(
            storage_bytes(tensor for entry in tier for tensor in entry.tensors) for tier in tiers
        )


class TieredMachine(Machine):
    sizes = {"device_bytes": 1024}  # noqa: RUF012


class CappedMachine(Machine):
    sizes = {"max_bytes": 3072, "device_bytes": 1024}  # noqa: RUF012

    def expected_max_bytes(self, max_bytes):
        return max_bytes + 1024


class CUDATieredMachine(TieredMachine):
    device = "cuda"

    def make_backend(self):
        return CPUBackend(**self.sizes)


class CUDACappedMachine(CappedMachine):
    device = "cuda"

    def make_backend(self):
        return CPUBackend(**self.sizes)


@pytest.mark.machine
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("machine", [CUDATieredMachine, CUDACappedMachine])
def test_tiers_conform_with_values_on_cuda(machine):
    """The same with a real device between whose memory and the host's copies are made."""
    run_state_machine_as_test(machine)


TestTiered = pytest.mark.machine(TieredMachine.TestCase)
TestCapped = pytest.mark.machine(CappedMachine.TestCase)


def test_what_leaves_the_device_is_on_the_host():
    """Every value is derived once, however little of them the device holds."""
    backend = make(device_bytes=4 * SIZE)
    assert cycle(backend, 10) == 10
    for _ in range(5):
        assert cycle(backend, 10) == 0
    assert len(backend) == 10
    assert backend.device_nbytes <= 4 * SIZE


def test_the_order_is_learned_in_the_first_forward():
    """From the second forward on, whatever is copied back was on its way before."""
    backend = make(device_bytes=8 * SIZE)
    cycle(backend, 20)
    cycle(backend, 20)
    before = backend.fetches, backend.prefetched
    for _ in range(5):
        cycle(backend, 20)
    fetches, prefetched = backend.fetches - before[0], backend.prefetched - before[1]
    assert fetches == prefetched
    # The others stay: a part of what a cycle visits is always on the device.
    assert 5 * 12 <= fetches <= 5 * 17


def test_another_order_is_learned_anew():
    """Copies that nobody takes make room for those that are wanted."""
    backend = make(device_bytes=8 * SIZE)
    cycle(backend, 20)
    cycle(backend, 20)
    for _ in range(4):
        before = backend.fetches, backend.prefetched
        for number in reversed(range(20)):
            assert backend.get(number).stamp == number
            assert backend.device_nbytes <= 8 * SIZE
    assert backend.fetches - before[0] == backend.prefetched - before[1]


def test_each_thread_has_an_order_of_its_own():
    """What one thread asks for in between does not follow what another asked for."""
    backend = make(device_bytes=4 * SIZE)
    cycle(backend, 10)
    other = threading.Thread(target=backend.get, args=(7,))
    backend.get(2)
    other.start()
    other.join()
    backend.get(3)
    assert backend._prefetch._successors[2] == 3


def test_only_what_leaves_both_tiers_is_evicted():
    """What goes from the device to the host stays; what the host has no room for is reported."""
    reported = []
    backend = make(device_bytes=4 * SIZE, max_bytes=2 * SIZE)
    backend.on_evict(reported.append)
    total = 0
    for number in range(12):
        before = set(backend.keys())
        kept = backend.put(number, entry(number))
        assert (number in backend.keys()) is kept
        assert sorted(reported) == sorted(before - set(backend.keys()))
        total += len(reported)
        reported.clear()
    before = set(backend.keys())
    backend.resize(0)
    assert sorted(reported) == sorted(before - set(backend.keys()))
    assert total > 0
    assert reported


def test_what_is_cheaper_to_derive_than_to_copy_is_not_offloaded():
    """It is derived again, as without the host."""
    backend = make(device_bytes=4 * SIZE)
    cheap = backend._transfer.seconds(SIZE) / 2
    for _ in range(3):
        cycle(backend, 10, cost=cheap)
    assert len(backend) == 4
    assert backend.fetches == 0
    assert backend._host.nbytes == 0


class Timed:
    """Stands for a GPU's work that takes long and is not done yet, or has been."""

    began = object()
    done = False

    def seconds(self):
        return 1.0 if self.done else None


def test_what_a_value_took_before_counts_while_the_device_is_at_it():
    """Launching takes no time; the device's work does, and is known from the times before."""
    backend = make(device_bytes=SIZE // 2)
    cheap = backend._transfer.seconds(SIZE) / 2
    first, second = Timed(), Timed()
    assert not backend.put("a", dataclasses.replace(entry(1, cost=cheap), ready=first))
    first.done = True
    assert not backend.put("b", entry(2, cost=cheap))  # the first one's time is read meanwhile
    assert backend.put("a", dataclasses.replace(entry(1, cost=cheap), ready=second))


def test_a_value_whose_cost_is_not_known_is_kept():
    """Backends are used without a cache as well, with entries made by hand."""
    backend = make(device_bytes=SIZE // 2)
    assert backend.put("a", entry(1, cost=0.0))
    assert backend.get("a").stamp == 1


def test_a_value_above_the_device_tier_waits_on_the_host():
    """It is copied back at each use, and never kept."""
    backend = make(device_bytes=SIZE // 2)
    assert backend.put("large", entry(1))
    for _ in range(2):
        assert backend.get("large").stamp == 1
        assert backend.device_nbytes == 0
    assert backend.fetches == 2


def test_what_leaves_the_host_is_not_on_its_way_either():
    """An answer never outlives its entry."""
    backend = make(device_bytes=2 * SIZE, max_bytes=4 * SIZE)
    cycle(backend, 5)
    cycle(backend, 5)
    for number in range(5):
        backend.delete(number)
        assert backend.get(number) is None
    assert backend.nbytes == 0
    cycle(backend, 5)
    backend.resize(0)
    assert backend._prefetch.nbytes == 0
    assert set(backend.keys()) == set(backend._device.keys())


def test_without_memory_values_are_derived_again():
    """No room to pin costs the entry; none on the device for what is not needed yet, nothing."""
    backend = make(device_bytes=4 * SIZE)
    cycle(backend, 10)
    cycle(backend, 10)
    backend._prefetch.clear()
    backend._transfer.broken = True
    resident = next(iter(backend._device.keys()))
    assert backend.get(resident).stamp == resident
    assert backend._prefetch.nbytes == 0
    with pytest.warns(CacheWarning, match="derived again: no host memory"):
        assert not backend.put("new", entry(1))
    assert not backend.put("newer", entry(1))  # one warning says it
    assert len(backend) == 10


def test_the_device_tier_yields_to_copies_on_their_way():
    """Together they never take more than device_bytes; what the tier gives up goes to the host."""
    backend = make(device_bytes=10 * SIZE)
    for number in range(10):
        assert backend.put(number, entry(number))
    assert backend.device_nbytes == 10 * SIZE
    assert cycle(backend, 14) == 4
    assert cycle(backend, 14) == 0
    assert backend.device_nbytes <= 10 * SIZE
    assert backend._device.max_bytes == 8 * SIZE


def test_what_was_written_into_is_not_offloaded():
    """A value that a caller has changed is gone with its place on the device."""
    backend = make(device_bytes=4 * SIZE)
    cycle(backend, 4)
    key = next(iter(backend._device.keys()))
    backend._device._held[key].entry.value.mul_(5)
    backend._device.resize(0)
    assert backend.get(key) is None
    assert len(backend) == 3


def test_memory_is_found_for_what_is_needed_now():
    """Copies that are on their way early give their memory up, and none are begun for a while."""
    backend = make(device_bytes=8 * SIZE)
    cycle(backend, 20)
    cycle(backend, 20)
    away = next(key for key in backend._away if key not in backend._prefetch._copies)
    backend._transfer.broken = True
    with pytest.raises(torch.OutOfMemoryError):
        backend.get(away)
    assert backend._prefetch.nbytes == 0
    backend._transfer.broken = False
    assert backend.get(away).stamp == away
