"""Where the time of a decode step goes, for one way of running."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity

from dora_cache.lab.bench.measure import synchronize

if TYPE_CHECKING:
    from peft import PeftModel

    from dora_cache.lab.bench.ways import Way

__all__ = ["Profile", "profile"]

_WARM_UPS = 3
_STEPS = 4
_ROWS = 15
_WIDTH = 40


@dataclass(frozen=True, slots=True)
class Profile:
    """What a decode step of one way is made of.

    Attributes:
        label: the way's name for people.
        step_ms: milliseconds of a step, not profiled: the median.
        busy: the share of it in what is counted.
        counted: "kernels" on CUDA, "operators" on a CPU, those called by others included.
        count: how many of them there are in a step.
        layers: adapter layers of the model; its linear layers where it has no adapters.
        table: the operators that take longest.
    """

    label: str
    step_ms: float
    busy: float
    counted: str
    count: float
    layers: int
    table: str

    def summary(self) -> str:
        """Say what each layer costs, and how much of it is Python and launching."""
        each_us = 1e3 * self.step_ms / max(1, self.layers)
        rest = 1 - self.busy
        return (
            f"{self.label}: {self.step_ms:.2f} ms per token, {self.busy:.0%} of it in "
            f"{self.count:.0f} {self.counted}, {rest:.0%} in Python and launching. For each of "
            f"{self.layers} layers: {each_us:.0f} us, of which Python and launching "
            f"{each_us * rest:.0f} us, and {self.count / max(1, self.layers):.1f} {self.counted}."
        )


def profile(model: PeftModel, input_ids: Tensor, *, adapter: str, way: Way) -> Profile:
    """Profile a few decode steps of one way, after it has been warmed up.

    Args:
        model: in eval mode; see ``compare`` for what becomes of its weights.
        input_ids: the prompt, int64, shape (1, length), on the model's device.
        adapter: the one to use.
        way: of running.
    """
    cuda = input_ids.is_cuda
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with way.open(model, [adapter]) as running:
        running.select(adapter)
        step = _Step(running.model, input_ids)
        with running.turn():
            for _ in range(_WARM_UPS):
                step()
            times = [step() for _ in range(2 * _STEPS)]
            with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
                profiled = [step() for _ in range(_STEPS)]
        layers = _layers(running.model)
    averages: Any = profiler.key_averages()
    if cuda:  # kernels alone: what launched them is listed with the same time again
        rows = [row for row in averages if row.device_type.name != "CPU"]
        busy = sum(row.self_device_time_total for row in rows) / statistics.median(times)
    else:  # operators take longer under the profiler
        rows = [row for row in averages if row.key.startswith("aten::")]
        busy = sum(row.self_cpu_time_total for row in rows) / statistics.median(profiled)
    return Profile(
        label=way.label,
        step_ms=statistics.median(times),
        busy=min(1.0, 1e-3 * busy / _STEPS),
        counted="kernels" if cuda else "operators",
        count=sum(row.count for row in rows) / _STEPS,
        layers=layers,
        table=averages.table(
            sort_by="self_cuda_time_total" if cuda else "self_cpu_time_total",
            row_limit=_ROWS,
            max_name_column_width=_WIDTH,
        ),
    )


class _Step:
    """A decode step that can be run again and again."""

    def __init__(self, model: Any, input_ids: Tensor) -> None:
        self._model = model
        with torch.inference_mode():
            output = model(input_ids=input_ids, use_cache=True)
        self._past = output.past_key_values
        self._ids = output.logits[:, -1:].argmax(dim=-1)

    @torch.inference_mode()
    def __call__(self) -> float:
        """Run it; return its milliseconds."""
        synchronize(self._ids.device)
        began = time.perf_counter()
        output = self._model(input_ids=self._ids, past_key_values=self._past, use_cache=True)
        self._ids = output.logits[:, -1:].argmax(dim=-1)
        synchronize(self._ids.device)
        return 1e3 * (time.perf_counter() - began)


def _layers(model: torch.nn.Module) -> int:
    modules = list(model.modules())
    adapted = sum(hasattr(module, "base_layer") for module in modules)
    return adapted or sum(isinstance(module, torch.nn.Linear) for module in modules)
