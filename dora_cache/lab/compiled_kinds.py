"""Every kind of adapter, compiled: ``python -m dora_cache.lab.compiled_kinds``.

Ways, side by side: PEFT eager; PEFT compiled; dora-cache compiled, with each numerics that the
example has a form for. Each compiled way is compared with PEFT in float64 first, and timed only if
it is right: within a tolerance, or not much further from that than eager PEFT is. A kind is
measured in processes of its own, so that none waits for another's compilations, fails with it, or
runs past its time: some prepare at the same time, and are timed one by one.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import multiprocessing
import os
import time
import warnings
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dora_cache.attachment import attach
from dora_cache.lab.bench.measure import Spread
from dora_cache.lab.coverage import sizes_of
from dora_cache.lab.machine import describe_machine
from dora_cache.lab.turns import take_turns
from dora_cache.recipes import load_recipes
from dora_cache.recipes.examples import make_model

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from multiprocessing.connection import Connection

    from dora_cache.recipes.examples import Example

__all__ = [
    "Cell",
    "Measured",
    "Settings",
    "as_json",
    "as_markdown",
    "measure_compiled_kinds",
    "names_of",
    "summary",
]

EAGER, COMPILED = "eager PEFT", "compiled PEFT"
_TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
_WORSE = 4.0  # an output may be so many times as far from float64 as eager PEFT's
_RECOMPILATIONS = 1 << 10  # layers share their code
_SHOWN = 160  # characters of an error


@dataclass(frozen=True, slots=True)
class Settings:
    """What to measure, and how.

    Attributes:
        kinds: names of recipes; by default all.
        every_example: whether to measure each example of a kind; by default its first for each kind
            of layer with a form of its own.
        device: of the models.
        dtype: of the base layers, where PEFT runs the example in it; else float32.
        size: inputs and outputs of linear layers; see ``dora-cache lab coverage``.
        layers: of each model.
        tokens: lengths of the inputs.
        rounds: how often each way is timed, at most.
        seconds: for how long the ways of one kind and length take turns; at least three rounds.
        backend: of ``torch.compile``.
        mode: likewise.
        limit: seconds for a kind and length to be made, compiled and compared.
        jobs: processes that prepare at the same time.
        threads: of PyTorch in each process.
        probed: whether the compiler is known to handle this processor's instructions.
    """

    kinds: tuple[str, ...] | None = None
    every_example: bool = False
    device: str = "cpu"
    dtype: str = "float32"
    size: int = 1024
    layers: int = 4
    tokens: tuple[int, ...] = (1, 128)
    rounds: int = 60
    seconds: float = 1.0
    backend: str = "inductor"
    mode: str | None = None
    limit: float = 240.0
    jobs: int = 1
    threads: int = 1
    probed: bool = False


@dataclass(frozen=True, slots=True)
class Cell:
    """One way with one length of input.

    Attributes:
        us: a forward through the model, in microseconds; the median over rounds. None if it was
            not timed.
        speedup: compiled PEFT's time over this one's, within rounds; the median and the quartiles.
        breaks: graph breaks; None for eager code.
        graphs: graphs that were compiled.
        recompiled: graphs that were compiled while it was timed.
        error: the Euclidean distance from the output of PEFT in float64, relative to that output's
            norm; from that of eager PEFT where it does not run in float64.
        note: why it was not timed, if so.
    """

    us: float | None = None
    speedup: Spread | None = None
    breaks: int | None = None
    graphs: int = 0
    recompiled: int = 0
    error: float | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Measured:
    """One example.

    Attributes:
        kind: the recipe's name.
        example: the example's.
        layer: the kind of layer, and its size.
        dtype: of the base layers.
        cells: by length of input and way.
        notes: by length of input, why nothing was measured, if so.
    """

    kind: str
    example: str
    layer: str
    dtype: str
    cells: dict[int, dict[str, Cell]] = field(default_factory=dict)
    notes: dict[int, str] = field(default_factory=dict)


def names_of() -> list[str]:
    """Return the names of the recipes that have examples."""
    return [recipe.name for recipe in load_recipes() if getattr(recipe, "examples", ())]


def measure_compiled_kinds(
    settings: Settings, on_done: Callable[[Measured, int, int], object] = lambda *_: None
) -> list[Measured]:
    """Measure the kinds of adapters compiled, each in a process of its own.

    Args:
        settings: what to measure.
        on_done: called with each result, how many there are, and how many there will be.

    Raises:
        ValueError: there is no recipe with examples of one of the names.
    """
    chosen = _chosen(settings)
    if settings.backend == "inductor":  # it tries for a while: once is enough
        from torch._inductor.cpu_vec_isa import pick_vec_isa

        settings = replace(settings, probed=bool(pick_vec_isa()))
    found: list[Measured] = []
    for start in range(0, len(chosen), settings.jobs):
        batch = [_Worker(settings, *one) for one in chosen[start : start + settings.jobs]]
        try:
            for length in settings.tokens:
                deadline = time.monotonic() + settings.limit
                for worker in batch:
                    worker.start()
                for worker in batch:
                    worker.prepared(length, deadline)
                for worker in batch:
                    worker.timed(length, settings.limit)
        finally:
            for worker in batch:
                worker.stop()
        for worker in batch:
            found.append(worker.found)
            on_done(worker.found, len(found), len(chosen))
    return found


def _chosen(settings: Settings) -> list[tuple[str, Example]]:
    known = {one.name: getattr(one, "examples", ()) for one in load_recipes()}
    for name in settings.kinds or ():
        if not known.get(name):
            names = ", ".join(map(repr, names_of()))
            raise ValueError(f"no recipe with examples is called {name!r}: there are {names}")
    found = []
    for name in settings.kinds or known:
        bases: set[object] = set()
        for example in known[name]:
            first = not bases or ("fast" in example.numerics and example.base not in bases)
            bases.add(example.base)
            if settings.every_example or first:
                found.append((name, example))
    return found


class _Worker:
    """The process of one example, as the first process sees it."""

    def __init__(self, settings: Settings, kind: str, example: Example) -> None:
        if getattr(torch, settings.dtype) not in example.dtypes:
            settings = replace(settings, dtype="float32")
        inputs, outputs = sizes_of(example, settings.size)
        layer = f"{example.base.name}({inputs}, {outputs})"
        self.found = Measured(kind, example.name, layer, settings.dtype)
        self._limit = settings.limit
        self._note = ""  # why it has ended, if it has
        context = multiprocessing.get_context("spawn")
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, settings, kind, example.name))
        self._process.start()
        theirs.close()

    def prepared(self, length: int, deadline: float) -> None:
        """Wait until everything for a length of input is compiled and compared."""
        self._receive(length, deadline - time.monotonic())

    def start(self) -> None:
        """Have it prepare the next length of input."""
        self._tell()

    def timed(self, length: int, seconds: float) -> None:
        """Have it timed, while nobody else works."""
        if length not in self.found.notes:
            self._tell()
            cells = self._receive(length, seconds)
            if cells is not None:
                self.found.cells[length] = cells

    def _tell(self) -> None:
        with suppress(OSError):  # it has ended; receiving says so
            self._ours.send(None)

    def _receive(self, length: int, seconds: float) -> Any:
        """Return what it sends; None if that is why there is nothing, or it sends nothing."""
        if not self._note:
            try:
                if self._ours.poll(max(0.0, seconds)):
                    problem, found = self._ours.recv()
                    if problem:
                        self.found.notes[length] = problem
                    return found
                self._note = f"stopped after {self._limit:.0f} s"
                self._process.kill()
            except (EOFError, OSError):
                self._process.join()
                self._note = f"its process ended with {self._process.exitcode}"
        self.found.notes[length] = self._note
        return None

    def stop(self) -> None:
        """End the process."""
        self._ours.close()
        self._process.join(1.0)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _work(pipe: Connection, settings: Settings, kind: str, name: str) -> None:
    """Measure one example, each length when told to."""
    nowhere = os.open(os.devnull, os.O_WRONLY)  # compilers and libraries talk
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    warnings.simplefilter("ignore")
    torch.set_num_threads(settings.threads)
    import torch._inductor.config as inductor

    inductor.cpp.vec_isa_ok = settings.probed or None
    inductor.compile_threads = 1 if settings.jobs > 1 else inductor.compile_threads
    recipe = next(one for one in load_recipes() if one.name == kind)
    example = next(one for one in recipe.examples if one.name == name)  # type: ignore[attr-defined]
    for length in settings.tokens:
        try:
            pipe.recv()  # while others are timed, nobody prepares
            with ExitStack() as stack, torch.no_grad():
                running = _Running(settings, example, length, stack)
                pipe.send(("", None))
                pipe.recv()
                pipe.send(("", running.time()))
        except EOFError:
            return
        except Exception as error:  # noqa: BLE001 - compilers fail in every way there is
            pipe.send((_said(error), None))
        torch._dynamo.reset()


class _Running:
    """The ways of one example with one length of input, compiled and compared."""

    def __init__(self, settings: Settings, example: Example, length: int, stack: ExitStack) -> None:
        limits = {
            "recompile_limit": _RECOMPILATIONS,
            "accumulated_recompile_limit": _RECOMPILATIONS,
        }
        stack.enter_context(torch._dynamo.config.patch(limits))
        self._settings = settings
        plain, x = _stacked(example, settings, length)
        self.cells: dict[str, Cell] = {}
        self._ways: dict[str, Callable[[], object]] = {}
        # Weights of its own for each: those of the way before may be in the processor's caches.
        models = {EAGER: plain, COMPILED: copy.deepcopy(plain)}
        for numerics in example.numerics:
            model = copy.deepcopy(plain)
            stack.enter_context(attach(model, numerics=numerics))
            models[f"dora-cache, {numerics}"] = model
        expected = plain(x)
        if not bool(expected.isfinite().all()):
            msg = "eager PEFT's output is not finite"
            raise ValueError(msg)
        exact = _exact(plain, x, expected)
        own = _distance(expected, exact)
        tolerance = max(_TOLERANCES[expected.dtype], _WORSE * own)
        self.cells[EAGER] = Cell(error=own)
        for way, model in models.items():
            self._add(way, model, x, exact, tolerance)

    def _add(self, way: str, model: nn.Module, x: Tensor, exact: Tensor, tolerance: float) -> None:
        run: Any = model
        if way != EAGER:
            counters = torch._dynamo.utils.counters
            counters.clear()
            settings = self._settings
            run = torch.compile(model, backend=settings.backend, mode=settings.mode, dynamic=False)
            try:
                for _ in range(3):  # the third call uses a CUDA graph
                    output = run(x)
            except Exception as error:  # noqa: BLE001 - compilers fail in every way there is
                self.cells[way] = Cell(note=_said(error))
                return
            distance = _distance(output, exact)
            right = distance <= tolerance
            self.cells[way] = Cell(
                breaks=sum(counters["graph_break"].values()),
                graphs=counters["stats"]["unique_graphs"],
                error=distance,
                note="" if right else f"wrong: {distance:.1e} from PEFT in float64",
            )
        if not self.cells[way].note:
            self._ways[way] = lambda: run(x)

    def time(self) -> dict[str, Cell]:
        """Return what there is of each way, with the times of those that are right."""
        counters = torch._dynamo.utils.counters
        counters.clear()
        times = take_turns(self._ways, self._settings.rounds, self._settings.seconds)
        recompiled = counters["stats"]["unique_graphs"]  # of all ways together
        for way, own in times.items():
            base = times.get(COMPILED)
            ratios = None if base is None else [a / b for a, b in zip(base, own, strict=True)]
            self.cells[way] = replace(
                self.cells[way],
                us=1e6 * Spread.quartiles(own).median,
                speedup=None if ratios is None else Spread.quartiles(ratios),
                recompiled=recompiled,
            )
        return self.cells


class _Stack(nn.Module):
    """Models one after another, or side by side if an output is no input to the next."""

    def __init__(self, parts: Sequence[nn.Module], *, chained: bool) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.chained = chained

    def forward(self, x: Tensor) -> Tensor:
        if self.chained:
            for part in self.parts:
                x = part(x)
            return x
        outputs = [part(x) for part in self.parts]
        total: Tensor = sum(getattr(output, "logits", output) for output in outputs)
        return total


def _stacked(example: Example, settings: Settings, length: int) -> tuple[_Stack, Tensor]:
    """Return a model of an example's layers, and an input."""
    inputs, outputs = sizes_of(example, settings.size)
    parts: list[nn.Module] = []
    each = (
        1 if example.base.whole else min(2, example.layers) if example.base.name == "Linear" else 1
    )
    for seed in range(1 if example.base.whole else math.ceil(settings.layers / each)):
        model, x = _made(example, settings, inputs, outputs, length, each, seed)
        # Past PeftModel's own forward, which takes as long in every way.
        inner = getattr(getattr(model, "base_model", model), "model", model)
        within = type(model).__name__ == "PeftModel" and callable(inner)
        parts.append(inner if within else model)
    for part in parts:
        part.requires_grad_(requires_grad=False)
        part.to(settings.device)
    x = x.to(settings.device)
    output = parts[0](x)
    alike = isinstance(output, Tensor) and output.shape == x.shape and output.dtype == x.dtype
    return _Stack(parts, chained=alike).eval(), x


def _made(
    example: Example,
    settings: Settings,
    inputs: int,
    outputs: int,
    length: int,
    layers: int,
    seed: int,
) -> tuple[Any, Tensor]:
    """Make a model and an input, on the device where that can be done: it is faster there."""
    dtype = getattr(torch, settings.dtype)
    make = partial(
        make_model, example, inputs, outputs, dtype=dtype, tokens=length, layers=layers, seed=seed
    )
    with suppress(Exception), torch.device(settings.device):
        return make()
    return make()


def _exact(plain: nn.Module, x: Tensor, expected: Tensor) -> Tensor:
    """Return the output in float64; ``expected`` if the library does not compute in it."""
    try:
        exact: Tensor = copy.deepcopy(plain).double()(x.double() if x.is_floating_point() else x)
    except Exception:  # noqa: BLE001 - the library's own code has a dtype of its own
        return expected
    return exact if exact.dtype is torch.float64 else expected


def _distance(output: Tensor, expected: Tensor) -> float:
    exact = expected.double()
    return float((output.double() - exact).norm() / exact.norm())


def _said(error: Exception) -> str:
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def as_markdown(rows: Sequence[Measured]) -> str:
    """Return a table for each length of input: a row for each example, a column for each way."""
    lengths = sorted({length for row in rows for length in (*row.cells, *row.notes)})
    ways = list(dict.fromkeys(way for row in rows for cells in row.cells.values() for way in cells))
    parts = []
    for length in lengths:
        heads = ["adapter", "layer", *ways]
        lines = [f"**{length} token{'s' if length > 1 else ''}**", "", f"| {' | '.join(heads)} |"]
        lines.append(f"|{' --- |' * len(heads)}")
        for row in rows:
            cells = row.cells.get(length)
            if cells is None:
                shown = [row.notes.get(length, "-"), *[""] * (len(ways) - 1)]
            else:
                shown = [_shown(cells.get(way), way) for way in ways]
            lines.append(f"| {' | '.join([row.example, f'{row.layer}, {row.dtype}', *shown])} |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _shown(cell: Cell | None, way: str) -> str:
    if cell is None:
        return "-"
    found = []
    if cell.note:
        kind = cell.note.partition(":")[0]  # of an error: the summary has all of it
        found.append(kind if kind.endswith("Error") else cell.note)
    elif way == COMPILED or cell.speedup is None:
        found.append(f"{cell.us:.0f} µs")
    else:
        spread = cell.speedup
        found.append(f"{spread.median:.2f} ({spread.low:.2f}\N{EN DASH}{spread.high:.2f})")
    if cell.breaks:
        found.append(f"{cell.breaks} graph break{'s' if cell.breaks > 1 else ''}")
    if cell.recompiled:
        found.append(f"{cell.recompiled} recompilations")
    return ", ".join(found)


def summary(rows: Sequence[Measured], gain: float = 1.3, least: float = 0.97) -> str:
    """Say how many kinds gain, which lose, which break their graphs, and which are wrong."""
    first = min((length for row in rows for length in row.cells), default=1)
    best: dict[str, float] = {}
    slower, broken, wrong = [], [], []
    for row in rows:
        for length, cells in row.cells.items():
            for way, cell in cells.items():
                where = f"{row.example} ({way}, {length})"
                if cell.note:
                    wrong.append(f"{where}: {cell.note}")
                if way in {EAGER, COMPILED}:
                    continue
                if cell.breaks:
                    broken.append(f"{where}: {cell.breaks}")
                if cell.speedup is not None:
                    if length == first:
                        best[row.kind] = max(best.get(row.kind, 0), cell.speedup.median)
                    if cell.speedup.median < least:
                        slower.append(f"{where}: {cell.speedup.median:.2f}")
        wrong += [f"{row.example} ({length}): {note}" for length, note in row.notes.items()]
    kinds = {row.kind for row in rows}
    lines = [
        (
            f"{sum(value >= gain for value in best.values())} of {len(kinds)} kinds are at least "
            f"{gain} times as fast as compiled PEFT with inputs of {first}."
        ),
        f"Below {least} times: {'; '.join(slower) or 'none'}.",
        f"Graph breaks: {'; '.join(broken) or 'none'}.",
        f"Not timed: {'; '.join(wrong) or 'none'}.",
    ]
    return "\n".join(lines)


def as_json(rows: Sequence[Measured]) -> list[dict[str, Any]]:
    """Return everything as JSON knows it; times in microseconds."""
    return [asdict(row) for row in rows]


def default_jobs(device: str) -> int:
    """Return how many processes may prepare at the same time on this machine."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return cores if torch.device(device).type == "cuda" else max(1, cores // 2)


def run_and_write(
    settings: Settings,
    out: Path | None,
    markdown: Path | None,
    on_done: Callable[[Measured, int, int], object] = lambda *_: None,
) -> str:
    """Measure, write the files, and return the table and the summary.

    Args:
        settings: what to measure.
        out: a JSON file.
        markdown: a file for the table.
        on_done: see :func:`measure_compiled_kinds`.
    """
    machine = describe_machine(torch.device(settings.device))
    rows: list[Measured] = []

    def on_row(row: Measured, done: int, total: int) -> None:
        rows.append(row)
        if out is not None:  # also if it is interrupted later on
            data = {"machine": machine, "settings": asdict(settings), "rows": as_json(rows)}
            out.write_text(json.dumps(data, indent=1), encoding="utf-8")
        on_done(row, done, total)

    measure_compiled_kinds(settings, on_row)
    table = as_markdown(rows)
    text = (
        f"{table}\nTimes of compiled PEFT in microseconds; all others relative to it: how many "
        "times as fast, the median over rounds in which all ways took turns (quartiles).\n\n"
        f"{summary(rows)}\n"
    )
    if markdown is not None:
        of = ", ".join(f"{name} {value}" for name, value in machine.items())
        markdown.write_text(f"{text}\nMeasured on: {of}.\n", encoding="utf-8")
    return text


def _main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, prog="python -m dora_cache.lab.compiled_kinds"
    )
    cuda = torch.cuda.is_available()
    parser.add_argument("--kinds", nargs="+", help="names of recipes; by default all")
    parser.add_argument("--every-example", action="store_true")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if cuda else "float32")
    parser.add_argument("--size", type=int, default=4096 if cuda else 1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 128])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--mode", help="of torch.compile, such as reduce-overhead")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds to prepare")
    parser.add_argument("--jobs", type=int)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="a JSON file")
    parser.add_argument("--markdown", type=Path, help="a file for the table")
    given = vars(parser.parse_args())
    given.pop("out"), given.pop("markdown")
    given["kinds"] = given["kinds"] and tuple(given["kinds"])
    given["tokens"] = tuple(given["tokens"])
    given["jobs"] = given["jobs"] or default_jobs(given["device"])

    def on_done(row: Measured, done: int, total: int) -> None:
        pass


if __name__ == "__main__":
    _main()
