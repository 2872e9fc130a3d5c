"""Parts of an HTML page for reports: tables with bars, meters, and charts of curves.

A page is a tree of :class:`xml.etree.ElementTree.Element`, which escapes every text and attribute.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from dataclasses import fields
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol
from xml.etree.ElementTree import Element, tostring

from dora_cache.core.naming import shorten
from dora_cache.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from os import PathLike

    from dora_cache.core.history import Sample
    from dora_cache.reasons import Advised

__all__ = [
    "LONGEST",
    "MORE",
    "PLACES",
    "TOP",
    "Column",
    "Row",
    "Tile",
    "bars",
    "by_layer",
    "chart",
    "counters",
    "cut",
    "details",
    "element",
    "listed",
    "meter",
    "number",
    "over_time",
    "percent",
    "seconds",
    "section",
    "size",
    "table",
    "text",
    "thinned",
    "tiles",
    "why",
    "write",
]

TOP = 12
"""Rows shown at once; the others are summed up."""
MORE = 50
"""Rows shown where somebody asks for more."""
LONGEST = 96
"""Characters of a name that are shown."""
PLACES = 320
"""Characters of a list of layers that are shown."""

_POINTS = 240  # of a curve
_SPANS = 12  # rows of a table over time
_WIDTH, _HEIGHT = 1000, 200  # a chart's own units; it is stretched to the page's

Child = Element | str


class Why(Protocol):
    """A reason, how often it applied, and where."""

    @property
    def reason(self) -> Advised: ...

    @property
    def count(self) -> int: ...

    @property
    def where(self) -> str: ...


class Tile(NamedTuple):
    """One figure that the page begins with.

    Attributes:
        label: what it is.
        figure: its value.
        beside: what to compare it with; ``""`` for nothing.
    """

    label: str
    figure: Child
    beside: Child = ""


class Column(NamedTuple):
    """One column of a table of bars.

    Attributes:
        head: its title.
        minor: whether it is left out on a narrow screen.
    """

    head: str
    minor: bool = False


class Row(NamedTuple):
    """One row of a table of bars.

    Attributes:
        label: what it is of.
        amount: the length of its bar, in any unit.
        cells: the other columns.
    """

    label: Child
    amount: float
    cells: tuple[Child, ...]


def element(tag: str, /, *children: Child, **attributes: object) -> Element:
    """Make an element; texts and attributes may be anything.

    Characters that are no text, such as those that turn the direction of writing or that UTF-8
    does not have, are shown by their numbers. Attributes of names that Python has for itself end in
    ``_``; other ``_`` stand for ``-``.
    """
    named = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items()}
    found = Element(tag, {name: _printable(str(value)) for name, value in named.items()})
    last: Element | None = None
    for child in children:
        if isinstance(child, Element):
            found.append(child)
            last = child
        elif last is None:
            found.text = (found.text or "") + _printable(child)
        else:
            last.tail = (last.tail or "") + _printable(child)
    return found


def _printable(name: str) -> str:
    if name.isprintable():
        return name
    return "".join(
        one if one.isprintable() else one.encode("unicode_escape").decode() for one in name
    )


def cut(name: str, longest: int = LONGEST) -> str:
    """Shorten a name that anybody may have chosen."""
    return name if len(name) <= longest else f"{name[: longest - 1]}…"


def text(name: str, longest: int = LONGEST) -> Element:
    """Show a name that anybody may have chosen, apart from the direction of what is around it."""
    return element("bdi", cut(name, longest))


def number(count: int) -> Element:
    """Show a count."""
    return element("data", f"{count:,}", value=count)


def size(nbytes: int) -> Element:
    """Show a number of bytes."""
    return element("data", format_bytes(nbytes), value=nbytes)


def seconds(duration: float) -> Element:
    """Show a time in seconds."""
    return element("data", format_seconds(duration) if duration else "0 s", value=repr(duration))


def percent(part: float, whole: float) -> str:
    """Show a share; a dash where there is nothing to have a share of."""
    return f"{part / whole:.1%}" if whole else "-"


def counters(stats: Any) -> Element:
    """Make a section of the numbers in a dataclass, by their names; floats are times in seconds."""
    rows: list[tuple[str, Child]] = []
    for one in fields(stats):
        value = getattr(stats, one.name)
        if value is None:
            rows.append((one.name, "no cap"))
        elif isinstance(value, float):
            rows.append((one.name, seconds(value)))
        elif isinstance(value, int):
            rows.append((one.name, number(value)))
    caption = "All counters, as in stats()"
    return section("Counters", details(caption, table(caption, ("counter", "value"), rows)))


def section(title: str, *children: Child) -> Element:
    """Make a section with a heading."""
    return element("section", element("h2", title), *children)


def details(summary: str, *children: Child) -> Element:
    """Make a part that is closed at first."""
    return element("details", element("summary", summary), *children)


def listed(names: Sequence[str]) -> list[Child]:
    """Show names in a line; of many, the first ones."""
    shown: list[Child] = []
    for name in names[:TOP]:
        shown += [", ", text(name)] if shown else [text(name)]
    return shown if len(names) <= TOP else [*shown, f", and {len(names) - TOP} more"]


def why(caption: str, rows: Iterable[Why]) -> Element:
    """Make a table of reasons, and what to do about them."""
    cells = ((_reason(row), row.reason.advice, number(row.count)) for row in rows)
    return table(caption, ("reason", "what to do", "times"), cells, words=2)


def _reason(row: Why) -> Element:
    where = row.where
    places = [element("span", " in ", text(where, PLACES), class_="places")] if where else []
    return element("span", row.reason.value, *places)


def tiles(shown: Iterable[Tile]) -> Element:
    """Show the figures that a page begins with."""
    return element(
        "dl",
        *(
            element(
                "div",
                element("dt", one.label),
                element("dd", one.figure, class_="figure"),
                *([element("dd", one.beside, class_="beside")] if one.beside != "" else []),
            )
            for one in shown
        ),
        class_="tiles",
    )


def meter(label: str, held: int, cap: int | None) -> Element:
    """Show bytes held, and how near they are to their cap; None if unbounded."""
    if cap is None:
        return element("p", label, ": ", size(held), ", no cap", class_="unbounded")
    share = min(1.0, held / cap) if cap else 1.0
    return element(
        "div",
        element(
            "p",
            element("span", label, ": ", size(held), " of ", size(cap)),
            element("span", percent(held, cap), " of the cap"),
        ),
        element(
            "span",
            element("span", style=f"width:{share:.2%}"),
            class_="track",
            role="img",
            aria_label=f"{label}: {percent(held, cap)} of the cap",
        ),
        class_="meter",
    )


def table(
    caption: str, head: Sequence[str], rows: Iterable[Sequence[Child]], *, words: int = 1
) -> Element:
    """Make a table.

    Args:
        caption: what it shows.
        head: titles of its columns.
        rows: their cells.
        words: how many columns hold words, the first ones; the others hold numbers.
    """
    classes = [{} if place < words else {"class_": "number"} for place in range(len(head))]
    return _scrolling(
        caption,
        element(
            "table",
            element("caption", caption),
            element("thead", element("tr", *_heads(head, classes))),
            element(
                "tbody",
                *(
                    element(
                        "tr",
                        *(
                            element("td", cell, **kind)
                            for cell, kind in zip(row, classes, strict=True)
                        ),
                    )
                    for row in rows
                ),
            ),
            class_="words" if words > 1 else "plain",
        ),
    )


def bars(caption: str, what: str, columns: Sequence[Column], rows: Sequence[Row]) -> Element:
    """Make a table with a bar in each row, as long as its amount, beside the largest one.

    Args:
        caption: what it shows.
        what: title of the first column.
        columns: the others, which hold numbers.
        rows: the last one may be the sum of others; its amount is 0 then.
    """
    largest = max((row.amount for row in rows), default=0)
    classes = [{"class_": "number minor" if one.minor else "number"} for one in columns]
    return _scrolling(
        caption,
        element(
            "table",
            element("caption", caption),
            element(
                "thead",
                element(
                    "tr",
                    element("th", what, scope="col"),
                    *_heads([one.head for one in columns], classes),
                ),
            ),
            element("tbody", *(_barred(row, largest, classes) for row in rows)),
            class_="bars",
        ),
    )


def _heads(head: Iterable[str], classes: Iterable[dict[str, str]]) -> list[Element]:
    pairs = zip(head, classes, strict=True)
    return [element("th", one, scope="col", **kind) for one, kind in pairs]


def _barred(row: Row, largest: float, classes: Sequence[dict[str, str]]) -> Element:
    label = [row.label]
    if row.amount:
        width = element("span", style=f"width:{row.amount / largest:.2%}")
        label.append(element("span", width, class_="bar", aria_hidden="true"))
    cells = (element("td", cell, **kind) for cell, kind in zip(row.cells, classes, strict=True))
    return element("tr", element("th", *label, scope="row"), *cells)


def _scrolling(caption: str, inner: Element) -> Element:
    """Let a table that is wider than the screen be scrolled, by keyboard as well."""
    return element("div", inner, class_="scroll", role="region", tabindex="0", aria_label=caption)


def by_layer(layers: Sequence[tuple[str, int]], total: int, unnamed: str) -> list[Element]:
    """Show bytes by layer: of layers whose names differ in numbers alone, first the sum.

    Args:
        layers: names and bytes.
        total: what shares are of.
        unnamed: what to call the layer that has no name.
    """
    groups: defaultdict[tuple[str, ...], list[tuple[str, int]]] = defaultdict(list)
    for name, nbytes in layers:
        alike = ("" if part.isdecimal() else part for part in name.split("."))
        groups[tuple(alike)].append((name, nbytes))
    alike_ones = sorted(
        (
            (shorten(name for name, _ in group) or unnamed, len(group), sum(n for _, n in group))
            for group in groups.values()
        ),
        key=lambda one: -one[2],
    )
    rows = [
        Row(text(name), nbytes, (number(count), size(nbytes), percent(nbytes, total)))
        for name, count, nbytes in alike_ones[:TOP]
    ]
    rest = alike_ones[TOP:]
    if rest:
        nbytes = sum(one[2] for one in rest)
        count = sum(one[1] for one in rest)
        others = f"{len(rest)} more kinds of layers"
        rows.append(Row(others, 0, (number(count), size(nbytes), percent(nbytes, total))))
    columns = Column("layers"), Column("bytes"), Column("share")
    largest = sorted(layers, key=lambda one: -one[1])
    caption = f"The {min(MORE, len(largest))} largest of {len(largest):,} layers"
    singles = [(text(shorten([name]) or unnamed), size(nbytes)) for name, nbytes in largest[:MORE]]
    return [
        bars("Bytes by kind of layer", "layer", columns, rows),
        details(caption, table(caption, ("layer", "bytes"), singles)),
    ]


# Charts


def chart(
    label: str,
    points: Sequence[tuple[float, float] | None],
    *,
    up: Callable[[float], str],
    along: Callable[[float], str],
    most: float | None = None,
    span: tuple[float, float] | None = None,
    across: tuple[float, str] | None = None,
    at: tuple[float, str] | None = None,
    curve: str,
    table: Element | None = None,
) -> Element:
    """Draw a curve; what lies below it is filled.

    Args:
        label: what it shows, for those who do not see it as well.
        points: x in ascending order, and y from 0 on; None where there is a gap.
        up: shows a value of y.
        along: shows a value of x.
        most: the largest y to show; by default that of the points and ``across``.
        span: the smallest and the largest x to show; by default those of the points and ``at``.
        across: a line at a value of y, and what it is.
        at: a line at a value of x, and what it is.
        curve: what the curve is.
        table: the same in numbers.
    """
    there = [point for point in points if point is not None]
    first, last = span or (there[0][0], max(there[-1][0], at[0] if at else 0))
    top = most or max(*(y for _, y in there), across[0] if across else 0) or 1

    def x_of(x: float) -> str:
        return f"{_WIDTH * (x - first) / ((last - first) or 1):.1f}"

    def y_of(y: float) -> str:
        return f"{_HEIGHT * (1 - min(y, top) / top):.1f}"

    lines = [
        element("line", x1="0", x2=_WIDTH, y1=y_of(y), y2=y_of(y), class_="grid")
        for y in (0, top / 2, top)
    ]
    areas, curves = [], []
    for run in _runs(points):
        path = "L".join(f"{x_of(x)} {y_of(y)}" for x, y in run)
        curves.append(f"M{path}")
        areas.append(f"M{x_of(run[0][0])} {_HEIGHT}L{path}L{x_of(run[-1][0])} {_HEIGHT}Z")
    lines.append(element("path", d="".join(areas), class_="area"))
    lines.append(element("path", d="".join(curves), class_="curve"))
    legend = [element("li", curve)]
    if across:
        y = y_of(across[0])
        lines.append(element("line", x1="0", x2=_WIDTH, y1=y, y2=y, class_="mark"))
    if at:
        x = x_of(at[0])
        lines.append(element("line", x1=x, x2=x, y1="0", y2=_HEIGHT, class_="mark"))
    legend += [element("li", mark[1], class_="marked") for mark in (across, at) if mark]
    svg = element(
        "svg",
        *lines,
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        preserveAspectRatio="none",
        role="img",
        aria_label=label,
    )
    labels_up = element("div", *(element("span", up(y)) for y in (0, top / 2, top)), class_="up")
    middle = (first + last) / 2
    labels_along = (element("span", along(x)) for x in (first, middle, last))
    return element(
        "figure",
        element("figcaption", label),
        element(
            "div",
            labels_up,
            svg,
            element("div", *labels_along, class_="along"),
            class_="plot",
        ),
        element("ul", *legend, class_="legend"),
        *([] if table is None else [table]),
    )


def _runs(points: Sequence[tuple[float, float] | None]) -> list[list[tuple[float, float]]]:
    runs: list[list[tuple[float, float]]] = [[]]
    for point in points:
        if point is None:
            runs.append([])
        else:
            runs[-1].append(point)
    return [run for run in runs if run]


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return so many of the points that a chart can show, the first and the last among them."""
    step = max(1, -(-len(points) // _POINTS))
    kept = list(points[::step])
    return kept if kept[-1:] == list(points[-1:]) else [*kept, points[-1]]


def over_time(samples: Sequence[Sample], cap: int | None, what: str, rule: str) -> Element:
    """Show hits, bytes and evictions over time.

    Args:
        samples: of the counters.
        cap: of the bytes; None if unbounded.
        what: whose bytes they are, e.g. ``"held"``.
        rule: when samples are taken.
    """
    title = "Over time"
    if not samples or samples[-1].hits + samples[-1].misses == 0:
        return section(title, element("p", "There was no lookup so far."))
    shares: list[tuple[float, float] | None] = []
    for one, two in itertools.pairwise(samples):
        hits, lookups = _between(one, two)
        if lookups:
            share = hits / lookups
            shares += [(one.seconds, share), (two.seconds, share)]
        elif shares and shares[-1] is not None:
            shares.append(None)
    spans = _spans(samples)
    rows = []
    for one, two in itertools.pairwise(spans):
        hits, lookups = _between(one, two)
        rows.append((
            f"{_time(one.seconds)} to {_time(two.seconds)}",
            number(lookups),
            percent(hits, lookups),
            number(max(0, two.evictions - one.evictions)),
            size(two.nbytes),
        ))  # fmt: skip
    head = "time", "lookups", "hits", "evictions", f"{what}, at the end"
    caption = "Lookups, evictions and bytes over time"
    return section(
        title,
        element("p", rule, class_="note"),
        chart(
            "Hits per lookup over time",
            shares,
            up=lambda y: f"{y:.0%}",
            along=_time,
            most=1.0,
            span=(samples[0].seconds, samples[-1].seconds),
            curve="hits per lookup, between one sample and the next",
        ),
        chart(
            "Bytes over time",
            [(one.seconds, float(one.nbytes)) for one in samples],
            up=format_bytes,
            along=_time,
            across=None if cap is None else (float(cap), f"cap, {format_bytes(cap)}"),
            curve=f"bytes {what}",
        ),
        details(caption, table(caption, head, rows)),
    )


def _between(one: Sample, two: Sample) -> tuple[int, int]:
    """Return hits and lookups from one sample to the next."""
    hits, misses = max(0, two.hits - one.hits), max(0, two.misses - one.misses)
    return hits, hits + misses


def _spans(samples: Sequence[Sample]) -> list[Sample]:
    """Return samples that divide the time into a few parts."""
    end = samples[-1].seconds
    chosen = [samples[0]]
    for one in samples[1:]:
        if one is samples[-1] or one.seconds >= end * len(chosen) / _SPANS:
            chosen.append(one)
    return chosen


def _time(duration: float) -> str:
    """Show a time since the beginning."""
    minute, hour, day = 60, 3600, 86400
    if duration < minute:
        return f"{duration:.3g} s"
    for unit, name in ((day, "d"), (hour, "h"), (minute, "min")):
        if duration >= 2 * unit or unit == minute:
            return f"{duration / unit:.1f} {name}"
    raise AssertionError


# The page


def write(path: str | PathLike[str], title: str, about: str, *parts: Element) -> None:
    """Write a page.

    Args:
        path: of the file; one that is there is replaced.
        title: its heading.
        about: a line under it.
        parts: what it shows.

    Raises:
        FileNotFoundError: the folder does not exist.
        OSError: the file cannot be written.
    """
    target = Path(path)
    if not target.parent.is_dir():
        msg = f"the folder {target.parent} does not exist: make it first, or give another path"
        raise FileNotFoundError(msg)
    written = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    body = [
        element("header", element("h1", title), element("p", about)),
        element("main", *parts),
        element("footer", f"Written by dora-cache on {written}."),
    ]
    template = Template(files("dora_cache.report").joinpath("page.html").read_text("utf-8"))
    html = template.substitute(
        title=_html(element("title", title)).removeprefix("<title>").removesuffix("</title>"),
        body="\n".join(map(_html, body)),
    )
    target.write_text(html, encoding="utf-8")


def _html(root: Element) -> str:
    return tostring(root, encoding="unicode", method="html")
