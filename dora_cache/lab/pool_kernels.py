"""Time one linear layer with many adapters: ``python -m dora_cache.lab.pool_kernels``.

Ways, in turn in one run: the base layer alone; plain LoRA with one adapter, by the operations that
PEFT runs; and the base layer with the pool's kernels, with some numbers of distinct adapters. GPU
time is of CUDA graphs of many layers, each with weights of its own, so that none is in a cache when
its turn comes, as in a model.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import struct
import time
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn.functional import linear

from dora_cache.lab.bench.measure import Spread
from dora_cache.lab.machine import describe_machine
from dora_cache.serving import kernels

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

__all__ = ["SHAPES", "measure"]

SHAPES = ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096))
"""Inputs and outputs of the linear layers of an 8B Llama."""

_BYTES = 256 << 20  # of the weights of a graph's layers: several times a GPU's cache
_MAX_RANK = 64


class Times(NamedTuple):
    """Microseconds of a layer; bytes of the distinct adapters' factors and scales."""

    gpu: Spread
    host: Spread
    nbytes: int


class _Layers:
    """Some layers of one size and the adapters that a batch has on them."""

    def __init__(
        self, shape: tuple[int, int], rows: int, rank: int, distinct: int, dtype: torch.dtype
    ) -> None:
        width, columns = shape
        self.x = torch.randn(rows, width, device="cuda", dtype=dtype)
        number = max(2, _BYTES // (width * columns * dtype.itemsize))
        self.weights = [_random(dtype, columns, width) for _ in range(number)]
        self.first = [[_random(dtype, rank, width) for _ in range(number)] for _ in range(distinct)]
        self.last = [
            [_random(dtype, columns, rank) for _ in range(number)] for _ in range(distinct)
        ]
        self.scales = [
            [torch.rand(columns, device="cuda") for _ in range(number)] for _ in range(distinct)
        ]
        (bits,) = struct.unpack("q", struct.pack("d", 2.0))
        self._tables = [
            torch.tensor(
                [
                    [first.data_ptr(), last.data_ptr(), scale.data_ptr(), 0, rank, bits, 0, 0]
                    for first, last, scale in zip(*parts, strict=True)
                ],
                device="cuda",
            )
            for parts in zip(self.first, self.last, self.scales, strict=True)
        ]
        self.rows = torch.tensor([1, 0], device="cuda")
        if distinct:
            names = [self._tables[index].data_ptr() for index in range(distinct)]
            self.rows = torch.tensor([distinct, *names], device="cuda")
        self.nbytes = distinct * (rank * (width + columns) * dtype.itemsize + columns * 4)

    def base(self) -> None:
        for weight in self.weights:
            linear(self.x, weight)

    def lora(self) -> None:
        x = self.x
        for weight, first, last in zip(self.weights, self.first[0], self.last[0], strict=True):
            linear(x, weight) + linear(linear(x, first), last) * 2.0

    def pool(self) -> None:
        for index, weight in enumerate(self.weights):
            y = linear(self.x, weight)
            if not kernels.adapt_(y, self.x, self.rows, index, _MAX_RANK):
                raise RuntimeError("A kernel failed.")


def measure(
    shape: tuple[int, int],
    rows: int,
    distinct: Sequence[int] = (1, 16, 64),
    rank: int = 16,
    dtype: torch.dtype = torch.bfloat16,
    rounds: int = 15,
) -> dict[str, Times]:
    """Time one size of layer in each way, in turn, under ``torch.inference_mode()``.

    Args:
        shape: inputs and outputs of the layer.
        rows: tokens of the input.
        distinct: numbers of adapters; those that do not divide ``rows`` are left out.
        rank: of all adapters.
        dtype: of the base weight, the input and the factors.
        rounds: how often each way is timed.
    """
    with torch.inference_mode():
        layers = {
            number: _Layers(shape, rows, rank, number, dtype)
            for number in distinct
            if rows % number == 0
        }
        one = layers[min(layers)]
        ways: dict[str, tuple[Callable[[], object], int, int]] = {
            "base": (one.base, len(one.weights), 0),
            "LoRA, one": (one.lora, len(one.weights), one.nbytes),
        }
        for number, of in layers.items():
            ways[f"pool, {number}"] = of.pool, len(of.weights), of.nbytes
        gpu = _gpu({name: way for name, (way, *_) in ways.items()}, rounds)
        host = _host({name: way for name, (way, *_) in ways.items()}, rounds)
    return {
        name: Times(
            Spread.quartiles(value / number for value in gpu[name]),
            Spread.quartiles(value / number for value in host[name]),
            nbytes,
        )
        for name, (_, number, nbytes) in ways.items()
    }


def _random(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, device="cuda", dtype=dtype).normal_(0, 0.02)


def _gpu(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Return microseconds of the GPU for each way, round by round, as CUDA graphs."""
    graphs = {}
    for name, run in ways.items():
        run()
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            run()
        graphs[name].replay()
    times: dict[str, list[float]] = {name: [] for name in ways}
    for name in _turns(list(ways), rounds):
        began = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        ended = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        began.record()
        graphs[name].replay()
        ended.record()
        ended.synchronize()
        times[name].append(began.elapsed_time(ended) * 1e3)
    return times


def _host(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Return microseconds that the host is busy for each way, round by round."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    gc.collect()
    gc.disable()
    try:
        for name in _turns(list(ways), rounds):
            torch.cuda.synchronize()
            began = time.perf_counter()
            ways[name]()
            times[name].append((time.perf_counter() - began) * 1e6)
    finally:
        gc.enable()
    return times


def _turns(names: list[str], rounds: int) -> list[str]:
    """Return the order of the ways: another one first in every round."""
    return [name for turn in range(rounds) for name in _rotated(names, turn % len(names))]


def _rotated(names: list[str], first: int) -> list[str]:
    return names[first:] + names[:first]


def _bandwidth() -> float:
    """Return bytes a microsecond that the device reads, measured on a sum of 4 GiB."""
    much = torch.zeros(1 << 30, device="cuda")
    return much.nbytes / min(_gpu({"": much.sum}, 7)[""])


def _main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, prog="python -m dora_cache.lab.pool_kernels"
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64, 8192])
    parser.add_argument("--distinct", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--shapes", nargs="+", default=["x".join(map(str, s)) for s in SHAPES])
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    device = torch.device("cuda", torch.cuda.current_device())
    for name, value in describe_machine(device).items():
        print(f"{name}: {value}")  # noqa: T201
    bandwidth = _bandwidth()
    print(f"bandwidth: {bandwidth / 1e6:.2f} TB/s")  # noqa: T201
    shapes = [tuple(map(int, shape.split("x"))) for shape in given.shapes]
    for (width, columns), rows in itertools.product(shapes, given.rows):
        print(f"\n{width} -> {columns}, {rows} rows, r={given.rank}, bfloat16")  # noqa: T201
        times = measure((width, columns), rows, given.distinct, given.rank, rounds=given.rounds)
        base, lora = times["base"].gpu.median, times["LoRA, one"].gpu.median
        print(  # noqa: T201
            f"{'':10} {'GPU us':22} {'beyond base':>12} {'at least':>9} {'x LoRA':>7}   "
            f"{'host us':22} beyond base"
        )
        for name, of in times.items():
            beyond, least = of.gpu.median - base, of.nbytes / bandwidth
            print(  # noqa: T201
                f"{name:10} {of.gpu!s:22} {beyond:12.2f} {least:9.2f} {of.gpu.median / lora:7.2f}"
                f"   {of.host!s:22} {of.host.median - times['base'].host.median:.2f}"
            )


if __name__ == "__main__":
    _main()
