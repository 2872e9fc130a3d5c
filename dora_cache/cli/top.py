"""``dora-cache top``: what a running server's caches and pools do, from its metrics."""

from __future__ import annotations

import http.client
import time
import urllib.error
import urllib.request
from collections import defaultdict
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit

import typer
from rich import box
from rich.console import Group
from rich.live import Live
from rich.table import Table

from dora_cache.cli.console import CliError, reported, results
from dora_cache.extras import require
from dora_cache.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["top"]

_MOST_BYTES = 16 << 20  # of a page of metrics
_CHUNK = 1 << 16
_REASONS = 10  # shown
_TIERS = ("device", "host", "files")
_PREFIX = "dora_cache_"
_OWN = ("tier", "reason", "outcome")  # labels that tell the samples of one source apart
_ENDINGS = ("cancelled", "refused", "failed", "turned_away")  # of requests


def top(
    url: Annotated[
        str,
        typer.Argument(metavar="URL", help="Of the server, or of its metrics: http://HOST:PORT."),
    ],
    *,
    once: Annotated[
        bool,
        typer.Option("--once", help="Print one frame; as where the output is no terminal."),
    ] = False,
    interval: Annotated[
        float, typer.Option(min=0.1, max=3600, help="Seconds between two frames.")
    ] = 2.0,
    timeout: Annotated[
        float, typer.Option(min=0.1, max=600, help="Seconds that a request may take.")
    ] = 5.0,
) -> None:
    """Watch a server's caches: caps, bytes, hits, adapters by tier, loads, evictions and bypasses.

    Reads the Prometheus metrics of dora_cache.serving.metrics. Control-C ends it.
    """
    with reported():
        try:
            require("metrics", ("prometheus_client",), "dora-cache top")
        except ImportError as error:
            raise CliError(str(error)) from None
        page = _page(url)
        latest = _Scrape(page, timeout)
        console = results()
        if once or not console.is_terminal:
            console.print(_frame(latest, None))
            return
        try:
            _watch(
                latest, Live(_frame(latest, None), console=console, auto_refresh=False), interval
            )
        except KeyboardInterrupt:
            return


def _watch(latest: _Scrape, live: Live, interval: float) -> None:
    """Show a frame after each interval, until interrupted; a failure is shown, and tried again."""
    before = None
    with live:
        while True:
            time.sleep(interval)
            failure = None
            try:
                latest, before = _Scrape(latest.page, latest.timeout), latest
            except CliError as error:
                failure = str(error)
            live.update(_frame(latest, before, failure), refresh=True)


def _page(url: str) -> str:
    """Return the address of the metrics."""
    parts = urlsplit(url if "://" in url else f"http://{url}")
    try:
        named = parts.scheme in {"http", "https"} and parts.hostname and (parts.port or True)
    except ValueError:  # the port is no number
        named = False
    if not named:
        msg = f"{url!r} is no address of a server: give one such as http://127.0.0.1:8000"
        raise CliError(msg)
    path = parts.path if parts.path.strip("/") else "/metrics"
    return parts._replace(path=path, fragment="").geturl()


def _fetch(page: str, timeout: float) -> str:
    """Return a page, of bounded size and within bounded time.

    Raises:
        CliError: it cannot be had.
    """
    end = time.monotonic() + timeout
    found = bytearray()
    try:
        with urllib.request.urlopen(page, timeout=timeout) as response:  # noqa: S310 - see _page
            while chunk := response.read1(_CHUNK):
                found += chunk
                if len(found) > _MOST_BYTES:
                    msg = f"{page} has more than {format_bytes(_MOST_BYTES)}: give that of a server"
                    raise CliError(msg)
                if time.monotonic() > end:
                    raise TimeoutError
    except urllib.error.HTTPError as error:
        error.close()
        msg = f"{page} answers {error.code} {error.reason}: give the address of the metrics"
        raise CliError(msg) from None
    except (OSError, UnicodeError, http.client.HTTPException) as error:
        cause = getattr(error, "reason", None) or error
        why = "no answer in time" if isinstance(cause, TimeoutError) else cause
        msg = f"cannot read {page} ({why}): see that the server runs, and give its address"
        raise CliError(msg) from None
    return found.decode(errors="replace")


Labels = tuple[tuple[str, str], ...]


class _Scrape:
    """A server's metrics of dora-cache at one time.

    Args:
        page: their address.
        timeout: seconds that reading them may take.

    Raises:
        CliError: they cannot be had.
    """

    def __init__(self, page: str, timeout: float) -> None:
        from prometheus_client.parser import text_string_to_metric_families

        self.page = page
        self.timeout = timeout
        text = _fetch(page, timeout)
        self.time = time.monotonic()
        # By source, then by the sample's name and the label that is the sample's own.
        self.sources: defaultdict[Labels, dict[tuple[str, str], float]] = defaultdict(dict)
        try:
            for family in text_string_to_metric_families(text):
                if family.name.startswith(_PREFIX) and family.name != f"{_PREFIX}build_info":
                    for sample in family.samples:
                        labels = dict(sample.labels)
                        bound = labels.pop("le", "")
                        own = next(filter(None, (labels.pop(one, "") for one in _OWN)), bound)
                        name = sample.name.removeprefix(_PREFIX)
                        source = tuple(sorted(labels.items()))
                        self.sources[source][name, own] = sample.value
        except ValueError as error:
            msg = f"{page} is no page of Prometheus metrics ({error}): give that of a server"
            raise CliError(msg) from None
        if not self.sources:
            msg = (
                f"{page} has no metrics of a cache or pool that is open: export one with "
                "dora_cache.serving.metrics.register(pool)"
            )
            raise CliError(msg)


class _Source:
    """One source's samples, and what they were before.

    Args:
        labels: of the source.
        latest: has it.
        before: an earlier scrape, or None.
    """

    def __init__(self, labels: Labels, latest: _Scrape, before: _Scrape | None) -> None:
        others = [value for name, value in labels if name != "model"]
        self.name = "/".join(filter(None, (dict(labels).get("model"), *others)))
        self._now = latest.sources[labels]
        self._before = {} if before is None else before.sources.get(labels, {})
        self._seconds = 0.0 if before is None else latest.time - before.time

    def value(self, name: str, own: str = "") -> float | None:
        return self._now.get((name, own))

    def count(self, name: str, own: str = "") -> float:
        return self._now.get((name, own), 0.0)

    def gain(self, name: str, own: str = "") -> float | None:
        """Return what a counter has gained since the earlier scrape; None if that is not known."""
        before = self._before.get((name, own))
        now = self.count(name, own)
        return None if before is None or now < before else now - before  # it began anew

    def rate(self, name: str, own: str = "") -> str:
        """Return a counter's rate per second."""
        gain = self.gain(name, own)
        return "-" if gain is None or not self._seconds else f"{gain / self._seconds:,.1f}"

    def hit_rate(self, prefix: str) -> tuple[str, str]:
        """Return the share of hits, of all lookups and of those since the earlier scrape."""
        hits, lookups = f"{prefix}hits_total", f"{prefix}lookups_total"
        return (
            _share(self.count(hits), self.count(lookups)),
            _share(self.gain(hits), self.gain(lookups)),
        )

    def reasons(self, name: str) -> list[tuple[str, float]]:
        found = [(own, value) for (one, own), value in self._now.items() if one == name and value]
        return sorted(found, key=lambda pair: -pair[1])


def _share(part: float | None, whole: float | None) -> str:
    return f"{part / whole:.1%}" if part is not None and whole else "-"


def _frame(latest: _Scrape, before: _Scrape | None, failure: str | None = None) -> RenderableType:
    """Return what is shown of a scrape; rates are since the one before."""
    sources = [_Source(labels, latest, before) for labels in sorted(latest.sources)]
    pools = [one for one in sources if one.value("pool_lookups_total") is not None]
    caches = [one for one in sources if one.value("lookups_total") is not None]
    parts: list[RenderableType] = [latest.page if failure is None else f"{failure} (trying again)"]
    served = [one for one in sources if one.value("requests_running") is not None]
    if served:
        parts.append(_requests(served))
    if pools:
        parts += [_tiers(pools), _pools(pools)]
    if caches:
        parts.append(_caches(caches))
    reasons = _reasons(sources)
    if reasons.row_count:
        parts.append(reasons)
    return Group(*parts)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    table.add_column(columns[0], style="bold")
    for column in columns[1:]:
        table.add_column(column, justify="right")
    return table


def _used(used: float | None, cap: float | None) -> tuple[str, str, str]:
    if used is None:
        return "-", "-", "-"
    if cap is None:
        return format_bytes(used), "no cap", "-"
    return format_bytes(used), format_bytes(cap), _share(used, cap)


def _requests(served: list[_Source]) -> Table:
    table = _table(
        "Requests", "pool", "running", "waiting", "finished", "per s", "cancelled", "refused",
        "failed", "turned away", "on device",
    )  # fmt: skip
    for one in served:
        came = [one.count("request_adapters_total", tier) for tier in _TIERS]
        table.add_row(
            one.name,
            f"{one.count('requests_running'):,.0f}",
            f"{one.count('requests_waiting'):,.0f}",
            f"{one.count('requests_total', 'finished'):,.0f}",
            one.rate("requests_total", "finished"),
            *(f"{one.count('requests_total', ending):,.0f}" for ending in _ENDINGS),
            _share(came[0], sum(came)),
        )
    return table


def _tiers(pools: list[_Source]) -> Table:
    table = _table("Adapters by tier", "pool", "tier", "adapters", "bytes", "cap", "used")
    for pool in pools:
        for number, tier in enumerate(_TIERS):
            table.add_row(
                "" if number else pool.name,
                tier,
                f"{pool.count('pool_adapters', tier):,.0f}",
                *_used(
                    pool.value("pool_used_bytes", tier), pool.value("pool_capacity_bytes", tier)
                ),
            )
    return table


def _pools(pools: list[_Source]) -> Table:
    table = _table(
        "Lookups of adapters", "pool", "lookups", "hit rate", "lately", "loads", "each", "failed",
        "evictions", "per s",
    )  # fmt: skip
    for pool in pools:
        loads = pool.count("pool_load_seconds_count")
        seconds = pool.count("pool_load_seconds_sum")
        table.add_row(
            pool.name,
            f"{pool.count('pool_lookups_total'):,.0f}",
            *pool.hit_rate("pool_"),
            f"{loads:,.0f}",
            format_seconds(seconds / loads) if loads else "-",
            f"{pool.count('pool_load_failures_total'):,.0f}",
            f"{pool.count('pool_evictions_total'):,.0f}",
            pool.rate("pool_evictions_total"),
        )
    return table


def _caches(caches: list[_Source]) -> Table:
    table = _table(
        "Derived values", "cache", "values", "bytes", "cap", "used", "lookups", "hit rate",
        "lately", "evictions", "per s",
    )  # fmt: skip
    for cache in caches:
        table.add_row(
            cache.name,
            f"{cache.count('entries'):,.0f}",
            *_used(cache.value("used_bytes"), cache.value("capacity_bytes")),
            f"{cache.count('lookups_total'):,.0f}",
            *cache.hit_rate(""),
            f"{cache.count('evictions_total'):,.0f}",
            cache.rate("evictions_total"),
        )
    return table


def _reasons(sources: list[_Source]) -> Table:
    """Return why calls went past caches, and why values were not kept, the most frequent first."""
    kinds = {
        "bypasses_total": "past the cache",
        "unstored_total": "not kept",
        "pool_bypasses_total": "scale derived at a forward",
    }
    table = _table("Reasons", "reason", "what", "of", "times", "per s")
    rows = [
        (count, reason, what, source.name, source.rate(name, reason))
        for source in sources
        for name, what in kinds.items()
        for reason, count in source.reasons(name)
    ]
    for count, reason, what, name, rate in sorted(rows, key=lambda row: -row[0])[:_REASONS]:
        table.add_row(reason, what, name, f"{count:,.0f}", rate)
    return table
