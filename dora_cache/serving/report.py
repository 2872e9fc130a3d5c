"""What a pool holds and has done: as data, as text, and as a page."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

from dora_cache.report import LayerRow, ReasonRow
from dora_cache.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from os import PathLike

    from dora_cache.core.history import Sample
    from dora_cache.reasons import Advised
    from dora_cache.serving.layers import PooledLayer
    from dora_cache.serving.pool import PoolStats
    from dora_cache.serving.tiers import Adapter

__all__ = ["AdapterRow", "PoolReport", "kernel_reasons", "layer_rows", "named_reasons"]


class AdapterRow(NamedTuple):
    """One adapter of a pool.

    Attributes:
        name: its name.
        where: ``"device"``, ``"host"`` or ``"files"``: the nearest place that has it.
        pinned: whether it stays on the device.
        nbytes: bytes that it takes on the device, when it is there.
        hits: lookups of it while it was on the device.
        misses: the others.
    """

    name: str
    where: Literal["device", "host", "files"]
    pinned: bool
    nbytes: int
    hits: int
    misses: int


@dataclass(frozen=True, slots=True)
class PoolReport:
    """What a pool holds and has done; shows itself in a few lines when printed.

    Attributes:
        stats: all counters.
        device: of the model.
        adapters: one row for each, in the order in which they were added.
        layers: of the layers that adapters may be on, what the adapters on the device take there,
            and how many have anything there.
        kinds: how many layers there are of each kind.
        reasons: why scales are derived at each forward, with counts and layers.
        kernels: why linear layers on CUDA ran without the pool's kernels, with counts and layers.
        failures: what Triton failed with.
        history: the counters over time. A sample is taken when ``stats()`` or ``report()`` is
            called, and now and then when an adapter is loaded; never at a hit.
    """

    stats: PoolStats
    device: str
    adapters: tuple[AdapterRow, ...]
    layers: tuple[LayerRow, ...]
    kinds: Mapping[str, int]
    reasons: tuple[ReasonRow, ...]
    kernels: tuple[ReasonRow, ...]
    failures: tuple[str, ...]
    history: tuple[Sample, ...] = field(repr=False)

    @property
    def pins(self) -> tuple[str, ...]:
        """Names of the pinned adapters, sorted."""
        return tuple(sorted(row.name for row in self.adapters if row.pinned))

    def to_html(self, path: str | PathLike[str]) -> None:
        """Write the report as one HTML file, which loads nothing from elsewhere.

        Of many adapters and layers it shows the largest, and the sum of the others.

        Args:
            path: of the file; one that is there is replaced.

        Raises:
            FileNotFoundError: the folder does not exist.
            OSError: the file cannot be written.
        """
        from dora_cache.serving.report_page import write_report

        write_report(self, path)

    def __str__(self) -> str:
        """Return it in a few lines."""
        now = self.stats
        caps = [
            "no cap" if cap is None else format_bytes(cap)
            for cap in (now.max_device_bytes, now.max_host_bytes)
        ]
        lines = [
            f"{len(self.adapters)} adapters on {len(self.layers)} layers",
            f"device: {now.on_device} adapters, {format_bytes(now.device_bytes)} of {caps[0]}",
            f"host: {now.on_host} more, {format_bytes(now.host_bytes)} of {caps[1]}",
            f"files: {now.on_disk} more",
            f"lookups: {now.lookups}, {now.hit_rate:.1%} hits",
            f"loads: {now.loads}, {now.reads} from files; {now.evictions} evictions",
        ]
        if now.failures:
            lines.append(f"loads that failed: {now.failures}; the log says which, and why")
        if self.pins:
            lines.append(f"pinned: {', '.join(self.pins)}")
        for what, rows in (
            ("scales derived at each forward", self.reasons),
            ("linear layers without the pool's kernels", self.kernels),
        ):
            for row in rows:
                lines.append(f"{what}: {row.count:,} x {row.reason.value}: {row.reason.advice}")
                if row.layers:
                    lines.append(f"  in {row.where}")
        lines += [f"Triton: {failure}" for failure in self.failures]
        return "\n".join(lines)


def layer_rows(layers: Iterable[PooledLayer], resident: Iterable[Adapter]) -> tuple[LayerRow, ...]:
    """Sum up by layer what the adapters on the device take."""
    held: defaultdict[str, list[int]] = defaultdict(list)
    for adapter in resident:
        for layout in adapter.layouts:
            for layer, nbytes in layout.sizes():
                held[layer.name].append(nbytes)
    return tuple(LayerRow(one.name, len(held[one.name]), sum(held[one.name])) for one in layers)


def kernel_reasons(layers: Iterable[PooledLayer]) -> tuple[ReasonRow, ...]:
    """Sum up by reason why layers ran without kernels, the most frequent first."""
    found: defaultdict[Advised, dict[str, int]] = defaultdict(dict)
    for layer in layers:
        for reason, count in list(layer.without_kernel.items()):
            found[reason][layer.name] = count
    total = Counter({reason: sum(places.values()) for reason, places in found.items()})
    return tuple(ReasonRow(reason, count, found[reason]) for reason, count in total.most_common())


def named_reasons(
    rows: Iterable[ReasonRow], layers: Sequence[PooledLayer]
) -> tuple[ReasonRow, ...]:
    """Return reasons of the cache that watches base layers, with the layers' names in the model.

    Args:
        rows: they name layers by their numbers.
        layers: by number.
    """
    return tuple(
        ReasonRow(
            row.reason,
            row.count,
            {
                layers[int(number)].name: count
                for number, count in row.layers.items()
                if number.isdecimal()
            },
        )
        for row in rows
    )
