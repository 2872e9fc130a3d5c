"""A failing backend costs recomputations and warnings, never an output."""

import random
import warnings

import pytest
import torch
from torch import nn
from zoo import activate, dora_model, run, sample

import dora_cache
from dora_cache import backends, cached


class Flaky:
    """A dictionary that raises on some of its calls."""

    def __init__(self, rate=1.0, operations="get,put,delete,keys,len,nbytes,clear", seed=0):
        self.inner = backends.DictBackend()
        self.rate = rate
        self.operations = operations.split(",")
        self.random = random.Random(seed)

    def _maybe(self, operation):
        if operation in self.operations and self.random.random() < self.rate:
            raise OSError(f"{operation} failed")

    @property
    def max_bytes(self):
        return None

    @property
    def nbytes(self):
        self._maybe("nbytes")
        return self.inner.nbytes

    def on_evict(self, evicted):
        self.inner.on_evict(evicted)

    def get(self, key):
        self._maybe("get")
        return self.inner.get(key)

    def put(self, key, entry):
        if self.random.random() < 0.5:
            self._maybe("put")
            return self.inner.put(key, entry)
        self.inner.put(key, entry)  # kept, and then the failure
        self._maybe("put")
        return True

    def delete(self, key):
        self._maybe("delete")
        return self.inner.delete(key)

    def clear(self):
        self._maybe("clear")
        self.inner.clear()

    def keys(self):
        self._maybe("keys")
        return self.inner.keys()

    def __len__(self):
        self._maybe("len")
        return len(self.inner)

    def close(self):
        self.inner.close()


class Liar(Flaky):
    """Gives back another key's entry as often as the right one."""

    def __init__(self):
        super().__init__(rate=0.0)

    def get(self, key):
        choices = [self.inner.get(other) for other in self.inner.keys()]
        return self.random.choice([None, *choices])


class Silent(backends.LRUBackend):
    """Evicts, and reports nothing."""

    def on_evict(self, evicted):
        pass


class Chatty(backends.LRUBackend):
    """Reports as evicted whatever is asked for, held or not, and what is no key."""

    def get(self, key):
        for reported in (key, "no such key", ["no key at all"]):
            self._evicted(reported)
        return super().get(key)


backends.register("silent", Silent)
backends.register("chatty", Chatty)
backends.register("flaky", Flaky)
backends.register("liar", Liar)


@pytest.mark.parametrize("operation", ["get", "put", "delete", "keys", "len", "nbytes"])
def test_one_warning_per_cause_and_right_outputs(operation):
    """A backend that always fails in one operation warns once, and outputs stay right."""
    model = dora_model(adapters=("first", "second"))
    x = sample("linear")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = dora_cache.CacheConfig(backend="flaky", options={"operations": operation})
        with dora_cache.attach(model, config) as cache:
            for _ in range(4):
                for adapter in ("first", "second"):
                    activate(model, adapter)
                    result = run(model, x)
                    with cache.bypass():
                        assert torch.equal(result, run(model, x))
                with torch.no_grad():
                    model.base_model.model.layer.lora_A["first"].weight.mul_(1.1)
                cache.invalidate(adapter="second")
            cache.stats()
    causes = [str(w.message) for w in caught if w.category is dora_cache.CacheWarning]
    assert len(causes) == len(set(causes))
    assert all(f"backend's {operation} failed" in cause for cause in causes)
    assert causes or operation in {"keys"}


def test_random_failures_over_many_forwards():
    """At one failure in ten calls, ten thousand forwards with changes in between are all right."""
    model = dora_model(adapters=("first", "second"))
    x = sample("linear")
    weight = model.base_model.model.layer.lora_A["first"].weight
    generator = random.Random(1)
    config = dora_cache.CacheConfig(backend="flaky", options={"rate": 0.1})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with dora_cache.attach(model, config) as cache:
            for _ in range(10_000):
                activate(model, generator.choice(("first", "second")))
                if generator.random() < 0.1:
                    with torch.no_grad():
                        weight.mul_(generator.choice((0.9, 1.1)))
                if generator.random() < 0.1:
                    cache.invalidate(adapter=generator.choice(("first", "second")))
                result = run(model, x)
                with cache.bypass():
                    assert torch.equal(result, run(model, x))
            hits = cache.stats().hits
    assert hits > 3000


def test_a_backend_that_mixes_up_its_entries():
    """An entry that is not the key's own is recognised by its stamp."""
    model = dora_model(adapters=("first", "second"))
    x = sample("linear")
    with dora_cache.attach(model, backend="liar") as cache:
        for adapter in ("first", "second") * 20:
            activate(model, adapter)
            result = run(model, x)
            with cache.bypass():
                assert torch.equal(result, run(model, x))


class Numbered(nn.Module):
    """Derives a value for each number, from one weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4), requires_grad=False)
        self.eval()

    @cached("numbered", depends_on=lambda self, number: [self.weight])
    def numbered(self, number):
        return self.weight * number


def test_a_backend_that_does_not_report_what_it_evicts():
    """Outputs are right, what is found missing counts as evicted, and little is remembered."""
    owner = Numbered()
    with dora_cache.attach(owner, backend="silent", max_bytes=4 * 16) as cache:
        for number in range(4):
            owner.numbered(number)
        owner.numbered(4)
        assert owner.numbered(0).tolist() == [0.0] * 4  # asked for and not there
        assert cache.stats().evictions == 1
        for number in range(1000):
            assert owner.numbered(number).tolist() == [float(number)] * 4
        (binding,) = cache._engine.bindings.values()
        held = cache._engine.cells.held()
        assert max(len(held), len(binding.shortcuts)) < 100
        with torch.no_grad():
            owner.weight.mul_(2)
        assert owner.numbered(999).tolist() == [1998.0] * 4
        assert len(cache._engine.memory.backend) <= 4
    assert cache.stats().entries == 0


def test_a_backend_that_reports_what_it_has_not_evicted():
    """It costs recomputations, and one warning for what is no key at all."""
    owner = Numbered()
    with (
        dora_cache.attach(owner, backend="chatty", max_bytes=4 * 16),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        for number in (1, 1, 2, 1, 2, 2, 3, 4, 5, 6, 1):
            assert owner.numbered(number).tolist() == [float(number)] * 4
        with torch.no_grad():
            owner.weight.mul_(2)
        assert owner.numbered(1).tolist() == [2.0] * 4
    assert [str(one.message) for one in caught if "report of an eviction" in str(one.message)]
    assert len(caught) == 1


def test_running_out_of_memory_in_the_backend():
    """A backend that cannot allocate costs a recomputation."""

    class Full(backends.DictBackend):
        def put(self, key, entry):
            raise torch.OutOfMemoryError("no memory left")

    backends.register("full", Full)
    model = dora_model()
    x = sample("linear")
    expected = run(model, x)
    with dora_cache.attach(model, backend="full") as cache:
        with pytest.warns(dora_cache.CacheWarning, match="put failed"):
            assert torch.equal(run(model, x), expected)
        assert torch.equal(run(model, x), expected)
        assert cache.stats().misses == 2


def test_warnings_as_errors_break_no_inference():
    """With warnings turned into errors, a failing backend still costs a recomputation only."""
    model = dora_model()
    x = sample("linear")
    expected = run(model, x)
    config = dora_cache.CacheConfig(backend="flaky", options={"operations": "put,delete"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with dora_cache.attach(model, config):
            for _ in range(3):
                assert torch.equal(run(model, x), expected)


def test_a_warning_handler_may_ask_the_cache(monkeypatch):
    """Warnings are shown outside the lock, so that a handler can call the cache."""
    model = dora_model()
    seen = []
    config = dora_cache.CacheConfig(backend="flaky", options={"operations": "get"})
    with warnings.catch_warnings(), dora_cache.attach(model, config) as cache:
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", lambda *_, **__: seen.append(cache.stats()))
        run(model, sample("linear"))
    assert len(seen) == 1


def test_a_backend_that_does_not_delete():
    """What has been dropped is not used again, even if the backend still has it."""
    model = dora_model()
    x = sample("linear")
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    config = dora_cache.CacheConfig(backend="flaky", options={"operations": "delete"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with dora_cache.attach(model, config) as cache:
            for _ in range(3):
                for weight in weights:
                    weight.grad = torch.ones_like(weight)
                # No version counter shows this step.
                torch.optim.SGD(weights, lr=0.1, fused=True).step()
                model.zero_grad()
                for _ in range(3):
                    result = run(model, x)
                    with cache.bypass():
                        assert torch.equal(result, run(model, x))
