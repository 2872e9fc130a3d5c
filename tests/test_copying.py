"""Copies and pickles: of a cache, of what holds one, and of what a cache is made of."""

import copy
import dataclasses
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from service import Service
from torch import nn
from zoo import dora_model, run, sample

import dora_cache
from dora_cache import backends
from dora_cache.attributes import SLOT
from dora_cache.core import facts
from dora_cache.core.decorator import MARK

COPY = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda one: pickle.loads(pickle.dumps(one)),
}
DEEP = {name: COPY[name] for name in ("deepcopy", "pickle")}


def survives(script):
    """Run a script in a process of its own: where memory is freed twice, that one is killed."""
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join(map(str, sys.path)), "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parent,
    )
    assert found.returncode == 0, f"exit status {found.returncode}\n{found.stderr}"


# What holds model and cache


def test_a_service_is_copied_with_a_plain_model_and_a_detached_cache():
    """deepcopy, AveragedModel, pickle and torch.save work; copies follow their own weights."""
    survives(
        """
        import copy, gc, io, pickle, torch
        from torch.optim.swa_utils import AveragedModel
        from service import Service
        from zoo import dora_model, sample
        import dora_cache

        def saved(service):
            file = io.BytesIO()
            torch.save(service, file)
            file.seek(0)
            return torch.load(file, weights_only=False)

        def averaged(service):
            return AveragedModel(service).module

        COPIES = (
            copy.deepcopy, averaged, lambda one: pickle.loads(pickle.dumps(one)), saved,
            lambda one: copy.deepcopy([one, {"again": one}])[1]["again"],
        )
        torch.manual_seed(0)
        torch.set_num_threads(1)
        x = sample("linear")
        plain = [type(part) for part in dora_model(adapters=("first", "second")).modules()]
        for settings in (
            {}, {"guard": "content"}, {"backend": "lru", "max_bytes": "1MiB"},
            {"backend": "budget", "max_bytes": "1MiB"},
            {"backend": "cpu", "device_bytes": "1MiB"},
        ):
            service = Service(**settings).eval()
            for _ in range(3):
                expected = service(x)
            entries = service.cache.stats().entries
            assert entries == 1
            copies = [make(service) for make in COPIES]
            gc.collect()
            for other in copies:
                assert torch.equal(other(x), expected)
                assert [type(part) for part in other.model.modules()] == plain
                assert "_dora_cache_binding" not in str([vars(one) for one in other.modules()])
                assert other.cache is not service.cache
                assert other.cache.stats().lookups == other.cache.stats().entries == 0
                other.change(1.5)
                assert not torch.equal(other(x), expected)
                assert torch.equal(other(x), copy.deepcopy(other)(x))
                assert torch.equal(service(x), expected)
                with dora_cache.attach(other.model) as cache:
                    assert torch.equal(other(x), copy.deepcopy(other)(x))
                    assert cache.stats().misses == 1
            changed = copies[0](x)
            service.change(0.5)
            assert torch.equal(service(x), service.uncached(x))
            assert torch.equal(copies[0](x), changed)

            average = AveragedModel(service)
            average.update_parameters(service)
            service.change(2.0)
            average.update_parameters(service)
            gc.collect()
            assert torch.equal(service(x), service.uncached(x))
            assert torch.equal(average(x), copy.deepcopy(average)(x))
            assert not torch.equal(average(x), service(x))

            service.cache.detach()
            assert torch.equal(service(x), copy.deepcopy(service)(x))
            del copies, other, average, service
            gc.collect()
        """
    )


def test_a_shallow_copy_of_a_service_shares_the_cache():
    """copy.copy of what holds a cache has the very same cache and model."""
    service, x = Service().eval(), sample("linear")
    other = copy.copy(service)
    assert other.cache is service.cache
    assert torch.equal(other(x), service(x))
    assert service.cache.stats().lookups == 2
    service.cache.detach()


def test_processes_get_plain_copies():
    """A service can be sent to a spawned process, and used in a forked one; its own goes on."""
    survives(
        """
        import os, torch
        from service import Service, forward
        from zoo import sample

        if __name__ == "__main__":
            torch.set_num_threads(1)
            x = sample("linear")
            service = Service().eval()
            for _ in range(3):
                expected = service(x)

            child = os.fork()
            if not child:
                service.change(2.0)
                os._exit(0 if torch.equal(service(x), service.uncached(x)) else 1)
            assert os.waitpid(child, 0)[1] == 0
            assert torch.equal(service(x), expected)

            processes = torch.multiprocessing.get_context("spawn")
            results = processes.Queue()
            child = processes.Process(target=forward, args=(service, x, results))
            child.start()
            torch.testing.assert_close(torch.tensor(results.get(timeout=120)), expected)
            child.join()
            assert child.exitcode == 0
            service.change(2.0)  # its weights are in shared memory now
            assert torch.equal(service(x), service.uncached(x))
            service.cache.detach()
        """
    )


# The cache itself


@pytest.mark.parametrize("how", COPY)
def test_a_copied_cache_is_detached_and_cold(how):
    """It has the settings and zero counters; what needs an attached cache says it is a copy."""
    model, x = dora_model(), sample("linear")
    with dora_cache.attach(model, backend="lru", max_bytes="1MiB") as cache:
        expected = run(model, x)
        cache.pin("first")
        before = cache.stats()
        other = COPY[how](cache)
        assert other.config == cache.config
        assert (other.config is cache.config) == (how == "copy")
        assert other.stats() == dora_cache.CacheStats(max_bytes=0)
        assert other.report().rows == other.report().declined == ()
        assert other.pins == ()
        assert other.invalidate() == 0
        assert repr(other) == "<AdapterCache, detached copy>"
        for use in (
            other.warm,
            other.refresh,
            lambda: other.pin("first"),
            lambda: other.unpin("first"),
            lambda: other.resize("2MiB"),
        ):
            with pytest.raises(dora_cache.DetachedError, match=r"a detached copy.*attach"):
                use()
        other.detach()
        with other, other.bypass():
            assert torch.equal(run(model, x), expected)
        assert cache.stats() == dataclasses.replace(before, hits=before.hits + 1)
        assert repr(COPY[how](other)) == repr(other)
    assert repr(COPY[how](cache)) == repr(other)


def test_a_pickled_cache_needs_no_backend():
    """It is unpickled also where nobody has registered its backend."""
    backends.register("of this test", backends.DictBackend)
    try:
        payload = pickle.dumps(dora_cache.attach(dora_model(), backend="of this test"))
    finally:
        del backends.registry._registered["of this test"]
    other = pickle.loads(payload)
    assert other.config.backend == other.report().backend == "of this test"


# What caches are asked for


@pytest.mark.parametrize("how", COPY)
def test_config_stats_and_report_are_copied(how):
    """Copies are equal; a deep one shares nothing that can be changed."""
    model = dora_model(adapters=("first", "second"))
    backends.register("with options", lambda max_bytes, sizes: backends.LRUBackend(max_bytes))
    try:
        settings = {"backend": "with options", "max_bytes": 4096, "options": {"sizes": [1]}}
        with dora_cache.attach(model, **settings) as cache:
            cache.warm()
            run(model, sample("linear"))
            with pytest.warns(dora_cache.CacheWarning, match="OFT"):
                cache._engine.decline("OFT", "layer", "for this test")
            config, stats, report = cache.config, cache.stats(), cache.report()
    finally:
        del backends.registry._registered["with options"]
    for one in (config, stats, report, report.rows[0], report.declined[0], report.seen[0]):
        other = COPY[how](one)
        assert other == one
        assert type(other) is type(one)
    assert str(COPY[how](report)) == str(report)
    assert COPY[how](report).curve() == report.curve()
    if how in DEEP:
        DEEP[how](config).options["sizes"].append(2)
        assert config.options == {"sizes": [1]}


def test_stats_and_reports_as_dataclasses():
    """dataclasses.replace, asdict and astuple work on what a cache says of itself."""
    model = dora_model()
    with dora_cache.attach(model) as cache:
        run(model, sample("linear"))
        stats, report = cache.stats(), cache.report()
    assert dora_cache.CacheStats(**dataclasses.asdict(stats)) == stats
    assert dataclasses.astuple(stats)[:2] == (0, 1)
    assert dataclasses.replace(stats, hits=3).hit_rate == 0.75
    assert dataclasses.asdict(report)["rows"][0]["misses"] == 1
    assert dataclasses.replace(report, stats=stats) == report


# What caches are made of


def test_what_stands_for_memory_cannot_be_copied():
    """Copying or pickling what a backend holds, or what a cache is made of, is a TypeError."""
    survives(
        """
        import copy, dataclasses, gc, pickle, torch
        from service import Service
        from zoo import sample
        from dora_cache import backends
        from dora_cache.backends.per_device import PerDeviceBackend
        from dora_cache.attributes import SLOT
        from dora_cache.recipes.substitutes import Gate
        from dora_cache.core.cells import Pending
        from dora_cache.core.facts import read

        class Own:
            max_bytes = None
            nbytes = property(lambda self: sum(one.nbytes for one in self.held.values()))
            def __init__(self): self.held = {}
            def on_evict(self, evicted): pass
            def get(self, key): return self.held.get(key)
            def put(self, key, entry): self.held[key] = entry; return True
            def delete(self, key): return self.held.pop(key, None) is not None
            def clear(self): self.held.clear()
            def keys(self): return self.held.keys()
            def __len__(self): return len(self.held)
            def close(self): self.clear()

        def refuses(one, *hows):
            for how in hows or (copy.copy, copy.deepcopy, pickle.dumps):
                try:
                    how(one)
                except TypeError as error:
                    assert "cannot be copied or pickled: it" in str(error), (one, error)
                else:
                    raise AssertionError((one, how))

        x = sample("linear")
        services = []
        for settings in (
            {}, {"guard": "content"}, {"backend": "lru", "max_bytes": "1MiB"},
            {"backend": "budget", "max_bytes": "1MiB"}, {"backend": "cpu"},
        ):
            service = Service(**settings).eval()
            for _ in range(3):
                expected = service(x)
            cache = service.cache
            engine = cache._engine
            backend, (cell,) = engine.memory.backend, engine.cells
            (key,) = backend.keys()
            entry, facts = backend.get(key), cell.facts
            for one in (backend, entry, facts, facts._held[0], cell, engine, engine.cells,
                        engine.memory, engine.memory.parts[0], backends.Ledger()):
                refuses(one)
            layer = service.model.base_model.model.layer
            binding = layer.__dict__[SLOT]
            for shortcut in binding.shortcuts.values():
                refuses(shortcut)
            refuses(Pending(cell, read([x]), None, 1))
            for one in (binding.holder, binding.holder.scalings, *binding.holder.face.key):
                refuses(one)
            refuses([{"entries": (entry,)}], copy.deepcopy, pickle.dumps)
            refuses(entry, dataclasses.asdict, dataclasses.astuple)
            for one in (binding, layer.__dict__["_dora_cache_observer"]):
                assert copy.copy(one) is copy.deepcopy(one) is None
            again = dataclasses.replace(entry, cost=2.0)
            assert again.stamp is facts and again.intact
            gc.collect()
            assert torch.equal(service(x), expected)
            services.append(service)

        service = Service().eval()
        with torch.no_grad():
            torch.compile(service.model, backend="eager", fullgraph=True)(x)
        engine = service.cache._engine
        (buffer,) = service.model.base_model.model.layer.__dict__[SLOT].buffers.values()
        (check,) = engine.buffers.entries.values()
        refuses(buffer)
        refuses(check)
        del buffer, check
        services.append(service)

        refuses(Gate())
        refuses(backends.Ready(0, 0, object()))
        refuses(PerDeviceBackend(lambda _: backends.DictBackend(), [torch.device("cpu")]))
        own = Own()
        backends.register("own", lambda: own)
        service = Service(backend="own")
        service(x)
        service.own = own
        refuses(service, copy.deepcopy, pickle.dumps)
        del service.own
        copy.deepcopy(service)
        for service in services:
            service.cache.detach()
        del services, service, cache, engine, backend, cell, entry, again, facts, one, own
        gc.collect()
        """
    )


def test_a_stamp_counts_its_storage_once():
    """A refused copy leaves the storage's weak count as it was."""
    survives(
        """
        import contextlib, copy, gc, pickle, torch
        from dora_cache.core.facts import Facts, read

        tensor = torch.zeros(1000)
        facts = Facts(read([tensor, [tensor]]))
        for how in (copy.copy, copy.deepcopy, pickle.dumps):
            for one in (facts, facts._held[0]):
                for _ in range(20):
                    with contextlib.suppress(TypeError):
                        how(one)
            gc.collect()
        assert not facts.expired
        del tensor
        assert facts.expired
        del facts
        gc.collect()
        """
    )


def test_the_message_of_a_refusal_says_what_to_do():
    """It names the class, and what to copy or make instead."""
    entry = backends.Entry(torch.zeros(2))
    for one, hint in (
        (entry, r"Entry .*entry\.value"),
        (backends.LRUBackend(64), "LRUBackend .*make a new backend"),
        (facts.Facts(facts.read([])), "Facts .*copy the model, and attach to the copy"),
    ):
        with pytest.raises(TypeError, match=hint):
            copy.deepcopy(one)


# Classes of users that say themselves how they are copied


class Usual:
    def __init__(self, size=3):
        self.size = size
        self.weight = torch.ones(size)

    @dora_cache.cached("twice", depends_on=lambda self: [self.weight])
    def twice(self):
        return 2 * self.weight


class Reducing(Usual):
    def __reduce__(self):
        return type(self), (self.size,)


class Slotted(Usual):
    __slots__ = ("other",)

    def __init__(self):
        super().__init__()
        self.other = 1


class Copying(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    @dora_cache.cached("twice", depends_on=lambda self: [self.weight])
    def twice(self):
        return 2 * self.weight

    def __copy__(self):
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other


class Single(Copying):
    def __copy__(self):
        return self

    def __deepcopy__(self, memo):
        return self


@pytest.mark.parametrize("how", COPY)
@pytest.mark.parametrize("kind", [Usual, Reducing, Slotted, Copying])
def test_copies_of_users_own_making_are_plain(kind, how):
    """__reduce__, __copy__ and slots: the copy has the class's own type and no tie to the cache."""
    owner = kind()
    if isinstance(owner, nn.Module):
        owner.eval()
    with dora_cache.attach(owner) as cache, torch.no_grad():
        owner.twice()
        other = COPY[how](owner)
        assert type(other) is kind
        assert not vars(other).get(SLOT)
        assert not [name for name in vars(other) if name.startswith("_dora_cache")]
        with dora_cache.attach(other) as second:
            other.weight.mul_(3)
            assert torch.equal(other.twice(), 2 * other.weight)
            assert second.stats().misses == 1
        assert torch.equal(owner.twice(), 2 * owner.weight)
        assert cache.stats().lookups == 2


def test_an_object_that_copies_as_itself_stays_attached():
    """Where __copy__ and __deepcopy__ return the object itself, it keeps its cache."""
    owner = Single().eval()
    with dora_cache.attach(owner) as cache, torch.no_grad():
        assert copy.copy(owner) is copy.deepcopy(owner) is owner
        owner.twice()
        owner.twice()
        assert (cache.stats().misses, cache.stats().hits) == (1, 1)
    assert type(owner) is Single


def test_a_function_pickled_by_value_has_keys_of_its_own():
    """A copied derivation takes a new number and belongs to no cache."""

    @dora_cache.cached("twice", depends_on=lambda weight: [weight])
    def twice(weight):
        return 2 * weight

    derivation = getattr(twice, MARK)
    with dora_cache.attach(twice):
        twice(torch.ones(2))
        other = copy.deepcopy(derivation)
    assert other.number != derivation.number
    assert other.binding is None
    assert list(other.caches) == []
    assert (other.name, other.function, other.parameters) == (
        "twice",
        derivation.function,
        ["weight"],
    )
