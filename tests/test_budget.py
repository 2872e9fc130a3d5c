"""The backend ``budget``: what it keeps, what it turns away, and what pins and a new cap do."""

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import run_state_machine_as_test
from peft import LoraConfig, get_peft_model
from torch import nn
from zoo import balanced, quiet

import dora_cache
from dora_cache.backends import (
    BudgetBackend,
    CPUBackend,
    DictBackend,
    Entry,
    LRUBackend,
    Pinning,
    Resizable,
)
from dora_cache.errors import ConfigError
from dora_cache.testing import BackendConformance

PINNING = [LRUBackend, BudgetBackend]


def entry_of(nbytes=10, cost=1e-3):
    return Entry(torch.zeros(nbytes, dtype=torch.uint8), cost=cost)


def use(backend, key, **entry):
    """Look a key up as the cache does; return whether it was a hit."""
    if backend.get(key) is not None:
        return True
    backend.put(key, entry_of(**entry))
    return False


def forward(backend, keys, **entry):
    """Use every key once; return how many hits there were."""
    return sum(use(backend, key, **entry) for key in keys)


class BudgetMachine(BackendConformance):
    def make_backend(self):
        return BudgetBackend(max_bytes=4096)


class TinyBudgetMachine(BackendConformance):
    def make_backend(self):
        return BudgetBackend(max_bytes=7)


class ClosedBudgetMachine(BackendConformance):
    def make_backend(self):
        return BudgetBackend(max_bytes=0)


TestBudget = pytest.mark.machine(BudgetMachine.TestCase)
TestTinyBudget = pytest.mark.machine(TinyBudgetMachine.TestCase)
TestClosedBudget = pytest.mark.machine(ClosedBudgetMachine.TestCase)


# The policy


@settings(max_examples=200)
@given(
    st.lists(st.integers(0, 11), min_size=100, max_size=400),
    st.integers(0, 300),
    st.randoms(use_true_random=False),
)
def test_what_is_declined_would_be_refused(uses, cap, random):
    """In any order of uses, forwards among them, at any cap."""
    backend = BudgetBackend(cap)
    costs = [random.uniform(1e-4, 1e-2) for _ in range(12)]
    for key in (*range(12),) * 12 + tuple(uses) + (*range(12),) * 4:
        if backend.get(key) is None:
            declined = backend.declines(key)
            # Sizes differ from key to key, since what a size usually costs counts as well.
            kept = backend.put(key, entry_of(nbytes=10 + key, cost=costs[key]))
            assert not (declined and kept)


class Timed:
    """Stands for the work of a GPU: what it takes is known once it is done."""

    began = object()

    def __init__(self, took):
        self.took = took
        self.done = False

    def seconds(self):
        return self.took if self.done else None


def test_what_a_gpu_takes_counts_once_it_is_known():
    """Launching the work takes the host the same time, whatever the GPU does with it."""
    backend = BudgetBackend(20)
    on_gpu = {0: 1e-5, 1: 1e-5, 2: 1e-1, 3: 1e-1}
    timings = []

    def once():
        for key, seconds in on_gpu.items():
            if backend.get(key) is None:
                timings.append(Timed(seconds))
                entry = Entry(torch.zeros(10, dtype=torch.uint8), cost=1e-3, ready=timings[-1])
                backend.put(key, entry)

    for _ in range(3):
        once()
    assert set(backend.keys()) == {0, 1}
    assert backend.expected(2) is None
    for timing in timings:
        timing.done = True
    once()
    once()
    assert set(backend.keys()) == {2, 3}
    assert backend.expected(2) == pytest.approx(1e-1)
    assert backend.expected("never seen") is None
    backend.clear()
    assert backend.expected(2) is None


def test_what_is_declined_is_measured_now_and_then():
    """So that a value that has become worth its bytes is let in."""
    backend = BudgetBackend(20)
    layers = range(4)
    cost = dict.fromkeys(layers, 1e-3)

    def once():
        asked = []
        for key in layers:
            if backend.get(key) is None and not backend.declines(key):
                asked.append(key)
                backend.put(key, entry_of(cost=cost[key]))
        return asked

    for _ in range(20):
        once()
    away = [key for key in layers if key not in set(backend.keys())]
    assert len(away) == 2
    offers = [once() for _ in range(68)]
    assert [sum(key in asked for asked in offers) for key in away] == [4, 4]
    cost[away[0]] = 1.0
    for _ in range(40):
        once()
    assert away[0] in set(backend.keys())


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_a_cycle_larger_than_the_cap_keeps_a_part_of_it(part):
    """In a cycle, as many values hit as fit, where an LRU has no hit at all."""
    layers = range(40)
    fit = int(len(layers) * part)
    budget, lru = BudgetBackend(10 * fit), LRUBackend(10 * fit)
    for _ in range(3):
        forward(budget, layers)
    assert [forward(budget, layers) for _ in range(5)] == [fit] * 5
    assert [forward(lru, layers) for _ in range(5)] == [0] * 5


def test_the_part_that_stays_is_what_saves_the_most_time_per_byte():
    """Of values in one cycle, those of the highest cost per byte stay, whatever came first."""
    cheap = {("cheap", i): (10, 1e-3) for i in range(8)}
    large = {("large", i): (40, 2e-3) for i in range(4)}
    dear = {("dear", i): (10, 2e-3) for i in range(8)}
    backend = BudgetBackend(10 * 12)
    for _ in range(6):
        for key, (nbytes, cost) in (large | cheap | dear).items():
            use(backend, key, nbytes=nbytes, cost=cost)
    assert set(dear) < set(backend.keys())
    assert not set(large) & set(backend.keys())


def test_traffic_that_moves_to_another_adapter_is_followed_within_two_forwards():
    """When another adapter's turn comes, its values displace those that are overdue."""
    backend = BudgetBackend(10 * 10)
    for turn in range(4):
        for adapter in "abc":
            layers = [(adapter, i) for i in range(20)]
            hits = [forward(backend, layers) for _ in range(12)]
            assert hits[4:] == [10] * 8, (turn, adapter)
            if turn:
                assert hits[2] >= 9, (turn, adapter)


def test_a_scan_displaces_little_of_what_is_in_use():
    """Many values that are used once leave most of a regularly used set where it is."""
    backend, layers = BudgetBackend(10 * 20), list(range(20))
    for step in range(60):
        hits = forward(backend, layers)
        forward(backend, [("scan", step, i) for i in range(3)])
        if step > 20:
            assert hits >= 18


def test_a_value_worth_less_is_turned_away_and_evicts_nothing():
    """put() returns False for what would displace values that save more, and leaves them."""
    backend, layers = BudgetBackend(10 * 5), list(range(5))
    for _ in range(4):
        forward(backend, layers, cost=1e-2)
    assert backend.get("new") is None
    assert not backend.put("new", entry_of(cost=1e-3))
    assert set(backend.keys()) == set(layers)
    assert backend.get("dear") is None
    assert backend.put("dear", entry_of(cost=1e-1))
    assert len(backend) == 5


def test_a_value_turned_away_is_remembered():
    """What a key's uses have shown still counts when its value is derived the next time."""
    backend = BudgetBackend(10)
    for _ in range(10):
        use(backend, "rare", cost=1e-3)
        for _ in range(5):
            use(backend, "between", cost=1e-6)
    assert list(backend.keys()) == ["rare"]


def test_one_odd_measurement_does_not_decide():
    """A cost counts as the mean of its measurements: one slow derivation displaces nothing dear."""
    backend, layers = BudgetBackend(10 * 5), list(range(5))
    for step in range(30):
        forward(backend, layers, cost=1e-2)
        use(backend, "odd", cost=5e-3 if step == 20 else 1e-3)
    assert set(backend.keys()) == set(layers)


def test_a_slow_first_derivation_does_not_hold_its_place_for_good():
    """A cost that others of the same size do not have is doubted, where it was measured once."""
    backend, layers = BudgetBackend(10 * 5), list(range(20))
    use(backend, 0, cost=2.5e-3)
    for _ in range(5):
        forward(backend, layers, cost=1e-3)
    assert 0 in backend.keys()
    for _ in range(5):
        forward(backend, layers, cost=1e-3)
        forward(backend, "abcde", cost=2e-3)
    assert set(backend.keys()) == set("abcde")


def test_evictions_are_no_more_than_are_needed():
    """A small victim that a larger one makes needless stays."""
    backend = BudgetBackend(100)
    backend.put("small", entry_of(nbytes=10, cost=1e-5))
    backend.put("large", entry_of(nbytes=90, cost=2e-3))
    for _ in range(3):
        backend.get("small"), backend.get("large"), backend.get("dear")
    assert backend.put("dear", entry_of(nbytes=80, cost=1.0))
    assert set(backend.keys()) == {"small", "dear"}


def test_keys_remembered_are_bounded():
    """Keys without a value are forgotten, those not used for longest first."""
    backend = BudgetBackend(10)
    use(backend, "first")
    use(backend, "first")
    for number in range(10_000):
        use(backend, number)
    assert len(backend._known) < 5000
    assert 9_999 in backend._known
    assert len(backend._ranks) + len(backend._dues) < 1000


@given(
    st.integers(0, 60),
    st.lists(st.tuples(st.integers(0, 11), st.integers(0, 30), st.sampled_from([0, 1e-3, 1.0]))),
)
@settings(max_examples=200, deadline=None)
def test_entries_and_records_agree(cap, uses):
    """Bytes, entries and heaps stay in step: all that is held and unpinned can be evicted."""
    backend = BudgetBackend(cap)
    for key, nbytes, cost in uses:
        if key == 11:
            backend.delete(nbytes % 11)
        elif key == 10:
            (backend.pin if cost else backend.unpin)(nbytes % 10)
        else:
            use(backend, key, nbytes=nbytes, cost=cost)
        assert backend.nbytes == sum(backend._held[key].nbytes for key in backend.keys()) <= cap
        live = {known.key for _, ticket, known in backend._ranks if known.ticket == ticket}
        assert live == set(backend.keys()) - backend._pins
        due = {known.key for _, ticket, known in backend._dues if known.ticket == ticket}
        assert due == live
    backend.resize(0)
    assert backend.nbytes == 0


def test_clear_forgets_what_was_learned():
    """After clear() the backend is as new: the first values that fit are kept."""
    backend = BudgetBackend(10)
    for _ in range(4):
        use(backend, "old", cost=1.0)
    backend.clear()
    assert not use(backend, "new")
    assert list(backend.keys()) == ["new"]


# A new cap


@pytest.mark.parametrize("kind", [*PINNING, CPUBackend])
def test_a_smaller_cap_holds_at_once(kind):
    """resize() evicts down to the new cap, and the same holds for what is put later."""
    backend = kind(max_bytes=100)
    assert isinstance(backend, Resizable)
    forward(backend, range(10))
    backend.resize(35)
    assert (backend.max_bytes, backend.nbytes) == (35, 30)
    use(backend, "new")
    assert backend.nbytes <= 35
    assert not backend.put("large", entry_of(nbytes=36))
    backend.resize(200)
    forward(backend, range(10))
    assert backend.nbytes >= 100


@pytest.mark.parametrize("kind", [*PINNING, CPUBackend])
def test_a_negative_cap_is_refused(kind):
    """A cap below zero is a mistake, at first and later, and changes nothing."""
    backend = kind(max_bytes=10)
    for make in (kind, backend.resize):
        with pytest.raises(ConfigError, match="max_bytes is -1: give a size of zero bytes or more"):
            make(max_bytes=-1)
    assert backend.max_bytes == 10


def test_what_is_worth_least_goes_first_when_the_cap_shrinks():
    """The backend budget gives up the least saving per byte, lru the least recently used."""
    backends = BudgetBackend(30), LRUBackend(30)
    for backend in backends:
        for _ in range(3):
            for key, cost in (("dear", 1.0), ("middle", 1e-2), ("cheap", 1e-4)):
                use(backend, key, cost=cost)
        backend.resize(10)
    assert [list(backend.keys()) for backend in backends] == [["dear"], ["cheap"]]


def test_an_unbounded_host_tier_takes_a_cap():
    """resize() gives the cpu backend a cap that it did not have; the oldest values go first."""
    backend = CPUBackend()
    forward(backend, "abc")
    backend.resize(25)
    assert (backend.max_bytes, list(backend.keys())) == (25, ["b", "c"])
    backend.resize(5)
    assert (len(backend), backend.nbytes) == (0, 0)


# Pins


@pytest.mark.parametrize("kind", PINNING)
def test_pinned_entries_stay(kind):
    """A pinned entry is not evicted, however many others come, until it is unpinned."""
    backend = kind(max_bytes=30)
    assert isinstance(backend, Pinning)
    use(backend, "pinned", cost=1e-6)
    backend.pin("pinned")
    for _ in range(5):
        forward(backend, range(10), cost=1.0)
    assert "pinned" in backend.keys()
    backend.unpin("pinned")
    for _ in range(5):
        forward(backend, range(10), cost=1.0)
    assert "pinned" not in backend.keys()


@pytest.mark.parametrize("kind", PINNING)
def test_a_pinned_key_gets_in(kind):
    """put() for a pinned key evicts others, whatever they are worth, and survives replacement."""
    backend = kind(max_bytes=30)
    backend.pin("pinned")
    for _ in range(5):
        forward(backend, range(3), cost=1.0)
    assert backend.put("pinned", entry_of(nbytes=20, cost=1e-6))
    backend.delete("pinned")
    forward(backend, range(3), cost=1.0)
    assert backend.put("pinned", entry_of(nbytes=25, cost=1e-6))
    assert list(backend.keys()) == ["pinned"]


@pytest.mark.parametrize("kind", PINNING)
def test_pins_share_the_cap(kind):
    """What does not fit beside the pinned entries is refused, pinned or not; a lower cap wins."""
    backend = kind(max_bytes=30)
    for key in "ab":
        backend.pin(key)
        assert backend.put(key, entry_of())
    assert not backend.put("c", entry_of(nbytes=11, cost=1.0))
    backend.pin("c")
    assert not backend.put("c", entry_of(nbytes=11))
    assert backend.put("c", entry_of(nbytes=10))
    backend.resize(15)
    assert (len(backend), backend.nbytes) == (1, 10)


@pytest.mark.parametrize("kind", PINNING)
def test_pins_outlive_clear_and_not_close(kind):
    """clear() drops pinned entries and keeps their pins; close() keeps neither."""
    backend = kind(max_bytes=10)
    backend.pin("pinned")
    use(backend, "pinned")
    backend.clear()
    assert len(backend) == 0
    use(backend, "pinned")
    use(backend, "other", cost=1.0)
    assert list(backend.keys()) == ["pinned"]
    backend.close()
    assert (len(backend), backend.nbytes, backend._pins) == (0, 0, set())


# The conformance machine notices what is broken


class ResizesLazily(LRUBackend):
    def resize(self, max_bytes):
        self._max_bytes = max_bytes


class ForgetsToResize(LRUBackend):
    def resize(self, max_bytes):
        pass


class ResizesToNothing(LRUBackend):
    """Drops more than it must."""

    def resize(self, max_bytes):
        super().resize(0)
        super().resize(max_bytes)


class IgnoresPins(LRUBackend):
    def pin(self, key):
        pass


class LosesPinsOnDelete(LRUBackend):
    def delete(self, key):
        self.unpin(key)
        return super().delete(key)


class KeepsPinsForGood(LRUBackend):
    def unpin(self, key):
        pass


BROKEN = {
    ResizesLazily: (False, "after resize.*above max_bytes"),
    ForgetsToResize: (False, "after resize.*max_bytes changed"),
    ResizesToNothing: (True, "after resize.*an exact LRU"),
    IgnoresPins: (False, "after .*(which is pinned|the key is pinned)"),
    LosesPinsOnDelete: (False, "after .*(which is pinned|the key is pinned)"),
    KeepsPinsForGood: (True, "after .*an exact LRU"),
}


@pytest.mark.parametrize("kind", BROKEN, ids=lambda kind: kind.__name__)
def test_machine_finds_broken_caps_and_pins(kind):
    """A backend that breaks what Resizable or Pinning say fails, with a message about that."""
    exact, message = BROKEN[kind]

    class Machine(BackendConformance):
        exact_lru = exact

        def make_backend(self):
            return kind(4096)

    find = settings(
        max_examples=200,
        stateful_step_count=30,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        deadline=None,
    )
    with pytest.raises(AssertionError, match=f"{kind.__name__}, {message}"):
        run_state_machine_as_test(Machine, settings=find)


def test_backends_without_caps_and_pins_are_no_such_backends():
    """The two protocols are optional: dict has neither."""
    assert not isinstance(DictBackend(), Resizable | Pinning)


# Attached to a model


@pytest.fixture
def model():
    torch.manual_seed(0)
    layers = [str(i) for i in range(12)]
    config = LoraConfig(use_dora=True, target_modules=layers, init_lora_weights=False)
    with quiet():
        model = get_peft_model(nn.Sequential(*[nn.Linear(16, 16) for _ in layers]), config, "one")
        model.add_adapter("two", config)
    return model.eval()


def test_a_model_keeps_half_its_hits_under_half_its_bytes(model):
    """Outputs are equal, bytes are below the cap, and about half of all lookups hit."""
    x, cap = torch.randn(2, 16), 6 * 16 * 4
    expected = {}
    with torch.no_grad():
        for name in ("one", "two"):
            model.base_model.set_adapter(name)
            expected[name] = model(x)
        with dora_cache.attach(model, backend="budget", max_bytes=cap) as cache:
            for name in ("one", "two", "one"):
                model.base_model.set_adapter(name)
                for _ in range(8):
                    assert torch.equal(model(x), expected[name])
                    assert cache.stats().nbytes <= cap
            stats = balanced(cache)
    assert 0.35 < stats.hit_rate <= 0.5
    assert stats.rejections > 0
    assert stats.misses == stats.stores + stats.rejections
