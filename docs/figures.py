"""Draw the figures of the documentation from its tables and from the code.

``python docs/figures.py`` writes them; ``tests/test_docs_figures.py`` checks that they are current.
"""

from __future__ import annotations

import ast
import math
import re
import tomllib
from html import escape
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"

STYLE = """
svg { font: 13px system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
.paper { fill: #ffffff; } .edge { stroke: #d0d7de; fill: none; }
text { fill: #1f2328; } .title { font-weight: 600; } .note { fill: #59636e; font-size: 11.5px; }
.bar { fill: #a3adb8; } .ours { fill: #2563eb; } .fast { fill: #8fb4f8; }
.row { fill: #f3f5f7; } .part { fill: #dde3ea; } .place { fill: #2563eb; }
text.inverse { fill: #ffffff; font-weight: 600; }
@media (prefers-color-scheme: dark) {
.paper { fill: #16191f; } .edge { stroke: #3b424c; }
text { fill: #e6edf3; } .note { fill: #a4aeb9; }
.bar { fill: #6b7480; } .ours { fill: #6ea8fe; } .fast { fill: #3f64a6; }
.row { fill: #20252d; } .part { fill: #343b46; } .place { fill: #6ea8fe; }
text.inverse { fill: #0b1220; }
}
"""


class Bar(NamedTuple):
    """A row of a bar chart.

    Attributes:
        label: stands left of the bar.
        value: its length.
        shown: stands right of the bar.
        style: a class of ``STYLE``.
    """

    label: str
    value: float
    shown: str
    style: str


def text(x: float, y: float, words: str, style: str = "", anchor: str = "start") -> str:
    """Return a line of text; ``x`` and ``y`` in units of the drawing."""
    style = f' class="{style}"' if style else ""
    anchor = f' text-anchor="{anchor}"' if anchor != "start" else ""
    return f'<text x="{x:g}" y="{y:g}"{style}{anchor}>{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, style: str, radius: float = 2) -> str:
    """Return a rectangle."""
    return (
        f'<rect class="{style}" x="{x:.5g}" y="{y:.5g}" width="{width:.5g}" height="{height:.5g}"'
        f' rx="{radius:g}"/>'
    )


def drawing(width: float, height: float, title: str, parts: list[str]) -> str:
    """Return an SVG document on a background of its own, for light and dark pages."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img">'
    named = f"<title>{escape(title)}</title>"
    style = f"<style>{STYLE}</style>"
    paper = box(0, 0, width, height, "paper", 6)
    edge = box(0.5, 0.5, width - 1, height - 1, "edge", 6)
    return "\n".join([head, named, style, paper, edge, *parts, "</svg>", ""])


def bars(rows: list[Bar], y: float, *, left: float, width: float, step: float = 24) -> list[str]:
    """Return bars below each other, the longest one ``width`` units long."""
    longest = max(row.value for row in rows)
    parts = []
    for number, row in enumerate(rows):
        top, length = y + number * step, max(1.0, width * row.value / longest)
        middle = top + step / 2
        parts += [
            text(left - 8, middle + 4.5, row.label, anchor="end"),
            box(left, top + 3, length, step - 6, row.style),
            text(left + length + 6, middle + 4.5, row.shown),
        ]
    return parts


def table(page: str, heading: str, row: str) -> dict[str, dict[str, str]]:
    """Return the first table below a heading that has a row of that name: rows, then columns."""
    lines = page[page.index(heading) :].splitlines()
    found: dict[str, dict[str, str]] = {}
    columns: list[str] = []
    for line in [*lines, ""]:
        if not line.startswith("|"):
            if row in found:
                return found
            found, columns = {}, []
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not columns:
            columns = cells
        elif set(line) - set("|-: "):
            found[cells[0]] = dict(zip(columns, cells, strict=True))
    raise LookupError(f"no table below {heading!r} has a row {row!r}")


def mebibytes(size: str) -> float:
    """Return a size such as ``26 GiB`` in MiB."""
    number, unit = size.split()
    return float(number) * {"KiB": 2.0**-10, "MiB": 1.0, "GiB": 2.0**10}[unit]


WAYS = {
    "PEFT": ("DoRA in PEFT", "bar"),
    "`DoraCaching`": ("PEFT DoraCaching", "bar"),
    "dora-cache": ("dora-cache", "ours"),
    '`numerics="fast"`': ("dora-cache, fast", "fast"),
}


def headline() -> str:
    """Time and memory of DoRA on a GPU, of the first table in "Measured on a GPU"."""
    measured = table(
        (DOCS / "benchmarks.md").read_text(encoding="utf-8"), "## Measured on a GPU", "decode"
    )
    times = [Bar("plain LoRA", 1.0, "1", "bar")]
    sizes = []
    for way, (label, style) in WAYS.items():
        time = measured["decode"][way].split()[0]
        size = measured["memory over LoRA's"][way]
        times.append(Bar(label, float(time), time, style))
        sizes.append(Bar(label, mebibytes(size), size, style))
    left, width = 138, 226
    return drawing(
        440,
        322,
        "DoRA on an 8B model: time per token relative to LoRA, and memory beyond LoRA's",
        [
            text(16, 26, "Time per token, relative to plain LoRA", "title"),
            *bars(times, 36, left=left, width=width),
            text(16, 186, "Memory in addition to plain LoRA's", "title"),
            *bars(sizes, 196, left=left, width=width),
            text(
                16, 310, "16 layers of Llama-3.1-8B's shape, rank 16, batch 1, NVIDIA H200", "note"
            ),
        ],
    )


MACHINES = {"GPU": "## Measured on a GPU", "CPU": "## Measured on a CPU"}
"""Where ``benchmarks.md`` has the tables."""


def headline_table() -> str:
    """Return a table of time and memory on a GPU and on a CPU."""
    page = (DOCS / "benchmarks.md").read_text(encoding="utf-8")
    heads = ["", *(label for label, _ in WAYS.values())]
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for machine, heading in MACHINES.items():
        rows = table(page, heading, "decode")
        times = [rows["decode"][way].split()[0] for way in WAYS]
        sizes = [rows["memory over LoRA's"][way] for way in WAYS]
        lines.append(f"| {machine}: time | {' | '.join(times)} |")
        lines.append(f"| {machine}: memory | {' | '.join(sizes)} |")
    return "\n".join(
        [
            *lines,
            "",
            "Time of one token of greedy decoding, batch 1, relative to plain LoRA; memory in",
            "addition to plain LoRA's. GPU: NVIDIA H200, 16 of the 32 layers of the",
            "Llama-3.1-8B shape, rank 16.",
            "CPU: two threads of an AMD EPYC, SmolLM2-135M shape, rank 8.",
            "",
        ]
    )


def coverage() -> str:
    """How many times as fast a layer is with each kind of adapter, for one token."""
    found: dict[str, dict[str, float]] = {}
    for line in (DOCS / "coverage-table.md").read_text(encoding="utf-8").splitlines():
        if "| peft |" in line or "| fast |" in line:
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            found.setdefault(cells[0], {})[cells[3]] = float(cells[6].removesuffix("x"))
    # The first example of each kind; the others are variants, named after a comma.
    kinds: dict[str, dict[str, float]] = {}
    for name, speeds in found.items():
        kinds.setdefault(name.split(",")[0], speeds)
    order = sorted(kinds, key=lambda kind: -max(kinds[kind].values()))
    left, width, step, top = 148, 232, 25, 78
    largest = math.log10(max(max(speeds.values()) for speeds in kinds.values()))

    def length(speed: float) -> float:
        return max(1.0, width * math.log10(max(speed, 1.0)) / largest)

    parts = [
        text(16, 26, "How many times as fast a layer is, for one token", "title"),
        text(16, 44, "against uncached PEFT; logarithmic scale", "note"),
        box(16, 56, 12, 12, "ours"),
        text(33, 66.5, 'numerics="peft"', "note"),
        box(148, 56, 12, 12, "fast"),
        text(165, 66.5, 'numerics="fast"', "note"),
    ]
    for number, kind in enumerate(order):
        y = top + number * step
        parts.append(text(left - 8, y + 16.5, kind, anchor="end"))
        ways = [(way, kinds[kind][way]) for way in ("peft", "fast") if way in kinds[kind]]
        height = 18 / len(ways)
        for place, (way, speed) in enumerate(ways):
            parts.append(
                box(
                    left,
                    y + 3 + place * height,
                    length(speed),
                    height - 0.5,
                    "ours" if way == "peft" else "fast",
                    1,
                )
            )
        shown = " / ".join(f"{speed:.3g}" for _, speed in ways)
        parts.append(text(left + length(max(s for _, s in ways)) + 6, y + 16.5, shown, "note"))
    return drawing(
        472,
        top + len(order) * step + 12,
        "Speed-up of one layer for each kind of adapter",
        parts,
    )


def layers() -> list[list[str]]:
    """Return the modules of each layer, the highest first, as import-linter checks them."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    whole, core = (
        [[name.strip() for name in layer.split("|")] for layer in contract["layers"]]
        for contract in settings["tool"]["importlinter"]["contracts"]
        if contract["type"] == "layers"
    )
    found = []
    for layer in whole:
        names = [name.removeprefix("dora_cache.") for name in layer]
        found += (
            [[f"core/{name}" for name in row] for row in core] if names == ["core"] else [names]
        )
    return found


def source(module: str) -> Path:
    """Return the file of a module of the contract."""
    folder = ROOT if module == "backends" else ROOT / "dora_cache"
    package = folder / module / "__init__.py"
    return package if package.exists() else folder / f"{module}.py"


PLACES = {
    "recipes": "a new adapter kind is a file here",
    "backends": "a new backend is a file here",
}


def architecture() -> str:
    """The layers of the code: each imports only what is below it."""
    width, left, step, top = 560, 44, 29, 62
    parts = [
        text(16, 26, "Modules of dora-cache", "title"),
        text(
            16,
            44,
            "Each layer imports only from layers below it.",
            "note",
        ),
    ]
    y = float(top)
    for layer in layers():
        rows: list[list[tuple[str, float]]] = [[]]
        x = 0.0
        for module in layer:
            size = 7.4 * len(module) + 16
            if x + size > width - left - 24:
                rows.append([])
                x = 0.0
            rows[-1].append((module, size))
            x += size + 6
        height = step * len(rows) - 3
        parts.append(box(left, y, width - left - 16, height, "row", 4))
        for number, row in enumerate(rows):
            x = left + 5
            for module, size in row:
                at = y + 3 + number * step
                place = module in PLACES
                parts += [
                    box(x, at, size, 20, "place" if place else "part", 4),
                    text(
                        x + size / 2, at + 14.5, module, "inverse" if place else "", anchor="middle"
                    ),
                ]
                x += size + 6
            note = summary(source(row[0][0])).replace("`", "") if len(row) == 1 else ""
            note = next((PLACES[module] for module, _ in row if module in PLACES), note)
            # A note that is too long is cut at its colon or left out: the table has all of it.
            fitting = (
                one for one in (note, note.partition(":")[0]) if 5.8 * len(one) < width - x - 16
            )
            if note := next(fitting, ""):
                parts.append(text(x + 4, y + 17.5 + number * step, note, "note"))
        y += height + 4
    turn = f"translate(20 {(top + y) / 2:g}) rotate(-90)"
    parts += [
        f'<path class="edge" d="M 26 {top} V {y - 8:g} m -5 -7 l 5 7 l 5 -7"/>',
        f'<text class="note" transform="{turn}" text-anchor="middle">imports</text>',
    ]
    return drawing(width, y + 12, "The layers of dora-cache's modules", parts)


def summary(path: Path) -> str:
    """Return the first line of a module's docstring, in Markdown, without the full stop."""
    document = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    line = re.sub(r"``?([^`]+)``?", r"`\1`", document.partition("\n")[0])
    return line.removesuffix(".")


def modules() -> str:
    """Return a table of all modules of the contract, with the first line of each docstring."""
    lines = ["| module | what it does |", "| --- | --- |"]
    for layer in layers():
        for module in layer:
            path = source(module)
            folder = "" if module == "backends" else "dora_cache/"
            name = f"{folder}{module}/" if path.name == "__init__.py" else f"{folder}{module}.py"
            lines.append(f"| `{name}` | {summary(path)} |")
    return "\n".join([*lines, ""])


FIGURES = {
    "_static/headline.svg": headline,
    "_static/coverage.svg": coverage,
    "_static/architecture.svg": architecture,
    "architecture-table.md": modules,
    "headline-table.md": headline_table,
}
"""By path below ``docs/``: what makes the file's text."""


if __name__ == "__main__":
    for name, make in FIGURES.items():
        (DOCS / name).write_text(make(), encoding="utf-8")
