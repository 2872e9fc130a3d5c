"""A comparison as a bar chart."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dora_cache.units import format_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from dora_cache.lab.bench.measure import Comparison, Result

__all__ = ["draw"]

_OURS, _PEFT, _YARDSTICK = "#2563a8", "#c2752d", "#8a8f98"


def draw(comparison: Comparison, path: Path, *, title: str, subtitle: str = "") -> None:
    """Draw ms/token of every way as horizontal bars, and write a PNG.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    results = comparison.results
    figure = Figure(figsize=(9, 1.6 + 0.55 * len(results)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    medians = [result.token_ms.median for result in results]
    margins = [
        [max(0.0, result.token_ms.median - result.token_ms.low) for result in results],
        [max(0.0, result.token_ms.high - result.token_ms.median) for result in results],
    ]
    rows = range(len(results))
    axes.barh(
        rows,
        medians,
        xerr=margins,
        height=0.62,
        color=[_color(result) for result in results],
        error_kw={"ecolor": "#333333", "elinewidth": 1, "capsize": 3},
    )
    right = max(result.token_ms.high for result in results)
    for row, result in zip(rows, results, strict=True):
        end = max(result.token_ms.high, result.token_ms.median)
        axes.text(end + 0.015 * right, row, _note(result), va="center", fontsize=9)
    axes.set_yticks(list(rows), [result.label for result in results], fontsize=10)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.42 * right)
    axes.set_xlabel("decode, ms per token: median, with the quartiles")
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    axes.set_title(subtitle, loc="left", fontsize=9, color="#444444")
    figure.savefig(path, format="png")


def _color(result: Result) -> str:
    if result.stats is not None:
        return _OURS
    return _YARDSTICK if result.max_logit_difference is None else _PEFT


def _note(result: Result) -> str:
    parts = [f"{result.token_ms.median:.0f} ms"]
    if result.ratio is not None:
        parts.append(f"{result.ratio:.2f}x LoRA")
    if result.held_bytes is not None:
        parts.append(f"{format_bytes(result.held_bytes)} held")
    return " · ".join(parts)
