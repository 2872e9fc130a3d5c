"""What a server has done, for Prometheus, beside what its pool has."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from dora_cache.serving.metrics import collector

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from prometheus_client import Metric

    from dora_cache.serving.server.engine import Engine

__all__ = ["Merged", "registry_of"]

_OUTCOMES = ("finished", "cancelled", "refused", "failed", "turned_away")
_TIERS = ("device", "host", "files")


def registry_of(engine: Engine, labels: Mapping[str, str]) -> CollectorRegistry:
    """Return a registry of an engine and its pool.

    Args:
        engine: whose pool is exported as well.
        labels: of all samples, beside ``pool``.
    """
    more = {"pool": str(engine.pool.number), **labels}
    registry = CollectorRegistry()
    registry.register(_Requests(engine, more))
    registry.register(collector(engine.pool, labels=more))
    return registry


class _Requests(Collector):
    def __init__(self, engine: Engine, labels: dict[str, str]) -> None:
        self._engine = engine
        self._names = list(labels)
        self._values = list(labels.values())

    def collect(self) -> Iterator[Metric]:
        engine, names, values = self._engine, self._names, self._values
        for name, text, value in (
            ("running", "Requests that run", engine.running),
            ("waiting", "Requests that wait", engine.waiting),
        ):
            gauge = GaugeMetricFamily(f"dora_cache_requests_{name}", text, labels=names)
            gauge.add_metric(values, value)
            yield gauge
        for name, label, text, each in (
            ("dora_cache_requests", "outcome", "Requests that have ended, by outcome", _OUTCOMES),
            (
                "dora_cache_request_adapters",
                "tier",
                "Accepted requests with an adapter, by the tier that had it when they came",
                _TIERS,
            ),
        ):
            counter = CounterMetricFamily(name, text, labels=[*names, label])
            for one in each:
                counter.add_metric([*values, one], engine.counts[one])
            yield counter


class Merged(Collector):
    """The metrics of several processes as one page.

    Args:
        pages: of each process, its metrics. Samples that several have alike are taken once.
    """

    def __init__(self, pages: Iterable[Iterable[Metric]]) -> None:
        self._pages = pages

    def collect(self) -> list[Metric]:
        """Return the metrics, each once, with the samples of all."""
        found: dict[str, Metric] = {}
        for page in self._pages:
            for metric in page:
                known = found.setdefault(metric.name, metric)
                if known is not metric:
                    known.samples += [one for one in metric.samples if one not in known.samples]
        return list(found.values())
