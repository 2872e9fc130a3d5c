"""Prometheus metrics of caches and pools, read when they are scraped. Needs the extra ``metrics``.

::

    from prometheus_client import start_http_server
    from dora_cache.serving import metrics

    metrics.register(pool, labels={"model": "smollm2"})
    start_http_server(9400)
"""

from __future__ import annotations

import math
import re
import weakref
from itertools import accumulate
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple, Protocol

from dora_cache import __version__
from dora_cache.cache import AdapterCache
from dora_cache.errors import ConfigError
from dora_cache.extras import require
from dora_cache.reasons import Reason
from dora_cache.serving.pool import AdapterPool
from dora_cache.serving.tiers import LOAD_SECONDS

require("metrics", ("prometheus_client",), "dora_cache.serving.metrics")

from prometheus_client import REGISTRY, Metric  # noqa: E402 - what is missing is said first
from prometheus_client.registry import Collector  # noqa: E402
from prometheus_client.utils import floatToGoString  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from prometheus_client import CollectorRegistry

    from dora_cache.core.engine import Engine

__all__ = ["FAMILIES", "CacheCollector", "Family", "collector", "register"]


class Family(NamedTuple):
    """One metric.

    Attributes:
        kind: ``"counter"``, ``"gauge"``, ``"histogram"`` or ``"info"``.
        help: what it counts or measures.
    """

    kind: str
    help: str


FAMILIES: Mapping[str, Family] = {
    "dora_cache_build": Family("info", "The version of dora-cache"),
    # Of an AdapterCache: values that layers derive from their weights.
    "dora_cache_capacity_bytes": Family("gauge", "Most bytes that values may take"),
    "dora_cache_used_bytes": Family("gauge", "Bytes that values take"),
    "dora_cache_entries": Family("gauge", "Values held"),
    "dora_cache_lookups": Family("counter", "Calls that consulted the cache"),
    "dora_cache_hits": Family("counter", "Lookups answered without deriving"),
    "dora_cache_stores": Family("counter", "Values that were kept"),
    "dora_cache_evictions": Family("counter", "Values dropped to make room"),
    "dora_cache_invalidations": Family("counter", "Values dropped that held no longer"),
    "dora_cache_replacements": Family("counter", "Values replaced by newer ones"),
    "dora_cache_rejections": Family("counter", "Values that the backend did not keep"),
    "dora_cache_derive_seconds": Family("counter", "Seconds spent deriving values"),
    "dora_cache_bypasses": Family("counter", "Calls that went past the cache, by reason"),
    "dora_cache_unstored": Family("counter", "Derived values that were not kept, by reason"),
    # Of an AdapterPool: whole adapters.
    "dora_cache_pool_capacity_bytes": Family("gauge", "Most bytes that adapters may take, by tier"),
    "dora_cache_pool_used_bytes": Family("gauge", "Bytes that adapters take, by tier"),
    "dora_cache_pool_adapters": Family("gauge", "Adapters, by the fastest tier that has them"),
    "dora_cache_pool_lookups": Family("counter", "Adapters that batches asked for"),
    "dora_cache_pool_hits": Family("counter", "Lookups of adapters that were on the device"),
    "dora_cache_pool_evictions": Family("counter", "Adapters that left the device for others"),
    "dora_cache_pool_load_seconds": Family(
        "histogram", "Seconds that bringing an adapter to the device took"
    ),
    "dora_cache_pool_file_reads": Family("counter", "Adapters that were read from their files"),
    "dora_cache_pool_load_failures": Family("counter", "Adapters that could not be loaded"),
    "dora_cache_pool_bypasses": Family(
        "counter", "Scales that were derived for one forward alone, by reason"
    ),
}
"""What is exported, by name. A counter's samples end in ``_total``, those of an info in ``_info``,
and a histogram's in ``_bucket``, ``_sum`` and ``_count``."""

_LABEL = re.compile(r"(?!__)[a-zA-Z_]\w*", re.ASCII)
_TAKEN = {"le", "reason", "tier", "version"}


def collector(
    *sources: AdapterCache | AdapterPool, labels: Mapping[str, str] | None = None
) -> CacheCollector:
    """Return a collector, to be registered with a ``prometheus_client.CollectorRegistry``.

    A registry takes one such collector; :meth:`CacheCollector.add` gives it further sources.

    Args:
        sources: what to export. They are held weakly, and left out once they are closed or
            detached.
        labels: for all samples, in place of the labels that a source has by itself: ``model``, the
            class of its model; and ``pool`` or ``cache``, a number.

    Raises:
        ConfigError: a source or a label is none, or two sources have the same labels.
        DetachedError: a source is closed or detached.
    """
    made = CacheCollector()
    for source in sources:
        made.add(source, labels)
    return made


def register(
    source: AdapterCache | AdapterPool,
    registry: CollectorRegistry = REGISTRY,
    labels: Mapping[str, str] | None = None,
) -> CacheCollector:
    """Export a cache or pool with a registry; once more for other labels.

    Args:
        source: as of :func:`collector`.
        registry: by default the one that ``prometheus_client.start_http_server`` serves.
        labels: as of :func:`collector`.

    Returns:
        The registry's collector of all that was registered in this way.

    Raises:
        ConfigError: the source or a label is none, or another source has the same labels.
        DetachedError: the source is closed or detached.
    """
    with _lock:
        found = _collectors.get(registry)
        if found is None:
            found = CacheCollector()
            registry.register(found)
            _collectors[registry] = found
    found.add(source, labels)
    return found


_lock = Lock()
_collectors: weakref.WeakKeyDictionary[CollectorRegistry, CacheCollector] = (
    weakref.WeakKeyDictionary()
)


class CacheCollector(Collector):
    """Reads the statistics of caches and pools at each scrape; in between it does nothing."""

    def __init__(self) -> None:
        self._sources: list[_Source] = []
        self._lock = Lock()

    def add(
        self, source: AdapterCache | AdapterPool, labels: Mapping[str, str] | None = None
    ) -> None:
        """Export a further source; one that is exported already gets these labels.

        Args:
            source: as of :func:`collector`.
            labels: as of :func:`collector`.

        Raises:
            ConfigError: the source or a label is none, or another source has the same labels.
            DetachedError: the source is closed or detached.
        """
        if not isinstance(source, (AdapterCache, AdapterPool)):
            msg = f"{type(source).__name__} has no metrics: give an AdapterCache or AdapterPool"
            raise ConfigError(msg)
        source._check_open()
        more = _checked(labels or {})
        new = _Pool(source, more) if isinstance(source, AdapterPool) else _Cache(source, more)
        with self._lock:
            others = [one for one in self._living() if one.target is not new.target]
            if any(one.labels == new.labels for one in others):
                msg = (
                    f"another source has the labels {new.labels}: give labels that tell them apart"
                )
                raise ConfigError(msg)
            self._sources = [*others, new]

    def describe(self) -> list[Metric]:
        """Return the metrics without samples."""
        return list(_families().values())

    def collect(self) -> list[Metric]:
        """Return the metrics as they are now."""
        families = _families()
        families["dora_cache_build"].add_sample(
            "dora_cache_build_info", {"version": __version__}, 1
        )
        with self._lock:
            self._sources = self._living()
            for source in self._sources:
                try:
                    samples = list(source.read())
                except Exception:
                    if source.is_open:
                        raise
                    continue  # it was closed just now
                for name, suffix, labels, value in samples:
                    family = families[name]
                    family.add_sample(name + suffix, source.labels | labels, value)
        return list(families.values())

    def _living(self) -> list[_Source]:
        return [source for source in self._sources if source.is_open]


def _families() -> dict[str, Metric]:
    return {name: Metric(name, one.help, one.kind) for name, one in FAMILIES.items()}


def _checked(labels: Mapping[str, str]) -> dict[str, str]:
    for name, value in labels.items():
        if not isinstance(name, str) or not _LABEL.fullmatch(name) or name in _TAKEN:
            taken = ", ".join(sorted(_TAKEN))
            msg = (
                f"{name!r} cannot be a label: give a name of letters, digits and underscores that "
                f"does not begin with a digit or two underscores, and is none of {taken}"
            )
            raise ConfigError(msg)
        if not isinstance(value, str):
            msg = f"the label {name} is {value!r}: give a text"
            raise ConfigError(msg)
    return dict(labels)


_Sample = tuple[str, str, dict[str, str], float]
"""Name of the metric, what the sample's name has after it, labels, and value."""


class _Source(Protocol):
    """A cache or a pool, and the labels of all its samples."""

    labels: dict[str, str]

    @property
    def target(self) -> object:
        """What is held weakly; None if it is gone."""

    @property
    def is_open(self) -> bool:
        """Whether it is neither gone nor closed."""

    def read(self) -> Iterator[_Sample]:
        """Yield the samples as they are now."""


class _Counters:
    """Keeps counters from falling.

    A cache takes a lookup back where it turns out to be none, and a scrape in between would see a
    counter fall, which Prometheus takes for a restart.
    """

    def __init__(self) -> None:
        self._highest: dict[tuple[str, str], float] = {}

    def __call__(self, name: str, value: float, reason: str = "") -> _Sample:
        key = name, reason
        self._highest[key] = value = max(value, self._highest.get(key, 0))
        return name, "_total", {"reason": reason} if reason else {}, value


class _Cache:
    """The engine is what lives as long as the model is attached; handles come and go."""

    def __init__(self, cache: AdapterCache, labels: dict[str, str]) -> None:
        engine = cache._engine
        self._engine = weakref.ref(engine)
        models = [part for weak in engine.parts.values() if (part := weak()) is not None]
        name = type(models[0]).__name__ if models else ""
        self.labels = {"model": name, "cache": str(engine.token)} | labels
        self._counter = _Counters()

    @property
    def target(self) -> Engine | None:
        return self._engine()

    @property
    def is_open(self) -> bool:
        engine = self._engine()
        if engine is None or engine.closed:
            return False
        return not engine.parts or any(part() is not None for part in engine.parts.values())

    def read(self) -> Iterator[_Sample]:
        engine = self._engine()
        if engine is None:
            return
        now, counter = AdapterCache(engine).stats(), self._counter
        if now.max_bytes is not None:
            yield "dora_cache_capacity_bytes", "", {}, now.max_bytes
        yield "dora_cache_used_bytes", "", {}, now.nbytes
        yield "dora_cache_entries", "", {}, now.entries
        yield counter("dora_cache_lookups", now.lookups)
        yield counter("dora_cache_hits", now.hits)
        yield counter("dora_cache_stores", now.stores)
        yield counter("dora_cache_evictions", now.evictions)
        yield counter("dora_cache_invalidations", now.invalidations)
        yield counter("dora_cache_replacements", now.replacements)
        yield counter("dora_cache_rejections", now.rejections)
        yield counter("dora_cache_derive_seconds", now.derive_seconds)
        for reason in Reason:
            name = "dora_cache_bypasses" if reason.is_bypass else "dora_cache_unstored"
            yield counter(name, now.reasons.get(reason.value, 0), reason.value)


class _Pool:
    def __init__(self, pool: AdapterPool, labels: dict[str, str]) -> None:
        self._pool = weakref.ref(pool)
        self.labels = {"model": type(pool._model).__name__, "pool": str(pool.number)} | labels
        self._counter = _Counters()

    @property
    def target(self) -> AdapterPool | None:
        return self._pool()

    @property
    def is_open(self) -> bool:
        pool = self._pool()
        return pool is not None and not pool._closed

    def read(self) -> Iterator[_Sample]:
        pool = self._pool()
        if pool is None:
            return
        now, counter = pool.stats(), self._counter
        for tier, cap, used in (
            ("device", now.max_device_bytes, now.device_bytes),
            ("host", now.max_host_bytes, now.host_bytes),
        ):
            if cap is not None:
                yield "dora_cache_pool_capacity_bytes", "", {"tier": tier}, cap
            yield "dora_cache_pool_used_bytes", "", {"tier": tier}, used
        tiers = {"device": now.on_device, "host": now.on_host, "files": now.on_disk}
        for tier, count in tiers.items():
            yield "dora_cache_pool_adapters", "", {"tier": tier}, count
        yield counter("dora_cache_pool_lookups", now.lookups)
        yield counter("dora_cache_pool_hits", now.hits)
        yield counter("dora_cache_pool_evictions", now.evictions)
        yield counter("dora_cache_pool_file_reads", now.reads)
        yield counter("dora_cache_pool_load_failures", now.failures)
        for reason in Reason:
            count = now.reasons.get(reason.value, 0)
            yield counter("dora_cache_pool_bypasses", count, reason.value)
        name = "dora_cache_pool_load_seconds"
        bounds = map(floatToGoString, (*LOAD_SECONDS, math.inf))
        for bound, count in zip(bounds, accumulate(now.load_times), strict=True):
            yield name, "_bucket", {"le": bound}, count
        yield name, "_sum", {}, now.load_seconds
        yield name, "_count", {}, now.loads
