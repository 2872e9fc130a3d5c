"""A server that lives long: adapters and layers that go leave nothing behind."""

import gc
import time
import weakref
from collections import Counter

import pytest
import torch
from depth import thinned
from hypothesis import settings as hypothesis_settings
from peft import HRAConfig, LoHaConfig, LoraConfig, OFTConfig, get_peft_model
from torch import nn

import dora_cache

X = torch.ones(1, 8)
TARGETS = {"target_modules": ["0", "1"]}
CONFIGS = {
    "DoRA": LoraConfig(use_dora=True, r=2, init_lora_weights=False, **TARGETS),
    "LoHa": LoHaConfig(r=2, init_weights=False, **TARGETS),
    "OFT": OFTConfig(oft_block_size=4, init_weights=False, **TARGETS),
    "HRA": HRAConfig(r=2, init_weights=False, **TARGETS),
}
BACKENDS = {"dict": {}, "lru": {"max_bytes": 10_000}, "budget": {"max_bytes": 10_000}, "cpu": {}}
PAIRS = [
    pytest.param(kind, backend, id=f"{kind}-{backend}") for kind in CONFIGS for backend in BACKENDS
]


def cycles():
    return 2000 if hypothesis_settings.get_current_profile_name() == "deep" else 40


def make(config):
    torch.manual_seed(0)
    return get_peft_model(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), config).eval()


def serve(model, name, config):
    """Add an adapter, use it, and delete it."""
    model.add_adapter(name, config)
    model.eval()
    model.set_adapter(name)
    model(X), model(X)
    model.set_adapter("default")
    model.delete_adapter(name)
    model(X)


def living():
    gc.collect()
    return Counter(type(one).__name__ for one in gc.get_objects())


@pytest.mark.parametrize(
    ("kind", "backend"), thinned(PAIRS, lambda kind, backend: "DoRA" in kind or backend == "budget")
)
def test_deleted_adapters_leave_nothing(kind, backend):
    """After many adapters there are as many objects as after a few, and the report is as long."""
    config = CONFIGS[kind]
    model = make(config)
    with dora_cache.attach(model, backend=backend, **BACKENDS[backend]) as cache, torch.no_grad():
        for index in range(10):
            serve(model, f"early{index}", config)
        report = cache.report()
        living()  # the first time, counting itself leaves references behind
        before = living()
        count = cycles()
        for index in range(count):
            serve(model, f"xyzzy{index}", config)
        # budget remembers what keys were worth, of so many at most.
        bounded = {"_Known", "tuple"} if backend == "budget" else set()
        grown = {name: n - before[name] for name, n in living().items() if name not in bounded}
        # What PyTorch and PEFT remember themselves grows now and then, not with each adapter.
        assert all(n < 2 * count for n in grown.values()), grown
        after = cache.report()
        assert len(after.rows) == len(report.rows)
        assert {row.adapter for row in after.rows} <= {"default", None}
        assert "xyzzy" not in str(after)
        assert "xyzzy" not in repr(vars(cache))
        assert after.stats.lookups > report.stats.lookups + 4 * count


def test_lookups_of_departed_adapters_stay_counted():
    """The counters are sums over all time, the derivation's own as well."""
    config = CONFIGS["DoRA"]
    model = make(config)
    with dora_cache.attach(model) as cache, torch.no_grad():
        for index in range(5):
            serve(model, f"a{index}", config)
        stats = cache.stats()
        # Each adapter: two forwards of its own, one of the default's, over two layers.
        assert (stats.hits, stats.misses) == (5 * 2 + 4 * 2, 5 * 2 + 2)
        assert stats.stores == stats.entries + stats.invalidations + stats.replacements


def test_a_pin_goes_with_its_adapter():
    """A pin of an adapter that no layer has any more is no pin."""
    config = CONFIGS["DoRA"]
    model = make(config)
    model.add_adapter("b", config)
    with dora_cache.attach(model, backend="lru", max_bytes=10_000) as cache:
        cache.pin("b")
        model.base_model.model[0].delete_adapter("b")
        assert cache.pins == ("b",)
        model.base_model.model[1].delete_adapter("b")
        assert cache.pins == ()


def test_layers_that_go_leave_nothing():
    """unload() takes the layers out of the model; nothing of them is kept."""
    model = make(CONFIGS["DoRA"])
    cache = dora_cache.attach(model)
    with torch.no_grad():
        model(X)
    layers = [weakref.ref(layer) for layer in model.base_model.model]
    base = model.unload()
    del model
    gc.collect()
    assert base(X).shape == X.shape
    assert [layer() for layer in layers] == [None, None]
    assert cache.stats().entries == 0
    assert cache.report().rows == ()
    assert not list(cache._engine.cells)
    cache.detach()


def test_an_adapter_deleted_while_its_value_is_derived_is_not_stored():
    """The deletion wins, and nothing is left of the name."""

    class Rotation(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.ParameterDict({"a": torch.ones(2)})
            self.during = lambda: None

        @dora_cache.cached(
            "rotation", adapter="name", depends_on=lambda self, name: [self.weight[name]]
        )
        def rotation(self, name):
            found = self.weight[name].detach() * 2
            self.during()
            return found

    owner = Rotation().eval()
    with dora_cache.attach(owner) as cache, torch.no_grad():
        binding = owner.__dict__["_dora_cache_binding"]
        owner.during = lambda: cache._engine.adapter_deleted(binding, "a")
        owner.rotation("a")
        assert cache.stats().entries == 0
        owner.during = lambda: None
        owner.rotation("a"), owner.rotation("a")
        assert cache.stats().hits == 1


def test_the_counters_take_no_longer_for_adapters_that_are_gone():
    """stats() costs what the values that are there cost, so nothing much here."""
    config = CONFIGS["DoRA"]
    model = make(config)
    with dora_cache.attach(model) as cache, torch.no_grad():
        for index in range(cycles()):
            serve(model, f"a{index}", config)
        assert len(list(cache._engine.cells)) == 2


def measure(count):
    """Print live objects, report rows and the time of stats() before and after many cycles."""
    config = CONFIGS["DoRA"]
    model = make(config)
    with dora_cache.attach(model) as cache, torch.no_grad():
        for index in range(count):
            serve(model, f"a{index}", config)
            if index + 1 in {10, count}:
                times = []
                for _ in range(200):
                    began = time.perf_counter()
                    cache.stats()
                    times.append(time.perf_counter() - began)
                objects, rows = sum(living().values()), len(cache.report().rows)
                micros = 1e6 * sorted(times)[100]
                print(f"{index + 1} cycles: {objects} objects, {rows} rows, {micros:.1f} us")


if __name__ == "__main__":
    measure(10_000)
