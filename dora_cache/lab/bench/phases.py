"""Time what decoding does not show: prefill, switching adapters, deriving; and weigh each way."""

from __future__ import annotations

import gc
import inspect
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dora_cache.lab.bench.measure import Spread, synchronize
from dora_cache.lab.bench.ways import BASE, LORA, PEFT, Way, groups, rotated

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from peft import PeftModel
    from torch import nn

    from dora_cache.lab.bench.ways import Running

__all__ = ["Cell", "Footprint", "Phase", "Phases", "measure_phases", "paired", "random_prompt"]

_NO_MEMORY = "out of memory"


@dataclass(frozen=True, slots=True)
class Cell:
    """What one way takes for one phase.

    Attributes:
        ms: the median over all rounds and the quartiles; None if it was not measured.
        ratio: the same of the time relative to that of plain LoRA in the same round; None where
            that was not measured or says nothing.
        reason: why there is no time.
    """

    ms: Spread | None = None
    ratio: Spread | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Phase:
    """One kind of work, and what it takes each way, by the ways' names."""

    name: str
    cells: dict[str, Cell]


@dataclass(frozen=True, slots=True)
class Footprint:
    """Memory of one way, with what it holds for one adapter.

    Attributes:
        allocated: bytes of weights, adapters and what is held; on CUDA by the allocator's count.
        peak: the most that was allocated during a forward of any phase; None where not counted.
    """

    allocated: int
    peak: int | None


@dataclass(frozen=True, slots=True)
class Phases:
    """All phases that were measured, and the memory of each way that fits."""

    phases: tuple[Phase, ...]
    memory: dict[str, Footprint]


class _Lane:
    """One way, opened; closed for good when memory does not suffice for it."""

    def __init__(self, way: Way, model: PeftModel, adapters: Sequence[str], ids: Tensor) -> None:
        self.way = way
        self.reason = ""
        self.transient = 0
        self.stack = ExitStack()
        self._ids = ids
        self._device = ids.device
        self._options: dict[str, int] = {}
        self._running: Running | None = None
        before = _allocated(self._device)
        with suppress(torch.OutOfMemoryError):
            self._running = self.stack.enter_context(way.open(model, adapters))
        if self._running is None:
            self.fail()
        if "logits_to_keep" in inspect.signature(model.get_base_model().forward).parameters:
            self._options["logits_to_keep"] = 1  # as generate() does with a prompt
        self.select(adapters[0])
        for _ in range(2):
            self.forward()
        self.growth = _allocated(self._device) - before
        self.held = 0 if self._running is None else self._running.held() or 0
        self.transient = 0

    def fail(self) -> None:
        """Give up for want of memory."""
        self.reason, self._running = _NO_MEMORY, None
        self.stack.close()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.no_grad()
    def do(self, action: Callable[[Running], object]) -> float | None:
        """Run something in the way's turn; return its milliseconds, None if it does not fit."""
        if self._running is None:
            return None
        cuda = self._device.type == "cuda"
        held = torch.cuda.memory_allocated(self._device) if cuda else 0
        if cuda:
            torch.cuda.reset_peak_memory_stats(self._device)
        try:
            with self._running.turn():
                synchronize(self._device)
                began = time.perf_counter()
                action(self._running)
                synchronize(self._device)
                took = 1e3 * (time.perf_counter() - began)
        except torch.OutOfMemoryError:
            pass  # the traceback holds what there is no memory for, so not from in here
        else:
            if cuda:
                peak = torch.cuda.max_memory_allocated(self._device)
                self.transient = max(self.transient, peak - held)
            return took
        self.fail()
        return None

    def forward(self, ids: Tensor | None = None) -> float | None:
        """Run the model; by default on one token."""
        ids = self._ids if ids is None else ids
        with torch.inference_mode():
            return self.do(lambda running: running.model(input_ids=ids, **self._options))

    def select(self, adapter: str) -> float | None:
        """Make an adapter the active one."""
        return self.do(lambda running: running.select(adapter))

    @property
    def running(self) -> Running | None:
        """The way, opened; None if it does not fit."""
        return self._running


def measure_phases(
    model: PeftModel,
    *,
    adapters: Sequence[str],
    ways: Sequence[Way],
    prefill: Iterable[tuple[int, int]] = (),
    rounds: int = 5,
    on_step: Callable[[str, int, int], object] | None = None,
) -> Phases:
    """Measure prefill, switching adapters and deriving, ways side by side as in ``compare``.

    *prefill*: a forward over a batch of prompts, with the first adapter.
    *switch*: making another adapter the active one and a forward of one token, less a forward of
    one token. What the adapters need has been derived before.
    *warm-up*: deriving everything for an adapter. With dora-cache, its ``warm()``; with PEFT's
    cache, what a first forward takes more than a second one; with PEFT uncached, what every
    forward takes more than plain LoRA's.

    Args:
        model: in eval mode; see ``compare`` for what becomes of its weights.
        adapters: names of the model's adapters.
        ways: with distinct names.
        prefill: batch size and length of the prompts of each prefill.
        rounds: how often each is measured.
        on_step: called with a way's label, the steps done and the steps in all.

    Raises:
        ValueError: the model is in training mode, or there is too little to measure.
        NothingToCacheError: a way attaches dora-cache, and the model has nothing to cache.
    """
    if model.training:
        raise ValueError("nothing is cached in training mode: call model.eval() first")
    if rounds < 1 or not adapters or not ways:
        raise ValueError("give a round, an adapter and a way or more")
    shapes = list(prefill)
    one = random_prompt(model, 1, 1)
    with torch.inference_mode():
        model(input_ids=one)  # for what libraries allocate once and for all
    sets = groups(ways)
    total, done = sum(map(len, sets)) * (len(shapes) + 2), 0
    cells: dict[str, dict[str, Cell]] = {}
    memory: dict[str, Footprint] = {}
    for together in sets:
        with ExitStack() as stack:
            lanes: dict[str, _Lane] = {}
            for way in together:
                lanes[way.name] = lane = _Lane(way, model, adapters, one)
                stack.enter_context(lane.stack)
            weighed: dict[str, Footprint] = {}
            for name, job in _jobs(model, lanes, adapters, shapes, rounds).items():
                # LoRA's cell and weight are its own, not those of a companion.
                cells[name] = job() | cells.get(name, {})
                # Each time: a way that fits now may not fit later, its peak may yet grow.
                weighed |= {own: _footprint(model, x) for own, x in lanes.items() if x.running}
                for way in together:
                    done += 1
                    if on_step is not None:
                        on_step(way.label, done, total)
            memory = weighed | memory
    return Phases(
        tuple(
            Phase(name, {way.name: found[way.name] for way in ways})
            for name, found in cells.items()
        ),
        {way.name: memory[way.name] for way in ways if way.name in memory},
    )


def _jobs(
    model: PeftModel,
    lanes: Mapping[str, _Lane],
    adapters: Sequence[str],
    shapes: Iterable[tuple[int, int]],
    rounds: int,
) -> dict[str, Callable[[], dict[str, Cell]]]:
    """Return what measures each phase; the most memory is wanted last."""
    prefills = {
        f"prefill {batch}x{length}": partial(_prefill, lanes, model, (batch, length), rounds)
        for batch, length in shapes
    }
    return {
        **prefills,
        "warm-up": partial(_warm_up, lanes, adapters[0], rounds),
        "switch": partial(_switch, lanes, adapters, rounds),
    }


def paired(times: Mapping[str, Sequence[float | None]], way: str) -> Spread | None:
    """Return the quartiles of a way's times relative to plain LoRA's; None without these."""
    ratios = [
        own / plain
        for own, plain in zip(times[way], times.get(LORA.name, ()), strict=False)
        if own is not None and plain
    ]
    return Spread.quartiles(ratios) if ratios else None


def random_prompt(model: Any, batch: int, length: int) -> Tensor:
    """Return random token ids, the same ones every time, on the model's device."""
    generator = torch.Generator().manual_seed(0)
    embeddings = model.get_input_embeddings()
    ids = torch.randint(embeddings.num_embeddings, (batch, length), generator=generator)
    return ids.to(embeddings.weight.device)


def _in_rounds(
    lanes: Mapping[str, _Lane], rounds: int, job: Callable[[_Lane], float | None]
) -> dict[str, list[float | None]]:
    """Do a job once without timing it, then once each round, another way first every time."""
    ways = [lane.way for lane in lanes.values()]
    times: dict[str, list[float | None]] = {name: [] for name in lanes}
    for turn in range(-1, rounds):
        for way in rotated(ways, turn):
            took = job(lanes[way.name])
            if turn >= 0:
                times[way.name].append(took)
    return times


def _cells(
    lanes: Mapping[str, _Lane], times: Mapping[str, Sequence[float | None]], *, ratios: bool
) -> dict[str, Cell]:
    return {
        name: Cell(reason=lane.reason)
        if lane.reason
        else Cell(
            Spread.quartiles(ms for ms in times[name] if ms is not None),
            paired(times, name) if ratios else None,
        )
        for name, lane in lanes.items()
    }


def _prefill(
    lanes: Mapping[str, _Lane], model: PeftModel, shape: tuple[int, int], rounds: int
) -> dict[str, Cell]:
    ids = random_prompt(model, *shape)
    times = _in_rounds(lanes, rounds, lambda lane: lane.forward(ids))
    return _cells(lanes, times, ratios=True)


def _warm_up(lanes: Mapping[str, _Lane], adapter: str, rounds: int) -> dict[str, Cell]:
    def forget(lane: _Lane) -> None:
        if lane.running is not None and lane.running.forget is not None:
            lane.running.forget(adapter)

    def job(lane: _Lane) -> float | None:
        forget(lane)
        running = lane.running
        if running is not None and running.warm is not None:
            warm = running.warm
            return lane.do(lambda _: warm(adapter))
        first = lane.forward()
        if running is None or running.forget is None:
            return first
        return _less(first, lane.forward())

    times = _in_rounds(lanes, rounds, job)
    found = _cells(lanes, times, ratios=False)
    for name, lane in lanes.items():
        if lane.running is None or lane.running.forget is not None:
            continue
        surplus = [
            _less(*pair) for pair in zip(times[name], times.get(LORA.name, ()), strict=False)
        ]
        known = [ms for ms in surplus if ms is not None]
        if name != PEFT.name:
            found[name] = Cell(reason="derives nothing")
        elif known:
            found[name] = Cell(Spread.quartiles(known))
        else:
            found[name] = Cell(reason="not told apart without plain LoRA")
    return found


def _switch(lanes: Mapping[str, _Lane], adapters: Sequence[str], rounds: int) -> dict[str, Cell]:
    if len(adapters) == 1:
        return dict.fromkeys(lanes, Cell(reason="there is one adapter"))
    switching = {name: lane for name, lane in lanes.items() if name != BASE.name}
    found = dict.fromkeys(lanes, Cell(reason="has no adapters"))
    if not switching:
        return found
    for lane in switching.values():  # all of them derived, the first one active
        for name in [*adapters, adapters[0]]:
            lane.select(name)
            lane.forward()
    turn = dict.fromkeys(switching, 0)

    def job(lane: _Lane) -> float | None:
        plain = lane.forward()
        turn[lane.way.name] += 1
        name = adapters[turn[lane.way.name] % len(adapters)]
        switched = lane.select(name)
        after = lane.forward()
        return None if switched is None or after is None else _less(switched + after, plain)

    return found | _cells(switching, _in_rounds(switching, rounds, job), ratios=False)


def _less(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def _allocated(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    gc.collect()
    torch.cuda.synchronize(device)
    return torch.cuda.memory_allocated(device)


def _footprint(model: nn.Module, lane: _Lane) -> Footprint:
    running: Any = lane.running
    own = dict(_storages(running.model))
    if next(model.parameters()).is_cuda:
        given = dict(_storages(model))
        shared = sum(size for pointer, size in own.items() if pointer in given)
        allocated = shared + lane.growth
        return Footprint(allocated, allocated + lane.transient)
    return Footprint(sum(own.values()) + lane.held, None)


def _storages(model: nn.Module) -> Iterator[tuple[int, int]]:
    for tensor in (*model.parameters(), *model.buffers()):
        storage = tensor.untyped_storage()
        yield storage.data_ptr(), storage.nbytes()
