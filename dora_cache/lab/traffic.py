"""Requests for many adapters on one small model: what a cap keeps, and what a switch costs."""

from __future__ import annotations

import statistics
import time
import warnings
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import torch
from rich import box
from rich.table import Table

from dora_cache.attachment import attach
from dora_cache.lab.simulator.bounds import belady
from dora_cache.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["Served", "Traffic", "as_dict", "make_model", "measure_traffic", "table"]

_SIZE = 64
_LAYERS = 4
_EXPONENT = 1.0


@dataclass(frozen=True, slots=True)
class Served:
    """One way of serving all requests.

    Attributes:
        name: the backend's; ``PEFT`` for uncached.
        hit_rate: hits per lookup.
        of_optimum: hits as a share of those that are possible.
        switch_ms: milliseconds of a request's first forward, right after the adapter was switched:
            the median.
        switch_p99_ms: the 99th percentile of that.
        forward_ms: a further forward, the median.
        max_bytes: the cap.
        most_held: the most bytes that were held after any request.
        rss_growth: bytes by which the process has grown between the tenth part of the requests and
            the last.
        wrong: requests whose output was not PEFT's.
    """

    name: str
    hit_rate: float
    of_optimum: float
    switch_ms: float
    switch_p99_ms: float
    forward_ms: float
    max_bytes: int
    most_held: int
    rss_growth: int
    wrong: int


@dataclass(frozen=True, slots=True)
class Traffic:
    """What was measured, and under what.

    Attributes:
        set_adapter_ms: milliseconds of PEFT's own ``set_adapter``, the median. It goes through all
            the adapters there are, so requests here set the active adapter's name alone.
        optimum: hits per lookup that are possible with foresight.
    """

    adapters: int
    requests: int
    forwards: int
    slots: int
    optimum: float
    set_adapter_ms: float
    served: tuple[Served, ...]


def make_model(adapters: int, *, move: Callable[[], object] = lambda: None) -> Any:
    """Return a small model with many DoRA adapters on every layer, in eval mode."""
    from peft import LoraConfig, get_peft_model

    def config() -> LoraConfig:
        names = [str(2 * index) for index in range(_LAYERS)]
        return LoraConfig(use_dora=True, r=2, target_modules=names, init_lora_weights=False)

    parts: list[torch.nn.Module] = []
    for _ in range(_LAYERS):
        parts += [torch.nn.Linear(_SIZE, _SIZE), torch.nn.Tanh()]
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = get_peft_model(torch.nn.Sequential(*parts), config(), adapter_name="a0")
        for index in range(1, adapters):
            model.add_adapter(f"a{index}", config())
            move()
    return model.eval()


def measure_traffic(
    model: Any,
    *,
    backends: Sequence[str] = ("lru", "budget"),
    slots: int = 50,
    requests: int = 2000,
    forwards: int = 4,
    seed: int = 0,
    move: Callable[[], object] = lambda: None,
) -> Traffic:
    """Serve the same requests uncached and with each backend, one after another.

    Args:
        model: see :func:`make_model`.
        backends: names of backends that take ``max_bytes``.
        slots: for how many adapters the cap suffices.
        requests: how many, for adapters by Zipf's law with exponent 1.
        forwards: in each request.
        seed: of the requests.
        move: called after each request.
    """
    names = list(model.peft_config)
    weights = 1 / np.arange(1, len(names) + 1) ** _EXPONENT
    picks = np.random.default_rng(seed).choice(len(names), size=requests, p=weights / weights.sum())
    with attach(model) as cache:
        cache.warm(adapters=names[:1])
        each = cache.stats().nbytes
    # Every forward of a request asks for each of the adapter's values once.
    lookups = np.repeat(picks, forwards)
    optimum = belady(lookups, slots) / len(lookups)
    x = torch.randn(1, _SIZE, generator=torch.Generator().manual_seed(seed))
    expected: list[torch.Tensor] = []
    asked = [names[pick] for pick in picks]
    cap = slots * each
    served = [
        _serve(model, asked, x, backend, cap, forwards, optimum, expected, move)
        for backend in ("", *backends)
    ]
    peft = []
    for name in names[:5]:
        began = time.perf_counter()
        model.set_adapter(name)
        peft.append(1e3 * (time.perf_counter() - began))
    slow = statistics.median(peft)
    return Traffic(len(names), requests, forwards, slots, optimum, slow, tuple(served))


def _serve(
    model: Any,
    asked: Sequence[str],
    x: torch.Tensor,
    backend: str,
    max_bytes: int,
    forwards: int,
    optimum: float,
    expected: list[torch.Tensor],
    move: Callable[[], object],
) -> Served:
    cache = attach(model, backend=backend, max_bytes=max_bytes) if backend else None
    layers = [part for part in model.modules() if hasattr(part, "lora_magnitude_vector")]
    process = psutil.Process()
    switches, steps = [], []
    most = wrong = grown = early = 0
    try:
        for index, name in enumerate(asked):
            for layer in layers:
                layer._active_adapter = [name]
            began = time.perf_counter()
            output = _forward(model, x)
            switches.append(time.perf_counter() - began)
            for _ in range(forwards - 1):
                began = time.perf_counter()
                output = _forward(model, x)
                steps.append(time.perf_counter() - began)
            if not backend:
                expected.append(output)
            else:
                wrong += not torch.equal(output, expected[index])
            if cache is not None:
                most = max(most, cache.stats().nbytes)
            if index == len(asked) // 10:
                early = process.memory_info().rss
            move()
        grown = process.memory_info().rss - early
        rate = cache.stats().hit_rate if cache is not None else 0.0
    finally:
        if cache is not None:
            cache.detach()
    return Served(
        backend or "PEFT",
        rate,
        rate / optimum,
        1e3 * statistics.median(switches),
        1e3 * float(np.quantile(switches, 0.99)),
        1e3 * statistics.median(steps),
        max_bytes if backend else 0,
        most,
        grown,
        wrong,
    )


def _forward(model: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(x)
    return found


def table(found: Traffic) -> Table:
    """Return one row for each way of serving."""
    rows = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    rows.add_column("")
    for column in (
        "hit rate", "of the\noptimum", "first, ms\np50", "p99", "further,\nms", "cap",
        "most held", "process\ngrew by", "wrong",
    ):  # fmt: skip
        rows.add_column(column, justify="right", vertical="bottom")
    for one in found.served:
        cached = one.name != "PEFT"
        rows.add_row(
            one.name,
            f"{one.hit_rate:.1%}" if cached else "",
            f"{one.of_optimum:.1%}" if cached else "",
            f"{one.switch_ms:.2f}",
            f"{one.switch_p99_ms:.2f}",
            f"{one.forward_ms:.2f}",
            format_bytes(one.max_bytes) if cached else "",
            format_bytes(one.most_held) if cached else "",
            format_bytes(max(0, one.rss_growth)),
            str(one.wrong) if cached else "",
        )
    return rows


def as_dict(found: Traffic) -> dict[str, Any]:
    """Return everything as JSON knows it; times in ms, sizes in bytes."""
    return asdict(found)
