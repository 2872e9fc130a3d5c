"""Caps that change, pins, caps per device, and memory that does not suffice."""

import warnings
from typing import ClassVar

import pytest
import torch
from torch import nn
from zoo import activate, balanced, dora_model, loha_config, quiet, run, sample

import dora_cache
from dora_cache import attachment, backends, cached
from dora_cache.backends.per_device import PerDeviceBackend
from dora_cache.testing import BackendConformance

SIZE = 16  # bytes of one value
CAPPED = ["lru", "budget"]


class Owner(nn.Module):
    """Derives one value of 16 bytes for each adapter and place."""

    def __init__(self, names="abc", *, device="cpu"):
        super().__init__()
        self.weight = nn.ParameterDict({name: torch.ones(4, device=device) for name in names})
        self.requires_grad_(requires_grad=False)
        self.derived = 0
        self.short = 0  # how many derivations from now on run out of memory
        self.eval()

    @cached("value", adapter="name", depends_on=lambda self, name, place=0: [self.weight[name]])
    def value(self, name, place=0):
        self.derived += 1
        if self.short:
            self.short -= 1
            raise torch.OutOfMemoryError("no memory")
        return self.weight[name] * 2 + place


def held(owner, cache, *calls):
    """Which of some calls hit."""
    found = []
    for call in calls:
        before = cache.stats().hits
        owner.value(*call)
        found.append(cache.stats().hits > before)
    return found


def sums(cache):
    stats = balanced(cache)
    assert stats.max_bytes is None or stats.nbytes <= stats.max_bytes
    return stats


# Values that a backend declines


class DecliningBackend(backends.LRUBackend):
    """Says ahead that it wants nothing."""

    fails = False
    put_calls = 0

    def declines(self, _):
        if self.fails:
            raise RuntimeError("no idea")
        return True

    def put(self, key, entry):
        DecliningBackend.put_calls += 1
        wanted = self.fails or key in self._pins
        return wanted and super().put(key, entry)


@pytest.fixture(scope="module")
def declining():
    # Not when the module is imported: test_report.py imports it as well.
    backends.register("declining", DecliningBackend)
    return "declining"


def test_what_is_declined_is_derived_as_without_a_cache(declining):
    """It counts as a miss and as a rejection; it is offered once, and after each event again."""
    owner = Owner()
    before = DecliningBackend.put_calls
    with dora_cache.attach(owner, backend=declining, max_bytes=8 * SIZE) as cache:
        for _ in range(3):
            assert owner.value("a").tolist() == [2.0] * 4
        with torch.no_grad():
            owner.weight["a"].add_(1)
        assert owner.value("a").tolist() == [4.0] * 4
        stats = sums(cache)
        assert (stats.misses, stats.hits, stats.rejections, stats.stores) == (4, 0, 4, 0)
        assert cache.report().rows[0].derive > 0
        assert DecliningBackend.put_calls == before + 1
        cache.invalidate(adapter="a")
        for _ in range(3):
            owner.value("a")
        assert DecliningBackend.put_calls == before + 2
        assert owner.derived == 7
        owner.short = 2  # memory runs out: then it is the cache that makes room
        with pytest.warns(dora_cache.CacheWarning, match="out of memory"):
            assert owner.value("a").tolist() == [4.0] * 4
        assert sums(cache).misses == 8


def test_what_is_declined_is_used_once_at_each_miss():
    """The way to an entry that was evicted meanwhile is forgotten: it would ask twice each time."""

    class Fickle(backends.LRUBackend):
        asked = 0
        refuses = False

        def get(self, key):
            Fickle.asked += 1
            return super().get(key)

        def declines(self, _):
            return self.refuses

    backend = Fickle(8 * SIZE)
    owner = Owner()
    backends.register("fickle", lambda max_bytes: backend)
    with dora_cache.attach(owner, backend="fickle", max_bytes=8 * SIZE):
        for _ in range(3):
            owner.value("a")  # the last time by the shortcut
        for key in list(backend.keys()):
            backend.delete(key)
        backend.refuses = True
        owner.value("a")
        Fickle.asked = 0
        for _ in range(3):
            owner.value("a")
        assert Fickle.asked == 3


def test_pins_see_what_is_declined():
    """Values seen so far count for pin(), resize() and report(), held or not, after events too."""
    owner = Owner()
    places = range(6)
    with dora_cache.attach(owner, backend="budget", max_bytes=4 * SIZE) as cache:

        def serve(times):
            for _ in range(times):
                for name in "ab":
                    for place in places:
                        owner.value(name, place)

        serve(12)
        cache.invalidate(adapter="a")
        serve(3)
        assert sums(cache).rejections > 0
        assert cache.report().working_set == 12 * SIZE
        with pytest.raises(dora_cache.errors.PinError):
            cache.pin("a")


def test_an_adapter_that_is_pinned_is_not_declined(declining):
    """Its values are wanted, whatever they are worth."""
    owner = Owner()
    with dora_cache.attach(owner, backend=declining, max_bytes=8 * SIZE) as cache:
        cache.pin("a")
        owner.value("a")
        assert held(owner, cache, ("a",), ("b",), ("b",)) == [True, False, False]


def test_a_backend_that_cannot_tell(declining, monkeypatch):
    """It is offered the value, after one warning."""
    monkeypatch.setattr(DecliningBackend, "fails", True)
    owner = Owner()
    with dora_cache.attach(owner, backend=declining, max_bytes=8 * SIZE) as cache:
        owner.value("a")
        cache._engine.memory.backend.clear()
        result, texts = warned(lambda: owner.value("a"))
        assert result.tolist() == [2.0] * 4
        assert len(texts) == 1
        assert "the backend's declines failed" in texts[0]
        assert held(owner, cache, ("a",)) == [True]


def test_declined_on_each_device_by_itself():
    """The backend of a value's own device answers."""
    backend = PerDeviceBackend(lambda _: DecliningBackend(64), [torch.device("cpu")])
    assert not backend.declines("never put")
    entry = backends.Entry(torch.zeros(4))
    backend.place("put", entry)
    assert backend.declines("put")
    backend = PerDeviceBackend(lambda _: backends.LRUBackend(64), [torch.device("cpu")])
    backend.place("put", entry)
    assert not backend.declines("put")


# Resizing


@pytest.mark.parametrize("backend", CAPPED)
def test_resize_evicts_at_once(backend):
    """A smaller cap holds as soon as resize() returns, and a larger one is used from then on."""
    owner = Owner()
    with dora_cache.attach(owner, backend=backend, max_bytes=8 * SIZE) as cache:
        for place in range(8):
            owner.value("a", place)
        assert sums(cache).entries == 8
        cache.resize(3 * SIZE + 1)
        stats = sums(cache)
        assert (stats.entries, stats.max_bytes, stats.evictions) == (3, 3 * SIZE + 1, 5)
        cache.resize(0)
        assert sums(cache).nbytes == 0
        cache.resize(f"{2 * SIZE}")
        owner.value("a", 0)
        owner.value("a", 1)
        assert held(owner, cache, ("a", 0), ("a", 1)) == [True, True]
        assert sums(cache).max_bytes == 2 * SIZE


def test_resize_to_a_share_of_the_free_memory():
    """A share is of what is free now."""
    owner = Owner()
    with dora_cache.attach(owner, backend="lru", max_bytes=SIZE) as cache:
        cache.resize("10%")
        assert cache.stats().max_bytes > 2**20


@pytest.mark.parametrize("wrong", ["1,5GB", "-1", -1, 1.5, "0%", "much"])
def test_resize_to_what_is_no_size(wrong):
    """What is no size is an error that shows what to write, and changes nothing."""
    with dora_cache.attach(Owner(), backend="lru", max_bytes=SIZE) as cache:
        with pytest.raises(dora_cache.ConfigError, match='write bytes like 268435456, or "256MiB"'):
            cache.resize(wrong)
        assert cache.stats().max_bytes == SIZE


@pytest.mark.parametrize("backend", ["dict", "null"])
def test_resize_without_a_cap(backend):
    """A backend without a cap says which to take."""
    with (
        dora_cache.attach(Owner(), backend=backend) as cache,
        pytest.raises(dora_cache.ConfigError, match='backend="budget", max_bytes="1 KiB"'),
    ):
        cache.resize("1KiB")


def test_resize_after_detach():
    """A detached cache cannot be resized or pinned."""
    cache = dora_cache.attach(Owner(), backend="lru", max_bytes=SIZE)
    cache.detach()
    for act in (lambda: cache.resize(1), lambda: cache.pin("a"), lambda: cache.unpin("a")):
        with pytest.raises(dora_cache.DetachedError):
            act()


def test_resize_follows_on_the_host():
    """The cpu backend's cap is the host's, and changes as the others' do."""
    owner = Owner()
    with dora_cache.attach(owner, backend="cpu", max_bytes=4 * SIZE) as cache:
        for place in range(4):
            owner.value("a", place)
        cache.resize(SIZE)
        assert (sums(cache).entries, cache.stats().max_bytes) == (1, SIZE)


def test_resize_gives_a_cap_to_what_had_none():
    """The cpu backend may begin unbounded; then it cannot keep pins."""
    owner = Owner()
    with dora_cache.attach(owner, backend="cpu") as cache:
        for place in range(4):
            owner.value("a", place)
        cache.pin("a")
        with pytest.raises(dora_cache.ConfigError, match='backend="budget" or "lru"'):
            cache.resize(2 * SIZE)
        assert sums(cache).entries == 4
        cache.unpin("a")
        cache.resize(2 * SIZE)
        assert (sums(cache).entries, cache.stats().max_bytes) == (2, 2 * SIZE)


class Buffer:
    """What compiled code reads, as far as the cap is concerned."""

    def __init__(self, adapter):
        self.adapters = (adapter,)
        self.nbytes = 0

    def drop(self):
        self.nbytes = 0

    def void(self):
        """Nothing to void."""

    def derived_from(self, storages):
        return False


def with_buffers(cache, owner, **sizes):
    """Let compiled code hold bytes for adapters."""
    (binding,) = cache._engine.bindings.values()
    made = {}
    for adapter, size in sizes.items():
        made[adapter] = Buffer(adapter)
        cache._engine.buffers.follow(binding, adapter, made[adapter])
        assert cache._engine.buffers.reserve(made[adapter], size, torch.device("cpu"))
    return made


@pytest.mark.parametrize("backend", [*CAPPED, "cpu"])
def test_resize_counts_what_compiled_code_reads(backend):
    """Entries make room for buffers under the new cap; buffers go where even they do not fit."""
    owner = Owner()
    with dora_cache.attach(owner, backend=backend, max_bytes=8 * SIZE) as cache:
        for place in range(8):
            owner.value("a", place)
        buffers = with_buffers(cache, owner, a=SIZE, b=SIZE)
        assert sums(cache).entries == 6
        cache.resize(4 * SIZE)
        assert (sums(cache).entries, cache.stats().nbytes) == (2, 4 * SIZE)
        for place in range(8):
            owner.value("a", place)
            assert sums(cache).nbytes <= 4 * SIZE
        cache.resize(SIZE + SIZE // 2)
        assert sorted(buffer.nbytes for buffer in buffers.values()) == [0, SIZE]
        assert sums(cache).entries == 0
        cache.resize(3)
        assert [buffer.nbytes for buffer in buffers.values()] == [0, 0]
        assert sums(cache).nbytes == 0
        cache.resize(8 * SIZE)
        for place in range(8):
            owner.value("a", place)
        assert sums(cache).entries == 8


# Pins


@pytest.mark.parametrize("backend", CAPPED)
def test_a_pinned_adapter_stays(backend):
    """Its entries are still there after any number of others', those derived later as well."""
    owner = Owner()
    with dora_cache.attach(owner, backend=backend, max_bytes=4 * SIZE) as cache:
        owner.value("a", 0)
        assert cache.pin("a") == 1
        owner.value("a", 1)
        for _ in range(3):
            for place in range(10):
                owner.value("b", place)
                sums(cache)
        assert held(owner, cache, ("a", 0), ("a", 1)) == [True, True]
        assert cache.pins == ("a",)


@pytest.mark.parametrize("backend", CAPPED)
def test_unpinned_entries_can_be_evicted_again(backend):
    """After unpin() they are entries as any other."""
    owner = Owner()
    with dora_cache.attach(owner, backend=backend, max_bytes=2 * SIZE) as cache:
        cache.pin("a")
        owner.value("a", 0)
        owner.value("a", 1)
        owner.value("b", 0)
        assert held(owner, cache, ("b", 0)) == [False]
        cache.unpin("a")
        cache.unpin("a")
        for _ in range(50):
            owner.value("b", 0)
        assert held(owner, cache, ("b", 0)) == [True]
        assert cache.pins == ()


@pytest.mark.parametrize("backend", CAPPED)
def test_events_drop_pinned_entries_and_the_pin_stays(backend):
    """A pinned value that no longer holds is not used; the one derived then is pinned again."""
    owner = Owner()
    with dora_cache.attach(owner, backend=backend, max_bytes=2 * SIZE) as cache:
        cache.pin("a")
        owner.value("a")
        owner.weight["a"].fill_(3)
        assert owner.value("a").tolist() == [6.0] * 4
        assert cache.invalidate(adapter="a") == 1
        assert sums(cache).entries == 0
        owner.value("a")
        for place in range(20):
            owner.value("b", place)
        assert held(owner, cache, ("a",)) == [True]


@pytest.mark.parametrize("backend", CAPPED)
def test_pins_above_the_cap_are_an_error(backend):
    """What has been seen of the adapters decides, held or not, and nothing is pinned then."""
    owner = Owner()
    with dora_cache.attach(owner, backend=backend, max_bytes=3 * SIZE) as cache:
        for name in "ab":
            for place in range(2):
                owner.value(name, place)
        cache.pin("a")
        with pytest.raises(dora_cache.PinError, match=r"'a', 'b' take 64 bytes .* unpin\(\) one"):
            cache.pin("b")
        assert cache.pins == ("a",)
        with pytest.raises(dora_cache.PinError, match=r"resize\(\) to a larger cap"):
            cache.resize(SIZE)
        assert cache.stats().max_bytes == 3 * SIZE
        cache.resize(4 * SIZE)
        cache.pin("b")


@pytest.mark.parametrize("backend", CAPPED)
def test_a_pinned_value_that_does_not_fit_is_derived(backend):
    """At run time pins above the cap cost recomputations, never an inference."""
    owner = Owner()
    with dora_cache.attach(owner, backend=backend, max_bytes=2 * SIZE) as cache:
        cache.pin("a")
        for _ in range(3):
            for place in range(4):
                assert owner.value("a", place).tolist() == [2.0 + place] * 4
                sums(cache)
        assert held(owner, cache, ("a", 0), ("a", 1)) == [True, True]
        assert cache.stats().rejections > 0


def test_pins_leave_room_to_compiled_code_and_take_it_from_none():
    """A buffer that pinned entries have no room for stays empty; a pin counts the buffers."""
    owner = Owner()
    with dora_cache.attach(owner, backend="lru", max_bytes=4 * SIZE) as cache:
        for place in range(2):
            owner.value("a", place)
        cache.pin("a")
        with_buffers(cache, owner, b=2 * SIZE)
        (binding,) = cache._engine.bindings.values()
        late = Buffer("c")
        cache._engine.buffers.follow(binding, "c", late)
        assert not cache._engine.buffers.reserve(late, SIZE, torch.device("cpu"))
        assert held(owner, cache, ("a", 0), ("a", 1)) == [True, True]
        owner.value("c")
        with pytest.raises(dora_cache.PinError):
            cache.pin("c")


def test_pins_where_nothing_is_evicted():
    """An unbounded backend keeps everything, so that a pin is granted; null keeps nothing."""
    owner = Owner()
    with dora_cache.attach(owner) as cache:
        owner.value("a")
        assert cache.pin("a") == 1
        assert cache.pins == ("a",)
    with (
        dora_cache.attach(owner, backend="null") as cache,
        pytest.raises(dora_cache.ConfigError, match="'null' cannot be told what to keep"),
    ):
        cache.pin("a")


def test_a_pin_of_an_unknown_adapter():
    """A typing error is told, with the names there are."""
    model = dora_model(adapters=("first", "second"))
    with dora_cache.attach(model, backend="lru", max_bytes=1000) as cache:
        with pytest.raises(
            dora_cache.AdapterNotFoundError, match=r"no .* 'frist'; adapters are: 'first', 'second'"
        ):
            cache.pin("frist")
        cache.pin("first")
        assert cache.warm(["first"]) == 1


def test_pins_of_a_peft_model():
    """One adapter is pinned, many others are served, and it always hits."""
    names = [f"n{index}" for index in range(6)]
    model = dora_model(adapters=names)
    x = sample("linear")
    with dora_cache.attach(model, backend="lru", max_bytes=100) as cache:
        cache.warm(["n0"])
        cache.pin("n0")
        for name in names[1:] * 3:
            activate(model, name)
            run(model, x)
        activate(model, "n0")
        before = cache.stats().misses
        result = run(model, x)
        assert cache.stats().misses == before
        with cache.bypass():
            assert torch.equal(result, run(model, x))


# Memory that does not suffice


def warned(action):
    """Run something; return its result and the cache's warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = action()
    return result, [str(w.message) for w in caught if w.category is dora_cache.CacheWarning]


def test_out_of_memory_evicts_and_derives_again():
    """The first failure costs the entries that may be evicted, one warning, and no output."""
    owner = Owner()
    with dora_cache.attach(owner, backend="lru", max_bytes=10 * SIZE) as cache:
        for name in "ab":
            owner.value(name)
        cache.pin("b")
        owner.short = 1
        result, texts = warned(lambda: owner.value("c"))
        assert result.tolist() == [2.0] * 4
        (text,) = texts
        assert "ran out of memory on cpu" in text
        assert "a smaller cap leaves more room" in text
        assert held(owner, cache, ("c",), ("b",), ("a",)) == [True, True, False]
        assert sums(cache).evictions == 1
        owner.short = 1
        assert warned(lambda: owner.value("c", 1))[1] == []


def test_out_of_memory_twice_derives_without_storing():
    """Then everything on the device goes, pinned entries and buffers too, and nothing is stored."""
    owner = Owner()
    with dora_cache.attach(owner, backend="lru", max_bytes=10 * SIZE) as cache:
        owner.value("b")
        cache.pin("b")
        buffers = with_buffers(cache, owner, a=SIZE)
        owner.short = 2
        result, texts = warned(lambda: owner.value("c"))
        assert result.tolist() == [2.0] * 4
        assert len(texts) == 1
        assert (buffers["a"].nbytes, sums(cache).nbytes) == (0, 0)
        assert held(owner, cache, ("c",), ("c",)) == [False, True]
        assert cache.pins == ("b",)


def test_out_of_memory_thrice_is_the_callers():
    """The error that PEFT would have raised comes through, and the next call tries again."""
    owner = Owner()
    with dora_cache.attach(owner) as cache:
        owner.short = 3
        with pytest.warns(dora_cache.CacheWarning), pytest.raises(torch.OutOfMemoryError):
            owner.value("c")
        assert owner.derived == 3
        assert owner.value("c").tolist() == [2.0] * 4
        sums(cache)


def test_entries_on_other_devices_stay():
    """Where a device's memory does not suffice, those of other devices would not help."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.here, self.there = Owner("a"), Owner("a", device="meta")

    model = Two().eval()
    with dora_cache.attach(model) as cache:
        model.there.value("a")
        model.here.value("a")
        model.here.short = 1
        with pytest.warns(dora_cache.CacheWarning, match="on cpu"):
            model.here.value("a", 1)
        assert held(model.there, cache, ("a",)) == [True]
        assert held(model.here, cache, ("a",)) == [False]


def test_what_failed_is_freed_before_it_is_tried_again():
    """No reference to a failed attempt's tensors is left when the next begins."""
    import weakref

    class Hungry(Owner):
        pieces: ClassVar[list] = []

        @cached("hungry", depends_on=lambda self: [self.weight["a"]])
        def hungry(self):
            assert not any(piece() is not None for piece in self.pieces)
            large = torch.zeros(8)
            self.pieces.append(weakref.ref(large))
            if self.short:
                self.short -= 1
                raise torch.OutOfMemoryError("no memory")
            return large[:4] + 1

    owner = Hungry()
    owner.short = 2
    with dora_cache.attach(owner), pytest.warns(dora_cache.CacheWarning):
        assert owner.hungry().tolist() == [1.0] * 4
    assert len(owner.pieces) == 3


def test_out_of_memory_while_storing():
    """A backend that needs memory for a copy gets it from the other entries."""

    class Copying(backends.LRUBackend):
        short = 0

        def put(self, key, entry):
            if Copying.short:
                Copying.short -= 1
                raise torch.OutOfMemoryError("no memory")
            return super().put(key, entry)

    backends.register("copying-lru", Copying)
    owner = Owner()
    with dora_cache.attach(owner, backend="copying-lru", max_bytes=10 * SIZE) as cache:
        owner.value("a")
        Copying.short = 1
        result, texts = warned(lambda: owner.value("b"))
        assert result.tolist() == [2.0] * 4
        assert len(texts) == 1
        assert "storing a value ran out of memory" in texts[0]
        assert held(owner, cache, ("b",), ("a",)) == [True, False]
        Copying.short = 2
        result, texts = warned(lambda: owner.value("c"))
        assert "the backend's put failed" in texts[0]
        assert owner.derived == 4
        sums(cache)


def test_out_of_memory_while_taking_a_view_apart(monkeypatch):
    """A value that had to be copied to be stored is returned as it is, not derived again."""

    class Views(Owner):
        @cached("view", depends_on=lambda self: [self.weight["a"]])
        def view(self):
            self.derived += 1
            return torch.ones(8)[:4]

    from dora_cache.core import deriver

    def no_room(value, storages):
        raise torch.OutOfMemoryError("no memory")

    owner = Views()
    with dora_cache.attach(owner) as cache:
        owner.value("a")
        monkeypatch.setattr(deriver, "storable", no_room)
        with pytest.warns(dora_cache.CacheWarning):
            assert owner.view().tolist() == [1.0] * 4
        assert owner.derived == 2
        assert sums(cache).entries == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_that_is_too_small():
    """An unbounded cache fills the memory there is: right outputs, one warning, and it goes on."""
    from peft import get_peft_model

    names = [f"n{index}" for index in range(8)]
    layers = [str(index) for index in range(4)]
    with quiet():
        model = nn.Sequential(*[nn.Linear(2048, 2048) for _ in layers])
        model = get_peft_model(model, loha_config(targets=layers), adapter_name=names[0])
        for name in names[1:]:
            model.add_adapter(name, loha_config(targets=layers))
    model = model.cuda().eval()
    x = torch.randn(4, 2048, device="cuda")
    expected = {}
    for name in names:
        activate(model, name)
        expected[name] = run(model, x)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    # Every value has 16 MiB, and deriving one takes a few times that; all together have 512 MiB.
    room = torch.cuda.memory_reserved() + 160 * 2**20
    torch.cuda.set_per_process_memory_fraction(room / total)
    try:
        with dora_cache.attach(model) as cache:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                for name in names * 2:
                    activate(model, name)
                    for _ in range(2):
                        assert torch.equal(run(model, x), expected[name])
            assert len([w for w in caught if w.category is dora_cache.CacheWarning]) == 1
            assert sums(cache).evictions > 0
            assert cache.stats().hits > 0
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


# A cap for each device


class Spanning(nn.Module):
    """Half of it is on another device; the meta device stands in for one."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Owner(), Owner(device="meta")
        self.eval()


@pytest.fixture
def spanning(monkeypatch):
    devices = [torch.device("cpu"), torch.device("meta")]
    monkeypatch.setattr(attachment, "_devices", lambda target: devices)
    return Spanning()


@pytest.mark.parametrize("backend", CAPPED)
def test_each_device_has_the_cap(spanning, backend):
    """A model that spans devices may hold that much on each, and no more on any."""
    with dora_cache.attach(spanning, backend=backend, max_bytes=2 * SIZE) as cache:
        for place in range(4):
            spanning.first.value("a", place)
            spanning.second.value("a", place)
        stats = sums(cache)
        assert (stats.entries, stats.nbytes, stats.max_bytes) == (4, 4 * SIZE, 4 * SIZE)
        assert cache.report().caps == (
            ("cpu", 2 * SIZE, 2 * SIZE),
            ("meta", 2 * SIZE, 2 * SIZE),
        )
        cache.resize(SIZE)
        assert [part[1:] for part in cache.report().caps] == [(SIZE, SIZE)] * 2


def test_pins_and_buffers_go_by_device(spanning):
    """What one device has no room for, the other has."""
    with dora_cache.attach(spanning, backend="lru", max_bytes=2 * SIZE) as cache:
        for owner in (spanning.first, spanning.second):
            owner.value("a")
        cache.pin("a")
        buffer = Buffer("b")
        assert cache._engine.buffers.reserve(buffer, SIZE, torch.device("cpu"))
        assert not cache._engine.buffers.reserve(Buffer("b"), SIZE, torch.device("cpu"))
        assert cache._engine.buffers.reserve(Buffer("b"), SIZE, torch.device("meta"))
        for owner in (spanning.first, spanning.second):
            for place in range(3):
                owner.value("b", place)
            assert held(owner, cache, ("a",)) == [True]
        sums(cache)


def test_a_share_is_of_each_devices_memory(spanning, monkeypatch):
    """Ten per cent means of what is free on the device that holds the entries."""
    from dora_cache.core import memory

    free = {"cpu": 1000, "meta": 500}

    def resolve(size, device):
        return int(free[device.type] * float(size.rstrip("%")) / 100)

    monkeypatch.setattr(memory, "resolve_size", resolve)
    with dora_cache.attach(spanning, backend="lru", max_bytes="10%") as cache:
        assert [part[2] for part in cache.report().caps] == [100, 50]
        cache.resize("20%")
        assert [part[2] for part in cache.report().caps] == [200, 100]


@pytest.mark.parametrize(
    "settings", [{}, {"backend": "cpu", "max_bytes": 2 * SIZE}], ids=["dict", "cpu"]
)
def test_one_backend_where_no_cap_is_a_devices(spanning, settings):
    """Without a cap, or with one of host memory, there is nothing to divide."""
    with dora_cache.attach(spanning, **settings) as cache:
        assert not isinstance(cache._engine.memory.backend, PerDeviceBackend)


def test_a_model_on_one_device_has_one_backend():
    """The router is only for models that span devices."""
    with dora_cache.attach(Owner(), backend="lru", max_bytes=SIZE) as cache:
        assert type(cache._engine.memory.backend) is backends.LRUBackend


def test_a_device_that_comes_later(spanning):
    """A part that moves to a third device gets a cap there, the one set last."""
    with dora_cache.attach(spanning, backend="lru", max_bytes=4 * SIZE) as cache:
        cache.resize(2 * SIZE)
        part = cache._engine.memory.part(torch.device("cuda", 7))
        assert part.limit == 2 * SIZE
        assert cache.stats().max_bytes == 6 * SIZE


def test_a_key_moves_between_devices():
    """The older entry goes from the device it was on."""
    made = {}

    def make(device):
        made[device.type] = backends.LRUBackend(100)
        return made[device.type]

    router = PerDeviceBackend(make, [torch.device("cpu")])
    assert router.put("key", backends.Entry(torch.ones(2)))
    assert router.put("key", backends.Entry(torch.ones(2, device="meta")))
    assert (len(made["cpu"]), len(made["meta"]), len(router)) == (0, 1, 1)
    assert router.get("key").value.is_meta
    assert router.delete("key")
    assert not router.delete("key")
    assert router.nbytes == 0


def test_backends_of_devices_made_later_report_as_well():
    """Whoever is told of evictions is told of those on every device."""
    reported = []
    backend = PerDeviceBackend(lambda _: backends.LRUBackend(16), [])
    backend.on_evict(reported.append)
    for key in "ab":
        assert backend.put(key, backends.Entry(torch.zeros(4)))
    assert backend.put("c", backends.Entry(torch.zeros(4, device="meta")))
    assert reported == ["a"]


class PerDeviceMachine(BackendConformance):
    """All entries of the machine are on one device, whose backend decides."""

    def make_backend(self):
        caps = {"cpu": 4096, "meta": 100}
        devices = [torch.device("meta"), torch.device("cpu")]
        return PerDeviceBackend(lambda one: backends.LRUBackend(caps[one.type]), devices)


class UnboundedPerDeviceMachine(BackendConformance):
    def make_backend(self):
        return PerDeviceBackend(lambda _: backends.DictBackend(), [torch.device("meta")])


TestPerDevice = pytest.mark.machine(PerDeviceMachine.TestCase)
TestUnboundedPerDevice = pytest.mark.machine(UnboundedPerDeviceMachine.TestCase)
