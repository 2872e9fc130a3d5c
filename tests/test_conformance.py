"""Every built-in backend conforms, and the conformance machine finds what is broken."""

import subprocess
import sys

import pytest
import torch
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from dora_cache.backends import (
    CPUBackend,
    DictBackend,
    Entry,
    Ledger,
    LRUBackend,
    NullBackend,
    storage_bytes,
)
from dora_cache.testing import BackendConformance


class DictMachine(BackendConformance):
    def make_backend(self):
        return DictBackend()


class NullMachine(BackendConformance):
    def make_backend(self):
        return NullBackend()


class LRUMachine(BackendConformance):
    exact_lru = True

    def make_backend(self):
        return LRUBackend(max_bytes=4096)


class TinyLRUMachine(BackendConformance):
    exact_lru = True

    def make_backend(self):
        return LRUBackend(max_bytes=7)


class ClosedLRUMachine(BackendConformance):
    exact_lru = True

    def make_backend(self):
        return LRUBackend(max_bytes=0)


class CPUMachine(BackendConformance):
    def make_backend(self):
        return CPUBackend()


class CappedCPUMachine(BackendConformance):
    exact_lru = True

    def make_backend(self):
        return CPUBackend(max_bytes=4096)


class TieredCPUMachine(BackendConformance):
    def make_backend(self):
        return CPUBackend(device_bytes=1024)


class CappedTieredCPUMachine(BackendConformance):
    def make_backend(self):
        return CPUBackend(max_bytes=3072, device_bytes=1024)

    def expected_max_bytes(self, max_bytes):
        return max_bytes + 1024


TestDict = pytest.mark.machine(DictMachine.TestCase)
TestNull = pytest.mark.machine(NullMachine.TestCase)
TestLRU = pytest.mark.machine(LRUMachine.TestCase)
TestTinyLRU = pytest.mark.machine(TinyLRUMachine.TestCase)
TestClosedLRU = pytest.mark.machine(ClosedLRUMachine.TestCase)
TestCPU = pytest.mark.machine(CPUMachine.TestCase)
TestCappedCPU = pytest.mark.machine(CappedCPUMachine.TestCase)
TestTieredCPU = pytest.mark.machine(TieredCPUMachine.TestCase)
TestCappedTieredCPU = pytest.mark.machine(CappedTieredCPUMachine.TestCase)


class CUDAMachine(BackendConformance):
    """Host entries are copies of what each tensor shows, so views and sharing count otherwise."""

    device = "cuda"

    def make_backend(self):
        return CPUBackend()

    def expected_nbytes(self, entries):
        host = sum(
            torch.empty_like(tensor, device="cpu").untyped_storage().nbytes()
            for entry in entries
            for tensor in entry.tensors
        )
        return host + self.backend.device_nbytes


@pytest.mark.machine
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cpu_backend_conforms_with_values_on_cuda():
    """Copies on the host come back to the device as they were."""
    run_state_machine_as_test(CUDAMachine)


def test_values_on_the_cpu_are_never_copied_by_the_cpu_backend():
    """What lives on the CPU anyway is stored as it is, so its exact storages count."""
    backend, entry = CPUBackend(device_bytes=1024), Entry(torch.ones(100)[:10])
    assert backend.put("key", entry)
    assert backend.get("key") is entry
    assert backend.nbytes == 400


class Counted(LRUBackend):
    """An LRU backend that counts bytes in its own way."""

    def __init__(self, max_bytes):
        super().__init__(max_bytes)
        self.held = {}

    def put(self, key, entry):
        kept = super().put(key, entry)
        if kept:
            self.held[key] = entry
        return kept

    def removed(self, key, entry):
        super().removed(key, entry)
        self.held.pop(key, None)


class CountsElements(Counted):
    @property
    def nbytes(self):
        tensors = [tensor for entry in self.held.values() for tensor in entry.tensors]
        return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


class CountsSharedTwice(Counted):
    @property
    def nbytes(self):
        return sum(entry.nbytes for entry in self.held.values())


class ForgetsToCountOut(LRUBackend):
    def removed(self, key, entry):
        pass


class EvictsNewest:
    """An LRU backend that makes room from the wrong end."""

    def __init__(self, max_bytes):
        self.max_bytes = max_bytes
        self.entries = {}

    @property
    def nbytes(self):
        return storage_bytes(t for entry in self.entries.values() for t in entry.tensors)

    def on_evict(self, evicted):
        self.evicted = evicted

    def used(self):
        return sum(entry.nbytes for entry in self.entries.values())

    def get(self, key):
        entry = self.entries.pop(key, None)
        if entry is not None:
            self.entries[key] = entry
        return entry

    def put(self, key, entry):
        self.entries.pop(key, None)
        if entry.nbytes > self.max_bytes:
            return False
        while self.used() + entry.nbytes > self.max_bytes:
            self.evict()
        self.entries[key] = entry
        return True

    def evict(self):
        key, _ = self.entries.popitem()
        self.evicted(key)

    def delete(self, key):
        return self.entries.pop(key, None) is not None

    def clear(self):
        self.entries.clear()

    def keys(self):
        return self.entries.keys()

    def __len__(self):
        return len(self.entries)

    def close(self):
        self.clear()


class EvictsOldest(EvictsNewest):
    """The same, from the right end: what the broken ones differ from in one thing."""

    def evict(self):
        key = next(iter(self.entries))
        del self.entries[key]
        self.evicted(key)


class EvictsFirstPut(EvictsOldest):
    def get(self, key):
        return self.entries.get(key)


class ReplacesInPlace(EvictsOldest):
    """A replaced entry keeps its old place in the order."""

    def put(self, key, entry):
        order = list(self.entries)
        kept = super().put(key, entry)
        if kept and key in order:
            later = [other for other in order[order.index(key) + 1 :] if other in self.entries]
            for other in later:
                self.entries[other] = self.entries.pop(other)
        return kept


class EvictsTooMuch(EvictsOldest):
    def put(self, key, entry):
        kept = super().put(key, entry)
        while kept and len(self.entries) > 1 and self.used() > 0.9 * self.max_bytes:
            self.evict()
        return kept


class KeepsOversize(EvictsOldest):
    def put(self, key, entry):
        if entry.nbytes > self.max_bytes:
            self.entries[key] = entry
            return True
        return super().put(key, entry)


class KeepsOlderAfterRefusal(EvictsOldest):
    def put(self, key, entry):
        return entry.nbytes <= self.max_bytes and super().put(key, entry)


class LosesOnGet(EvictsOldest):
    def get(self, key):
        return self.entries.pop(key, None)


class UnboundedLosesOnPut(EvictsOldest):
    def __init__(self, max_bytes):
        super().__init__(1 << 30)
        self.max_bytes = None

    def put(self, key, entry):
        self.max_bytes = 1 << 30
        kept = super().put(key, entry)
        self.max_bytes = None
        if len(self.entries) > 3:
            self.evict()
        return kept


class AlwaysDeletes(EvictsOldest):
    def delete(self, key):
        super().delete(key)
        return True


class NeverDeletes(EvictsOldest):
    def delete(self, key):
        super().delete(key)
        return False


class MixesStamps(EvictsOldest):
    def get(self, key):
        entry = super().get(key)
        if entry is None or len(self.entries) < 2:
            return entry
        other = next(iter(self.entries.values()))
        return Entry(entry.value, stamp=other.stamp, cost=entry.cost)


class RaisesCost(EvictsOldest):
    def get(self, key):
        entry = super().get(key)
        return entry and Entry(entry.value, stamp=entry.stamp, cost=entry.cost + 1)


class ExceedsCap(EvictsOldest):
    """Looks only at each value, not at the sum."""

    def put(self, key, entry):
        self.entries.pop(key, None)
        if entry.nbytes > self.max_bytes:
            return False
        self.entries[key] = entry
        return True


class RefusesButKeeps(EvictsOldest):
    def put(self, key, entry):
        return super().put(key, entry) and len(self.entries) < 3


class AnswersNothing(EvictsOldest):
    def put(self, key, entry):
        super().put(key, entry)


class ClearsHalf(EvictsOldest):
    def clear(self):
        for key in list(self.entries)[1:]:
            del self.entries[key]


class OutlivesClose(EvictsOldest):
    def close(self):
        pass


class HidesLeak(EvictsOldest):
    """Reports that an entry is gone, and keeps its memory."""

    def __init__(self, max_bytes):
        super().__init__(max_bytes)
        self.hidden = []

    def delete(self, key):
        if key in self.entries:
            self.hidden.append(self.entries[key].tensors)
        return super().delete(key)


class LosesPrecision(EvictsOldest):
    def put(self, key, entry):
        if isinstance(entry.value, torch.Tensor) and entry.value.dtype is torch.float64:
            entry = Entry(entry.value.float(), stamp=entry.stamp, cost=entry.cost)
        return super().put(key, entry)


class WritesIntoValues(EvictsOldest):
    def get(self, key):
        entry = super().get(key)
        if entry is not None and entry.value is entry.tensors[0]:
            entry.value.zero_()
            return Entry(entry.value, stamp=entry.stamp, cost=entry.cost)
        return entry


class LosesStrides(EvictsOldest):
    def get(self, key):
        entry = super().get(key)
        if entry is None or isinstance(entry.value, tuple):
            return entry
        return Entry(entry.value.contiguous(), stamp=entry.stamp, cost=entry.cost)


class LosesMemoryFormat(EvictsOldest):
    def get(self, key):
        entry = super().get(key)
        if entry is None or isinstance(entry.value, tuple) or entry.value.dim() != 4:
            return entry
        return Entry(entry.value.contiguous(), stamp=entry.stamp, cost=entry.cost)


class UnpacksTuples(EvictsOldest):
    def get(self, key):
        entry = super().get(key)
        if entry is None or len(entry.tensors) > 1:
            return entry
        return Entry(entry.tensors[0], stamp=entry.stamp, cost=entry.cost)


class ListsTwice(EvictsOldest):
    def keys(self):
        return [*self.entries, *list(self.entries)[:1]]


class CountsWrong(EvictsOldest):
    def __len__(self):
        return min(len(self.entries), 2)


class RaisesCap(EvictsOldest):
    def put(self, key, entry):
        self.max_bytes += 1
        return super().put(key, entry)


class FindsByIdentity(EvictsOldest):
    """Compares keys by identity, which holds only until they are built anew."""

    def get(self, key):
        return next((super(FindsByIdentity, self).get(k) for k in self.entries if k is key), None)


class ReportsNothing(EvictsOldest):
    def on_evict(self, evicted):
        self.evicted = lambda key: None


class ReportsTwice(EvictsOldest):
    def on_evict(self, evicted):
        self.evicted = lambda key: (evicted(key), evicted(key))


class ReportsTheFirst(EvictsOldest):
    """Of several evictions of one put."""

    def put(self, key, entry):
        told = []
        evicted, self.evicted = self.evicted, told.append
        kept = super().put(key, entry)
        self.evicted = evicted
        for first in told[:1]:
            evicted(first)
        return kept


class ReportsLate(EvictsOldest):
    """At the next call that reads."""

    late = ()

    def on_evict(self, evicted):
        self.report, self.late = evicted, []
        self.evicted = self.late.append

    def get(self, key):
        while self.late:
            self.report(self.late.pop())
        return super().get(key)


class ReportsHeld(EvictsOldest):
    """What it has just put, beside what has gone."""

    def put(self, key, entry):
        kept = super().put(key, entry)
        if kept:
            self.evicted(key)
        return kept


class ReportsDeleted(EvictsOldest):
    def delete(self, key):
        found = super().delete(key)
        if found:
            self.evicted(key)
        return found


class ReportsCleared(EvictsOldest):
    def clear(self):
        while self.entries:
            self.evict()


class ReportsReplaced(EvictsOldest):
    def put(self, key, entry):
        if key in self.entries:
            del self.entries[key]
            self.evicted(key)
        return super().put(key, entry)


class ReportsRefused(EvictsOldest):
    """The key of an entry above the cap."""

    def put(self, key, entry):
        kept = super().put(key, entry)
        if not kept:
            self.evicted(key)
        return kept


class LacksKeys:
    max_bytes = None
    nbytes = 0


def machine_for(kind, *, exact):
    class Machine(BackendConformance):
        exact_lru = exact

        def make_backend(self):
            return kind(4096)

    return Machine


# Without shrinking and explaining: only whether the machine fails matters here, not how shortly.
FIND = settings(
    max_examples=200,
    stateful_step_count=30,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    deadline=None,
)


@pytest.mark.parametrize("exact", [True, False], ids=["exact_lru", "any_order"])
@pytest.mark.parametrize("kind", [EvictsOldest, Counted])
def test_machine_passes_the_sound_relatives_of_the_broken_backends(kind, exact):
    """Each broken backend fails for its one fault, not for what it inherits."""
    run_state_machine_as_test(
        machine_for(kind, exact=exact), settings=settings(FIND, max_examples=25)
    )


ANY_ORDER = {
    CountsElements: "after .*nbytes is",
    CountsSharedTwice: "after .*nbytes is",
    ForgetsToCountOut: "after .*nbytes is",
    KeepsOversize: "after .*returned True, but max_bytes is 4096",
    KeepsOlderAfterRefusal: "after .*the older entry must go too",
    LosesOnGet: "after .*it lost",
    UnboundedLosesOnPut: "after .*it lost",
    AlwaysDeletes: "after .*returned True, but the key was not held",
    NeverDeletes: "after .*returned False, but the key was held",
    MixesStamps: r"after .*has stamp \d+, but stamp \d+ was put",
    RaisesCost: "after .*has cost",
    ExceedsCap: "after .*above max_bytes 4096",
    RefusesButKeeps: "after .*returned False, but the key is held",
    AnswersNothing: "after .*returned None, not True or False",
    ClearsHalf: "after .*should not be held",
    OutlivesClose: "after close: .* should not be held",
    HidesLeak: "after .*still kept in memory",
    LosesPrecision: "after .*(nbytes is|another dtype)",
    WritesIntoValues: "after .*another content",
    LosesStrides: "after .*another strides",
    LosesMemoryFormat: r"after .*another strides: \(",
    UnpacksTuples: "after .*was put",
    ListsTwice: "after .*duplicates",
    CountsWrong: r"after .*len\(\) is 2",
    RaisesCap: "after .*max_bytes changed",
    FindsByIdentity: "after .*returned None, but the key is held",
    ReportsNothing: "after .*evicted .*and did not report it",
    ReportsTheFirst: "after .*evicted .*and did not report it",
    ReportsLate: "after .*evicted .*and did not report it",
    ReportsTwice: "after .*reported an eviction more than once",
    ReportsHeld: "after .*reported .* but the key is held",
    ReportsDeleted: r"after delete: it reported .* only put\(\) and resize\(\) evict",
    ReportsCleared: r"after (clear|close): it reported .* only put\(\) and resize\(\) evict",
    ReportsReplaced: "after .*(but the key is held|but that was no eviction)",
    ReportsRefused: "after .*but that was no eviction",
    LacksKeys: "after .*lacks methods",
}
EXACT = {
    EvictsNewest: "an exact LRU of 4096 bytes evicts",
    EvictsFirstPut: "an exact LRU of 4096 bytes evicts",
    ReplacesInPlace: "an exact LRU of 4096 bytes evicts",
    EvictsTooMuch: "an exact LRU of 4096 bytes evicts",
    NullBackend: "an exact LRU keeps it",
}


@pytest.mark.parametrize("kind", ANY_ORDER, ids=lambda kind: kind.__name__)
def test_machine_finds_a_broken_backend(kind):
    """A backend that breaks one promise fails, with a message about that promise."""
    if kind is LacksKeys:
        machine = machine_for(lambda _: LacksKeys(), exact=False)
    else:
        machine = machine_for(kind, exact=False)
    with pytest.raises(AssertionError, match=f"{kind.__name__}, {ANY_ORDER[kind]}"):
        run_state_machine_as_test(machine, settings=FIND)


@pytest.mark.parametrize("kind", EXACT, ids=lambda kind: kind.__name__)
def test_machine_finds_a_wrong_order_of_eviction(kind):
    """A backend that claims to be an exact LRU, and is none, fails."""
    machine = machine_for(
        (lambda _: NullBackendOf4096()) if kind is NullBackend else kind, exact=True
    )
    with pytest.raises(AssertionError, match=EXACT[kind]):
        run_state_machine_as_test(machine, settings=FIND)


class NullBackendOf4096(NullBackend):
    max_bytes = 4096


def test_a_machine_without_a_backend_says_what_to_define():
    """Forgetting make_backend() is explained, not met with an AttributeError."""
    with pytest.raises(NotImplementedError, match=r"must define make_backend\(self\)"):
        run_state_machine_as_test(BackendConformance, settings=FIND)


def test_bytes_are_counted_independently_of_the_ledger():
    """The machine's own count of bytes agrees with the backends' on tensors of every layout."""
    whole = torch.arange(64.0)
    entries = [Entry((whole[3:7], whole[::2])), Entry(whole.expand(3, 64)), Entry(torch.empty(0))]
    ledger = Ledger()
    for entry in entries:
        ledger.add(entry.tensors)
    assert DictMachine().expected_nbytes(entries) == ledger.nbytes == 256


def test_import_without_hypothesis_says_what_to_install():
    """Hypothesis is optional: without it, the import names the extra to install."""
    code = (
        "import sys; sys.modules['hypothesis'] = None\n"
        "try: import dora_cache.testing\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 'needs hypothesis: pip install "dora-cache[testing]"' in done.stdout
