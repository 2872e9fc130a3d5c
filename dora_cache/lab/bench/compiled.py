"""Time compiled decoding: ``generate`` with a static cache, as Transformers compiles it."""

from __future__ import annotations

import itertools
import time
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dora_cache.lab.bench.measure import Spread
from dora_cache.lab.bench.phases import Cell, Phase, paired
from dora_cache.lab.bench.ways import groups, rotated

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from peft import PeftModel

    from dora_cache.lab.bench.ways import Running, Way

__all__ = ["measure_compiled"]

_SETTLING = 3  # steps in which a CUDA graph is warmed up and recorded
_WARM_UPS = 2
_RECOMPILATIONS = 1 << 14  # models share their code, and layers theirs: the default 8 is not enough
_SHOWN = 120


class _Clock:
    """A streamer for ``generate`` that notes when each token comes."""

    def __init__(self) -> None:
        self._times: list[float] = []

    def put(self, _: Tensor) -> None:
        self._times.append(time.perf_counter())

    def end(self) -> None:
        pass

    def step_ms(self) -> list[float]:
        """Return the milliseconds of each compiled step; neither prompt nor settling counts."""
        times = self._times[1:]  # the prompt is put first
        steps = [1e3 * (later - sooner) for sooner, later in itertools.pairwise(times)]
        return steps[min(_SETTLING, len(steps) - 1) :]


def measure_compiled(
    model: PeftModel,
    input_ids: Tensor,
    *,
    adapter: str,
    ways: Sequence[Way],
    tokens: int = 32,
    rounds: int = 5,
    backend: str = "inductor",
    on_step: Callable[[str, int, int], object] | None = None,
) -> Phase:
    """Measure decoding with a static cache, compiled (on CUDA into CUDA graphs).

    The pass over the prompt is not compiled and not timed. All ways generate in turn, another one
    first in every round. A way that does not compile gets the reason in place of a time.

    Args:
        model: in eval mode; see ``compare`` for what becomes of its weights.
        input_ids: the prompt, int64, shape (1, length), on the model's device.
        adapter: the one to use.
        ways: with distinct names.
        tokens: new tokens of each generation, three or more.
        rounds: generations of every way.
        backend: of ``torch.compile``.
        on_step: called with a way's label, the steps done and the steps in all.
    """
    if tokens < 3 or rounds < 1 or not ways:  # noqa: PLR2004 - one from the prompt, and a step
        raise ValueError("give three tokens or more, and a round and a way or more")
    sets = groups(ways)
    total, done = sum(map(len, sets)) * (rounds + 1), 0

    def step(way: Way) -> None:
        nonlocal done
        done += 1
        if on_step is not None:
            on_step(way.label, done, total)

    found: dict[str, Cell] = {}
    limits = {
        "recompile_limit": _RECOMPILATIONS,
        "accumulated_recompile_limit": _RECOMPILATIONS,
        "fail_on_recompile_limit_hit": True,  # rather than going on uncompiled
    }
    try:
        with torch._dynamo.config.patch(limits):
            for together in sets:
                found = (
                    _side_by_side(
                        model, input_ids, adapter, together, tokens, rounds, backend, step
                    )
                    | found
                )
    finally:
        torch._dynamo.reset()
    return Phase("decode, compiled", {way.name: found[way.name] for way in ways})


def _side_by_side(
    model: PeftModel,
    input_ids: Tensor,
    adapter: str,
    ways: Sequence[Way],
    tokens: int,
    rounds: int,
    backend: str,
    step: Callable[[Way], None],
) -> dict[str, Cell]:
    reasons: dict[str, str] = {}
    times: dict[str, list[float | None]] = {way.name: [] for way in ways}
    running: dict[str, Running] = {}

    def attempt(way: Way, action: Callable[[], list[float]]) -> list[float]:
        if way.name not in reasons:
            try:
                return action()
            except Exception as error:  # noqa: BLE001 - compilers fail in every way there is
                text = f"{type(error).__name__}: {' '.join(str(error).split())}"
                reasons[way.name] = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
        return []

    def generate(way: Way) -> list[float]:
        return _generate(running[way.name], input_ids, tokens, backend)

    def prepare(way: Way) -> list[float]:
        running[way.name] = stack.enter_context(way.open(model, [adapter]))
        running[way.name].select(adapter)
        for _ in range(_WARM_UPS):
            generate(way)
        return []

    with ExitStack() as stack:
        for way in ways:
            attempt(way, partial(prepare, way))
            step(way)
        for turn in range(rounds):
            for way in rotated(ways, turn):
                times[way.name] += attempt(way, partial(generate, way))
                step(way)
    return {
        way.name: Cell(reason=reasons[way.name])
        if way.name in reasons
        else Cell(
            Spread.quartiles(ms for ms in times[way.name] if ms is not None),
            paired(times, way.name),
        )
        for way in ways
    }


def _generate(running: Running, input_ids: Tensor, tokens: int, backend: str) -> list[float]:
    from transformers import CompileConfig

    config: Any = CompileConfig(backend=backend)
    config._compile_all_devices = True  # else nothing is compiled for a CPU, without a word
    clock = _Clock()
    with running.turn(), torch.no_grad():
        running.model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            do_sample=False,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            cache_implementation="static",
            compile_config=config,
            streamer=clock,
        )
    return clock.step_ms()
