"""What a cache holds and what that has saved, as data, as a table, and as a curve over caps."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from dora_cache.core.cells import Totals
from dora_cache.core.naming import shorten
from dora_cache.extras import require
from dora_cache.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from os import PathLike

    from dora_cache.core.binding import Binding
    from dora_cache.core.cells import Cell, Cells
    from dora_cache.core.history import Sample
    from dora_cache.core.keys import Adapters
    from dora_cache.reasons import Advised, Declined
    from dora_cache.stats import CacheStats

__all__ = [
    "CacheReport",
    "CurvePoint",
    "LayerRow",
    "ReasonRow",
    "ReportRow",
    "Seen",
    "layers_of",
    "rows_of",
    "seen_of",
]

_REASONS = 20  # of what is declined, shown with the table
_COLUMNS = (
    "kind", "adapter", "entries", "bytes", "hits", "misses", "hit rate", "time saved", "deriving"
)  # fmt: skip
_NAMES = 2  # of these columns; the others hold figures
_WIDEST = 32  # characters of a name, shown in a table


@dataclass(frozen=True, slots=True)
class ReasonRow:
    """One reason for which calls went past the cache, or values were not kept.

    Attributes:
        reason: the reason; ``reason.value`` names it, ``reason.advice`` says what to do.
        count: how often it applied.
        layers: how often in each layer, by the module's full name in the attached model. Layers
            that are no longer in it are left out, and so are functions, which are in no module.
    """

    reason: Advised
    count: int
    layers: Mapping[str, int]

    @property
    def where(self) -> str:
        """The layers' names in a line, as ``model.layers.{0..31}.self_attn.{q,v}_proj``."""
        return shorten(self.layers)


class Seen(NamedTuple):
    """One value that has been derived and not voided since, held or not.

    Attributes:
        nbytes: its size.
        cost: seconds that deriving it took, on average.
        uses: lookups of it.
    """

    nbytes: int
    cost: float
    uses: int


class LayerRow(NamedTuple):
    """What is held of one layer's values, of all kinds and adapters.

    Attributes:
        layer: the module's full name in the attached model; ``""`` for functions, and for layers
            that are not in it any more.
        entries: entries held now.
        nbytes: their bytes.
    """

    layer: str
    entries: int
    nbytes: int


class CurvePoint(NamedTuple):
    """One cap, and what a cache of that size could have saved.

    Attributes:
        max_bytes: the cap.
        saved: seconds.
        share: of what an unbounded cache would have saved, from 0 to 1.
    """

    max_bytes: int
    saved: float
    share: float


@dataclass(frozen=True, slots=True)
class ReportRow:
    """The values of one kind and adapter.

    Attributes:
        kind: name of what is derived, e.g. ``"DoRA scale"``.
        adapter: the adapter's name, or several; None for values that belong to none.
        pinned: whether the adapter is pinned.
        entries: entries held now.
        nbytes: their bytes.
        hits: lookups answered without deriving.
        misses: lookups that derived.
        saved: seconds saved: for each key its hits times what deriving its value took on average,
            by the host's clock (on a GPU, where deriving is launched and not waited for, that is
            the time to launch it).
        derive: seconds spent deriving, by the same clock.
    """

    kind: str
    adapter: Adapters
    pinned: bool
    entries: int
    nbytes: int
    hits: int
    misses: int
    saved: float
    derive: float


@dataclass(frozen=True, slots=True)
class CacheReport:
    """What a cache holds and has saved; shows itself as a table when printed.

    Attributes:
        backend: name of the backend.
        rows: one for each kind and adapter, in the order they were first used.
        layers: one for each layer of which values are held.
        stats: all counters; ``stats.hit_rate``, ``stats.nbytes`` and ``stats.max_bytes`` among
            them.
        working_set: bytes of all distinct values seen, held or not, that no event has voided: the
            cap from which on nothing need be derived twice.
        buffers: bytes that compiled code reads; part of ``stats.nbytes``.
        caps: for each device that has a cap of its own, its name, the bytes held, and the cap.
        pins: names of the pinned adapters.
        declined: what could have been cached and is not, and why.
        reasons: why calls went past the cache or values were not kept, with counts and layers, the
            most frequent first.
        uncounted: how often the audit has found contents that had changed without being counted.
        history: the counters over time. A sample is taken when ``stats()`` or ``report()`` is
            called, and now and then when a value is derived; never at a hit.
        seen: what the curve is computed from.
    """

    backend: str
    rows: tuple[ReportRow, ...]
    layers: tuple[LayerRow, ...]
    stats: CacheStats
    working_set: int
    buffers: int
    caps: tuple[tuple[str, int, int | None], ...]
    pins: tuple[str, ...]
    declined: tuple[Declined, ...]
    reasons: tuple[ReasonRow, ...]
    uncounted: int
    history: tuple[Sample, ...] = field(repr=False)
    seen: tuple[Seen, ...] = field(repr=False)

    @property
    def hit_rate(self) -> float:
        """Hits per lookup, from 0 to 1; 0 before the first lookup."""
        return self.stats.hit_rate

    @property
    def saved(self) -> float:
        """Seconds saved by all hits."""
        return sum(row.saved for row in self.rows)

    def curve(self) -> tuple[CurvePoint, ...]:
        """Return the time that a cache could have saved, over its cap.

        Of the values seen, a fixed set is kept: those that save the most time per byte, which is
        the best fixed set there is at every cap listed. A value is derived at its first use, so it
        saves its cost at every other one. A policy that changes what it keeps as traffic moves may
        save more; ``lru`` saves nothing where values are used in a cycle that does not fit.

        Returns:
            Caps in ascending order, from 0 to the working set.
        """
        worth = [
            (max(0, one.uses - 1) * one.cost, one.nbytes) for one in self.seen if one.nbytes > 0
        ]
        worth.sort(key=lambda pair: pair[0] / pair[1], reverse=True)
        total = sum(saved for saved, _ in worth)
        points, size, sum_saved = [CurvePoint(0, 0.0, 0.0)], 0, 0.0
        for saved, nbytes in worth:
            size += nbytes
            sum_saved += saved
            points.append(CurvePoint(size, sum_saved, sum_saved / total if total else 0.0))
        return tuple(points)

    def plot(self, path: str | PathLike[str]) -> None:
        """Draw :meth:`curve`, and write it to a file: PNG, SVG or PDF by its suffix.

        Raises:
            ImportError: the extra ``cli``, which installs matplotlib, is missing.
            OSError: the file cannot be written.
        """
        require("cli", ("matplotlib",), "CacheReport.plot()")
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        points = self.curve()
        figure = Figure(figsize=(7, 4), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        scale, unit = _scale(self.working_set)
        axes.plot(
            [point.max_bytes / scale for point in points],
            [point.saved for point in points],
            color="#2563a8",
            label="best fixed set",
        )
        if self.stats.max_bytes is not None:
            axes.axvline(self.stats.max_bytes / scale, color="#8a8f98", linestyle="--", label="cap")
        axes.plot(
            [self.stats.nbytes / scale], [self.saved], "o", color="#c2752d", label="this cache"
        )
        axes.set_xlabel(f"cap, {unit}")
        axes.set_ylabel("time saved, s")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        axes.set_title(f"{self.backend}: time saved over the cap", loc="left", fontsize=11)
        figure.savefig(path)

    def to_html(self, path: str | PathLike[str]) -> None:
        """Write the report as one HTML file, which loads nothing from elsewhere.

        Of many adapters and layers it shows the largest, and the sum of the others.

        Args:
            path: of the file; one that is there is replaced.

        Raises:
            FileNotFoundError: the folder does not exist.
            OSError: the file cannot be written.
        """
        from dora_cache.report.page import write_report

        write_report(self, path)

    def __str__(self) -> str:
        """Return the table and what goes with it."""
        lines = [*self._table(), "", *self._summary()]
        if self.reasons:
            lines.append("Calls past the cache, and values not kept:")
            for row in self.reasons:
                lines.append(f"  {row.count:,} x {row.reason.value}: {row.reason.advice}")
                if row.layers:
                    lines.append(f"    in {row.where}")
        if self.declined:
            lines.append("Not cached:")
            shown = self._declined()
            lines += shown[:_REASONS]
            if len(shown) > _REASONS:
                lines.append(f"  and {len(shown) - _REASONS} more")
        return "\n".join(lines)

    def _declined(self) -> list[str]:
        """Return a line for each kind, adapter and reason, with the layers' names."""
        places: defaultdict[tuple[str, str | None, str], list[str]] = defaultdict(list)
        for one in self.declined:
            places[one.kind, one.adapter, one.reason].append(one.where)
        return [
            f"  {kind}{f' {adapter!r}' if adapter else ''}, {shorten(where)}: {reason}"
            for (kind, adapter, reason), where in places.items()
        ]

    def _table(self) -> list[str]:
        table = [_COLUMNS]
        for row in self.rows:
            name = ", ".join(row.adapter) if isinstance(row.adapter, tuple) else row.adapter or ""
            lookups = row.hits + row.misses
            table.append((
                _shortened(row.kind),
                f"{_shortened(name)} (pinned)" if row.pinned else _shortened(name),
                f"{row.entries:,}",
                format_bytes(row.nbytes),
                f"{row.hits:,}",
                f"{row.misses:,}",
                f"{row.hits / lookups:.1%}" if lookups else "-",
                format_seconds(row.saved),
                format_seconds(row.derive),
            ))  # fmt: skip
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(width) if place < _NAMES else cell.rjust(width)
                for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
            )
            for cells in table
        ]
        return [lines[0], "-" * len(lines[0]), *lines[1:]]

    def _summary(self) -> list[str]:
        stats = self.stats
        cap = "no cap" if stats.max_bytes is None else f"a cap of {format_bytes(stats.max_bytes)}"
        first = (
            f"{self.backend}: {stats.entries:,} entries, {format_bytes(stats.nbytes)} held under "
            f"{cap}; working set seen {format_bytes(self.working_set)}; "
            f"{self.hit_rate:.1%} hits; {format_seconds(self.saved)} saved."
        )
        lines = [first]
        if self.buffers:
            lines.append(f"Compiled code reads {format_bytes(self.buffers)} of that.")
        if len(self.caps) > 1:
            each = (
                f"{device} {format_bytes(held)} of "
                f"{'any size' if cap is None else format_bytes(cap)}"
                for device, held, cap in self.caps
            )
            lines.append(f"By device: {', '.join(each)}.")
        if self.uncounted:
            lines.append(
                f"Writes that PyTorch does not count were found {self.uncounted:,} times: call "
                "cache.invalidate() after them."
            )
        if self.pins:
            lines.append(f"Pinned: {', '.join(self.pins)}.")
        return lines


def rows_of(cells: Cells, pinned: Iterable[Adapters]) -> tuple[ReportRow, ...]:
    """Sum up cells by kind and adapter.

    Args:
        cells: all of them.
        pinned: of the adapters among them, those that are pinned.
    """
    totals: defaultdict[tuple[str, Adapters], Totals] = defaultdict(Totals)
    entries: defaultdict[tuple[str, Adapters], list[int]] = defaultdict(list)
    for (_, kind, adapter), old in cells.retired():
        total = totals[kind, adapter]
        total.hits += old.hits
        total.misses += old.misses
        total.seconds += old.seconds
        total.saved += old.saved
    for cell in cells:
        name = cell.kind, cell.adapter
        totals[name].add(cell)
        if cell.facts is not None:
            entries[name].append(cell.nbytes)
    pins = set(pinned)
    return tuple(
        ReportRow(
            kind=kind,
            adapter=adapter,
            pinned=adapter in pins,
            entries=len(entries[kind, adapter]),
            nbytes=sum(entries[kind, adapter]),
            hits=total.hits,
            misses=total.misses,
            saved=total.saved,
            derive=total.seconds,
        )
        for (kind, adapter), total in totals.items()
    )


def layers_of(cells: Cells, layers: Iterable[tuple[str, Binding]]) -> tuple[LayerRow, ...]:
    """Sum up what cells hold by layer.

    Args:
        cells: all of them.
        layers: the names of owners.
    """
    names = {binding.token: name for name, binding in layers}
    held: defaultdict[str, list[int]] = defaultdict(list)
    for cell in cells.held():
        held[names.get(cell.owner, "")].append(cell.nbytes)
    return tuple(LayerRow(name, len(sizes), sum(sizes)) for name, sizes in held.items())


def seen_of(cells: Iterable[Cell]) -> tuple[Seen, ...]:
    """Return what cells say of the values."""
    return tuple(Seen(cell.nbytes, cell.cost, cell.hits + cell.misses) for cell in cells)


def _shortened(name: str) -> str:
    return name if len(name) <= _WIDEST else f"{name[: _WIDEST - 1]}…"


def _scale(nbytes: int) -> tuple[int, str]:
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if nbytes >= 1 << power:
            return 1 << power, unit
    return 1, "bytes"
