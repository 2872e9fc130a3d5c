"""Each row's own adapter, by kernels, is what float64 computes; and nothing else is written.

On a machine without CUDA, Triton's interpreter runs the kernels: ``TRITON_INTERPRET=1``.
"""

import itertools
import os
import struct
import warnings

import pytest
import torch

import dora_cache
from dora_cache import triton_launch
from dora_cache.serving import kernels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="needs CUDA, or TRITON_INTERPRET=1"
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYERS = 3


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    if INTERPRETED:
        from dora_cache.serving import triton_kernels

        monkeypatch.setattr(kernels, "_kernels", lambda: triton_kernels)
        monkeypatch.setattr(kernels, "current_device", lambda: -1)  # of a tensor on the CPU
        monkeypatch.setattr(kernels, "_can_start_early", lambda _: False)
        kernels._launchers.cache_clear()
        kernels.launches.cache_clear()
        patch_dot(monkeypatch)


def patch_dot(monkeypatch):
    """Have the interpreter multiply bfloat16 numbers, of which it has the bits alone."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, tl

    original = InterpreterBuilder.create_dot

    def widened(handle):
        if handle.dtype.scalar is not tl.bfloat16:
            return handle
        bits = handle.data.astype("uint32") << 16
        return TensorHandle(bits.view("float32"), tl.float32)

    def create_dot(self, one, other, *rest):
        return original(self, widened(one), widened(other), *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


class Adapter:
    """One adapter for one of the layers; the other layers' rows of its table are nonsense."""

    def __init__(self, generator, width, columns, rank, dtype, layer=1, *, scale=True, shift=True):
        def random(*shape):
            return torch.randn(*shape, generator=generator)

        self.first = (random(rank, width) / width**0.5).to(DEVICE, dtype)
        self.last = random(columns, rank).to(DEVICE, dtype)
        self.scale = (1 + 0.1 * random(columns)).to(DEVICE) if scale else None
        self.shift = random(columns).to(DEVICE) if shift else None
        self.scaling = float(random(1)) * 0.5
        self.table = torch.full((LAYERS, 8), 3, dtype=torch.int64)
        tensors = self.first, self.last, self.scale, self.shift
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        (bits,) = struct.unpack("q", struct.pack("d", self.scaling))
        self.table[layer] = torch.tensor([*addresses, rank, bits, 0, 0])
        self.table = self.table.to(DEVICE)

    def __call__(self, y, x):
        delta = (x.double() @ self.first.double().T) @ self.last.double().T
        y = y.double() + self.scaling * delta
        y = y if self.scale is None else self.scale.double() * y
        return y if self.shift is None else y + self.shift.double()

    def size(self, x):
        """Return how large the terms of the second product are together."""
        hidden = x.double() @ self.first.double().T
        return abs(self.scaling) * (hidden.abs() @ self.last.double().abs().T)


def table_of(adapters, capacity=0):
    """Return the rows that name these adapters, None for the base model."""
    addresses = [0 if adapter is None else adapter.table.data_ptr() for adapter in adapters]
    spare = [12345] * (capacity - len(adapters))
    return torch.tensor([len(adapters), *addresses, *spare], device=DEVICE)


def expected_of(y, x, adapters):
    """Return what each row is with its adapter alone, in float64."""
    each = len(y) // len(adapters)
    parts = []
    for index, adapter in enumerate(adapters):
        rows = slice(index * each, (index + 1) * each)
        parts.append(y[rows].double() if adapter is None else adapter(y[rows], x[rows]))
    return torch.cat(parts)


def sizes_of(y, x, adapters):
    """Return how large what is added to each row is, its terms together, in float64."""
    each = len(y) // len(adapters)
    parts = []
    for index, adapter in enumerate(adapters):
        rows = slice(index * each, (index + 1) * each)
        parts.append(y[rows].double() * 0 if adapter is None else adapter.size(x[rows]))
    return torch.cat(parts)


def inputs(generator, count, width, columns, dtype):
    return (
        torch.randn(count, columns, generator=generator).to(DEVICE, dtype),
        torch.randn(count, width, generator=generator).to(DEVICE, dtype),
    )


def check(adapters, count, width, columns, dtype, *, layer=1, max_rank=64, seed=1):
    """Compare what the kernels write with float64, and the base model's rows to the bit."""
    y, x = inputs(torch.Generator().manual_seed(seed), count, width, columns, dtype)
    expected = expected_of(y, x, adapters)
    around = torch.full((count + 2, columns), 7.0, dtype=dtype, device=DEVICE)
    found = around[1:-1]
    found.copy_(y)
    assert kernels.adapt_(found, x, table_of(adapters, len(adapters) + 3), layer, max_rank)
    # Relative to the output and to the terms of its sum, which are rounded before. (The interpreter
    # rounds bfloat16 towards zero.)
    error = {torch.float32: 3e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    if INTERPRETED and dtype is torch.bfloat16:
        error = 2**-7
    size = 2 + expected.abs() + sizes_of(y, x, adapters)
    error = (found.double() - expected).abs() / (error * size)
    assert error.max() < 1, (error.max(), error.argmax())
    each = count // len(adapters)
    for index, adapter in enumerate(adapters):
        if adapter is None:
            rows = slice(index * each, (index + 1) * each)
            assert torch.equal(found[rows], y[rows])
    assert (around[0] == 7).all()
    assert (around[-1] == 7).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (37, 29), (128, 256), (640, 272)], ids=str)
def test_shapes(dtype, shape):
    """Sizes that are and are not multiples of the blocks; one row, few, and many."""
    generator = torch.Generator().manual_seed(0)
    one, other = (Adapter(generator, *shape, rank, dtype) for rank in (16, 8))
    for count, adapters in (
        (1, [one]),
        (2, [one, other]),
        (3, [one, None, other]),
        (16, [other]),
        (34, [one, other]),
        (144, [one, None, other, one]),
    ):
        check(adapters, count, *shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [14, 140], ids=["few", "many"])
def test_ranks(dtype, count):
    """Any ranks in one batch, within a tile as well."""
    generator = torch.Generator().manual_seed(2)
    ranks = [1, 2, 3, 8, 15, 16, 17, 24, 33, 64, 80, 96, 255, 256]
    adapters = [Adapter(generator, 96, 48, rank, dtype) for rank in ranks]
    check(adapters, count, 96, 48, dtype, max_rank=256)
    check(adapters[:7], count, 96, 48, dtype, max_rank=17)
    check(adapters[7:9] * 7, count, 96, 48, dtype, max_rank=33)


@pytest.mark.parametrize("count", [64, 192, 1088], ids=str)
def test_order(count):
    """Equal adapters apart, together, and one for all; distinct ones in each row."""
    generator = torch.Generator().manual_seed(3)
    adapters = [Adapter(generator, 64, 80, rank, torch.bfloat16) for rank in range(1, 9)]
    for names in (
        adapters * 8,
        [adapter for adapter in adapters for _ in range(8)],
        adapters[:1] * 64,
        adapters[:1],
        [None, *adapters[:3]],
        [None, adapters[0]] * 32,
    ):
        check(names, count, 64, 80, torch.bfloat16)


def test_what_an_adapter_may_lack():
    """Scales, shifts, and the factors; then a row is the base model's, to the bit."""
    generator = torch.Generator().manual_seed(4)
    for dtype, count in itertools.product(DTYPES, (8, 136)):
        adapters = [
            Adapter(generator, 48, 64, rank, dtype, scale=scale, shift=shift)
            for rank, scale, shift in itertools.product((0, 12), (True, False), (True, False))
        ]
        check(adapters, count, 48, 64, dtype)
        y, x = inputs(generator, count, 48, 64, dtype)
        y[:, ::3] = -0.0
        x[0] = float("inf")
        found = y.clone()
        assert kernels.adapt_(found, x, table_of([adapters[3], None]), 1, 64)
        bits = torch.int32 if dtype is torch.float32 else torch.int16
        assert torch.equal(found.view(bits), y.view(bits))


def test_layers():
    """A table has all layers of the adapter."""
    generator = torch.Generator().manual_seed(5)
    for layer in range(LAYERS):
        adapter = Adapter(generator, 32, 32, 4, torch.float32, layer)
        check([adapter, None], 6, 32, 32, torch.float32, layer=layer)


def test_rows_are_apart():
    """What is not a number in one row is in no other; and rows do not depend on one another."""
    generator = torch.Generator().manual_seed(6)
    one, other = (Adapter(generator, 64, 64, rank, torch.float32) for rank in (5, 16))
    for count in (12, 132):
        y, x = inputs(generator, count, 64, 64, torch.float32)
        x[3] = float("nan")
        y[5] = float("inf")
        found = y.clone()
        assert kernels.adapt_(found, x, table_of([one, other] * (count // 2)), 1, 64)
        bad = (~found.isfinite()).any(1).nonzero().flatten()
        assert bad.tolist() == [3, 5]


def test_division_of_the_work():
    """Any division computes the same but for the order of sums."""
    generator = torch.Generator().manual_seed(7)
    adapters = [Adapter(generator, 512, 96, rank, torch.bfloat16) for rank in (16, 40)]
    for tile, splits in itertools.product((1, 16, 32), (1, 8)):
        how = kernels.Plan(tile, splits, 64, 64, 32)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "plan", lambda *_, **__: how)
            kernels.launches.cache_clear()
            check([*adapters, None], 45, 512, 96, torch.bfloat16)
    kernels.launches.cache_clear()


def test_no_rows():
    y, x = torch.empty(0, 8, device=DEVICE), torch.empty(0, 4, device=DEVICE)
    assert kernels.adapt_(y, x, table_of([None]), 0, 16)


def test_a_kernel_that_fails(monkeypatch):
    """It is said once, and the output is as it was."""
    adapter = Adapter(torch.Generator().manual_seed(8), 32, 32, 4, torch.float32)
    y, x = inputs(torch.Generator().manual_seed(8), 4, 32, 32, torch.float32)
    before = y.clone()

    def fail(*_):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(triton_launch.Launcher, "launch", fail)
    try:
        with pytest.warns(dora_cache.CacheWarning, match="Triton kernel 'pool_shrink_row' failed"):
            assert not kernels.adapt_(y, x, table_of([adapter]), 1, 16)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not kernels.adapt_(y, x, table_of([adapter]), 1, 16)
    finally:
        triton_launch.broken.clear()
    assert torch.equal(y, before)


def test_available():
    assert not kernels.available(torch.device("cpu"), torch.float32)
    assert not kernels.available(torch.device("cuda"), torch.float64)
    if not INTERPRETED:
        assert kernels.available(torch.device("cuda"), *DTYPES)


@pytest.mark.skipif(INTERPRETED, reason="needs CUDA")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [16, 64, 512, 2048], ids=str)
def test_real_sizes(dtype, count):
    generator = torch.Generator().manual_seed(9)
    adapters = [
        Adapter(generator, 4096, 1024, rank, dtype) for rank in (8, 16, 64, 16, 32, 128, 12, 16)
    ]
    check(adapters, count, 4096, 1024, dtype, max_rank=128)


@pytest.mark.skipif(INTERPRETED, reason="needs CUDA")
@pytest.mark.parametrize("count", [16, 256], ids=["few", "many"])
def test_one_graph_for_every_mix(count):
    """A captured graph follows the rows, the tables, and the inputs."""
    generator = torch.Generator().manual_seed(10)
    adapters = [Adapter(generator, 256, 320, rank, torch.bfloat16) for rank in (4, 16, 40, 64)]
    adapters.append(None)
    rows = table_of([None] * 16)
    before, x = inputs(generator, count, 256, 320, torch.bfloat16)
    y = before.clone()
    assert kernels.adapt_(y, x, rows, 1, 64)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        assert kernels.adapt_(y, x, rows, 1, 64)
    for turn in range(20):
        names = [
            adapters[index]
            for index in torch.randint(5, (2 ** (turn % 5),), generator=generator).tolist()
        ]
        mix = table_of(names)
        rows[: len(mix)] = mix
        new, other = inputs(generator, count, 256, 320, torch.bfloat16)
        x.copy_(other)
        y.copy_(new)
        graph.replay()
        eager = new.clone()
        assert kernels.adapt_(eager, x, rows, 1, 64)
        assert torch.equal(y, eager)
        expected = expected_of(new, x, names)
        assert ((y.double() - expected).abs() < 2**-8 * (2 + expected.abs())).all()


@pytest.mark.skipif(INTERPRETED, reason="needs CUDA")
@pytest.mark.parametrize("count", [16, 256], ids=["few", "many"])
def test_deterministic(count):
    generator = torch.Generator().manual_seed(11)
    adapters = [Adapter(generator, 4096, 512, rank, torch.bfloat16) for rank in (16, 64)]
    before, x = inputs(generator, count, 4096, 512, torch.bfloat16)
    outputs = []
    for _ in range(5):
        y = before.clone()
        assert kernels.adapt_(y, x, table_of(adapters * 8), 1, 64)
        outputs.append(y)
    assert all(torch.equal(outputs[0], other) for other in outputs)


@pytest.mark.skipif(INTERPRETED, reason="needs CUDA")
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_another_device_than_the_current_one(monkeypatch):
    monkeypatch.setitem(globals(), "DEVICE", "cuda:1")
    adapter = Adapter(torch.Generator().manual_seed(12), 32, 32, 4, torch.float32)
    check([adapter, None], 6, 32, 32, torch.float32)
