"""What only a GPU can show: bits, streams, pinned memory, graphs."""

import copy
import threading

import pytest
import torch
from peft import LoHaConfig, get_peft_model
from torch import nn
from zoo import CASES, activate, dora_model, run, sample

import dora_cache
from dora_cache import cached

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def on_gpu(kind, dtype=torch.float32, **options):
    model = dora_model(kind, dtype=dtype, adapters=("first", "second"), **options).cuda()
    return model, sample(kind, dtype).cuda()


@pytest.mark.parametrize(
    "settings", [{}, {"backend": "cpu"}, {"backend": "cpu", "device_bytes": 40}], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kind", "bias"), CASES)
def test_output_is_bit_equal(kind, bias, dtype, settings):
    """On CUDA, too, outputs have PEFT's bits, from every backend, cold and warm."""
    model, x = on_gpu(kind, dtype, bias=bias)
    expected = {}
    for adapter in ("first", "second"):
        activate(model, adapter)
        expected[adapter] = run(model, x)
    with dora_cache.attach(model, **settings) as cache:
        for adapter in ("first", "second") * 3:
            activate(model, adapter)
            assert torch.equal(run(model, x), expected[adapter])
        assert cache.stats().hits == 4


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["linear", "embedding", "conv2d"])
def test_autocast_is_bit_equal(kind, low):
    """Values derived under CUDA autocast are kept apart from others."""
    model, x = on_gpu(kind)
    with torch.autocast("cuda", dtype=low):
        expected = run(model, x)
    plain = run(model, x)
    with dora_cache.attach(model):
        for _ in range(2):
            assert torch.equal(run(model, x), plain)
            with torch.autocast("cuda", dtype=low):
                assert torch.equal(run(model, x), expected)


def test_fused_optimizer_steps_on_the_gpu_are_seen():
    """A fused AdamW step on CUDA voids exactly the adapter it stepped."""
    model, x = on_gpu("linear")
    with dora_cache.attach(model) as cache:
        for adapter in ("first", "second"):
            activate(model, adapter)
            run(model, x)
        parameters = [p for n, p in model.named_parameters() if ".first" in n]
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        torch.optim.AdamW(parameters, lr=0.1, fused=True).step()
        assert cache.stats().entries == 1
        activate(model, "first")
        assert torch.equal(run(model, x), run(copy.deepcopy(model), x))


def test_moves_between_devices():
    """A model moved while warm derives afresh on its new device, and frees the old values."""
    model, x = on_gpu("linear")
    activate(model, "first")
    with dora_cache.attach(model) as cache:
        run(model, x)
        model.cpu()
        assert cache.stats().entries == 0
        assert torch.equal(run(model, x.cpu()), run(copy.deepcopy(model), x.cpu()))
        model.cuda()
        assert torch.equal(run(model, x), run(copy.deepcopy(model), x))


class Big(nn.Module):
    """Derives something that takes the GPU a while."""

    def __init__(self, names, size=1024):
        super().__init__()
        self.weight = nn.ParameterDict({n: torch.randn(size, size, device="cuda") for n in names})
        self.requires_grad_(requires_grad=False)
        self.eval()

    @cached("power", adapter="name", depends_on=lambda self, name: [self.weight[name]])
    def power(self, name):
        value = self.weight[name]
        for _ in range(20):
            value = torch.nn.functional.normalize(value @ self.weight[name])
        return value


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"backend": "lru", "max_bytes": "9MiB"},
        {"backend": "cpu", "device_bytes": "9MiB"},
        {"backend": "cpu", "max_bytes": "17MiB"},
    ],
    ids=str,
)
def test_values_cross_streams_safely(settings):
    """Values made on one stream and used, evicted and reused on others are always whole."""
    names = "abcdef"
    owner = Big(names)
    expected = {name: owner.power(name) for name in names}
    torch.cuda.synchronize()
    wrong = []

    def serve(seed):
        generator = torch.Generator().manual_seed(seed)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(60):
                name = names[int(torch.randint(len(names), (), generator=generator))]
                value = owner.power(name)
                difference = (value - expected[name]).abs().max()
                del value
                torch.randn(1024, 1024, device="cuda")  # reuses freed memory
                if difference.item() != 0:
                    wrong.append(name)

    with dora_cache.attach(owner, **settings) as cache:
        threads = [threading.Thread(target=serve, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        stats = cache.stats()
    assert not wrong
    assert stats.hits > 0
    assert stats.max_bytes is None or stats.nbytes <= stats.max_bytes


def test_the_cpu_backend_frees_device_memory():
    """With backend="cpu" the device holds the hot tier and no more, but for the audit's hashes."""
    owner = Big("abcdef")
    for name in "abcdef":
        owner.power(name)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    with dora_cache.attach(owner, backend="cpu", device_bytes="8MiB") as cache:
        for name in "abcdef" * 2:
            owner.power(name)
        torch.cuda.synchronize()
        hashes = 6 * 2048
        assert torch.cuda.memory_allocated() - before <= 8 * 2**20 + hashes
        assert cache.stats().entries == 6
        assert cache.stats().hits == 6
    assert torch.cuda.memory_allocated() == before


def test_copies_ahead_are_whole():
    """Thousands of values, copied back ahead on another stream and used on four, are all whole."""
    names = "abcdefghijkl"
    owner = Big(names)
    expected = {name: owner.power(name) for name in names}
    torch.cuda.synchronize()
    wrong = []

    def serve(forwards):
        with torch.cuda.stream(torch.cuda.Stream()):
            bad = torch.zeros((), device="cuda")
            for _ in range(forwards):
                for name in names:
                    bad += (owner.power(name) != expected[name]).any()
                    torch.randn(1024, 1024, device="cuda")  # reuses freed memory
            wrong.append(bad.item())

    with dora_cache.attach(owner, backend="cpu", device_bytes="33MiB") as cache:
        serve(20)  # alone: the order is always the same
        backend = cache._engine.memory.backend
        assert backend.prefetched > 0.9 * backend.fetches > 20
        threads = [threading.Thread(target=serve, args=(60,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(200)
        assert backend.device_nbytes <= 33 * 2**20
    assert wrong == [0.0] * 5


def test_the_cpu_backend_under_inference_mode():
    """What is stored and copied back under inference_mode serves gradients as well."""
    names = "abcdef"
    owner = Big(names)
    expected = {name: owner.power(name) for name in names}
    with dora_cache.attach(owner, backend="cpu", device_bytes="9MiB") as cache:
        for _ in range(3):
            with torch.inference_mode():
                for name in names:
                    assert torch.equal(owner.power(name), expected[name])
        for name in names:
            x = torch.ones(1024, device="cuda", requires_grad=True)
            (owner.power(name) * x).sum().backward()
            assert torch.equal(x.grad, expected[name].sum(0))
        assert cache.stats().misses == len(names)


class Stack(nn.Module):
    """Linear layers in a row."""

    def __init__(self, layers, size):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(size, size, bias=False) for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


@pytest.mark.parametrize(
    "settings",
    [
        {"backend": "lru", "max_bytes": "1GiB"},
        {"backend": "budget", "max_bytes": "1GiB"},
        {"backend": "cpu", "device_bytes": "1GiB"},
    ],
    ids=lambda settings: settings["backend"],
)
def test_the_allocator_confirms_the_cap(settings):
    """Dense values of three adapters: never more than the cap, and what is being used, on top."""
    size, layers, adapters = 4096, 8, ("first", "second", "third")
    with torch.random.fork_rng(devices=[0]):
        torch.manual_seed(0)
        with torch.device("cuda"):
            names = [f"layers.{index}" for index in range(layers)]
            config = LoHaConfig(r=4, target_modules=names, init_weights=False)
            model = get_peft_model(Stack(layers, size), config, "first").eval()
            for adapter in adapters[1:]:
                model.add_adapter(adapter, config)
            model.cuda().requires_grad_(requires_grad=False)
            x = torch.randn(4, size)
    expected, value = {}, 4 * size * size
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    for adapter in adapters:
        model.set_adapter(adapter)
        expected[adapter] = run(model, x)
    uncached = torch.cuda.max_memory_allocated()
    with dora_cache.attach(model, **settings) as cache:
        torch.cuda.reset_peak_memory_stats()
        for adapter in adapters * 4:
            model.set_adapter(adapter)
            for _ in range(2):
                assert torch.equal(run(model, x), expected[adapter])
        grown = torch.cuda.max_memory_allocated() - uncached
        assert cache.stats().hits > 0
    assert grown <= 2**30 + value


def test_captured_graphs_follow_their_weights():
    """While a CUDA graph is captured the cache stays out of it, so replays are never stale."""
    model, x = on_gpu("linear")
    activate(model, "first")
    with dora_cache.attach(model), torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                model(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = model(x)
        for parameter in model.parameters():
            parameter.mul_(1.1)
        graph.replay()
        torch.testing.assert_close(result, run(copy.deepcopy(model), x))
        torch.testing.assert_close(model(x), result)


def test_a_share_is_of_the_devices_memory():
    """max_bytes="1%" is one percent of what is free on the GPU."""
    owner = Big("a")
    free = torch.cuda.mem_get_info()[0]
    with dora_cache.attach(owner, backend="lru", max_bytes="1%") as cache:
        assert cache.stats().max_bytes == pytest.approx(free / 100, rel=0.05)
