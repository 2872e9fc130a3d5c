"""Run every operation on several caches, and show what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from rich.table import Table

from dora_cache.lab.freshness.operations import OPERATIONS, RAW
from dora_cache.lab.freshness.scene import ADAPTERS
from dora_cache.lab.freshness.trial import DORA_CACHING, Trial, attached, run_trial

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from dora_cache.lab.freshness.operations import Operation

__all__ = ["Row", "as_markdown", "as_table", "markdown_line", "rows", "summary"]


@dataclass(frozen=True, slots=True)
class Row:
    """One operation, and what came of it.

    Attributes:
        operation: the operation.
        peft: with PEFT's ``DoraCaching``.
        ours: with dora-cache; with ``guard="content"`` where the write is one that PyTorch does
            not count.
        unguarded: for such a write, dora-cache with ``guard="version"``.
    """

    operation: Operation
    peft: Trial
    ours: Trial
    unguarded: Trial | None = None


def runnable(device: torch.device) -> tuple[list[Operation], list[Operation]]:
    """Return the operations that a device allows, ordinary and raw ones."""
    ordinary, raw = (
        [one for one in listed if one.device in {None, device.type}] for listed in (OPERATIONS, RAW)
    )
    return ordinary, raw


def rows(
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    moved: Callable[[int, int], object] = lambda *_: None,
) -> Iterator[Row]:
    """Try every operation on PEFT's cache and on dora-cache.

    Args:
        dtype: of the model.
        device: of the model.
        moved: called with the number of operations done, and of all.
    """
    where = torch.device(device)
    ordinary, raw = runnable(where)
    for done, operation in enumerate((*ordinary, *raw), start=1):
        peft = run_trial(operation, DORA_CACHING, dtype=dtype, device=where)
        if operation in raw:
            content = run_trial(operation, attached(guard="content"), dtype=dtype, device=where)
            version = run_trial(operation, attached(), dtype=dtype, device=where)
            yield Row(operation, peft, content, version)
        else:
            yield Row(operation, peft, run_trial(operation, attached(), dtype=dtype, device=where))
        moved(done, len(ordinary) + len(raw))


def summary(found: Iterable[Row]) -> str:
    """Count in a sentence or two."""
    found = list(found)
    ordinary = [row for row in found if row.unguarded is None]
    raw = [row for row in found if row.unguarded is not None]

    def wrong(trials: Iterable[Trial | None]) -> int:
        return sum(trial is not None and trial.verdict.word != "fresh" for trial in trials)

    return (
        f"After {len(ordinary)} ordinary operations, DoraCaching is wrong "
        f"{wrong(row.peft for row in ordinary)} times, "
        f"dora-cache {wrong(row.ours for row in ordinary)} times. "
        f"Of {len(raw)} writes that PyTorch does not count, DoraCaching misses "
        f"{wrong(row.peft for row in raw)}, dora-cache {wrong(row.unguarded for row in raw)}, "
        f'and with guard="content" {wrong(row.ours for row in raw)}.'
    )


_COLOURS = {"fresh": "green", "stale": "red", "fails": "red"}


def as_table(found: Iterable[Row]) -> Table:
    """Return a table for the terminal."""
    table = Table(title="Outputs after an operation on a warm cache")
    for title in ("operation", "DoraCaching", "dora-cache", "entries held", *_derived()):
        table.add_column(title)
    for group, members in groupby(found, key=lambda row: row.operation.group):
        table.add_section()
        table.add_row(f"[bold]{group}")
        for row in members:
            name, peft, ours, *rest = _cells(row)
            colours = [_COLOURS[trial.verdict.word] for trial in (row.peft, row.ours)]
            table.add_row(name, f"[{colours[0]}]{peft}", f"[{colours[1]}]{ours}", *rest)
    return table


def as_markdown(found: Iterable[Row]) -> str:
    """Return the same table for the documentation."""
    titles = ("operation", "DoraCaching", "dora-cache", "entries held", *_derived())
    lines = []
    for group, members in groupby(found, key=lambda row: row.operation.group):
        lines += ["", f"## {group[0].upper()}{group[1:]}", ""]
        lines += [_line(titles), _line("---" for _ in titles)]
        lines += [markdown_line(row) for row in members]
    return "\n".join(lines).strip() + "\n"


def markdown_line(row: Row) -> str:
    """Return the row's line of that table."""
    name, peft, ours, *rest = _cells(row)
    return _line((name.replace("_", r"\_"), _strong(peft), ours, *rest))


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _strong(word: str) -> str:
    return word if word == "fresh" else f"**{word}**"


def _derived() -> tuple[str, ...]:
    return ("adapter changed", "other adapter")


def _cells(row: Row) -> list[str]:
    """Name, verdicts, entries before and right after, and how many layers derive again."""
    ours = row.ours.verdict.word
    if row.unguarded is not None:
        ours = f"{row.unguarded.verdict.word}; {ours} with content"
    held = "-" if row.ours.held is None else " → ".join(map(str, row.ours.held))
    again = [_again(row.ours.again.get(adapter)) for adapter in ADAPTERS]
    return [row.operation.name, row.peft.verdict.word, ours, held, *again]


def _again(layers: int | None) -> str:
    if layers is None:
        return "-"
    return f"{layers} derived again" if layers else "warm"
