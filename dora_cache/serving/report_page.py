"""A pool's report as an HTML page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dora_cache.report.drawing import (
    MORE,
    PLACES,
    TOP,
    Column,
    Row,
    Tile,
    bars,
    by_layer,
    counters,
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
    tiles,
    why,
    write,
)
from dora_cache.serving.tiers import LOAD_SECONDS
from dora_cache.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from collections.abc import Sequence
    from os import PathLike
    from xml.etree.ElementTree import Element

    from dora_cache.serving.report import AdapterRow, PoolReport

__all__ = ["write_report"]

_RULE = (
    "A sample is taken when stats() or report() is called, and when an adapter is loaded, unless "
    "the last one was less than a tenth of a second ago (longer in a long run). Hits take none, so "
    "while all lookups hit and nobody asks, there is one long step. The counters themselves miss "
    "nothing. A lookup is one adapter that a use() names. Times count from when the pool was made."
)


def write_report(report: PoolReport, path: str | PathLike[str]) -> None:
    """Write a report's page; see :meth:`PoolReport.to_html`."""
    parts = [
        _first(report),
        _memory(report),
        _adapters(report),
        _layers(report),
        over_time(report.history, report.stats.max_device_bytes, "on the device", _RULE),
        _kernels(report),
        _scales(report),
        _loads(report),
        counters(report.stats),
    ]
    about = (
        f"AdapterPool on {report.device}: {len(report.adapters):,} adapters, "
        f"{len(report.layers):,} layers."
    )
    write(path, "dora-cache pool report", about, *parts)


def _first(report: PoolReport) -> Element:
    now = report.stats
    elsewhere = number(now.on_host), " on the host, ", number(now.on_disk), " in files"
    loaded: list[Element | str] = [number(now.reads), " from files"]
    if now.loads:
        loaded += [", ", seconds(now.load_seconds / now.loads), " each"]
    cap = now.max_device_bytes
    beside = "no cap" if cap is None else f"{percent(now.device_bytes, cap)} of {format_bytes(cap)}"
    return tiles([
        Tile(
            "Hits per lookup",
            percent(now.hits, now.lookups),
            element("span", number(now.hits), " of ", number(now.lookups)),
        ),
        Tile("On the device", size(now.device_bytes), beside),
        Tile(
            "Adapters there",
            number(now.on_device),
            element("span", *elsewhere),
        ),
        Tile("Loads", number(now.loads), element("span", *loaded)),
        Tile("Evictions", number(now.evictions), "from the device"),
        Tile("On the host", size(now.host_bytes), "copies of adapters"),
    ])  # fmt: skip


def _memory(report: PoolReport) -> Element:
    now = report.stats
    parts = [
        meter("Device", now.device_bytes, now.max_device_bytes),
        meter("Host", now.host_bytes, now.max_host_bytes),
    ]
    everything = sum(row.nbytes for row in report.adapters)
    parts.append(element("p", "All adapters together take ", size(everything), " on the device."))
    if now.max_device_bytes is not None and everything > now.max_device_bytes:
        advice = (
            "That is more than the cap, so some are loaded again and again. They would all stay "
            f"with device_bytes={everything}."
        )
        parts[-1].append(element("span", f" {advice}"))
    if report.pins:
        parts.append(element("p", "Pinned: ", *listed(report.pins), "."))
    return section("Memory", *parts)


def _adapters(report: PoolReport) -> Element:
    title = "Adapters"
    if not report.adapters:
        return section(title, element("p", "There is none: call pool.add(name, path)."))
    ordered = sorted(
        report.adapters,
        key=lambda row: (-row.nbytes * (row.where == "device"), -row.hits - row.misses),
    )
    total = report.stats.device_bytes
    lookups = sum(row.hits + row.misses for row in ordered)
    shown = [
        Row(
            element("span", text(row.name), " (pinned)" if row.pinned else ""),
            row.nbytes if row.where == "device" else 0,
            (row.where, *_figures([row], total, lookups)),
        )
        for row in ordered[:TOP]
    ]
    rest = ordered[TOP:]
    if rest:
        others = f"{len(rest):,} more adapters"
        shown.append(Row(others, 0, ("-", *_figures(rest, total, lookups))))
    columns = (
        Column("where", minor=True), Column("bytes"), Column("share", minor=True),
        Column("lookups"), Column("of all", minor=True), Column("hit rate"),
    )  # fmt: skip
    caption = f"The {MORE} first of {len(ordered):,}" if len(ordered) > MORE else "Each adapter"
    head = "adapter", "where", "bytes when on the device", "hits", "misses"
    each = [
        (text(row.name), row.where, size(row.nbytes), number(row.hits), number(row.misses))
        for row in ordered[:MORE]
    ]
    return section(
        title,
        bars("Bytes on the device by adapter", "adapter", columns, shown),
        details(caption, table(caption, head, each, words=2)),
    )


def _figures(rows: Sequence[AdapterRow], total: int, lookups: int) -> tuple[Element | str, ...]:
    nbytes = sum(row.nbytes for row in rows if row.where == "device")
    hits, misses = sum(row.hits for row in rows), sum(row.misses for row in rows)
    return (
        size(nbytes), percent(nbytes, total), number(hits + misses),
        percent(hits + misses, lookups), percent(hits, hits + misses),
    )  # fmt: skip


def _layers(report: PoolReport) -> Element:
    title = "Layers"
    sizes = [(row.layer, row.nbytes) for row in report.layers if row.nbytes]
    if not sizes:
        return section(title, element("p", "No adapter is on the device now."))
    total = sum(nbytes for _, nbytes in sizes)
    table_bytes = "The rest of what is on the device is the adapters' tables and gaps."
    return section(
        title,
        *by_layer(sizes, total, "(no name)"),
        element("p", table_bytes, class_="note"),
    )


def _loads(report: PoolReport) -> Element:
    now = report.stats
    parts = []
    if now.failures:
        failed = "Loads that failed: ", number(now.failures), ". The log says which, and why."
        parts.append(element("p", *failed))
    if now.loads:
        names = [*(f"up to {format_seconds(bound)}" for bound in LOAD_SECONDS), "more"]
        counted = zip(names, map(number, now.load_times), strict=True)
        caption = "Loads by the time that they took"
        parts.append(details(caption, table(caption, ("time", "loads"), list(counted))))
    return section("Loads", *(parts or [element("p", "There was none.")]))


def _kernels(report: PoolReport) -> Element:
    title = "Kernels"
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(report.kinds.items()))
    parts = [element("p", f"Layers by kind: {kinds or 'none'}.")]
    if not report.device.startswith("cuda"):
        where = (
            f"The model is on {report.device}. PyTorch's operations run there, one adapter after "
            "the other; the pool's kernels are for CUDA."
        )
        parts.append(element("p", where))
    elif report.kernels:
        parts.append(why("Linear layers that ran without the pool's kernels", report.kernels))
    else:
        parts.append(element("p", "No linear layer has run without the pool's Triton kernels."))
    parts += [element("p", "Triton failed: ", text(one, PLACES)) for one in report.failures]
    return section(title, *parts)


def _scales(report: PoolReport) -> Element:
    title = "Scales"
    if not report.reasons:
        kept = "No scale of an adapter had to be derived again at each forward."
        return section(title, element("p", kept))
    return section(title, why("Scales derived at each forward", report.reasons))
