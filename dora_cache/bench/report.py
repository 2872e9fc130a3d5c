"""A comparison as a table to read and as plain data to keep."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

if TYPE_CHECKING:
    from dora_cache.bench.measure import Comparison, Result, Spread

__all__ = ["as_dict", "format_bytes", "legend", "table"]

_ABSENT = "-"
_COLUMNS = (
    "ms per\ntoken", "quar-\ntiles", "x\nLoRA", "first\nms", "held", "hits", "misses", "evicted",
    "max Δ\nlogit",
)  # fmt: skip


def table(comparison: Comparison, *, title: str | None = None) -> Table:
    """Return one row for each way of running, in the order they were measured."""
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
    for column in _COLUMNS:
        found.add_column(column, justify="right", vertical="bottom", no_wrap=True)
    for result in comparison.results:
        found.add_row(*_row(result), style="bold" if result.stats is not None else None)
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


def format_bytes(count: float) -> str:
    """Return a size with three digits or so, e.g. ``608 KiB`` or ``1.19 MiB``."""
    units = iter(("B", "KiB", "MiB"))
    unit = next(units)
    while count >= 1000:  # noqa: PLR2004 - so that no size takes four digits
        count /= 1024
        unit = next(units, "GiB")
        if unit == "GiB":
            break
    return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.3g} {unit}"  # noqa: PLR2004


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
