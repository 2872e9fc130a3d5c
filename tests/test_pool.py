"""Many adapters in one batch: each row is what plain PEFT makes of it alone, whatever happens."""

import asyncio
import contextlib
import copy
import gc
import io
import itertools
import json
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from pool_oracle import (
    CLASSIFIER_KINDS,
    LLAMA_KINDS,
    MORE_NET_KINDS,
    NET_KINDS,
    WEIGHTS,
    Folders,
    Net,
    Oracle,
    alone,
    assert_rows,
    classifier,
    error,
    language_model,
    net,
    objects_of,
    output,
    save,
    state_of,
    tokens,
)
from pool_soak import soak
from torch import nn
from zoo import quiet

from dora_cache import AdapterNotFoundError, AdapterPool, ConfigError, DoraCacheError
from dora_cache.errors import AdapterFileError, CapError, PinError
from dora_cache.serving import tiers
from dora_cache.units import format_bytes

ALL_KINDS = NET_KINDS | MORE_NET_KINDS


class Served:
    """A pooled model, and one alike that plain PEFT serves, row by row."""

    def __init__(self, make, folders, names=(), **settings):
        self.make = make
        self.model = make()
        self.plain = None
        self.oracle = folders.oracle  # of a base model that nobody writes to
        self.folders = {}
        self.pool = AdapterPool(self.model, **settings)
        self.made = folders
        for name in names:
            self.add(name, name)

    def add(self, name, kind, seed=0):
        self.folders[name] = self.made.get(kind, seed)
        self.pool.add(name, self.folders[name])

    def expected(self, names, ids):
        return self.oracle.rows([name and self.folders[name] for name in names], ids)

    def check(self, names, ids=None):
        """Run a batch of as many rows as there are names, and compare."""
        ids = tokens(len(names)) if ids is None else ids
        with self.pool.use(names), torch.no_grad():
            found = output(self.model, ids)
        assert_rows(found, self.expected(names, ids))
        assert_sums(self.pool)

    def write(self, act):
        """Do something to the weights of both models."""
        self.plain = self.plain or self.make()
        self.oracle = Oracle(self.plain)
        for model in (self.model, self.plain):
            act(model)


def assert_sums(pool):
    """What the statistics say agrees with itself and keeps to the caps."""
    stats = pool.stats()
    assert stats.on_device + stats.on_host + stats.on_disk == len(pool.names)
    assert stats.nbytes == stats.device_bytes + stats.host_bytes
    assert stats.loads >= 0
    lookups = stats.hits + stats.misses
    assert stats.hit_rate == (stats.hits / lookups if lookups else 0.0)
    assert (stats.on_device > 0) == (stats.device_bytes > 0) or stats.on_device == 0
    if stats.max_device_bytes is not None:
        assert stats.device_bytes <= stats.max_device_bytes
    if stats.max_host_bytes is not None:
        assert stats.host_bytes <= stats.max_host_bytes
    return stats


def made_once(make, kinds):
    @pytest.fixture(scope="module")
    def folders(tmp_path_factory):
        return Folders(make(), kinds, tmp_path_factory.mktemp("adapters"))

    return folders


net_folders = made_once(net, ALL_KINDS)
llama_folders = made_once(language_model, LLAMA_KINDS)
classifier_folders = made_once(classifier, CLASSIFIER_KINDS)


@pytest.fixture
def served(net_folders):
    """All kinds of adapters for the small model, without a cap."""
    found = Served(net, net_folders, ALL_KINDS)
    yield found
    found.pool.close()


def cost(folders, *kinds):
    """Return the bytes on the device that adapters take together."""
    with Served(net, folders, kinds).pool as pool, pool.use(list(kinds)):
        return pool.stats().device_bytes


# Right


def test_every_kind_and_the_base_in_one_batch(served):
    """Seven kinds, more, and the base model in one batch are each as alone, in float64."""
    served.check([*NET_KINDS, None])
    served.check([None, *ALL_KINDS])


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_one_kind_beside_the_base(kind, served):
    """An adapter is right beside rows of the base model, and so are these."""
    served.check([None, kind, None])


def test_kinds_of_a_language_model(llama_folders):
    """The same of a language model, embeddings and output layer included."""
    served = Served(language_model, llama_folders, LLAMA_KINDS)
    served.check([None, *LLAMA_KINDS, None])


def test_a_classifier_has_heads_of_its_own(classifier_folders):
    """Modules that were saved whole are each row's own."""
    served = Served(classifier, classifier_folders, CLASSIFIER_KINDS)
    names = ["first", "second", None, "second"]
    ids = tokens(4)
    with served.pool.use(names), torch.no_grad():
        found = output(served.model, ids)
    assert_rows(found, served.expected(names, ids))


@pytest.mark.parametrize("order", range(4))
def test_any_order_of_rows(order, served):
    """Names may repeat, in any order."""
    generator = torch.Generator().manual_seed(order)
    choice = [None, *NET_KINDS]
    names = [choice[i] for i in torch.randint(len(choice), (13,), generator=generator)]
    served.check(names)


def test_one_name_for_all_rows(served):
    """A name that is not in a list is for every row, None for the base model."""
    ids = tokens(3)
    for name in ("dora", "biases", None):
        with served.pool.use(name), torch.no_grad():
            assert_rows(served.model(ids), served.expected([name] * 3, ids))


def test_rows_of_one_name(served):
    """A list of one name is for every row, as the name itself is."""
    served.check(["dora"])
    ids = tokens(3)
    with served.pool.use(["biases"]), torch.no_grad():
        found = served.model(ids)
    assert_rows(found, served.expected(["biases"] * 3, ids))


def test_a_flat_batch_of_tokens(served):
    """Rows may be tokens: each token of a flat batch has a name."""
    names = ["dora", None, "lora", "dora", "embedding", "layers", "rslora"]
    ids = tokens(1, len(names))[0]
    with served.pool.use(names), torch.no_grad():
        found = served.model(ids)
    expected = [
        served.oracle.model(name and served.folders[name])(ids[i : i + 1])[0].detach()
        for i, name in enumerate(names)
    ]
    assert_rows(found, expected)


def test_layers_called_by_themselves(served):
    """A layer gets the rows' adapters for inputs of two, three and four dimensions."""
    names = ["dora", None, "lora", "biases"]
    layer = served.model.body["layers"][0].up
    for shape in ((4, 8), (4, 3, 8), (4, 3, 2, 8)):
        x = torch.randn(shape, dtype=torch.float64)
        with served.pool.use(names), torch.no_grad():
            found = layer(x)
        for i, name in enumerate(names):
            model = served.oracle.model(name and served.folders[name])
            own = model.get_submodule(f"{'base_model.model.' if name else ''}body.layers.0.up")
            rows = slice(i, i + 1)
            with torch.no_grad():
                assert error(found[rows], own(x[rows])) <= 1e-9


def test_views_and_other_layouts(served):
    """Inputs that are not contiguous, are expanded or need no copy are served alike, unchanged."""
    names = ["dora", "lora", "rslora"]
    layer = served.model.body["layers"][0].up
    base = torch.randn(3, 5, 8, dtype=torch.float64)
    for x in (
        base.transpose(0, 1).contiguous().transpose(0, 1),
        torch.randn(1, 5, 8, dtype=torch.float64).expand(3, 5, 8),
        torch.randn(3, 5, 16, dtype=torch.float64)[..., ::2],
    ):
        before = x.clone()
        with served.pool.use(names), torch.no_grad():
            found = layer(x)
        for i, name in enumerate(names):
            own = served.oracle.model(served.folders[name])
            with torch.no_grad():
                expected = own.get_submodule("base_model.model.body.layers.0.up")(x[i : i + 1])
            assert error(found[i : i + 1], expected) <= 1e-9
        assert torch.equal(x, before)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_mode_and_back(mode, served):
    """What one mode has loaded serves the other."""
    other = torch.inference_mode if mode is torch.no_grad else torch.no_grad
    names = ["dora", "biases", None, "a whole layer"]
    ids = tokens(4)
    expected = served.expected(names, ids)
    for context in (mode, other, mode):
        with served.pool.use(names), context():
            assert_rows(served.model(ids).clone(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype, net_folders):
    """Models of lower precision are served in theirs."""
    served = Served(lambda: net().to(dtype), net_folders, ALL_KINDS)
    names = [None, *ALL_KINDS]
    ids = tokens(len(names))
    with served.pool.use(names), torch.no_grad():
        found = served.model(ids)
    assert found.dtype is dtype
    rounded = net().to(dtype).double()
    exact = Oracle(rounded).rows([name and net_folders[name] for name in names], ids)
    loose = {torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 1e-2}[dtype]
    assert_rows(found.double(), exact, within=loose)


# Generating


@pytest.mark.parametrize(
    ("beams", "sequences"), [(1, 1), (3, 1), (4, 2)], ids=["greedy", "beams", "sequences"]
)
def test_generate(beams, sequences, llama_folders):
    """Generated tokens and scores are those of each prompt alone, with and without beams."""
    served = Served(language_model, llama_folders, LLAMA_KINDS)
    names = [*LLAMA_KINDS, None]
    ids = tokens(len(names), 4)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0  # padded
    settings = {
        "max_new_tokens": 5,
        "do_sample": False,
        "num_beams": beams,
        "num_return_sequences": sequences,
        "output_scores": True,
        "return_dict_in_generate": True,
    }
    with served.pool.use(names):
        found = served.model.generate(input_ids=ids, attention_mask=mask, **settings)
    for i, name in enumerate(names):
        model = served.oracle.model(name and served.folders[name])
        expected = model.generate(
            input_ids=ids[i : i + 1], attention_mask=mask[i : i + 1], **settings
        )
        own = slice(i * sequences, (i + 1) * sequences)
        assert torch.equal(found.sequences[own], expected.sequences)
        if beams == 1:
            for one, other in zip(found.scores, expected.scores, strict=True):
                assert error(one[own], other) <= 1e-9
        else:
            assert error(found.sequences_scores[own], expected.sequences_scores) <= 1e-9


# Caps


def test_evictions_between_batches(net_folders):
    """With room for two adapters, any sequence of pairs is right, and the cap is kept."""
    cap = max(cost(net_folders, *pair) for pair in itertools.combinations(NET_KINDS, 2))
    served = Served(net, net_folders, NET_KINDS, device_bytes=cap)
    held = []
    served.model.norm.register_forward_hook(
        lambda *_: held.append(served.pool.stats().device_bytes)
    )
    for pair in itertools.permutations(NET_KINDS, 2):
        served.check([pair[0], None, pair[1], pair[0]])
    assert max(held) <= cap
    stats = served.pool.stats()
    assert stats.max_device_bytes == cap
    assert stats.evictions > 0
    assert stats.misses > len(NET_KINDS)
    assert stats.on_device < len(NET_KINDS)


@pytest.mark.parametrize("backend", ["cpu", "lru", "budget", "dict", "null"])
def test_any_backend_is_the_host_tier(backend, net_folders):
    """Whatever the host tier keeps or loses, rows are right and both caps are kept."""
    one = max(cost(net_folders, kind) for kind in NET_KINDS)
    caps = {} if backend in {"dict", "null"} else {"max_bytes": 2 * one}
    served = Served(net, net_folders, NET_KINDS, device_bytes=one, backend=backend, **caps)
    for _ in range(2):
        for kind in NET_KINDS:
            served.check([kind, None])
    assert served.pool.stats().evictions > 0


def test_hits_and_misses(served):
    """A lookup is a distinct name at one use; it is a hit if the adapter is on the device."""
    stats = served.pool.stats()
    assert (stats.hits, stats.misses, stats.on_device) == (0, 0, 0)
    assert stats.on_disk == len(ALL_KINDS)
    assert stats.device_bytes == 0
    served.check(["dora", "dora", None, "lora"])
    stats = served.pool.stats()
    assert (stats.hits, stats.misses, stats.on_device) == (0, 2, 2)
    assert stats.loads == 2
    served.check(["dora", "rslora"])
    stats = served.pool.stats()
    assert (stats.hits, stats.misses, stats.on_device) == (1, 3, 3)
    with served.pool.use(None):
        pass
    assert served.pool.stats() == stats


def test_prefetched_is_a_hit(served):
    """What has been prefetched is a hit when it is used, and right."""
    served.pool.prefetch(["dora", "biases"]).result(60)
    served.check(["dora", "biases", None])
    stats = served.pool.stats()
    assert (stats.hits, stats.misses, stats.loads) == (2, 0, 2)


def test_prefetched_ones_do_not_make_room_for_one_another(net_folders):
    """One that is there already stays, though it is the least recently used."""
    first, other, last = list(NET_KINDS)[:3]
    costs = {kind: cost(net_folders, kind) for kind in (first, other, last)}
    cap = max(costs[first] + costs[other], costs[first] + costs[last])
    served = Served(net, net_folders, NET_KINDS, device_bytes=cap)
    served.check([first])
    served.check([other])
    served.pool.prefetch([last, first]).result(60)
    before = served.pool.stats()
    served.check([first, last])
    after = served.pool.stats()
    assert (after.hits, after.misses) == (before.hits + 2, before.misses)
    assert after.loads == 3


def test_pinned_is_not_evicted(net_folders):
    """A pinned adapter stays on the device while others come and go."""
    cap = max(cost(net_folders, "dora", kind) for kind in NET_KINDS)
    served = Served(net, net_folders, NET_KINDS, device_bytes=cap)
    served.pool.pin("dora")
    for kind in NET_KINDS:
        served.check([kind])
    before = served.pool.stats()
    served.check(["dora", None])
    after = served.pool.stats()
    assert (after.hits, after.misses) == (before.hits + 1, before.misses)
    served.pool.unpin("dora")
    for kind in NET_KINDS:
        if kind != "dora":
            served.check([kind])
    before = served.pool.stats().misses
    served.check(["dora"])
    assert served.pool.stats().misses == before + 1


def test_pins_that_leave_no_room(net_folders):
    """A batch for which pins leave no room is refused, and served once they are gone."""
    cap = cost(net_folders, "dora", "lora")
    served = Served(net, net_folders, NET_KINDS, device_bytes=cap)
    served.pool.pin("dora")
    served.pool.pin("lora")
    with pytest.raises((CapError, PinError), match="embedding"):
        served.pool.pin("embedding")
    with pytest.raises(CapError, match="embedding"), served.pool.use(["embedding"]):
        pass
    served.check(["dora", "lora", None])
    served.pool.unpin("dora")
    served.pool.unpin("lora")
    served.check(["embedding", None])


def test_resizing_down_evicts(served):
    """A smaller cap is kept at once, also while nothing is used, and none brings all back."""
    served.check(list(ALL_KINDS))
    full = served.pool.stats()
    assert full.on_device == len(ALL_KINDS)
    served.pool.resize(device_bytes=full.device_bytes // 2)
    stats = assert_sums(served.pool)
    assert stats.device_bytes <= full.device_bytes // 2
    assert stats.evictions > 0
    assert 0 < stats.on_device < full.on_device
    served.check(["dora", None])
    served.pool.resize(device_bytes=0)
    assert assert_sums(served.pool).on_device == 0
    with pytest.raises(CapError), served.pool.use("dora"):
        pass
    served.pool.resize(device_bytes=full.device_bytes)
    served.check([None, *ALL_KINDS])


def test_a_resize_does_not_evict_what_is_used(served):
    """Adapters of an open use are not evicted under it, however small the cap."""
    names = ["dora", "lora", None]
    ids = tokens(3)
    expected = served.expected(names, ids)
    with served.pool.use(names), torch.no_grad():
        with pytest.raises(CapError):
            served.pool.resize(device_bytes=1)
        assert_rows(served.model(ids), expected)
    served.pool.resize(device_bytes=1)
    assert served.pool.stats().device_bytes <= 1


def test_a_batch_that_needs_more_than_the_cap(net_folders):
    """It is refused with the adapters and their bytes, before anything is evicted for it."""
    cap = cost(net_folders, "dora", "lora")
    served = Served(net, net_folders, NET_KINDS, device_bytes=cap)
    served.check(["dora", "lora"])
    before = served.pool.stats()
    with pytest.raises(CapError) as caught, served.pool.use(["dora", "lora", "embedding", None]):
        pass
    for word in ("dora", "lora", "embedding", format_bytes(cap)):
        assert word in str(caught.value)
    after = served.pool.stats()
    assert (after.on_device, after.device_bytes) == (before.on_device, before.device_bytes)
    served.check(["dora", None, "lora"])


def tensors():
    """Return all tensors there are."""
    gc.collect()
    return [one for one in gc.get_objects() if issubclass(type(one), torch.Tensor)]


def test_nothing_is_left_of_what_is_removed(served):
    """Removed adapters' tensors are freed, on the device and on the host."""
    served.check(["lora"])
    served.expected(list(ALL_KINDS), tokens(len(ALL_KINDS)))
    own = {id(one) for one in tensors()}
    served.check(list(ALL_KINDS))
    new = [weakref.ref(one) for one in tensors() if id(one) not in own]
    for kind in ALL_KINDS:
        if kind != "lora":
            served.pool.remove(kind)
    gc.collect()
    left = [one() for one in new if one() is not None and one().numel() > 1]
    assert not [tuple(one.shape) for one in left]
    stats = served.pool.stats()
    assert served.pool.names == ["lora"]
    assert stats.on_device == 1
    assert stats.device_bytes == cost(served.made, "lora")


# Contexts


def test_nested_uses(served):
    """The inner use counts; after it the outer one does again, also after an error."""
    ids = tokens(2)
    with torch.no_grad(), served.pool.use(["dora", None]):
        with served.pool.use(["lora", "biases"]):
            assert_rows(served.model(ids), served.expected(["lora", "biases"], ids))
            with served.pool.use(None):
                assert_rows(served.model(ids), served.expected([None, None], ids))
        assert_rows(served.model(ids), served.expected(["dora", None], ids))
        with contextlib.suppress(AdapterNotFoundError), served.pool.use(["nobody", None]):
            pass
        with contextlib.suppress(ArithmeticError), served.pool.use(["layers", "lora"]):
            raise ArithmeticError
        assert_rows(served.model(ids), served.expected(["dora", None], ids))
    with torch.no_grad():
        assert_rows(served.model(ids), served.expected([None, None], ids))


def test_two_pools_nested(net_folders):
    """Uses of two pools do not concern each other's models."""
    one = Served(net, net_folders, ["dora"])
    other = Served(net, net_folders, ["lora"])
    ids = tokens(2)
    with torch.no_grad(), one.pool.use(["dora", None]), other.pool.use([None, "lora"]):
        assert_rows(one.model(ids), one.expected(["dora", None], ids))
        assert_rows(other.model(ids), other.expected([None, "lora"], ids))


def test_threads_do_not_see_each_others(served):
    """Eight threads with mixes of their own run at the same time, each gets its own."""
    kinds = [None, *ALL_KINDS]
    start = threading.Barrier(8)

    def work(number):
        generator = torch.Generator().manual_seed(number)
        for turn in range(4):
            names = [kinds[i] for i in torch.randint(len(kinds), (5,), generator=generator)]
            ids = tokens(5, seed=number)
            with torch.no_grad(), served.pool.use(names):
                start.wait(30)
                found.append((names, ids, served.model(ids)))
                start.wait(30)
            assert turn >= 0

    found = []
    with ThreadPoolExecutor(8) as threads:
        for one in [threads.submit(work, number) for number in range(8)]:
            one.result(60)
    assert len(found) == 32
    for names, ids, rows in found:
        assert_rows(rows, served.expected(names, ids))


def test_a_thread_started_within_a_use_has_none(served):
    """A use is this thread's; in another the model is the base."""
    ids = tokens(2)
    with served.pool.use("dora"), ThreadPoolExecutor(1) as threads:
        found = threads.submit(torch.no_grad()(served.model), ids).result(60)
    assert_rows(found, served.expected([None, None], ids))


def test_tasks_do_not_see_each_others(served):
    """Asyncio tasks whose uses overlap get each their own."""
    ids = tokens(2)

    async def serve(name):
        with served.pool.use([name, None]):
            await asyncio.sleep(0)
            with torch.no_grad():
                found = served.model(ids)
            await asyncio.sleep(0)
        return found

    async def serve_all():
        return await asyncio.gather(*(serve(kind) for kind in ALL_KINDS))

    for kind, found in zip(ALL_KINDS, asyncio.run(serve_all()), strict=True):
        assert_rows(found, served.expected([kind, None], ids))


def test_tasks_that_need_more_than_the_cap_together(net_folders):
    """A task is refused rather than stop the thread in which another one holds the memory."""
    served = Served(net, net_folders, NET_KINDS, device_bytes=cost(net_folders, "dora"))

    async def serve(name):
        with served.pool.use([name]):
            await asyncio.sleep(0)
            with torch.no_grad():
                return served.model(tokens(1))

    async def serve_both():
        return await asyncio.gather(serve("dora"), serve("lora"), return_exceptions=True)

    with ThreadPoolExecutor(1) as threads:
        first, second = threads.submit(asyncio.run, serve_both()).result(60)
    assert isinstance(second, CapError)
    assert_rows(first, served.expected(["dora"], tokens(1)))
    served.check(["lora"])


def test_threads_wait_for_each_other(net_folders):
    """Threads whose batches fit one at a time are all served, none is refused."""
    cap = max(cost(net_folders, kind) for kind in NET_KINDS)
    served = Served(net, net_folders, NET_KINDS, device_bytes=cap)
    start = threading.Barrier(6)

    def work(number):
        start.wait(30)
        for kind in [*NET_KINDS, *NET_KINDS][number : number + 6]:
            served.check([kind, None])

    with ThreadPoolExecutor(6) as threads:
        for one in [threads.submit(work, number) for number in range(6)]:
            one.result(60)


def test_a_batch_that_waits_within_another(net_folders):
    """A nested batch waits for other threads, and is refused once nobody else can let go."""
    cap = cost(net_folders, "dora", "embedding")
    served = Served(net, net_folders, NET_KINDS, device_bytes=cap)
    entered, leave = threading.Event(), threading.Event()

    def hold():
        with served.pool.use("embedding"):
            entered.set()
            assert leave.wait(60)

    with ThreadPoolExecutor(1) as threads, served.pool.use(["dora"]):
        holding = threads.submit(hold)
        assert entered.wait(60)
        threading.Timer(0.1, leave.set).start()
        served.check(["lora", None])  # waits for the other thread
        holding.result(60)
        with pytest.raises(CapError), served.pool.use(["biases", "embedding"]):
            pass
    served.check(["biases"])


def test_a_large_batch_does_not_starve(net_folders, monkeypatch):
    """Batches that come later, and would fit, let one go first that waits for more memory."""
    monkeypatch.setattr(tiers, "_GIVE_WAY", 60.0)
    cap = cost(net_folders, "dora", "embedding")
    served = Served(net, net_folders, NET_KINDS, device_bytes=cap)
    order, entered, leave = [], threading.Event(), threading.Event()

    def hold():
        with served.pool.use("embedding"):
            entered.set()
            assert leave.wait(60)

    def work(*names):
        with served.pool.use(list(names)):
            order.append(names)

    def waiting(count):
        last = time.monotonic() + 20
        while len(served.pool._tiers._queue) < count:
            assert time.monotonic() < last
            time.sleep(0.001)

    with ThreadPoolExecutor(3) as threads:
        tasks = [threads.submit(hold)]
        assert entered.wait(60)
        tasks.append(threads.submit(work, "dora", "lora"))
        waiting(1)
        tasks.append(threads.submit(work, "embedding"))  # it is there
        waiting(2)
        leave.set()
        for one in tasks:
            one.result(60)
    assert order == [("dora", "lora"), ("embedding",)]
    monkeypatch.setattr(tiers, "_GIVE_WAY", 0.0)
    served.check(["lora", None])


def test_who_gives_way_does_so_for_a_limited_time(net_folders, monkeypatch):
    """A thread that another one within a batch waits for is served in the end."""
    monkeypatch.setattr(tiers, "_GIVE_WAY", 0.05)
    cap = cost(net_folders, "dora", "embedding")
    served = Served(net, net_folders, NET_KINDS, device_bytes=cap)
    with ThreadPoolExecutor(2) as threads:
        with served.pool.use("embedding"):
            large = threads.submit(served.check, ["dora", "lora"])
            while not served.pool._tiers._queue:
                time.sleep(0.001)
            threads.submit(served.check, ["embedding"]).result(60)
            assert not large.done()
        large.result(60)


# Adding, removing, closing


def test_the_same_name_again(served):
    """The next use sees the new adapter; one that is open ends with the old one."""
    ids = tokens(2)
    with torch.no_grad(), served.pool.use(["dora", None]):
        old = served.expected(["dora", None], ids)
        assert_rows(served.model(ids), old)
        served.add("dora", "embedding", seed=1)
        assert_rows(served.model(ids), old)
        with served.pool.use(["dora", None]):
            assert_rows(served.model(ids), served.expected(["dora", None], ids))
        assert_rows(served.model(ids), old)
    served.check(["dora", "lora"])
    served.add("dora", "dora", seed=2)
    served.check(["dora", "lora"])
    assert sorted(served.pool.names) == sorted(ALL_KINDS)


def test_a_use_that_has_not_run_yet_ends_with_the_old_one(served):
    """Also where its first forward comes after the new one was added and used."""
    ids = tokens(1)
    old = served.expected(["dora"], ids)
    with torch.no_grad(), served.pool.use(["dora"]):
        served.add("dora", "dora", seed=3)
        with ThreadPoolExecutor(1) as threads:
            threads.submit(served.check, ["dora"]).result(60)
        assert_rows(served.model(ids), old)


def test_removed_while_in_use(served):
    """A use that is open goes on; the name is unknown to the next, and nothing is left after."""
    ids = tokens(2)
    old = served.expected(["dora", "lora"], ids)
    with torch.no_grad(), served.pool.use(["dora", "lora"]):
        served.pool.remove("dora")
        assert_rows(served.model(ids), old)
        with pytest.raises(AdapterNotFoundError), served.pool.use(["dora", None]):
            pass
        assert_rows(served.model(ids), old)
    assert served.pool.stats().device_bytes == cost(served.made, "lora")
    served.check(["lora", None])
    served.add("dora", "dora", seed=1)
    served.check(["dora", "lora"])


def test_adding_a_folder_of_adapters(net_folders, tmp_path):
    """Every adapter in a folder is added under its folder's name; other things are left alone."""
    model = net()
    for kind in ("dora", "lora"):
        net_folders.copied(kind, tmp_path / kind)
    (tmp_path / "notes.txt").write_text("not an adapter")
    (tmp_path / "empty").mkdir()
    with AdapterPool(model) as pool:
        assert sorted(pool.add_folder(tmp_path)) == ["dora", "lora"]
        assert sorted(pool.names) == ["dora", "lora"]
        ids = tokens(2)
        with pool.use(["lora", "dora"]), torch.no_grad():
            found = model(ids)
    paths = [net_folders["lora"], net_folders["dora"]]
    assert_rows(found, net_folders.oracle.rows(paths, ids))


@pytest.mark.parametrize("make", [net, language_model])
def test_close_leaves_the_model_as_it_was(make, net_folders, llama_folders):
    """Classes, attributes, parameters and outputs are those from before, to the bit."""
    folders = net_folders if make is net else llama_folders
    model = make()
    ids = tokens(3)
    with torch.no_grad():
        before = output(model, ids)
        state, same = state_of(model), objects_of(model)
        values = {key: value.clone() for key, value in model.state_dict().items()}
        pool = AdapterPool(model)
        for kind in folders.kinds:
            pool.add(kind, folders[kind])
        with pool.use("dora"):
            assert not torch.equal(output(model, ids), before)
        assert torch.equal(output(model, ids), before)
        assert model.state_dict().keys() == values.keys()
        pool.close()
        assert torch.equal(output(model, ids), before)
    assert state_of(model) == state
    assert objects_of(model) == same
    for key, value in model.state_dict().items():
        assert torch.equal(value, values[key])
    pool.close()  # twice does no harm
    with pytest.raises(DoraCacheError), pool.use("dora"):
        pass
    gone = weakref.ref(pool)
    del pool
    gc.collect()
    assert gone() is None
    with AdapterPool(model) as pool:  # and there may be another
        pool.add("lora", folders["lora"])
        with pool.use(["lora", None, None]), torch.no_grad():
            found = output(model, ids)
    assert_rows(found, folders.oracle.rows([folders["lora"], None, None], ids))


def test_a_copy_is_the_plain_model(served):
    """A copy or a pickle of a pooled model is a plain model, also made within a use."""
    ids = tokens(2)
    with torch.no_grad():
        expected = net()(ids)
    file = io.BytesIO()
    with served.pool.use("dora"):
        clone = copy.deepcopy(served.model)
        torch.save(served.model, file)
        file.seek(0)
        read = torch.load(file, weights_only=False)
        for other in (clone, read):
            with torch.no_grad():
                assert torch.equal(other(ids), expected)
            for one, plain in zip(other.modules(), net().modules(), strict=True):
                assert type(one) is type(plain)
                assert vars(one).keys() == vars(plain).keys()
    with AdapterPool(clone) as pool:
        pool.add("dora", served.folders["dora"])
        with pool.use("dora"), torch.no_grad():
            assert_rows(clone(ids), served.expected(["dora"] * 2, ids))


def test_a_model_that_is_deleted(net_folders):
    """A pool does not keep a deleted model alive once it is gone itself."""
    served = Served(net, net_folders, ["dora"])
    served.check(["dora"])
    gone = [weakref.ref(served.model), weakref.ref(served.pool)]
    del served
    gc.collect()
    assert [one() for one in gone] == [None, None]


# Writes to the base model


def _in_place(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25).add_(0.01)


def _copied(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.flip(0) * 0.5)


def _loaded(model):
    model.load_state_dict({key: value * 0.75 for key, value in model.state_dict().items()})


def _loaded_by_assignment(model):
    values = {key: value * 0.75 for key, value in model.state_dict().items()}
    model.load_state_dict(values, assign=True)


def _stepped(model):
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.requires_grad_()
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(parameters, lr=0.1).step()
    for parameter in parameters:
        parameter.requires_grad_(requires_grad=False)
        parameter.grad = None


def _stepped_fused(model):
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.requires_grad_()
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(parameters, lr=0.1, fused=True).step()
    for parameter in parameters:
        parameter.requires_grad_(requires_grad=False)
        parameter.grad = None


def _data_replaced(model):
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.5


def _parameters_replaced(model):
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                new = nn.Parameter(parameter.detach() * 1.5, requires_grad=False)
                setattr(module, name, new)


def _swapped(model):
    with torch.no_grad():
        for parameter in model.parameters():
            other = nn.Parameter(parameter * 0.7, requires_grad=False)
            torch.utils.swap_tensors(parameter, other)


def _in_inference_mode(model):
    with torch.inference_mode():
        for parameter in model.parameters():
            parameter.mul_(0.8)


RESTING = [*NET_KINDS, "lora_bias", "all biases", "a whole layer", "a whole embedding"]
WRITES = [
    _in_place,
    _copied,
    _loaded,
    _loaded_by_assignment,
    _stepped,
    _stepped_fused,
    _data_replaced,
    _parameters_replaced,
    _swapped,
    _in_inference_mode,
]


@pytest.mark.parametrize("write", WRITES, ids=lambda one: one.__name__[1:])
def test_a_write_to_the_base_weights(write, net_folders):
    """The next forward has scales of the new weights, between uses and within one."""
    served = Served(net, net_folders, RESTING)
    names = [None, *RESTING]
    served.check(names)
    served.write(write)
    served.check(names)
    ids = tokens(len(names))
    with served.pool.use(names):
        served.write(write)
        with torch.no_grad():
            found = served.model(ids)
        assert_rows(found, served.expected(names, ids))
    served.check(names)


def test_a_write_past_the_counters_and_an_event(net_folders):
    """After a write through ``.data``, a mode switch of the model is enough."""
    served = Served(net, net_folders, RESTING)
    names = [None, *RESTING]
    served.check(names)

    def write(model):
        for parameter in model.parameters():
            parameter.data.mul_(1.5)
        model.train()
        model.eval()

    served.write(write)
    served.check(names)


def test_a_write_to_an_evicted_adapters_base(net_folders):
    """An adapter that comes back to the device gets scales of the weights there are then."""
    served = Served(net, net_folders, NET_KINDS, device_bytes=cost(net_folders, "embedding"))
    served.check(["dora", None])
    served.check(["embedding"])
    served.write(_in_place)
    served.check(["dora", None])
    served.check(["layers"])


def test_the_model_moves_to_another_dtype(net_folders):
    """After ``model.to(...)`` the adapters are of the model's new dtype."""
    served = Served(net, net_folders, RESTING)
    names = [None, *RESTING]
    served.check(names)
    served.write(lambda model: model.float())
    ids = tokens(len(names))
    with served.pool.use(names), torch.no_grad():
        found = served.model(ids)
    assert_rows(found, served.expected(names, ids), within=1e-4)
    served.write(lambda model: model.double())
    served.check(names)


# Gradients, modes


def test_gradients_through_the_input(served):
    """In a use, gradients with respect to inputs are right where they are wanted."""
    names = ["dora", "lora", None, "biases", "rslora"]
    layer = served.model.body["layers"][0]
    x = torch.randn(5, 3, 8, dtype=torch.float64, requires_grad=True)
    with served.pool.use(names):
        found = layer(x)
    found.pow(2).sum().backward()
    own = x.grad.clone()
    for i, name in enumerate(names):
        model = served.oracle.model(name and served.folders[name])
        block = model.get_submodule(f"{'base_model.model.' if name else ''}body.layers.0")
        row = x[i : i + 1].detach().requires_grad_()
        expected = block(row)
        expected.pow(2).sum().backward()
        assert error(found[i : i + 1].detach(), expected.detach()) <= 1e-9
        assert error(own[i : i + 1], row.grad) <= 1e-9


def test_under_autocast(net_folders):
    """Under autocast rows are as near to the exact ones as plain PEFT's are."""
    served = Served(lambda: net().float(), net_folders, NET_KINDS)
    names = [None, *NET_KINDS]
    ids = tokens(len(names))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16), served.pool.use(names):
        found = served.model(ids)
    assert_rows(found.double(), served.expected(names, ids), within=0.1)


# Other models


def test_a_model_that_peft_has_wrapped(net_folders):
    """In a use the pool's adapters stand in for the active one, which is back after it."""
    model = alone(net(), net_folders["rslora"])
    ids = tokens(4)
    with torch.no_grad():
        before = model(ids)
    names = ["dora", None, "a whole layer", "embedding"]
    with AdapterPool(model) as pool:
        for name in (*names[2:], "dora"):
            pool.add(name, net_folders[name])
        with pool.use(names), torch.no_grad():
            found = model(ids)
        paths = [name and net_folders[name] for name in names]
        assert_rows(found, net_folders.oracle.rows(paths, ids))
        with torch.no_grad():
            assert torch.equal(model(ids), before)
    with torch.no_grad():
        assert torch.equal(model(ids), before)


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_quantized_base(use_dora, tmp_path):
    """On int8 weights of torchao, rows are as near as plain PEFT's are to exact ones."""
    torchao = pytest.importorskip("torchao.quantization")

    def make():
        found = net().float()
        with quiet():
            torchao.quantize_(found.body, torchao.Int8WeightOnlyConfig())
        return found.requires_grad_(requires_grad=False)

    base = make()
    assert type(base.body["layers"][0].up.weight.data) is not torch.Tensor
    path = save(net().float(), tmp_path / "one", target_modules=["up"], r=2, use_dora=use_dora)
    model = copy.deepcopy(base)
    ids = tokens(2)
    with AdapterPool(model) as pool:
        pool.add("one", path)
        with pool.use(["one", None]), torch.no_grad():
            found = model(ids)
    assert_rows(found, Oracle(base).rows([path, None], ids), within=1e-4)


class Experts(nn.Module):
    """Sends each token to one of two experts, so experts' rows are not the batch's."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.router = nn.Linear(8, 1)

    def forward(self, x):
        to_first = self.router(x).squeeze(-1) > 0
        found = torch.empty_like(x)
        found[to_first] = self.experts[0](x[to_first])
        found[~to_first] = self.experts[1](x[~to_first])
        return found


@pytest.mark.parametrize("tokens_to_first", [7, 8, 9])
def test_rows_that_are_not_the_batchs(tokens_to_first, tmp_path):
    """Layers that see a choice of the tokens are refused rather than served wrongly."""

    def make():
        torch.manual_seed(1)
        model = Experts().double().eval()
        with torch.no_grad():
            model.router.weight.zero_()[0, 0] = 1
            model.router.bias.zero_()
        return model.requires_grad_(requires_grad=False)

    path = save(make(), tmp_path / "moe", target_modules=["experts.0", "experts.1"], r=2)
    model, oracle = make(), Oracle(make())
    x = torch.randn(4, 4, 8, dtype=torch.float64)
    x[..., 0] = -1
    x.view(16, 8)[:tokens_to_first, 0] = 1
    pool = AdapterPool(model)
    try:
        pool.add("moe", path)
    except DoraCacheError:
        return  # refused by name
    with torch.no_grad():
        with pool.use("moe"):  # every token has the same: any rows are right
            assert_rows(model(x), oracle.rows([path] * 4, x))
        with pool.use(["moe", None, None, "moe"]):
            try:
                found = model(x)
            except DoraCacheError:
                return
        assert_rows(found, oracle.rows([path, None, None, path], x))


class Head(nn.Module):
    """More than one layer, a buffer, and dropout."""

    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(8, 8)
        self.out = nn.Linear(8, 5)
        self.dropout = nn.Dropout(0.9)
        self.register_buffer("offset", torch.randn(8))

    def forward(self, x):
        return self.out(self.dropout(torch.tanh(self.dense(x) + self.offset)))


class Headed(nn.Module):
    """A model whose head is often trained whole."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(8, 8)
        self.head = Head()

    def forward(self, x):
        return self.head(torch.tanh(self.up(x)))


@pytest.mark.parametrize("training", [True, False])
def test_a_head_of_several_layers(training, tmp_path):
    """One adapter has a head of its own, another changes a layer within; both follow the model."""

    def make():
        torch.manual_seed(3)
        return Headed().double().eval().requires_grad_(requires_grad=False)

    def with_other_offset():
        found = make()
        found.head.offset.mul_(3)
        return found

    folders = Folders(
        make(),
        {
            "inner": {"target_modules": ["up", "dense"], "r": 2, "use_dora": True},
            "tuned": {"target_modules": ["up"], "r": 2},
        },
        tmp_path,
    )
    served = Served(make, folders, ["inner", "tuned"])
    settings = {"target_modules": ["up"], "r": 2, "modules_to_save": ["head"]}
    served.folders["whole"] = save(with_other_offset(), tmp_path / "whole", **settings)
    served.pool.add("whole", served.folders["whole"])
    names = ["whole", "inner", None, "tuned", "whole"]
    x = torch.randn(5, 3, 8, dtype=torch.float64)
    if training:  # when they are loaded
        served.model.train()
        served.pool.pin("whole")
        served.model.eval()
    served.check(names, x)
    served.write(_parameters_replaced)
    served.write(lambda model: model.head.offset.add_(1))
    served.check(names, x)


# Bad input


def unharmed(served):
    served.check(["dora", None, "lora", "biases"])


@pytest.mark.parametrize("names", [["dorra", None], "dorra", ["dora", "dorra"]])
def test_an_unknown_name(names, served):
    """An unknown name is refused with the nearest one there is."""
    with pytest.raises(AdapterNotFoundError, match=r"dorra.*'?dora'?"), served.pool.use(names):
        pass
    for act in (served.pool.remove, served.pool.pin, served.pool.unpin):
        with pytest.raises(AdapterNotFoundError, match="dorra"):
            act("dorra")
    with pytest.raises(AdapterNotFoundError, match="dorra"):
        served.pool.prefetch(["dorra"])
    unharmed(served)


@pytest.mark.parametrize(("names", "rows"), [(3, 4), (4, 3), (4, 2), (4, 1), (4, 6), (4, 8)])
def test_names_that_do_not_match_the_batch(names, rows, served):
    """Names of which the batch is no multiple are refused at the forward, with both numbers."""
    given = ["dora", "lora", None, "biases"][:names]
    with served.pool.use(given), torch.no_grad(), pytest.raises(ConfigError, match=rf"{names}"):
        served.model(tokens(rows, 5))
    unharmed(served)


@pytest.mark.parametrize("names", [[], (), 3, [3], [["dora"]], b"dora", [b"dora"]])
def test_names_that_are_none(names, served):
    """What is not a name is refused."""
    with pytest.raises((DoraCacheError, TypeError)), served.pool.use(names):
        pass
    unharmed(served)


@pytest.mark.parametrize("name", ["", None, 3])
def test_adding_under_no_name(name, served):
    """An adapter's name is a string with something in it."""
    with pytest.raises((DoraCacheError, TypeError)):
        served.pool.add(name, served.made["dora"])
    unharmed(served)


def _truncate(path):
    data = (path / WEIGHTS).read_bytes()
    (path / WEIGHTS).write_bytes(data[: len(data) // 2])


def _delete(path):
    (path / WEIGHTS).unlink()


def _delete_config(path):
    (path / "adapter_config.json").unlink()


def _noise(path):
    (path / WEIGHTS).write_bytes(bytes(range(256)) * 40)


def _empty(path):
    (path / WEIGHTS).write_bytes(b"")


def _bad_config(path):
    (path / "adapter_config.json").write_text("{")


def _huge_header(path):
    (path / WEIGHTS).write_bytes(b"\xff" * 8 + b"{}" * 40)


def _other_rank(path):
    config = json.loads((path / "adapter_config.json").read_text())
    config["r"] = 9
    (path / "adapter_config.json").write_text(json.dumps(config))


SPOILED = [_truncate, _delete, _delete_config, _noise, _empty, _bad_config, _huge_header]


@pytest.mark.parametrize("spoil", [*SPOILED, _other_rank], ids=lambda one: one.__name__[1:])
def test_bad_files_when_added(spoil, served, net_folders, tmp_path):
    """They are refused by name, and a name that was there keeps its adapter."""
    path = net_folders.copied("dora", tmp_path / "bad", seed=1)
    spoil(path)
    with pytest.raises(AdapterFileError, match="fresh"):
        served.pool.add("fresh", path)
    with pytest.raises(AdapterFileError, match="dora"):
        served.pool.add("dora", path)
    assert sorted(served.pool.names) == sorted(ALL_KINDS)
    unharmed(served)


@pytest.mark.parametrize(
    "spoil", [_truncate, _delete, _noise, _empty], ids=lambda x: x.__name__[1:]
)
def test_bad_files_when_loaded(spoil, served, net_folders, tmp_path):
    """What became of the files after they were added is noticed when they are read."""
    path = net_folders.copied("dora", tmp_path / "good", seed=1)
    served.pool.add("fresh", path)
    spoil(path)
    for _ in range(2):
        with pytest.raises(AdapterFileError, match="fresh"), served.pool.use(["fresh", None]):
            pass
    with quiet():
        served.pool.prefetch(["fresh"]).result(60)
    with pytest.raises(AdapterFileError, match="fresh"), served.pool.use(["dora", "fresh"]):
        pass
    assert_sums(served.pool)
    unharmed(served)
    served.add("fresh", "dora", seed=1)
    served.check(["fresh", "dora"])
    served.pool.remove("fresh")


def test_files_replaced_before_they_are_loaded(served, net_folders, tmp_path):
    """Other files of the same shape in the place of those added are not served silently."""
    path = net_folders.copied("dora", tmp_path / "moved", seed=1)
    served.pool.add("fresh", path)
    net_folders.copied("dora", path, seed=2)
    with pytest.raises(AdapterFileError, match="fresh"), served.pool.use(["fresh"]):
        pass
    unharmed(served)
    served.add("fresh", "dora", seed=2)
    served.check(["fresh", "dora"])


def test_files_deleted_after_they_were_loaded(net_folders, tmp_path):
    """What is on the device or the host is served without its files."""
    served = Served(net, net_folders, ["dora", "lora"])
    path = net_folders.copied("dora", tmp_path / "gone", seed=1)
    served.pool.add("fresh", path)
    served.folders["fresh"] = net_folders.get("dora", 1)
    served.check(["fresh", "dora"])
    _delete(path)
    served.check(["fresh", "dora", None])


def test_an_adapter_for_another_shape(served, tmp_path):
    """It is refused with the module and both shapes."""

    class Other(Net):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(8, 6)

    other = Other().double()
    path = save(other, tmp_path / "other", target_modules=["head"], r=2)
    with pytest.raises(AdapterFileError, match=r"head") as caught:
        served.pool.add("other", path)
    assert "6" in str(caught.value)
    assert "5" in str(caught.value)
    unharmed(served)


def test_an_adapter_of_too_high_a_rank(net_folders, tmp_path):
    """A rank above the pool's limit is refused, with both numbers."""
    served = Served(net, net_folders, ["lora"], max_rank=4)
    path = save(net(), tmp_path / "high", target_modules=["up"], r=5)
    with pytest.raises(DoraCacheError, match=r"high.* 5.*=4"):
        served.pool.add("high", path)
    served.check(["lora", None])


def test_an_adapter_of_another_kind(served, tmp_path):
    """A kind that the pool does not serve is refused by name or served right."""
    from peft import IA3Config, get_peft_model

    with quiet():
        model = get_peft_model(
            net(), IA3Config(target_modules=["up"], feedforward_modules=[], init_ia3_weights=False)
        )
        model.save_pretrained(tmp_path / "ia3")
    try:
        served.pool.add("ia3", tmp_path / "ia3")
    except AdapterFileError as refused:
        assert "ia3" in str(refused)
    else:
        served.folders["ia3"] = tmp_path / "ia3"
        served.check(["ia3", None, "dora"])
    unharmed(served)


@pytest.mark.parametrize(
    "settings",
    [
        {"device_bytes": -1},
        {"device_bytes": "12 apples"},
        {"max_bytes": -1},
        {"backend": "nothing-like-that"},
        {"max_rank": 0},
    ],
    ids=str,
)
def test_bad_settings(settings):
    """They are refused, and the model is as it was."""
    model = net()
    state = state_of(model)
    with pytest.raises(ConfigError):
        AdapterPool(model, **settings)
    assert state_of(model) == state


def test_a_second_pool_on_the_same_model(served):
    """A model has one pool at a time."""
    with pytest.raises(DoraCacheError):
        AdapterPool(served.model)
    unharmed(served)


def test_a_failing_forward_leaves_nothing_open(served):
    """After an error in a forward the next use is right, and nothing stays in use."""
    with contextlib.suppress(RuntimeError, IndexError), served.pool.use(["dora", "lora"]):
        served.model(torch.full((2, 6), 99))
    served.pool.resize(device_bytes=0)
    assert served.pool.stats().device_bytes == 0
    served.pool.resize(device_bytes="1GiB")
    unharmed(served)


# Many threads


@pytest.mark.timeout(120)
def test_a_soak():
    """Eight threads serve, add, remove, resize: nothing is wrong, nobody gets stuck."""
    found = soak(3)
    assert not found.wrong
    assert not found.failed
    assert not found.stuck
    for what in ("served", "added", "removed", "resized", "prefetched"):
        assert found.counts[what], found.counts
