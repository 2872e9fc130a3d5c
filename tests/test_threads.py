"""Many threads: one computation per missing key, no lost invalidation, sums that add up."""

import gc
import random
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import settings
from torch import nn
from zoo import balanced, dora_model, run, sample

import dora_cache
from dora_cache import cached
from dora_cache.reasons import Reason


class Slow(nn.Module):
    """Derives when told to, so that a test can arrange what happens meanwhile."""

    def __init__(self):
        super().__init__()
        self.weight = nn.ParameterDict({name: torch.ones(4) for name in "ab"})
        self.requires_grad_(requires_grad=False)
        self.started = threading.Semaphore(0)
        self.go = threading.Event()
        self.calls = 0
        self.error = None
        self.eval()

    @cached("value", adapter="name", depends_on=lambda self, name: [self.weight[name]])
    def value(self, name):
        self.calls += 1
        result = self.weight[name] * 2
        self.started.release()
        assert self.go.wait(20)
        if self.error is not None:
            raise self.error
        return result


@pytest.fixture
def slow():
    return Slow()


def later(pool, count, function, *args):
    return [pool.submit(function, *args) for _ in range(count)]


def waiting(cache, count):
    """Wait until so many lookups have joined another thread's computation."""
    end = time.monotonic() + 20
    while cache.stats().hits < count:
        assert time.monotonic() < end
        time.sleep(0.001)


def test_concurrent_requests_for_one_value_compute_it_once(slow):
    """Eight threads that want one missing value get it from one computation."""
    with dora_cache.attach(slow) as cache, ThreadPoolExecutor(8) as pool:
        futures = later(pool, 8, slow.value, "a")
        slow.started.acquire()
        waiting(cache, 7)
        slow.go.set()
        results = [future.result(20) for future in futures]
        assert slow.calls == 1
        assert all(torch.equal(result, torch.full((4,), 2.0)) for result in results)
        stats = cache.stats()
    assert (stats.misses, stats.hits, stats.stores) == (1, 7, 1)


@pytest.mark.parametrize("backend", ["lru", "budget"])
def test_what_another_thread_puts_off_meanwhile_is_done_after_the_call(slow, monkeypatch, backend):
    """Another thread that finds the lock taken for a moment leaves its part to whoever has it."""
    slow.go.set()
    done = []
    hits = backend == "lru"
    with dora_cache.attach(slow, backend=backend, max_bytes=1000 if hits else 8) as cache:
        engine = cache._engine
        for _ in range(4):
            slow.value("a")
        # The last one was a hit by the shortcut, or a value that the backend declines.
        assert cache.stats().hits == (3 if hits else 0)
        assert engine.reasons[Reason.DECLINED] == (not hits)
        owner, name = (engine._backend, "get") if hits else (engine.holdings, "derived")
        plain = getattr(owner, name)

        def locked(*args):
            assert engine.mutex.is_owned
            engine.mutex.later(lambda: done.append(name), now=True)
            return plain(*args)

        monkeypatch.setattr(owner, name, locked)
        slow.value("a")
        assert done == [name]


def test_a_failing_computation_fails_its_waiters_once(slow):
    """All that wait for a computation that fails get its error; the next call tries again."""
    slow.error = ValueError("no luck")
    with dora_cache.attach(slow) as cache, ThreadPoolExecutor(4) as pool:
        futures = later(pool, 4, slow.value, "a")
        slow.started.acquire()
        waiting(cache, 3)
        slow.go.set()
        for future in futures:
            with pytest.raises(ValueError, match="no luck"):
                future.result(20)
        assert slow.calls == 1
        assert cache.stats().stores == 0
        slow.error = None
        assert torch.equal(slow.value("a"), torch.full((4,), 2.0))


def test_an_interrupted_computation_lets_the_others_try_again(slow):
    """KeyboardInterrupt is the leader's own; whoever waits computes for itself."""
    slow.error = KeyboardInterrupt()
    with dora_cache.attach(slow) as cache, ThreadPoolExecutor(1) as pool:
        caught = []

        def leader():
            try:
                slow.value("a")
            except KeyboardInterrupt:
                caught.append(True)

        thread = threading.Thread(target=leader)
        thread.start()
        slow.started.acquire()
        future = pool.submit(slow.value, "a")
        waiting(cache, 1)
        slow.go.set()
        thread.join(20)
        assert caught
        with pytest.raises(KeyboardInterrupt):  # it computes again, and the error is still set
            future.result(20)
        assert slow.calls == 2
        stats = cache.stats()
        assert (stats.hits, stats.misses) == (0, 2)


def test_a_drop_that_had_to_wait_concerns_nothing_derived_since(slow):
    """A weight is replaced while the lock is taken: what is derived from the new one is kept."""
    with dora_cache.attach(slow) as cache, ThreadPoolExecutor(3) as pool:
        slow.go.set()
        slow.value("a")
        slow.go.clear()
        with cache._engine.mutex.lock:
            pool.submit(slow.weight.__setitem__, "a", nn.Parameter(torch.zeros(4))).result(20)
        slow.weight["a"].requires_grad_(requires_grad=False)
        slow.started.acquire()
        futures = later(pool, 1, slow.value, "a")
        slow.started.acquire()
        cache.stats()  # does what had to wait
        futures += later(pool, 1, slow.value, "a")
        waiting(cache, 1)
        slow.go.set()
        futures += later(pool, 1, slow.value, "a")
        assert [future.result(20).tolist() for future in futures] == [[0.0] * 4] * 3
        assert slow.calls == 2
        assert balanced(cache).stores == 2


INVALIDATIONS = {
    "invalidate": lambda slow, cache: cache.invalidate(),
    "invalidate(adapter)": lambda slow, cache: cache.invalidate(adapter="a"),
    "invalidate(module)": lambda slow, cache: cache.invalidate(module=slow),
    "cache_clear": lambda slow, cache: Slow.value.cache_clear(),
    "touched": lambda slow, cache: cache._engine.touched([slow.weight["a"]]),
    "in place": lambda slow, cache: slow.weight["a"].mul_(3),
    "data": lambda slow, cache: setattr(slow.weight["a"], "data", torch.full((4,), 3.0)),
    "replaced": lambda slow, cache: slow.weight.__setitem__("a", nn.Parameter(torch.zeros(4))),
    "mode": lambda slow, cache: slow.train() and slow.eval(),
    "detach": lambda slow, cache: cache.detach(),
}


@pytest.mark.parametrize("how", INVALIDATIONS)
def test_an_invalidation_during_a_computation_wins(slow, how):
    """A value computed before an invalidation is returned to its caller and never stored."""
    cache = dora_cache.attach(slow)
    with ThreadPoolExecutor(2) as pool:
        future = pool.submit(slow.value, "a")
        slow.started.acquire()
        with torch.no_grad():
            INVALIDATIONS[how](slow, cache)
        slow.go.set()
        assert torch.equal(future.result(20), torch.full((4,), 2.0))
        assert cache.stats().stores == 0
        assert cache.stats().entries == 0
        assert torch.equal(slow.value("a"), Slow.value.__wrapped__(slow, "a"))
    cache.detach()


def test_a_call_after_an_invalidation_does_not_join_an_older_computation(slow):
    """Whoever asks after the invalidation gets a value computed after it."""
    with dora_cache.attach(slow) as cache, ThreadPoolExecutor(2) as pool:
        old = pool.submit(slow.value, "a")
        slow.started.acquire()
        cache.invalidate(adapter="a")
        new = pool.submit(slow.value, "a")
        assert slow.started.acquire(timeout=20)
        slow.go.set()
        old.result(20), new.result(20)
        assert slow.calls == 2
        assert cache.stats().stores == 1


def test_an_event_for_one_adapter_lets_the_other_finish(slow):
    """Invalidating "b" while "a" is being computed does not cost "a" its entry."""
    with dora_cache.attach(slow) as cache, ThreadPoolExecutor(1) as pool:
        future = pool.submit(slow.value, "a")
        slow.started.acquire()
        cache.invalidate(adapter="b")
        slow.go.set()
        future.result(20)
        assert cache.stats().entries == 1


def test_bypass_is_one_threads_own(slow):
    """bypass() in one thread leaves the others on the cache."""
    slow.go.set()
    with dora_cache.attach(slow) as cache, ThreadPoolExecutor(1) as pool, cache.bypass():
        slow.value("a")
        assert cache.stats().bypasses == 1
        pool.submit(slow.value, "a").result(20)
        pool.submit(slow.value, "a").result(20)
        assert cache.stats().hits == 1
        assert cache.stats().bypasses == 1


def soak(seconds, settings):
    """Serve three adapters from eight threads and train a fourth; return what went wrong."""
    served, trained = ("first", "second", "third"), "trained"
    model = dora_model("linear", adapters=(*served, trained))
    layer = model.base_model.model.layer
    x = sample("linear")
    base = layer.get_base_layer()
    parts = [layer.lora_A, layer.lora_B, layer.lora_magnitude_vector]

    def forward(adapter):
        with torch.no_grad():
            return layer.lora_variant[adapter].forward(
                layer, active_adapter=adapter, x=x, result=base(x)
            )

    expected = {adapter: forward(adapter) for adapter in served}
    weights = [part[trained].weight for part in parts]
    end = time.monotonic() + seconds
    wrong, over, forwards, steps = [], [], Counter(), 0

    def serve(number):
        generator = random.Random(number)
        while time.monotonic() < end:
            adapter = generator.choice(served)
            if not torch.equal(forward(adapter), expected[adapter]):
                wrong.append(adapter)
            forwards[number] += 1
            choice = generator.random()
            if choice < 0.03:
                cache.invalidate(adapter=generator.choice([*served, trained, None]))
            elif choice < 0.04:
                cache.warm([adapter])
            stats = cache.stats()
            if stats.max_bytes is not None and stats.nbytes > stats.max_bytes:
                over.append(stats)

    def train():
        nonlocal steps
        optimizers = [
            torch.optim.SGD(weights, lr=0.01, fused=True),
            torch.optim.AdamW(weights, lr=0.01, foreach=True),
        ]
        while time.monotonic() < end:
            for weight in weights:
                weight.grad = torch.ones_like(weight)
            optimizers[steps % 2].step()
            result = forward(trained)
            with cache.bypass():
                if not torch.equal(result, forward(trained)):
                    wrong.append(trained)
            steps += 1

    with dora_cache.attach(model, **settings) as cache:
        threads = [threading.Thread(target=serve, args=(number,)) for number in range(8)]
        threads.append(threading.Thread(target=train))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(seconds + 60)
        stuck = [thread for thread in threads if thread.is_alive()]
        if not stuck:
            balanced(cache)
    return wrong, over, stuck, forwards, steps


@pytest.mark.parametrize(
    "settings",
    [{}, {"backend": "lru", "max_bytes": 100}, {"backend": "cpu", "max_bytes": 70}],
    ids=str,
)
def test_many_threads_never_get_a_wrong_output(settings):
    """Threads on several adapters, one more that trains, and invalidations all along."""
    wrong, over, stuck, forwards, steps = soak(3, settings)
    assert (wrong, over, stuck) == ([], [], [])
    assert len(forwards) == 8
    assert min(forwards.values()) > 10
    assert steps > 10


@pytest.mark.machine
def test_a_minute_of_it(record_property):
    """A minute under a cap that holds two of the four adapters."""
    if settings.default.max_examples < 1000:
        pytest.skip("a minute long: make test-deep runs it")
    wrong, over, stuck, forwards, steps = soak(60, {"backend": "lru", "max_bytes": 100})
    record_property("machine", ("8 threads, 60 s", sum(forwards.values()), steps))
    assert (wrong, over, stuck) == ([], [], [])


def test_attaching_and_detaching_while_serving():
    """Outputs stay right while another thread attaches and detaches all the time."""
    model = dora_model("linear")
    x = sample("linear")
    expected = run(model, x)
    stop = threading.Event()

    def switch():
        while not stop.is_set():
            with dora_cache.attach(model):
                time.sleep(0.001)

    thread = threading.Thread(target=switch)
    thread.start()
    end = time.monotonic() + 2
    count = 0
    try:
        while time.monotonic() < end:
            assert torch.equal(run(model, x), expected)
            count += 1
    finally:
        stop.set()
        thread.join(20)
    assert count > 100


class Nosy:
    """Calls the cache when it is collected, which may be while the collector runs anywhere."""

    def __init__(self, cache, model):
        self.cache, self.model = cache, model
        self.myself = self  # only the cycle collector finds it

    def __del__(self):
        self.cache.invalidate()
        self.cache.stats()
        run(self.model, sample("linear"))


@pytest.mark.timeout(60)
def test_destructors_may_call_the_cache():
    """Even those that the collector runs inside the cache, with its lock held."""
    model = dora_model("linear")
    x = sample("linear")
    expected = run(model, x)
    with dora_cache.attach(model) as cache:
        inside = []
        holdings = cache._engine.holdings
        discard = holdings.discard

        def collecting(cell, why="invalidations"):
            Nosy(cache, model)
            gc.collect()
            inside.append(cell)
            return discard(cell, why)

        holdings.discard = collecting
        for _ in range(5):
            assert torch.equal(run(model, x), expected)
            cache.invalidate()
        del holdings.discard
        assert inside
        balanced(cache)


def test_data_parallel_replicas_share_nothing():
    """A replica as DataParallel makes it is a plain module without the cache."""
    model = dora_model("linear")
    layer = model.base_model.model.layer
    plain = type(layer)
    x = sample("linear")
    with dora_cache.attach(model) as cache:
        expected = run(model, x)
        replica = layer._replicate_for_data_parallel()
        assert type(replica) is plain
        lookups = cache.stats().lookups
        for name, parameter in layer._parameters.items():
            replica._parameters[name] = parameter
        with torch.no_grad():
            assert torch.equal(torch.tanh(replica(x)), expected)
        assert cache.stats().lookups == lookups
        assert type(layer) is not plain
        run(model, x)
        assert cache.stats().hits == 1
