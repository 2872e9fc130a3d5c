"""A cache's report as an HTML page."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from dora_cache.core.naming import shorten
from dora_cache.report.drawing import (
    MORE,
    PLACES,
    TOP,
    Column,
    Row,
    Tile,
    bars,
    by_layer,
    chart,
    counters,
    cut,
    details,
    element,
    listed,
    meter,
    number,
    over_time,
    percent,
    seconds,
    section,
    size,
    table,
    text,
    thinned,
    tiles,
    why,
    write,
)
from dora_cache.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from collections.abc import Sequence
    from os import PathLike
    from xml.etree.ElementTree import Element

    from dora_cache.core.keys import Adapters
    from dora_cache.report.data import CacheReport, ReportRow

__all__ = ["write_report"]

_RULE = (
    "A sample is taken when stats() or report() is called, and when a value is derived, unless the "
    "last one was less than a tenth of a second ago (longer in a long run). Hits take none, so "
    "while all lookups hit and nobody asks, there is one long step. The counters themselves miss "
    "nothing. Times count from attach()."
)
_SAVED = (
    "Time saved is hits times what deriving took on average, by the host's clock; on a GPU that is "
    "the time to launch the work."
)


def write_report(report: CacheReport, path: str | PathLike[str]) -> None:
    """Write a report's page; see :meth:`CacheReport.to_html`."""
    parts = [
        _first(report),
        _memory(report),
        _adapters(report),
        _layers(report),
        over_time(report.history, report.stats.max_bytes, "held", _RULE),
        _past(report),
        *_caps(report),
        counters(report.stats),
    ]
    about = f"Backend {cut(report.backend)}. What the cache holds, and what that has saved."
    write(path, "dora-cache report", about, *parts)


def _first(report: CacheReport) -> Element:
    stats = report.stats
    cap = stats.max_bytes
    beside = "no cap" if cap is None else f"{percent(stats.nbytes, cap)} of {format_bytes(cap)}"
    return tiles([
        Tile(
            "Hits per lookup",
            percent(stats.hits, stats.lookups),
            element("span", number(stats.hits), " of ", number(stats.lookups)),
        ),
        Tile("Held", size(stats.nbytes), beside),
        Tile("Time saved", seconds(report.saved), "by the host's clock"),
        Tile("Entries", number(stats.entries), element("span", number(stats.stores), " stored")),
        Tile("Evictions", number(stats.evictions), "to make room"),
        Tile("Past the cache", number(stats.bypasses), "calls"),
    ])  # fmt: skip


def _memory(report: CacheReport) -> Element:
    stats, several = report.stats, len(report.caps) > 1
    parts = [meter("Held", stats.nbytes, stats.max_bytes)]
    if several:
        parts += [meter(cut(device), held, cap) for device, held, cap in report.caps]
    working = element("p", "Working set seen so far: ", size(report.working_set), ". ")
    parts.append(working)
    advice = "It is the cap from which on nothing need be derived twice."
    if stats.max_bytes is not None and report.working_set > stats.max_bytes:
        advice = (
            "It is larger than the cap, so some values are derived again and again. With "
            f"max_bytes={report.working_set} they would all be kept."
        )
    working.append(element("span", advice))
    if report.buffers:
        parts.append(
            element("p", "Compiled code reads ", size(report.buffers), " of what is held.")
        )
    if report.pins:
        parts.append(element("p", "Pinned: ", *listed(report.pins), "."))
    if report.uncounted:
        warning = " times: call cache.invalidate() after them."
        found = "Writes that PyTorch does not count were found "
        parts.append(element("p", found, number(report.uncounted), warning))
    return section("Memory", *parts)


def _name(adapter: Adapters) -> str:
    if adapter is None:
        return "(no adapter)"
    return adapter if isinstance(adapter, str) else ", ".join(adapter)


def _adapters(report: CacheReport) -> Element:
    title = "Adapters"
    if not report.rows:
        return section(title, element("p", "No value has been asked for so far."))
    grouped: defaultdict[Adapters, list[ReportRow]] = defaultdict(list)
    for row in report.rows:
        grouped[row.adapter].append(row)
    ordered = sorted(
        grouped.items(),
        key=lambda one: (-sum(row.nbytes for row in one[1]), -sum(row.hits for row in one[1])),
    )
    total = sum(row.nbytes for row in report.rows)
    shown = [_adapter_row(_name(adapter), rows, total) for adapter, rows in ordered[:TOP]]
    rest = [row for _, rows in ordered[TOP:] for row in rows]
    if rest:
        others = f"{len(ordered) - TOP} more adapters"
        shown.append(_adapter_row(others, rest, total)._replace(label=others, amount=0))
    columns = (
        Column("bytes"), Column("share"), Column("hits"), Column("misses", minor=True),
        Column("hit rate", minor=True), Column("saved"),
    )  # fmt: skip
    caption = "By kind and adapter"
    largest = sorted(report.rows, key=lambda row: (-row.nbytes, -row.hits))[:MORE]
    if len(largest) < len(report.rows):
        caption = f"{caption}: the {MORE} largest of {len(report.rows):,}"
    head = (
        "kind", "adapter", "entries", "bytes", "hits", "misses", "hit rate", "saved", "deriving"
    )  # fmt: skip
    each = [
        (
            text(row.kind), _labelled(row), number(row.entries), size(row.nbytes),
            number(row.hits), number(row.misses), percent(row.hits, row.hits + row.misses),
            seconds(row.saved), seconds(row.derive),
        )
        for row in largest
    ]  # fmt: skip
    return section(
        title,
        bars("Bytes by adapter", "adapter", columns, shown),
        element("p", _SAVED, class_="note"),
        details(caption, table(caption, head, each, words=2)),
    )


def _labelled(row: ReportRow) -> Element:
    return element("span", text(_name(row.adapter)), " (pinned)" if row.pinned else "")


def _adapter_row(name: str, rows: Sequence[ReportRow], total: int) -> Row:
    nbytes, hits = sum(row.nbytes for row in rows), sum(row.hits for row in rows)
    misses, saved = sum(row.misses for row in rows), sum(row.saved for row in rows)
    pinned = any(row.pinned for row in rows)
    return Row(
        element("span", text(name), " (pinned)" if pinned else ""),
        nbytes,
        (
            size(nbytes), percent(nbytes, total), number(hits), number(misses),
            percent(hits, hits + misses), seconds(saved),
        ),
    )  # fmt: skip


def _layers(report: CacheReport) -> Element:
    title = "Layers"
    if not report.layers:
        return section(title, element("p", "No value is held now."))
    sizes = [(row.layer, row.nbytes) for row in report.layers]
    total = sum(row.nbytes for row in report.layers)
    return section(title, *by_layer(sizes, total, "(not in the model)"))


def _past(report: CacheReport) -> Element:
    title = "Past the cache, and not kept"
    parts: list[Element] = []
    if report.reasons:
        caption = "Why calls went past the cache, or values were not kept"
        parts.append(why(caption, report.reasons))
    else:
        everything = "Every call was answered by the cache, and every value derived was kept."
        parts.append(element("p", everything))
    if report.declined:
        places: defaultdict[tuple[str, str | None, str], list[str]] = defaultdict(list)
        for one in report.declined:
            places[one.kind, one.adapter, one.reason].append(one.where)
        declined = [
            (
                text(kind),
                text(adapter or "-"),
                text(reason, PLACES),
                text(shorten(where), PLACES),
                number(len(where)),
            )
            for (kind, adapter, reason), where in list(places.items())[:MORE]
        ]
        caption = "What could be cached and is not"
        if len(places) > MORE:
            caption = f"{caption}: {MORE} of {len(places)}"
        head = "kind", "adapter", "reason", "where", "layers"
        parts.append(element("h3", "Not cached"))
        parts.append(table(caption, head, declined, words=4))
    return section(title, *parts)


def _caps(report: CacheReport) -> list[Element]:
    """Show what other caps could save; nothing before anything was used twice."""
    curve = report.curve()
    if not curve[-1].saved:
        return []
    stats = report.stats
    points = thinned([(float(point.max_bytes), point.saved) for point in curve])
    mark = None
    if stats.max_bytes is not None and stats.max_bytes <= 2 * report.working_set:
        mark = float(stats.max_bytes), f"cap, {format_bytes(stats.max_bytes)}"
    rows = [
        (size(int(cap)), seconds(saved), percent(saved, curve[-1].saved))
        for cap, saved in points[:: max(1, len(points) // TOP)]
    ]
    note = (
        "What the best fixed set of the values seen could have saved, under each cap. Where the "
        "curve still rises at the cap, a larger one pays. This cache has saved "
    )
    caption = "Time saved by cap"
    return [
        section(
            "Other caps",
            element("p", note, seconds(report.saved), ".", class_="note"),
            chart(
                "Time that could be saved, by cap",
                points,
                up=lambda y: format_seconds(y) if y else "0",
                along=format_bytes,
                at=mark,
                curve="best fixed set",
                table=details(caption, table(caption, ("cap", "time saved", "share"), rows)),
            ),
        )
    ]
