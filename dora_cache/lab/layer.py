"""Time the forward of one linear layer on the host: ``python -m dora_cache.lab.layer``.

In eager decoding on a fast GPU the host is what takes the time, so what a layer costs there is how
long its Python code and its kernel launches keep the host busy.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
import warnings
from collections import defaultdict
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dora_cache.attachment import attach
from dora_cache.lab.bench.measure import Spread, synchronize
from dora_cache.lab.machine import describe_machine

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

__all__ = ["WAYS", "count_frames", "measure_layer"]

WAYS = ("LoRA", "PEFT DoRA", "peft", "fast")
"""Plain LoRA, uncached DoRA, and DoRA attached with both ``numerics``."""

_CALLS = 50  # between synchronizations: few enough for a device's queue
_WARM_UP = 10


class _Block(nn.Module):
    """One linear layer, which PEFT can wrap."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def measure_layer(
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    adapter_dtype: torch.dtype = torch.float32,
    rank: int = 16,
    rows: int = 1,
    numerics: Sequence[str] = ("peft", "fast"),
    rounds: int = 9,
    *,
    shape: tuple[int, int] = (4096, 4096),
    bias: bool = False,
) -> dict[str, Spread]:
    """Time one layer's forward in each way, in turn, under ``torch.no_grad()``.

    Args:
        device: where the layer is.
        dtype: of the base weight and the input.
        adapter_dtype: of the adapter's parameters.
        rank: of the adapter.
        rows: tokens of the input, shape (1, rows, in).
        numerics: those to attach with, beside plain LoRA and uncached DoRA.
        rounds: how often each way is timed.
        shape: inputs and outputs of the layer.
        bias: whether the base layer has a bias.

    Returns:
        Microseconds of host time per forward: the median over the rounds, and the quartiles. Keys
        are those of :data:`WAYS`.
    """
    x = torch.randn(1, rows, shape[0], device=device, dtype=dtype)
    spent: defaultdict[str, list[float]] = defaultdict(list)
    with ExitStack() as attached, torch.no_grad():
        dtypes, names = (dtype, adapter_dtype), ["LoRA", "PEFT DoRA", *numerics]
        layers = {
            way: _layer(way, attached, torch.device(device), dtypes, rank, shape, bias=bias)
            for way in names
        }
        for layer in layers.values():
            _time(layer, x, _WARM_UP)
        gc.collect()
        gc.disable()
        try:
            for turn in range(rounds):
                for way in names[turn % len(names) :] + names[: turn % len(names)]:
                    spent[way].append(_time(layers[way], x, _CALLS))
        finally:
            gc.enable()
    return {way: Spread.quartiles(spent[way]) for way in names}


def count_frames(call: Callable[[], object]) -> int:
    """Return how many Python functions run during a call, the called one included."""
    frames = 0

    def count(_: object, event: str, __: object) -> None:
        nonlocal frames
        frames += event == "call"

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(before)
    return frames


def _layer(
    way: str,
    attached: ExitStack,
    device: torch.device,
    dtypes: tuple[torch.dtype, torch.dtype],
    rank: int,
    shape: tuple[int, int],
    *,
    bias: bool,
) -> Any:
    from peft import LoraConfig, get_peft_model

    dtype, adapter_dtype = dtypes

    config = LoraConfig(
        r=rank, target_modules=["layer"], use_dora=way != "LoRA", init_lora_weights=False
    )
    block = _Block(nn.Linear(*shape, bias=bias, device=device, dtype=dtype))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(block, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(adapter_dtype)
    model.eval()
    if way not in {"LoRA", "PEFT DoRA"}:
        attached.enter_context(attach(model, numerics=way))
    return model.get_submodule("base_model.model.layer")


def _time(layer: Any, x: Tensor, calls: int) -> float:
    synchronize(x.device)
    began = time.perf_counter()
    for _ in range(calls):
        layer(x)
    spent = time.perf_counter() - began
    synchronize(x.device)
    return spent / calls * 1e6


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m dora_cache.lab.layer")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", help="of the base weight and the input")
    parser.add_argument("--adapter-dtype", default="float32")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rows", type=int, nargs="+", default=[1])
    parser.add_argument("--shape", default="4096x4096", help="inputs x outputs")
    parser.add_argument("--bias", action="store_true")
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    inputs, outputs = map(int, given.shape.split("x"))
    for name, value in describe_machine(torch.device(given.device)).items():
        print(f"{name}: {value}")  # noqa: T201
    print(  # noqa: T201
        f"\n{inputs} -> {outputs}, r={given.rank}, {given.dtype}, adapters {given.adapter_dtype}; "
        "microseconds of host time per forward: median (quartiles)"
    )
    for rows in given.rows:
        found = measure_layer(
            given.device,
            getattr(torch, given.dtype),
            getattr(torch, given.adapter_dtype),
            given.rank,
            rows,
            rounds=given.rounds,
            shape=(inputs, outputs),
            bias=given.bias,
        )
        lora = found["LoRA"].median
        print(f"\n{rows} rows")  # noqa: T201
        for way, spread in found.items():
            times = f"{spread.median:9.1f} ({spread.low:.1f} - {spread.high:.1f})"
            print(f"{way:10} {times:30} {spread.median / lora:6.2f} x LoRA")  # noqa: T201


if __name__ == "__main__":
    _main()
