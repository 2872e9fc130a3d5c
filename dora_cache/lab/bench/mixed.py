"""Time batches whose rows have different adapters: PEFT's mixed LoRA and a pool's, side by side."""

from __future__ import annotations

import functools
import inspect
import math
import time
import warnings
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dora_cache.lab.bench.measure import Decoding, Spread, blocks, decode, logits, synchronize
from dora_cache.lab.bench.phases import Cell, Phase, paired, random_prompt
from dora_cache.lab.bench.ways import BASE, LORA, Running, Way, rotated
from dora_cache.lab.models import twin, write_adapter

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
    from pathlib import Path

__all__ = [
    "Check",
    "Limit",
    "Mixed",
    "Mixture",
    "bandwidth",
    "measure_mixed",
    "mixed_ways",
    "mixture",
]

_MIXED = "peft-mixed"
_ONE_BY_ONE = "peft-one-by-one"
_NO_GRAPH = {
    _MIXED: "makes its indices on the host",
    _ONE_BY_ONE: "needs a graph for each adapter",
}
_PROMPT = 16
_TURN = 8  # tokens, or replays of a graph
_LEAST_ROUNDS = 3
_WARM_UPS = 3
_COPIES = 5
_COPIED = {"cuda": 1 << 30, "cpu": 1 << 28}  # bytes: more than any cache has
_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
_SHARE = 0.25  # of what an adapter changes: an error as large is not one of rounding


@dataclass(frozen=True, slots=True)
class Mixture:
    """A model, and adapters for it in files.

    Attributes:
        base: the model, without adapters.
        model: a PEFT model that shares its weights, with the LoRA adapters.
        names: of the adapters.
        folders: by kind, ``"lora"``, ``"dora"`` and, for DoRA of several ranks, ``"ranks"``: the
            folder in which there is one for each name.
        ranks: by kind, the ranks, which adapters have in turn.
    """

    base: Any
    model: Any
    names: tuple[str, ...]
    folders: dict[str, Path]
    ranks: dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Check:
    """How far a pool's outputs are from plain PEFT's with one adapter.

    All are relative: the norm of the difference over that of PEFT's output.

    Attributes:
        way: the way's name.
        what: what was compared.
        error: of the pool.
        effect: what the adapter changes of the base model's output; 0 where that is not known.
        tolerance: what rounding may make of the error.
    """

    way: str
    what: str
    error: float
    effect: float
    tolerance: float

    @property
    def right(self) -> bool:
        """Whether the error is within the tolerance, and small beside what the adapter changes."""
        return self.error <= min(self.tolerance, _SHARE * self.effect or self.tolerance)


@dataclass(frozen=True, slots=True)
class Limit:
    """What a step takes at least: the base batch's, and to read each of the adapters once.

    Attributes:
        way: the way's name.
        phase: whose time of the base model it is.
        nbytes: of the distinct adapters, as the pool holds them.
        ms: the limit.
        times: how many times that the way takes.
    """

    way: str
    phase: str
    nbytes: int
    ms: float
    times: float


@dataclass(frozen=True, slots=True)
class Mixed:
    """What was measured of batches with one number of adapters."""

    phases: tuple[Phase, ...]
    checks: tuple[Check, ...]
    limits: tuple[Limit, ...]


def mixture(
    base: Any,
    folder: Path,
    count: int,
    *,
    rank: int,
    ranks: Sequence[int] = (),
    dtype: torch.dtype | None = None,
    loaded: Collection[int] | None = None,
) -> Mixture:
    """Write random adapters for a model, and load LoRA ones with PEFT.

    Args:
        base: a Transformers model without adapters; it stays as it is.
        folder: to write to.
        count: how many of each kind.
        rank: of LoRA and DoRA adapters.
        ranks: of further DoRA adapters, in turn; none by default.
        dtype: of the adapters; by default the model's.
        loaded: which LoRA adapters PEFT is to load, the first one among them; by default all.

    Raises:
        ValueError: the model has no linear layers.
    """
    names = tuple(f"adapter{index}" for index in range(count))
    of_kinds = {"lora": (rank,), "dora": (rank,)} | ({"ranks": tuple(ranks)} if ranks else {})
    for kind, each in of_kinds.items():
        for index, name in enumerate(names):
            write_adapter(
                base,
                folder / kind / name,
                rank=each[index % len(each)],
                dora=kind != "lora",
                dtype=dtype,
                seed=index,
            )
    folders = {kind: folder / kind for kind in of_kinds}
    wanted = [name for index, name in enumerate(names) if loaded is None or index in loaded]
    return Mixture(base, _loaded(base, folders["lora"], wanted), names, folders, of_kinds)


def _loaded(base: Any, folder: Path, names: Sequence[str]) -> Any:
    """Return a PEFT model of a twin, with adapters from files in the files' dtype."""
    from peft import PeftModel

    how: dict[str, Any] = {
        "autocast_adapter_dtype": False,
        "low_cpu_mem_usage": True,
        "torch_device": str(base.device),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(twin(base), str(folder / names[0]), names[0], **how)
        for name in names[1:]:
            model.load_adapter(str(folder / name), name, **how)
    return model.eval()


@dataclass(frozen=True, slots=True)
class _Pooled(Running):
    """A pool's model, with the adapters of one kind."""

    kind: str = ""
    pool: Any = None


@dataclass(frozen=True, slots=True)
class _OneByOne(Running):
    """A PEFT model that runs the rows one after another, each with its own adapter."""

    names: tuple[str, ...] = ()


def _requests(running: Running, ids: Tensor) -> list[tuple[str, Tensor]]:
    """Return the batches that a way runs, each with the adapter to select for it."""
    if isinstance(running, _OneByOne):
        return list(zip(running.names, torch.split(ids, 1), strict=True))
    return [("", ids)]


def mixed_ways(made: Mixture) -> tuple[Way, ...]:
    """Return the ways of running a batch: without adapters, with one for all, with one a row.

    They are to open :attr:`Mixture.model`, with a name for each row.
    """

    @contextmanager
    def base(_: Any, __: Sequence[str]) -> Iterator[Running]:
        yield Running(made.base, _nothing)

    @contextmanager
    def one(model: Any, names: Sequence[str]) -> Iterator[Running]:
        model.set_adapter(names[0], inference_mode=True)
        yield Running(model, _nothing)

    @contextmanager
    def mixed(model: Any, names: Sequence[str]) -> Iterator[Running]:
        yield Running(functools.partial(model, adapter_names=list(names)), _nothing)

    @contextmanager
    def one_by_one(_: Any, names: Sequence[str]) -> Iterator[Running]:
        own = _loaded(made.base, made.folders["dora"], names)
        select = functools.partial(own.set_adapter, inference_mode=True)
        yield _OneByOne(own, select, names=tuple(names))

    def pooled(kind: str, label: str) -> Way:
        @contextmanager
        def run(_: Any, names: Sequence[str]) -> Iterator[Running]:
            from dora_cache.serving import AdapterPool  # it imports PEFT

            own, ranks = twin(made.base), made.ranks[kind][: len(names)]
            with AdapterPool(own, backend="null", max_rank=max(ranks)) as pool:
                for name in names:
                    pool.add(name, made.folders[kind] / name)
                yield _Pooled(
                    own,
                    _nothing,
                    turn=lambda: pool.use(list(names)),
                    held=lambda: pool.stats().device_bytes,
                    kind=kind,
                    pool=pool,
                )

        return Way(f"dora-cache:{kind}", label, run)

    labels = {"lora": "pool, LoRA", "dora": "pool, DoRA"}
    if "ranks" in made.ranks:
        labels["ranks"] = f"pool, ranks {', '.join(map(str, made.ranks['ranks']))}"
    return (
        Way(BASE.name, BASE.label, base),
        Way(LORA.name, "PEFT LoRA, one for all", one),
        Way(_MIXED, "PEFT LoRA, one a row", mixed),
        Way(_ONE_BY_ONE, "PEFT DoRA, row by row", one_by_one),
        *(pooled(kind, label) for kind, label in labels.items()),
    )


def _nothing(_: str) -> None:
    """Select no adapter: which ones there are is settled when a way is opened."""


def measure_mixed(
    made: Mixture,
    rows: int,
    *,
    ways: Sequence[Way],
    tokens: int = 16,
    rounds: int = 4,
    seconds: float = math.inf,
    prompt: int = 0,
    graphs: bool = False,
    per_second: float | None = None,
    on_step: Callable[[int, int], object] | None = None,
) -> Mixed:
    """Measure batches of which each row has an adapter of its own, ways side by side.

    *decode*: a token of greedy decoding with a key-value cache, as in ``compare``: eight tokens of
    one way, then eight of the next. *prefill*: a forward over a batch of prompts. *CUDA graph*: a
    forward of one token without a key-value cache, replayed eight times. Within its turns a pool is
    in ``use``; entering it is not timed. Where rows run one after another, their times are added,
    and selecting adapters is not timed either.

    Outputs of pools are compared with plain PEFT's first, for the first and the last row; later
    those of a CUDA graph, replayed with other adapters than it was recorded with, with eager ones.

    Args:
        made: the model and its adapters.
        rows: as many as the batch has, and adapters.
        ways: of :func:`mixed_ways`.
        tokens: new tokens of each generation; the first is not timed.
        rounds: generations, prefills and turns of graphs of every way, at most.
        seconds: for how long each phase goes on; three rounds at least, if ``rounds`` allows.
        prompt: length of the prompts of prefills; 0 for none.
        graphs: whether to record CUDA graphs; for models on CUDA.
        per_second: bytes that the device's memory reads; limits are computed from it.
        on_step: called with the turns done and the turns in all.

    Raises:
        ValueError: there are fewer adapters than that.
    """
    if not 1 <= rows <= len(made.names):
        raise ValueError(f"there are {len(made.names)} adapters: give from 1 to that many rows")
    names = made.names[:rows]
    device = made.base.device
    sizes = blocks(tokens)
    counts = (rounds * len(sizes), rounds if prompt else 0, rounds if graphs else 0)
    total, done = sum(counts) * len(ways), 0

    def step() -> None:
        nonlocal done
        done += 1
        if on_step is not None:
            on_step(done, total)

    with ExitStack() as stack:
        running = {way.name: stack.enter_context(way.open(made.model, names)) for way in ways}
        turns = _Turns(ways, running, seconds, step)
        checks = list(_check(made, names, running))
        made.model.set_adapter(names[0], inference_mode=True)
        phases = [_decode(turns, random_prompt(made.base, rows, _PROMPT), sizes, rounds)]
        if prompt:
            phases.append(_prefill(turns, made.base, (rows, prompt), rounds))
        if graphs:
            ids = random_prompt(made.base, rows, 1)
            phase, more = _graphs(turns, names, ids, rounds)
            phases.append(phase)
            checks += more
        limits = () if per_second is None else tuple(_limits(phases, running, per_second))
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what graphs had
    return Mixed(tuple(phases), tuple(checks), limits)


@dataclass(frozen=True, slots=True)
class _Turns:
    """The ways that take turns."""

    ways: Sequence[Way]
    running: Mapping[str, Running]
    seconds: float
    step: Callable[[], None]

    def take(
        self, job: Callable[[str, int], list[float]], turns: int, least: int, names: Sequence[str]
    ) -> dict[str, Cell]:
        """Have ways do a job in turn, another one first every time.

        Args:
            job: given the way's name and the turn, returns milliseconds.
            turns: how many, at most.
            least: how many even if time is up.
            names: of the ways.
        """
        ways = [way for way in self.ways if way.name in names]
        times: dict[str, list[float | None]] = {way.name: [] for way in ways}
        end = time.perf_counter() + self.seconds
        for turn in range(turns):
            for way in rotated(ways, turn):
                with self.running[way.name].turn(), torch.inference_mode():
                    times[way.name] += job(way.name, turn)
                self.step()
            if turn + 1 >= least and time.perf_counter() > end:
                break
        return {
            name: Cell(Spread.quartiles(ms for ms in own if ms is not None), paired(times, name))
            for name, own in times.items()
        }

    def once(self, job: Callable[[Running], object]) -> None:
        """Have all ways do something once, so that it is not the first time when it is timed."""
        for running in self.running.values():
            with running.turn(), torch.inference_mode():
                job(running)


def _decode(turns: _Turns, ids: Tensor, sizes: Sequence[int], rounds: int) -> Phase:
    """Measure tokens; ``sizes`` are the tokens of each turn of a generation, first 1."""
    under_way: dict[str, list[tuple[str, Decoding]]] = {}

    def job(name: str, turn: int) -> list[float]:
        part = turn % len(sizes)
        running = turns.running[name]
        if part == 0:
            under_way[name] = [
                (adapter, Decoding(running.model, own)) for adapter, own in _requests(running, ids)
            ]
        took = [0.0] * sizes[part]
        for adapter, decoding in under_way[name]:
            running.select(adapter)
            for token in range(sizes[part]):
                took[token] += decoding.step()
        return took if part else []

    def warm_up(running: Running) -> None:
        for adapter, own in _requests(running, ids):
            running.select(adapter)
            decode(running.model, own, 2)

    turns.once(warm_up)
    count = len(sizes)
    cells = turns.take(job, rounds * count, _LEAST_ROUNDS * count, list(turns.running))
    return Phase(f"decode, {len(ids)} rows", cells)


def _prefill(turns: _Turns, base: Any, shape: tuple[int, int], rounds: int) -> Phase:
    ids = random_prompt(base, *shape)
    options: dict[str, int] = {}
    if "logits_to_keep" in inspect.signature(base.forward).parameters:
        options["logits_to_keep"] = 1  # as generate() does with a prompt

    def forward(running: Running) -> list[float]:
        took = 0.0
        for adapter, own in _requests(running, ids):
            running.select(adapter)
            took += _timed(functools.partial(running.model, input_ids=own, **options), ids.device)
        return [took]

    turns.once(forward)
    cells = turns.take(
        lambda name, _: forward(turns.running[name]), rounds, _LEAST_ROUNDS, list(turns.running)
    )
    return Phase(f"prefill {shape[0]}x{shape[1]}", cells)


def _timed(run: Callable[[], object], device: torch.device) -> float:
    """Return the milliseconds that something takes."""
    synchronize(device)
    began = time.perf_counter()
    run()
    synchronize(device)
    return 1e3 * (time.perf_counter() - began)


# Outputs


def _relative(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over the norm of what is expected."""
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm())


def _tolerance(found: Tensor) -> float:
    return _TOLERANCES.get(found.dtype, max(_TOLERANCES.values()))


def _check(made: Mixture, names: Sequence[str], running: Mapping[str, Running]) -> Iterator[Check]:
    """Compare the logits after a prompt with plain PEFT's."""
    ids = random_prompt(made.base, len(names), _PROMPT)
    base = logits(made.base, ids)[:, -1]
    chosen = list(dict.fromkeys((names[0], names[-1])))
    for way, one in running.items():
        if not isinstance(one, _Pooled):
            continue
        with one.turn():
            found = logits(one.model, ids)[:, -1]
        # PEFT's mixed batches refuse DoRA: here all rows have the adapter, and one counts.
        own = one.kind == "lora"
        model = made.model if own else _loaded(made.base, made.folders[one.kind], chosen)
        for name in chosen:
            model.set_adapter(name, inference_mode=True)
            row = names.index(name)
            expected = logits(model, ids)[row, -1]
            yield Check(
                way,
                f"row {row} of {len(names)}, to plain PEFT",
                _relative(found[row], expected),
                _relative(base[row], expected),
                _tolerance(found),
            )


# CUDA graphs


def _graphs(
    turns: _Turns, names: Sequence[str], ids: Tensor, rounds: int
) -> tuple[Phase, list[Check]]:
    recorded: dict[str, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
    reasons = {}
    for way, running in turns.running.items():
        if way in _NO_GRAPH:
            reasons[way] = _NO_GRAPH[way]
            continue
        try:
            with running.turn(), torch.inference_mode():
                recorded[way] = _record(running, ids)
        except Exception as error:  # noqa: BLE001 - recording fails in every way there is
            reasons[way] = f"{type(error).__name__}: {' '.join(str(error).split())}"

    def job(way: str, _: int) -> list[float]:
        graph = recorded[way][0]

        def replay() -> None:
            for _ in range(_TURN):
                graph.replay()

        return [_timed(replay, ids.device) / _TURN]

    for way in recorded:
        with turns.running[way].turn():
            job(way, 0)
    cells = turns.take(job, rounds, _LEAST_ROUNDS, list(recorded)) if recorded else {}
    cells = {
        way: cells[way] if way in cells else Cell(reason=reasons[way]) for way in turns.running
    }
    checks = [
        _replayed(way, one, names, ids, *recorded[way])
        for way, one in turns.running.items()
        if isinstance(one, _Pooled) and way in recorded
    ]
    return Phase(f"CUDA graph, {len(ids)} rows", cells), checks


def _step(running: Running, ids: Tensor) -> Tensor:
    """Run one token for each row, without a key-value cache, whose shapes would change."""
    found: Tensor = running.model(input_ids=ids, use_cache=False).logits
    return found


def _record(running: Running, ids: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """Record a step, and return the graph and its output."""
    if isinstance(running, _Pooled):
        running.pool.static_rows(ids.device)  # before recording: not of the graph's own memory
    side: Any = torch.cuda.Stream(ids.device)  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream(ids.device))
    with torch.cuda.stream(side):
        for _ in range(_WARM_UPS):
            _step(running, ids)
    torch.cuda.current_stream(ids.device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = _step(running, ids)
    return graph, output


def _replayed(
    way: str,
    running: _Pooled,
    names: Sequence[str],
    ids: Tensor,
    graph: torch.cuda.CUDAGraph,
    output: Tensor,
) -> Check:
    """Compare a graph with eager execution, with other adapters than those it was recorded with."""
    with running.turn(), torch.inference_mode():
        before = _step(running, ids)
    with running.pool.use([None, *reversed(names[1:])]), torch.inference_mode():
        graph.replay()
        expected = _step(running, ids)
        return Check(
            way,
            f"graph of {len(names)} rows, other adapters, to eager",
            _relative(output, expected),
            _relative(before, expected),
            _tolerance(output),
        )


# The physical limit


def bandwidth(device: torch.device) -> float:
    """Return the bytes per second that a device reads and writes when it copies its memory."""
    size = _COPIED.get(device.type, _COPIED["cpu"])
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    best = min(_timed(lambda: target.copy_(source), device) for _ in range(_COPIES))
    return 2e3 * size / best


def _limits(
    phases: Sequence[Phase], running: Mapping[str, Running], per_second: float
) -> Iterator[Limit]:
    for phase in phases:
        base = phase.cells.get(BASE.name)
        if base is None or base.ms is None or phase.name.startswith("prefill"):
            continue
        for way, one in running.items():
            ms = phase.cells[way].ms
            if isinstance(one, _Pooled) and ms is not None:
                held = one.held() or 0
                limit = base.ms.median + 1e3 * held / per_second
                yield Limit(way, phase.name, held, limit, ms.median / limit)
