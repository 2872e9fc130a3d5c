"""A comparison as a table to read and as plain data to keep."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from dora_cache.lab.bench.phases import Cell, Phase
from dora_cache.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from dora_cache.lab.bench.measure import Comparison, Result, Spread
    from dora_cache.lab.bench.phases import Footprint

__all__ = [
    "as_dict",
    "legend",
    "memory_table",
    "phase_of",
    "phases_table",
    "reasons",
    "table",
]

_ABSENT = "-"
_REASON = 20  # characters of a reason that the table has room for
_COLUMNS = (
    "ms per\ntoken", "quar-\ntiles", "x\nLoRA", "first\nms", "held", "hits", "misses", "evicted",
    "max Δ\nlogit",
)  # fmt: skip


def table(comparison: Comparison, *, title: str | None = None) -> Table:
    """Return one row for each way of running, in the order they were measured."""
    found = _empty(_COLUMNS, title=title)
    for result in comparison.results:
        found.add_row(*_row(result), style="bold" if result.stats is not None else None)
    return found


def phase_of(comparison: Comparison) -> Phase:
    """Return what a comparison found as a phase beside others."""
    cells = {
        result.way: Cell(result.token_ms, result.ratio_spread) for result in comparison.results
    }
    return Phase("decode, per token", cells)


def phases_table(phases: Iterable[Phase], labels: Mapping[str, str]) -> Table:
    """Return one row for each phase and way.

    Args:
        phases: what was measured.
        labels: names of the ways for people, by their names.
    """
    found = _empty(("phase", "ms", "quartiles", "x LoRA", "quartiles"))
    for phase in phases:
        for way, cell in phase.cells.items():
            ours = way.startswith("dora-cache")
            found.add_row(
                labels[way],
                phase.name,
                *(_figures(cell.ms) if cell.ms else (_ABSENT, _short(cell.reason))),
                *(_figures(cell.ratio) if cell.ratio else ("", "")),
                style="bold" if ours else None,
            )
        found.add_section()
    return found


def reasons(phases: Iterable[Phase], labels: Mapping[str, str]) -> list[str]:
    """Return in full the reasons that :func:`phases_table` has no room for."""
    return [
        f"{labels[way]}, {phase.name}: {cell.reason}"
        for phase in phases
        for way, cell in phase.cells.items()
        if _short(cell.reason) != cell.reason
    ]


def memory_table(memory: Mapping[str, Footprint], labels: Mapping[str, str]) -> Table:
    """Return one row for each way: its memory, and how much that is over plain LoRA's."""
    found = _empty(("allocated", "over LoRA's", "peak", "over LoRA's"))
    plain = memory.get("lora")
    for way, weighed in memory.items():
        found.add_row(
            labels[way],
            format_bytes(weighed.allocated),
            _over(weighed.allocated, plain.allocated if plain else None),
            _ABSENT if weighed.peak is None else format_bytes(weighed.peak),
            _over(weighed.peak, plain.peak if plain else None),
            style="bold" if way.startswith("dora-cache") else None,
        )
    return found


def legend(comparison: Comparison) -> str:
    """Say how the numbers of the table came about."""
    names = ", ".join(comparison.adapters)
    return (
        f"Greedy decoding, batch 1: {comparison.rounds} rounds of {comparison.tokens} tokens with "
        f"each adapter ({names}), all ways side by side. Per token: the median, and the "
        "quartiles. First: the pass over the prompt "
        f"({comparison.prompt_tokens} tokens) right after switching adapters."
    )


def as_dict(comparison: Comparison) -> dict[str, Any]:
    """Return all numbers of a comparison as JSON knows them; times in ms, sizes in bytes."""
    data = asdict(comparison)
    data["ways"] = {result.pop("way"): result for result in data.pop("results")}
    return data


def _empty(columns: Iterable[str], *, title: str | None = None) -> Table:
    # Narrow enough for a terminal of 80 columns.
    found = Table(
        title=title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
        show_edge=False,
    )
    found.add_column("", no_wrap=True)
    for column in columns:
        left = column == "phase"
        found.add_column(
            column, justify="left" if left else "right", vertical="bottom", no_wrap=True
        )
    return found


def _short(reason: str) -> str:
    return reason if len(reason) <= _REASON else f"{reason[: _REASON - 1]}…"


def _figures(spread: Spread) -> tuple[str, str]:
    return f"{spread.median:.2f}", f"{spread.low:.2f}-{spread.high:.2f}"


def _over(own: int | None, plain: int | None) -> str:
    if own is None or plain is None:
        return _ABSENT
    return f"{'-' if own < plain else '+'}{format_bytes(abs(own - plain))}"


def _row(result: Result) -> tuple[str, ...]:
    stats = result.stats
    counts = (stats.hits, stats.misses, stats.evictions) if stats else ()
    difference = result.max_logit_difference
    return (
        result.label,
        f"{result.token_ms.median:.1f}",
        _range(result.token_ms),
        _ABSENT if result.ratio is None else f"{result.ratio:.2f}",
        f"{result.first_ms.median:.0f}",
        _ABSENT if result.held_bytes is None else format_bytes(result.held_bytes),
        *map(_format_count, counts),
        *([_ABSENT] * (3 - len(counts))),
        _ABSENT if difference is None else f"{difference:.2g}",
    )


def _format_count(count: int) -> str:
    """Return a count with three digits or so, e.g. ``14.3k``."""
    for least, scale, unit in ((10**9, 10**9, "G"), (10**6, 10**6, "M"), (10**4, 10**3, "k")):
        if count >= least:
            return f"{count / scale:.1f}{unit}"
    return str(count)


def _range(spread: Spread) -> str:
    return f"{spread.low:.0f}-{spread.high:.0f}"
