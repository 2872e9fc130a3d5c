"""What a simulation found as a table, as plain data, and as a chart."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from dora_cache.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from dora_cache.lab.simulator.scoring import Score
    from dora_cache.lab.simulator.traces import Trace

__all__ = ["as_dict", "draw", "legend", "table"]

_COLORS = {"budget": "#2563a8", "lru": "#c2752d"}
_OTHERS = ("#8a8f98", "#5a9367", "#a05a8f", "#b5a642", "#333333")


def table(scores: Sequence[Score]) -> Table:
    """Return one row for each trace and cap: what each policy saved, in per cent of the optimum.

    A cap's optimum stands beside it as a share of what deriving everything would take.
    """
    found = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in ("trace", "cap"):
        found.add_column(column, no_wrap=True)
    found.add_column("optimum", justify="right", no_wrap=True)
    names = _names(scores)
    for name in names:
        found.add_column(
            name, justify="right", no_wrap=True, style="bold" if name == "budget" else None
        )
    for trace in dict.fromkeys(score.trace for score in scores):
        for share in dict.fromkeys(score.share for score in scores):
            row = {s.policy: s for s in scores if s.trace == trace and s.share == share}
            one = next(iter(row.values()))
            best = one.optimum / one.total
            found.add_row(
                trace,
                f"{share:.0%}",
                f"{'' if one.exact else '≤ '}{100 * best:.1f} %",
                *(f"{100 * row[name].part:.1f}" for name in names),
            )
        found.add_section()
    return found


def legend(traces: Sequence[Trace]) -> str:
    """Say what the numbers of the table are, and what happens in each trace."""
    found = (
        "Time saved in per cent of the offline optimum's, which knows the future. Cap: share of "
        "the bytes of all values. Optimum: share of all time to derive that it saves; ≤ where it "
        "is an upper bound."
    )
    for trace in traces:
        found += (
            f"\n{trace.name}: {trace.title} ({len(trace.lookups):,} lookups, working set "
            f"{format_bytes(trace.working_set)})."
        )
    return found


def as_dict(scores: Sequence[Score], traces: Sequence[Trace], *, seed: int) -> dict[str, Any]:
    """Return everything as JSON knows it; times in seconds, sizes in bytes."""
    return {
        "seed": seed,
        "traces": {
            trace.name: {
                "title": trace.title,
                "lookups": len(trace.lookups),
                "working_set": trace.working_set,
            }
            for trace in traces
        },
        "scores": [asdict(score) | {"part": score.part} for score in scores],
    }


def draw(scores: Sequence[Score], traces: Sequence[Trace], path: Path) -> None:
    """Draw time saved over caps, one panel for each trace, and write a PNG.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(3, len(traces))
    rows = -(-len(traces) // columns)
    figure = Figure(figsize=(3.4 * columns, 2.7 * rows + 0.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    names = _names(scores)
    others = iter(_OTHERS * len(names))
    colors = {name: _COLORS.get(name) or next(others) for name in names}
    for panel, trace in zip(grid.flat, traces, strict=False):
        for name in reversed(names):  # the first on top
            mine = [s for s in scores if s.trace == trace.name and s.policy == name]
            panel.plot(
                [100 * score.share for score in mine],
                [100 * score.part for score in mine],
                marker="o",
                markersize=3.5,
                linewidth=2 if name == "budget" else 1.2,
                color=colors[name],
                label=name,
            )
        panel.axhline(100, color="#bbbbbb", linewidth=0.8)
        panel.set_title(trace.name, loc="left", fontsize=10, fontweight="bold")
        panel.set_xlim(0, 100)
        panel.set_ylim(-3, 104)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in list(grid.flat)[len(traces) :]:
        panel.set_visible(False)
    for panel in grid[-1]:
        panel.set_xlabel("cap, % of the working set", fontsize=9)
    for panel in grid[:, 0]:
        panel.set_ylabel("% of the optimum", fontsize=9)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(
        handles[::-1],
        labels[::-1],
        loc="outside upper center",
        ncols=len(names),
        frameon=False,
        fontsize=9,
    )
    figure.savefig(path, format="png")


def _names(scores: Sequence[Score]) -> list[str]:
    return list(dict.fromkeys(score.policy for score in scores))
