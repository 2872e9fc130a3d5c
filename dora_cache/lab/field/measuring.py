"""Try every set-up, time it uncached, cached and with plain LoRA, and show what came of it."""

from __future__ import annotations

import importlib
import pkgutil
import warnings
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from importlib import metadata
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from rich import box
from rich.table import Table
from rich.text import Text

from dora_cache.attachment import attach
from dora_cache.lab.bench import Spread, figure
from dora_cache.lab.field.setup import try_out
from dora_cache.lab.turns import take_turns
from dora_cache.reasons import Reason

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from dora_cache.lab.field.setup import Built, SetUp

__all__ = [
    "WAYS",
    "Row",
    "as_json",
    "as_markdown",
    "as_table",
    "markdown_line",
    "measure",
    "page",
    "summary",
    "test_of",
    "verdict",
]

WAYS = ("uncached", "cached", "LoRA")
"""The ways of running a set-up that are timed."""

NOT_TRIED = "not tried"
_PEFT_CANNOT = "PEFT cannot"
_RATIOS = (("uncached", "cached"), ("cached", "LoRA"))
_TITLES = ("set-up", "library", "cached", *(" / ".join(pair) for pair in _RATIOS))
_SHOWN = 160  # characters of an error's text


@dataclass(frozen=True, slots=True)
class Row:
    """One set-up, and what came of it.

    Attributes:
        name: the set-up's.
        library: the package, as it is imported.
        version: of the package; empty where it is not installed.
        cached: ``"yes"``, ``"no: "`` and the reasons, or what else is the case, with why.
        agrees: whether that is what the set-up is listed with, and every output is right.
        test: the file whose test shows it, in the repository.
        note: what else a reader should know.
        reasons: names of the reasons for which calls went past the cache or values were not kept.
        ms: a forward by each way, in milliseconds: the median over rounds, and the quartiles.
        ratios: of two ways' times within rounds, by ``"uncached / cached"`` and
            ``"cached / LoRA"``: the median, and the quartiles.
        absent: why a way was not timed, by the way.
    """

    name: str
    library: str
    version: str
    cached: str
    agrees: bool
    test: str
    note: str = ""
    reasons: tuple[str, ...] = ()
    ms: dict[str, Spread] = field(default_factory=dict)
    ratios: dict[str, Spread] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)


def verdict(reasons: Sequence[str]) -> str:
    """Return what the table says of a set-up whose outputs are right.

    Args:
        reasons: names of those for which it is not cached; none if it is.
    """
    return f"no: {', '.join(reasons)}" if reasons else "yes"


def measure(setup: SetUp, *, width: int = 1024, rounds: int = 25, seconds: float = 3.0) -> Row:
    """Try and time one set-up; its errors become part of the row.

    Args:
        setup: the set-up.
        width: the size of the model's layers.
        rounds: how often each way is timed, at most.
        seconds: for how long the ways take turns.
    """
    row: dict[str, Any] = {
        "name": setup.name,
        "library": setup.library,
        "version": "",
        "test": test_of(setup),
        "note": setup.note,
    }
    if setup.missing:
        return Row(**row, cached=f"{NOT_TRIED}: {setup.missing}", agrees=True)
    row["version"] = _version(setup.library)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = try_out(setup, width)
            times, absent = _time(setup, width, rounds, seconds)
        except Exception as error:  # noqa: BLE001 - whatever another library raises
            return Row(**row, cached=f"fails: {_brief(error)}", agrees=False)
    if not found.equal:
        cached = "wrong outputs"
    elif found.reasons or (found.hits and not found.misses):
        cached = verdict(tuple(found.reasons))
    else:
        cached = f"no: {found.hits} hits, {found.misses} misses"
    expected = verdict(() if setup.reason is None else (setup.reason.value,))
    return Row(
        **row,
        cached=cached,
        agrees=cached == expected,
        reasons=tuple(found.reasons),
        ms={way: Spread.quartiles(1e3 * one for one in taken) for way, taken in times.items()},
        ratios={
            f"{one} / {other}": Spread.quartiles(
                a / b for a, b in zip(times[one], times[other], strict=True)
            )
            for one, other in _RATIOS
            if one in times and other in times
        },
        absent=absent,
    )


def _time(
    setup: SetUp, width: int, rounds: int, seconds: float
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Return seconds per forward by each way, and why a way is missing."""
    absent = {}
    with ExitStack() as stack:
        built = setup.build(True, width)  # noqa: FBT003
        stack.enter_context(built.undo)
        lora = None
        try:
            lora = _unattached(setup, width, stack, dora=False)
        except Exception as error:  # noqa: BLE001 - whatever another library raises
            absent["LoRA"] = _brief(error)
        stack.enter_context(torch.no_grad())
        stack.enter_context(attach(built.model))
        ways: dict[str, Callable[[], object]] = {"cached": built.run}
        if built.reference is None:
            ways["uncached"] = _unattached(setup, width, stack, dora=True).run
        else:
            absent["uncached"] = _PEFT_CANNOT
        if lora is not None:
            ways["LoRA"] = lora.run
        return take_turns(ways, rounds, seconds), absent


def _unattached(setup: SetUp, width: int, stack: ExitStack, *, dora: bool) -> Built:
    """Build a set-up without a cache, and see that it runs."""
    built = setup.build(dora, width)
    with built.undo as undo, torch.no_grad():
        built.run()
        stack.push(undo.pop_all())
    return built


def test_of(setup: SetUp) -> str:
    """Return the path of the file that tests the set-ups of the same module."""
    import dora_cache.lab.field as package

    for info in pkgutil.iter_modules(package.__path__):
        if info.name.startswith("of_"):
            module = importlib.import_module(f"{package.__name__}.{info.name}")
            if any(one is setup for one in module.SETUPS):
                return f"tests/field/test_{info.name.removeprefix('of_')}.py"
    return ""


def _version(library: str) -> str:
    found = getattr(importlib.import_module(library), "__version__", None)
    if found is None:
        names = metadata.packages_distributions().get(library.partition(".")[0], [])
        found = metadata.version(names[0]) if names else ""
    return str(found)


def _brief(error: Exception) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


def as_table(rows: Sequence[Row]) -> Table:
    """Return a table for the terminal."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for title in _TITLES[:3]:
        table.add_column(title, overflow="fold")
    for title in (*_TITLES[3:], *(f"{way}, ms" for way in WAYS)):
        table.add_column(title, justify="right")
    for row in rows:
        name, library, cached, *ratios = _cells(row)
        times = [
            figure(row.ms[way].median) if way in row.ms else row.absent.get(way, "-")
            for way in WAYS
        ]
        colour = "red" if not row.agrees else "green" if row.cached == verdict(()) else "none"
        table.add_row(name, library, Text(cached, colour), *ratios, *times)
    return table


def as_markdown(rows: Sequence[Row]) -> str:
    """Return a table for each library, and the reasons' advice, for the documentation."""
    heads = ("set-up", *_TITLES[2:], *(f"{way}, ms" for way in WAYS))
    lines: list[str] = []
    for library, group in groupby(rows, key=_library):
        members = list(group)
        tests = ", ".join(f"`{test}`" for test in dict.fromkeys(row.test for row in members))
        lines += [f"## {library}", "", f"Tested by {tests}.", ""]
        lines += [_line(heads), _line("---" for _ in heads)]
        lines += [*map(markdown_line, members), ""]
    reasons = dict.fromkeys(reason for row in rows for reason in row.reasons)
    if reasons:
        lines += ["## Where it is not cached", ""]
        lines += [f"- {reason}: {Reason[_named(reason)].advice}" for reason in reasons]
        lines.append("")
    return "\n".join(lines)


def markdown_line(row: Row) -> str:
    """Return the row's line of its library's table; what is other than listed stands out."""
    name, _, cached, *ratios = _cells(row)
    cached = cached if row.agrees else f"**{cached}**"
    times = [
        figure(row.ms[way].median) if way in row.ms else row.absent.get(way, "-") for way in WAYS
    ]
    return _line((name, cached, *ratios, *times))


def _library(row: Row) -> str:
    return f"{row.library} {row.version}".strip()


def _named(value: str) -> str:
    return next(reason.name for reason in Reason if reason.value == value)


def _line(cells: Any) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _cells(row: Row) -> list[str]:
    """Name, library, whether it is cached, and the ratios."""
    cached = f"{row.cached} ({row.note})" if row.note else row.cached
    ratios = (row.ratios.get(" / ".join(pair), "-") for pair in _RATIOS)
    return [row.name, _library(row), cached, *map(str, ratios)]


def summary(rows: Sequence[Row]) -> str:
    """Count in a sentence or two."""
    cached = sum(row.cached == verdict(()) for row in rows)
    tried = [row for row in rows if not row.cached.startswith(NOT_TRIED)]
    wrong = [f"{row.library}: {row.name} ({row.cached})" for row in rows if not row.agrees]
    text = f"Of {len(tried)} set-ups tried, {cached} are cached."
    if len(tried) < len(rows):
        text += f" {len(rows) - len(tried)} cannot be tried here."
    return f"{text} Other than listed: {', '.join(wrong) or 'none'}."


def page(rows: Sequence[Row], machine: Mapping[str, Any], width: int) -> str:
    """Return the table for the documentation, with what it was measured on."""
    return (
        as_markdown(rows)
        + f"\n## Machine\n\nMeasured by `dora-cache lab field` with layers of width {width} on "
        f"{machine['cpu']}, {machine['threads']} thread(s), torch {machine['torch']}, peft "
        f"{machine['peft']}: medians of rounds in which all ways of a row took turns, and the "
        "quartiles.\n"
    )


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return everything as JSON knows it; times in milliseconds."""
    return [asdict(row) for row in rows]
