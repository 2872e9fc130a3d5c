"""Metrics over HTTP, spans, log records, the live view and the dashboard agree with stats()."""

import contextlib
import gc
import http.server
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import types
import urllib.request
from pathlib import Path

import pytest
import torch
from opentelemetry import trace
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from pool_oracle import NET_KINDS, Folders, net, output, tokens
from prometheus_client import CollectorRegistry, generate_latest, start_http_server
from prometheus_client.parser import text_string_to_metric_families
from test_docs import blocks
from torch import nn
from typer.testing import CliRunner
from zoo import activate, dora_model, run, sample

import dora_cache
from dora_cache import AdapterPool, ConfigError, DetachedError, cached
from dora_cache.backends import DictBackend, register
from dora_cache.backends.registry import _registered
from dora_cache.cli import top as top_module
from dora_cache.cli.app import app
from dora_cache.core.engine import Engine
from dora_cache.errors import AdapterFileError
from dora_cache.lab.models import twin
from dora_cache.reasons import Reason
from dora_cache.serving import metrics
from dora_cache.serving.metrics import FAMILIES, collector
from dora_cache.serving.tiers import LOAD_SECONDS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
DASHBOARD = json.loads((DOCS / "grafana-dashboard.json").read_text(encoding="utf-8"))


# What is exported


@pytest.fixture
def registry():
    return CollectorRegistry()


@pytest.fixture
def url(registry):
    """The address of a server of the registry's metrics."""
    server, thread = start_http_server(0, "127.0.0.1", registry=registry)
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def scrape(url, **labels):
    """Return the values of a source's samples, by name and the label that is the sample's own."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as response:
        text = response.read().decode()
    found = {}
    for family in text_string_to_metric_families(text):
        for one in family.samples:
            if labels.items() <= one.labels.items():
                own = [one.labels[name] for name in ("tier", "reason", "le") if name in one.labels]
                key = (one.name.removeprefix("dora_cache_"), *own)
                assert key not in found, f"{key} twice"
                found[key] = one.value
    return found


@pytest.fixture
def model():
    """A block with two DoRA adapters, each of which has one value of 32 bytes."""
    return dora_model(adapters=("a", "b"))


@pytest.fixture
def x():
    return sample("linear")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return Folders(net(), NET_KINDS, tmp_path_factory.mktemp("adapters"))


@pytest.fixture
def pool(folders):
    """A pool of three adapters, and room for two of them."""
    made = AdapterPool(net(), max_bytes="1MiB")
    for name in ("lora", "dora", "rslora"):
        made.add(name, folders[name])
    sizes = sorted(one.nbytes for one in made._names.values())
    made.resize(device_bytes=sum(sizes[1:]))
    yield made
    made.close()


def serve(pool, names):
    with pool.use(names), torch.no_grad():
        return output(pool._model, tokens(1 if isinstance(names, str) else len(names)))


def assert_agrees_with_cache(found, cache):
    now = cache.stats()
    assert found["used_bytes",] == now.nbytes
    assert found["entries",] == now.entries
    assert found["lookups_total",] == now.hits + now.misses
    assert found["derive_seconds_total",] == now.derive_seconds
    for name in (
        "hits", "stores", "evictions", "invalidations", "replacements", "rejections"
    ):  # fmt: skip
        assert found[f"{name}_total",] == getattr(now, name), name
    assert found.get(("capacity_bytes",)) == now.max_bytes
    bypasses = {one[1]: count for one, count in found.items() if one[0] == "bypasses_total"}
    unstored = {one[1]: count for one, count in found.items() if one[0] == "unstored_total"}
    assert sum(bypasses.values()) == now.bypasses
    assert {name: n for name, n in (bypasses | unstored).items() if n} == now.reasons
    assert bypasses.keys() | unstored.keys() == {one.value for one in Reason}


def assert_agrees_with_pool(found, pool):
    now = pool.stats()
    assert found["pool_lookups_total",] == now.hits + now.misses
    assert found["pool_hits_total",] == now.hits
    assert found["pool_evictions_total",] == now.evictions
    assert found["pool_file_reads_total",] == now.reads
    assert found["pool_load_failures_total",] == now.failures
    assert found["pool_load_seconds_count",] == now.loads == sum(now.load_times)
    assert found["pool_load_seconds_sum",] == now.load_seconds
    assert found["pool_used_bytes", "device"] == now.device_bytes
    assert found["pool_used_bytes", "host"] == now.host_bytes
    assert found.get(("pool_capacity_bytes", "device")) == now.max_device_bytes
    assert found.get(("pool_capacity_bytes", "host")) == now.max_host_bytes
    assert found["pool_adapters", "device"] == now.on_device
    assert found["pool_adapters", "host"] == now.on_host
    assert found["pool_adapters", "files"] == now.on_disk
    buckets = [count for one, count in found.items() if one[0] == "pool_load_seconds_bucket"]
    assert len(buckets) == len(LOAD_SECONDS) + 1
    assert buckets == sorted(buckets)
    assert buckets[-1] == now.loads
    reasons = {one[1]: n for one, n in found.items() if one[0] == "pool_bypasses_total" and n}
    assert reasons == now.reasons


def test_a_scrape_agrees_with_a_cache(model, x, registry, url):
    """After known hits, misses, evictions, bypasses and invalidations, all sums are as counted."""
    with dora_cache.attach(model, backend="lru", max_bytes=40) as cache:
        metrics.register(cache, registry, {"model": "block"})
        for name in ("a", "a", "a", "b", "a"):  # one value fits: b evicts a, and a evicts b
            activate(model, name)
            run(model, x)
        held = scrape(url, model="block")
        assert_agrees_with_cache(held, cache)
        assert (held["entries",], held["used_bytes",]) == (1, 32)
        with cache.bypass():
            run(model, x)
        model.train()
        run(model, x)
        run(model, x)
        model.eval()
        run(model, x)
        cache.invalidate()
        found = scrape(url, model="block")
        assert_agrees_with_cache(found, cache)
        assert found["capacity_bytes",] == 40
        assert (found["hits_total",], found["lookups_total",]) == (2, 6)
        assert (found["stores_total",], found["evictions_total",]) == (4, 2)
        assert found["invalidations_total",] == 2  # by the switch to training, and by hand
        assert (found["entries",], found["used_bytes",]) == (0, 0)
        assert found["bypasses_total", "bypass()"] == 1
        assert found["bypasses_total", "training mode"] == 2
        assert found["derive_seconds_total",] > 0


def test_values_that_are_not_kept_are_counted_by_reason(model, x, registry, url):
    """A value above the cap is unstored; so is one that the backend fails to keep."""
    with dora_cache.attach(model, backend="lru", max_bytes=8) as cache:
        metrics.register(cache, registry)
        run(model, x)
        found = scrape(url)
        assert_agrees_with_cache(found, cache)
        assert found["rejections_total",] == 1
        assert found["unstored_total", "no room under the cap"] == 1


class Failing(DictBackend):
    """A backend that keeps nothing, by failing."""

    def put(self, key, entry):
        raise OSError("put failed")


class Picky(DictBackend):
    """A backend that keeps nothing, and says so before a value is derived."""

    keeps_everything = False

    def put(self, key, entry):
        return False

    def declines(self, key):
        return True


@pytest.fixture(autouse=True)
def _backends():
    register("failing", Failing)
    register("picky", Picky)
    yield
    del _registered["failing"], _registered["picky"]


def test_values_that_are_declined_are_told_like_others(model, x, registry, url, spans, caplog):
    """In the metrics, in the span and in the log, with the reason."""
    caplog.set_level(logging.DEBUG, "dora_cache")
    with dora_cache.attach(model, backend="picky") as cache:
        metrics.register(cache, registry)
        run(model, x)
        run(model, x)
        found = scrape(url)
        assert_agrees_with_cache(found, cache)
        assert found["rejections_total",] == 2
        assert found["unstored_total", "declined by the backend"] == 1
        reasons = ["no room under the cap", "declined by the backend"]
        assert [one["reason"] for _, one in told(spans)] == reasons
        logged = [one[3] for one in records(caplog) if one[0] == "core.deriver"]
        assert [one["reason"] for one in logged] == reasons
        seconds = sum(one["seconds"] for one in logged)
        assert seconds == cache.stats().derive_seconds == found["derive_seconds_total",]


@pytest.mark.filterwarnings("ignore::dora_cache.CacheWarning")
def test_bypasses_are_the_sum_of_their_reasons(registry, url):
    """Results that cannot be stored are calls past the cache; what a backend drops is not."""

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2), requires_grad=False)

        @cached("text", depends_on=lambda self: [self.weight])
        def text(self):
            return "no tensor"

        @cached("double", depends_on=lambda self: [self.weight])
        def double(self):
            return 2 * self.weight

    odd = Odd().eval()
    with dora_cache.attach(odd, backend="failing") as cache:
        metrics.register(cache, registry)
        assert [odd.text(), odd.text()] == ["no tensor"] * 2
        odd.double()
        found = scrape(url)
        assert_agrees_with_cache(found, cache)
        assert found["bypasses_total", Reason.UNSTORABLE.value] == cache.stats().bypasses == 2
        assert found["unstored_total", Reason.BACKEND_FAILED.value] == 1


def test_a_scrape_agrees_with_a_pool(pool, registry, url):
    """After known lookups, loads and evictions, the metrics are what stats() says."""
    metrics.register(pool, registry, {"model": "net"})
    first = scrape(url, model="net")
    assert_agrees_with_pool(first, pool)
    assert [first["pool_adapters", tier] for tier in ("device", "host", "files")] == [0, 0, 3]
    for names in ("lora", "lora", ["lora", "dora", None], "rslora", "lora"):
        serve(pool, names)
    found = scrape(url, model="net")
    assert_agrees_with_pool(found, pool)
    assert (found["pool_lookups_total",], found["pool_hits_total",]) == (6, 2)
    assert found["pool_file_reads_total",] == 3
    assert found["pool_load_seconds_count",] == 4
    assert found["pool_evictions_total",] == 2
    assert [found["pool_adapters", tier] for tier in ("device", "host", "files")] == [2, 1, 0]
    assert found["pool_load_failures_total",] == 0


def test_scales_that_a_pool_cannot_keep_are_counted(folders, registry, url):
    """A base layer in training mode makes a pool derive scales at each forward, for that reason."""
    with AdapterPool(net()) as pool:
        pool.add("dora", folders["dora"])
        metrics.register(pool, registry)
        pool._model.train()
        serve(pool, "dora")
        assert_agrees_with_pool(scrape(url), pool)
        assert pool.stats().reasons == {
            name: count for (what, name), count in pairs(scrape(url)) if count
        }


def pairs(found):
    return [(one, n) for one, n in found.items() if one[0] == "pool_bypasses_total"]


def test_failed_loads_are_counted(folders, tmp_path, registry, url):
    """An adapter whose file is damaged once it is added is a failed load; others serve."""
    path = folders.copied("dora", tmp_path / "spoilt")
    with AdapterPool(net()) as pool:
        pool.add("spoilt", path)
        pool.add("lora", folders["lora"])
        metrics.register(pool, registry)
        spoil(path)
        for _ in range(2):
            with pytest.raises(AdapterFileError):
                serve(pool, "spoilt")
        serve(pool, "lora")
        found = scrape(url)
        assert_agrees_with_pool(found, pool)
        assert found["pool_load_failures_total",] == 2
        assert found["pool_load_seconds_count",] == 1


def spoil(path):
    (path / "adapter_model.safetensors").write_bytes(b"")


def test_loads_are_counted_by_their_time(pool, monkeypatch):
    """A load counts in the first bucket that its seconds do not exceed, and in the sum."""
    clock = [0.0]
    monkeypatch.setattr("dora_cache.serving.tiers.time.perf_counter", lambda: clock[0])
    loading, wanted = pool._tiers._load, iter([0.001, 0.3, 11.0])

    def load(adapter):
        found = loading(adapter)
        clock[0] += next(wanted)
        return found

    monkeypatch.setattr(pool._tiers, "_load", load)
    pool.resize(device_bytes=None)
    for name in pool.names:
        serve(pool, name)
    now = pool.stats()
    taken = {bound: n for bound, n in zip((*LOAD_SECONDS, None), now.load_times, strict=True) if n}
    assert taken == {0.001: 1, 0.5: 1, None: 1}
    assert now.load_seconds == pytest.approx(11.301)


def test_counters_never_fall(model, x, registry, url):
    """A hit that the cache takes back is no restart of the counter; later ones count on."""
    with dora_cache.attach(model) as cache:
        metrics.register(cache, registry)
        for _ in range(3):
            run(model, x)
        assert scrape(url)["hits_total",] == 2
        (cell,) = cache._engine.cells.held()
        cell.add(hit=True, count=-1)
        assert cache.stats().hits == 1
        found = scrape(url)
        assert (found["hits_total",], found["lookups_total",]) == (2, 3)
        run(model, x)
        run(model, x)
        assert_agrees_with_cache(scrape(url), cache)
        assert scrape(url)["hits_total",] == 3


# Which sources


def test_every_metric_is_exported_and_described(model, pool, registry):
    """A page has all families, each with its type and help, and samples of each."""
    with dora_cache.attach(model, backend="lru", max_bytes=1000) as cache:
        registry.register(collector(pool, cache))
        page = generate_latest(registry).decode()
    families = {one.name: one for one in text_string_to_metric_families(page)}
    expected = {f"{name}_info" if one.kind == "info" else name for name, one in FAMILIES.items()}
    assert set(families) == expected
    for name, one in families.items():
        described = FAMILIES[name.removesuffix("_info")]
        assert one.documentation == described.help
        assert one.type == {"info": "gauge"}.get(described.kind, described.kind)
        assert one.samples


def test_sources_leave_when_they_are_closed(model, pool, registry, url):
    """Closed, detached and freed sources are not in the next scrape; it goes on without error."""
    cache = dora_cache.attach(model)
    metrics.register(cache, registry, {"model": "closed"})
    metrics.register(pool, registry, {"model": "net"})
    lost = AdapterPool(net())
    metrics.register(lost, registry, {"model": "lost"})
    assert all(scrape(url, model=name) for name in ("closed", "net", "lost"))
    cache.detach()
    del lost
    gc.collect()
    assert scrape(url, model="closed") == scrape(url, model="lost") == {}
    assert_agrees_with_pool(scrape(url, model="net"), pool)
    pool.close()
    assert list(scrape(url)) == [("build_info",)]


def test_a_cache_is_exported_for_as_long_as_the_model_is_attached(x, registry, url):
    """The handle may be dropped; the model's end is the end of its metrics."""
    model = dora_model()
    metrics.register(dora_cache.attach(model), registry)
    gc.collect()
    run(model, x)
    assert scrape(url)["lookups_total",] == 1
    del model
    gc.collect()
    assert list(scrape(url)) == [("build_info",)]


def test_a_source_that_closes_during_a_scrape_is_left_out(model, x, registry, monkeypatch):
    """Statistics that fail since the source was closed just now fail no scrape; others do."""
    cache = dora_cache.attach(model)
    registry.register(collector(cache))

    def closing(self):
        cache.detach()
        raise RuntimeError("closed")

    monkeypatch.setattr(dora_cache.AdapterCache, "stats", closing)
    assert b"dora_cache_lookups_total{" not in generate_latest(registry)
    monkeypatch.undo()
    cache = dora_cache.attach(model)
    registry = CollectorRegistry()
    registry.register(collector(cache))
    monkeypatch.setattr(dora_cache.AdapterCache, "stats", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate_latest(registry)
    monkeypatch.undo()
    cache.detach()


def test_sources_have_labels_that_tell_them_apart(pool, x, registry, url):
    """By itself a source has its model's class and a number; labels given take their place."""
    models = [dora_model(), dora_model()]
    caches = [dora_cache.attach(one) for one in models]
    registry.register(collector(*caches, pool))
    run(models[1], x)
    numbers = [str(cache._engine.token) for cache in caches]
    name = type(models[0]).__name__
    assert [scrape(url, model=name, cache=one)["lookups_total",] for one in numbers] == [0, 1]
    assert scrape(url, model="Net", pool=str(pool.number))
    for cache in caches:
        cache.detach()


def test_registering_again_changes_the_labels(pool, registry, url):
    """A source is exported once, with the labels given last."""
    first = metrics.register(pool, registry, {"model": "a", "zone": "x"})
    assert metrics.register(pool, registry, {"model": "b"}) is first
    assert scrape(url, model="a") == {}
    assert_agrees_with_pool(scrape(url, model="b"), pool)


@pytest.mark.parametrize("name", ["tier", "reason", "le", "__name__", "0x", "a-b", "", 1])
def test_labels_that_cannot_be(pool, name):
    """Names that Prometheus or the metrics themselves take are refused, with what is allowed."""
    with pytest.raises(ConfigError, match="cannot be a label: give a name of letters"):
        collector(pool, labels={name: "x"})


def test_mistakes_in_sources_are_said(pool, model):
    """No source, a closed one, values that are no text, and labels of another source are errors."""
    with pytest.raises(ConfigError, match="Net has no metrics: give an AdapterCache or"):
        collector(pool._model)
    with pytest.raises(ConfigError, match="the label model is 1: give a text"):
        collector(pool, labels={"model": 1})
    cache = dora_cache.attach(model)
    cache.detach()
    with pytest.raises(DetachedError):
        collector(cache)
    with AdapterPool(net()) as other:
        same = {"model": "m", "pool": "p"}
        found = collector(pool, labels=same)
        with pytest.raises(ConfigError, match="give labels that tell them apart"):
            found.add(other, same)
    with pytest.raises(DetachedError):
        collector(other)


def test_two_collectors_clash_in_one_registry(pool, registry):
    """A registry refuses a second collector, rather than export a metric twice."""
    registry.register(collector(pool))
    with pytest.raises(ValueError, match="Duplicated"):
        registry.register(collector())


def test_threads_scrape_and_register_while_others_serve(folders, registry, url):
    """Scrapes beside use, closing and registering are complete, and counters do not fall."""
    stop = threading.Event()
    failures = []

    def serving(number):
        while not stop.is_set():
            with AdapterPool(net()) as pool:
                pool.add("lora", folders["lora"])
                metrics.register(pool, registry, {"model": f"m{number}"})
                for _ in range(5):
                    serve(pool, "lora")

    def scraping():
        try:
            while not stop.is_set():
                found = scrape(url, model="m0")
                assert not found or found["pool_lookups_total",] >= found["pool_hits_total",]
        except Exception as error:  # noqa: BLE001 - for the main thread
            failures.append(error)

    threads = [threading.Thread(target=serving, args=(number,)) for number in range(2)]
    threads += [threading.Thread(target=scraping) for _ in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(2)
    stop.set()
    for thread in threads:
        thread.join()
    assert failures == []
    gc.collect()
    assert list(scrape(url)) == [("build_info",)]


# Spans


@pytest.fixture
def spans(monkeypatch):
    """An exporter in memory, of the provider that the API names."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    return exporter


def told(exporter):
    """Return the finished spans' names and attributes, without prefixes, and forget them."""
    found = [
        (
            span.name.removeprefix("dora_cache."),
            {name.removeprefix("dora_cache."): value for name, value in span.attributes.items()},
        )
        for span in exporter.get_finished_spans()
    ]
    exporter.clear()
    return found


def test_a_derivation_is_a_span_and_a_hit_is_none(model, x, spans):
    """Its attributes say whose value it is, how large, and why it is not kept."""
    with dora_cache.attach(model, backend="lru", max_bytes=40) as cache:
        run(model, x)
        ((name, found),) = told(spans)
        seconds = found.pop("seconds")
        assert name == "derive"
        assert found == {
            "adapter": "a", "kind": "DoRA scale", "layer": "base_model.model.layer", "bytes": 32
        }  # fmt: skip
        assert seconds == cache.stats().derive_seconds
        for _ in range(3):
            run(model, x)
        assert cache.stats().hits == 3
        assert told(spans) == []
        cache.resize(8)
        run(model, x)
        ((_, found),) = told(spans)
        assert found["reason"] == "no room under the cap"


def test_spans_are_children_of_the_current_one_and_parents(model, x, spans):
    """A derivation within a request is part of its trace, and what it calls is part of it."""
    inner = []
    tracer = trace.get_tracer_provider().get_tracer("test")

    class Owner(nn.Module):
        @cached("value", depends_on=lambda self: [1])
        def value(self):
            inner.append(trace.get_current_span())
            return torch.ones(1)

    owner = Owner().eval()
    with dora_cache.attach(owner), tracer.start_as_current_span("request") as request:
        owner.value()
    derive = next(one for one in spans.get_finished_spans() if one.name == "dora_cache.derive")
    assert derive.parent.span_id == request.get_span_context().span_id
    assert inner[0].get_span_context().span_id == derive.context.span_id


def test_a_failing_derivation_is_a_span_with_the_error(spans):
    """The exception is recorded and raised."""

    class Owner(nn.Module):
        @cached("value", depends_on=lambda self: [1])
        def value(self):
            raise ArithmeticError("no value")

    owner = Owner().eval()
    with dora_cache.attach(owner), pytest.raises(ArithmeticError):
        owner.value()
    (span,) = spans.get_finished_spans()
    assert span.status.status_code is StatusCode.ERROR
    assert [event.name for event in span.events] == ["exception"]
    assert span.attributes["dora_cache.kind"] == "value"


def test_loads_are_spans(pool, folders, tmp_path, spans):
    """One for each load, with where it came from; a failed one has the error."""
    sizes = {one.name: one.nbytes for one in pool._names.values()}
    for name in ("lora", "lora", "dora", "rslora", "lora"):
        serve(pool, name)
    loads = [found for name, found in told(spans) if name == "load"]
    assert all(one.pop("seconds") > 0 for one in loads)
    assert loads == [
        {"adapter": "lora", "bytes": sizes["lora"], "source": "files"},
        {"adapter": "dora", "bytes": sizes["dora"], "source": "files"},
        {"adapter": "rslora", "bytes": sizes["rslora"], "source": "files"},
        {"adapter": "lora", "bytes": sizes["lora"], "source": "host"},
    ]
    path = folders.copied("dora", tmp_path / "spoilt")
    pool.add("spoilt", path)
    spoil(path)
    with pytest.raises(AdapterFileError):
        serve(pool, "spoilt")
    (span,) = [one for one in spans.get_finished_spans() if one.name == "dora_cache.load"]
    assert span.status.status_code is StatusCode.ERROR
    assert span.attributes["dora_cache.adapter"] == "spoilt"


class Raising(SpanProcessor):
    def on_start(self, span, parent_context=None):
        raise ArithmeticError("on_start")

    def on_end(self, span):
        raise ArithmeticError("on_end")


@pytest.mark.parametrize("stage", ["provider", "tracer", "start", "end"])
def test_a_failing_tracer_fails_no_inference(stage, model, x, pool, folders, monkeypatch):
    """Whatever OpenTelemetry raises, outputs are those without it."""
    provider = TracerProvider()
    processor = Raising()
    if stage == "end":
        processor.on_start = lambda span, parent_context=None: None
    provider.add_span_processor(processor)

    def get():
        if stage == "provider":
            raise ArithmeticError(stage)
        if stage == "tracer":
            return types.SimpleNamespace(get_tracer=lambda name: 1 / 0)
        return provider

    expected = run(twin(model), x)
    plain = serve(pool, "lora")
    monkeypatch.setattr(trace, "get_tracer_provider", get)
    with dora_cache.attach(model) as cache:
        assert torch.equal(run(model, x), expected)
        assert torch.equal(run(model, x), expected)
        assert (cache.stats().hits, cache.stats().misses) == (1, 1)
    pool.remove("lora")
    pool.add("lora", folders["lora"])
    assert torch.equal(serve(pool, "lora"), plain)


def test_a_span_that_is_not_sampled_costs_no_attributes(model, x, monkeypatch):
    """Layers' names are not looked for where nothing is recorded: no provider, or not sampled."""
    from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

    asked = []
    looking = Engine.layer_of
    monkeypatch.setattr(
        Engine,
        "layer_of",
        lambda *args: asked.append(args) or looking(*args),
    )
    for provider in (trace.ProxyTracerProvider(), TracerProvider(sampler=ALWAYS_OFF)):
        monkeypatch.setattr(trace, "get_tracer_provider", lambda provider=provider: provider)
        with dora_cache.attach(model):
            run(model, x)
    assert asked == []
    monkeypatch.setattr(trace, "get_tracer_provider", TracerProvider)
    with dora_cache.attach(model):
        run(model, x)
    assert len(asked) == 1


def python(code):
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, check=False, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/tests"},
    )  # fmt: skip


def test_nothing_is_imported_and_nothing_is_printed():
    """Where the application uses neither OpenTelemetry nor logging, the library does not either."""
    code = """
import sys
sys.modules["opentelemetry"] = sys.modules["prometheus_client"] = None
import dora_cache, torch, zoo, logging
model = zoo.dora_model()
with dora_cache.attach(model, backend="lru", max_bytes=8) as cache:
    zoo.run(model, zoo.sample("linear"))
    cache._engine.mutex.failed("the test", OSError("unlucky"))
assert "opentelemetry.trace" not in sys.modules
handlers = logging.getLogger("dora_cache").handlers
assert [type(one).__name__ for one in handlers] == ["NullHandler"]
try:
    import dora_cache.serving.metrics
except ImportError as error:
    print(error)
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    needs = 'dora_cache.serving.metrics needs prometheus_client: pip install "dora-cache[metrics]"'
    assert done.stdout == f"{needs}\n"
    assert "derived the" not in done.stderr


# Log records

FIELDS = ("adapter", "kind", "layer", "bytes", "seconds", "source", "reason")


def records(caplog):
    """Return the records' loggers, levels, texts and fields, and forget them."""
    found = [
        (
            one.name.removeprefix("dora_cache."),
            one.levelname,
            one.getMessage(),
            {name: vars(one)[name] for name in FIELDS if vars(one).get(name) is not None},
        )
        for one in caplog.records
        if one.name.startswith("dora_cache")
    ]
    caplog.clear()
    return found


def test_derivations_and_evictions_are_logged(model, x, caplog):
    """At DEBUG, with fields; a hit is not."""
    caplog.set_level(logging.DEBUG, "dora_cache")
    with dora_cache.attach(model, backend="lru", max_bytes=40) as cache:
        for name in ("a", "a", "b"):
            activate(model, name)
            run(model, x)
        found = records(caplog)
        assert sum(one[3].pop("seconds", 0) for one in found) == cache.stats().derive_seconds
        value = {"kind": "DoRA scale", "layer": "base_model.model.layer", "bytes": 32}
        where = "in base_model.model.layer"
        a, b = ({"adapter": name} | value for name in "ab")
        derived = [
            ("core.deriver", "DEBUG", f"derived the DoRA scale of adapter {name} {where}", fields)
            for name, fields in (("a", a), ("b", b))
        ]
        gone = ("core.holdings", "DEBUG", f"evicted the DoRA scale of adapter a {where}", a)
        assert sorted(found, key=str) == sorted([*derived, gone], key=str)
        cache.resize(8)
        (found,) = records(caplog)
        assert found == (
            "core.holdings",
            "DEBUG",
            f"evicted the DoRA scale of adapter b {where}",
            b,
        )


@pytest.mark.filterwarnings("ignore::dora_cache.CacheWarning")
def test_evictions_where_memory_runs_out_are_logged(caplog):
    """As those of the backend are; the shortage itself is at WARNING."""
    short, weight = [], torch.ones(1)

    class Owner(nn.Module):
        @cached("value", adapter="name", depends_on=lambda self, name: [weight])
        def value(self, name):
            if short:
                short.pop()
                raise torch.OutOfMemoryError
            return torch.ones(2)

    caplog.set_level(logging.DEBUG, "dora_cache")
    owner = Owner().eval()
    with dora_cache.attach(owner) as cache:
        owner.value("a")
        records(caplog)
        short.append(True)
        owner.value("b")
        assert cache.stats().evictions == 1
    found = [(name, level, fields.get("adapter")) for name, level, _, fields in records(caplog)]
    assert ("core.holdings", "DEBUG", "a") in found
    assert ("errors", "WARNING", None) in found


def test_loads_and_evictions_of_a_pool_are_logged(pool, caplog):
    """At INFO, with where it came from."""
    caplog.set_level(logging.INFO, "dora_cache")
    sizes = {one.name: one.nbytes for one in pool._names.values()}
    for name in ("lora", "lora", "dora", "rslora"):
        serve(pool, name)
    found = records(caplog)
    seconds = sum(one[3].pop("seconds", 0) for one in found)
    assert seconds == pytest.approx(pool.stats().load_seconds)
    loaded = [
        (
            "serving.tiers", "INFO", f"loaded adapter {name}",
            {"adapter": name, "bytes": sizes[name], "source": "files"},
        )
        for name in ("lora", "dora", "rslora")
    ]  # fmt: skip
    gone = [one for one in found if one not in loaded]
    assert [one for one in found if one in loaded] == loaded
    assert len(gone) == pool.stats().evictions > 0
    assert gone[0] == (
        "serving.tiers", "INFO", "evicted adapter lora", {"adapter": "lora", "bytes": sizes["lora"]}
    )  # fmt: skip
    pool.resize(device_bytes=0)
    left = [one[3]["adapter"] for one in records(caplog)]
    assert sorted(left + [one[3]["adapter"] for one in gone]) == ["dora", "lora", "rslora"]


@pytest.mark.filterwarnings("ignore::dora_cache.CacheWarning")
def test_failures_are_logged(model, x, pool, folders, tmp_path, caplog):
    """At WARNING, with the reason: a backend's, a load's, and a prefetch's."""
    with dora_cache.attach(model, backend="failing"):
        run(model, x)
        run(model, x)
    name, level, text, _ = records(caplog)[0]
    assert (name, level) == ("errors", "WARNING")
    assert "put failed" in text
    path = folders.copied("dora", tmp_path / "spoilt")
    pool.add("spoilt", path)
    spoil(path)
    with pytest.raises(AdapterFileError) as raised:
        serve(pool, "spoilt")
    ((name, level, text, fields),) = records(caplog)
    assert (name, level, text) == ("serving.tiers", "WARNING", "adapter spoilt was not loaded")
    assert fields["adapter"] == "spoilt"
    assert fields["reason"] == f"AdapterFileError: {raised.value}"
    pool.prefetch("spoilt").result()
    assert [(one[0], one[1]) for one in records(caplog)] == [
        ("serving.tiers", "WARNING"), ("errors", "WARNING")
    ]  # fmt: skip


class Watching(logging.Handler):
    """A handler that waits for another thread, which uses the cache and the pool."""

    def __init__(self, cache, pool):
        super().__init__()
        self.cache, self.pool = cache, pool
        self.seen = []

    def emit(self, record):
        asking = threading.Thread(target=lambda: (self.cache.stats(), self.pool.stats()))
        asking.start()
        asking.join(5)
        self.seen.append((record.getMessage(), asking.is_alive()))


def test_handlers_run_without_the_locks(model, x, pool, folders, tmp_path):
    """Whatever a handler does, it holds up no other thread; records of all kinds are seen."""
    path = folders.copied("dora", tmp_path / "spoilt")
    pool.add("spoilt", path)
    spoil(path)
    logger = logging.getLogger("dora_cache")
    with dora_cache.attach(model, backend="lru", max_bytes=40) as cache:
        handler = Watching(cache, pool)
        logger.addHandler(handler)
        level = logger.level
        logger.setLevel(logging.DEBUG)
        try:
            for name in ("a", "b"):
                activate(model, name)
                run(model, x)
            cache.resize(8)
            for name in ("lora", "dora", "rslora"):
                serve(pool, name)
            with pytest.raises(AdapterFileError):
                serve(pool, "spoilt")
            pool.resize(device_bytes=0)
        finally:
            logger.setLevel(level)
            logger.removeHandler(handler)
    assert [said for said, held_up in handler.seen if held_up] == []
    text = "\n".join(said for said, _ in handler.seen)
    for part in ("derived the", "evicted the", "loaded", "evicted adapter", "was not loaded"):
        assert part in text


def test_a_failing_filter_fails_no_inference(model, x, pool, caplog):
    """What handlers and filters raise is dropped."""
    caplog.set_level(logging.DEBUG, "dora_cache")
    loggers = [
        logging.getLogger(f"dora_cache.{name}")
        for name in ("core.deriver", "core.holdings", "serving.tiers")
    ]
    expected = run(twin(model), x)
    for one in loggers:
        one.addFilter(raising)
    try:
        with dora_cache.attach(model, backend="lru", max_bytes=40) as cache:
            assert torch.equal(run(model, x), expected)
            cache.resize(8)
            assert torch.equal(run(model, x), expected)
        for name in ("lora", "dora", "rslora"):
            serve(pool, name)
    finally:
        for one in loggers:
            one.removeFilter(raising)
    assert pool.stats().loads == 3


def raising(_):
    raise ArithmeticError("filter")


# The live view


def top(*arguments):
    return CliRunner().invoke(app, ["top", *map(str, arguments)])


def cells(result, first):
    """Return the words of the line of a table that begins with some."""
    lines = [line.split() for line in result.stdout.splitlines()]
    return next(words for words in lines if words[: len(first.split())] == first.split())


def test_one_frame_shows_what_the_server_counts(model, x, pool, registry, url):
    """Caps, bytes, adapters by tier, hit rates, evictions and reasons, as stats() has them."""
    with dora_cache.attach(model, backend="lru", max_bytes=40) as cache:
        metrics.register(cache, registry, {"model": "block", "cache": "1"})
        metrics.register(pool, registry, {"model": "net", "pool": "1"})
        for name in ("a", "a", "a", "b"):
            activate(model, name)
            run(model, x)
        with cache.bypass():
            run(model, x)
        for name in ("lora", "lora", "dora", "rslora"):
            serve(pool, name)
        for address in (url, f"{url}/", f"{url}/metrics", url.removeprefix("http://")):
            result = top(address, "--once")
            assert result.exit_code == 0, result.output
        now = pool.stats()
        frame = result.stdout
        assert cells(result, "net/1 device")[2] == str(now.on_device)
        assert cells(result, "host")[1] == str(now.on_host)
        assert cells(result, "files")[1] == str(now.on_disk)
        assert dora_cache.units.format_bytes(now.device_bytes) in frame
        assert dora_cache.units.format_bytes(now.max_device_bytes) in frame
        assert cells(result, f"net/1 {now.lookups}")[2:5] == ["25.0%", "-", str(now.loads)]
        assert cells(result, f"net/1 {now.lookups}")[-2:] == [str(now.evictions), "-"]
        line = cells(result, "block/1 1")
        assert line == ["block/1", "1", "32", "B", "40", "B", "80.0%", "4", "50.0%", "-", "1", "-"]
        assert cells(result, "bypass()") == [
            "bypass()",
            "past",
            "the",
            "cache",
            "block/1",
            "1",
            "-",
        ]


def test_rates_are_of_the_time_between_two_frames(pool, registry, url, monkeypatch):
    """Shares and rates are of what was gained since; a server that began anew has none."""
    metrics.register(pool, registry, {"model": "net", "pool": "1"})
    monkeypatch.setattr(top_module, "_fetch", lambda page, _: read_page(page))
    serve(pool, "lora")
    before = top_module._Scrape(f"{url}/metrics", 5.0)
    evictions = pool.stats().evictions
    for name in ("lora", "lora", "lora", "dora", "rslora"):
        serve(pool, name)
    latest = top_module._Scrape(f"{url}/metrics", 5.0)
    before.time, latest.time = 10.0, 14.0
    ((labels, _),) = latest.sources.items()
    source = top_module._Source(labels, latest, before)
    assert source.hit_rate("pool_") == ("50.0%", "60.0%")
    gained = pool.stats().evictions - evictions
    assert gained > 0
    assert source.rate("pool_evictions_total") == f"{gained / 4:.1f}"
    again = top_module._Source(labels, before, latest)
    assert again.rate("pool_lookups_total") == "-"
    assert again.hit_rate("pool_")[1] == "-"


def read_page(page):
    with urllib.request.urlopen(page, timeout=10) as response:
        return response.read().decode()


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")
def test_it_goes_on_until_interrupted(pool, registry, url):
    """On a terminal frame follows frame; without the server it says so; Control-C ends it well."""
    import pty

    metrics.register(pool, registry, {"model": "net", "pool": "1"})
    ours, theirs = pty.openpty()
    # A shell may have started the tests in its background, with Control-C ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "dora_cache", "top", url, "--interval", "0.2", "--timeout", "2"],
            stdin=theirs, stdout=theirs, stderr=theirs,
            env=os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "150"},
        )  # fmt: skip
    finally:
        signal.signal(signal.SIGINT, before)
    os.close(theirs)
    try:
        until(ours, "Lookups of adapters")
        serve(pool, "lora")
        until(ours, r"net/1\s+1\s+0.0%")
        pool.close()
        until(ours, "has no metrics of a cache or pool that is open")
        process.send_signal(signal.SIGINT)
        threading.Thread(target=drain, args=(ours,), daemon=True).start()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def drain(terminal):
    """Read a terminal until it is closed: who writes to a full one waits."""
    with contextlib.suppress(OSError):
        while os.read(terminal, 1 << 16):
            pass


def until(terminal, pattern, seconds=60):
    """Read a terminal until a text is there."""
    end = time.monotonic() + seconds
    seen = ""
    while time.monotonic() < end:
        seen += os.read(terminal, 1 << 16).decode(errors="replace")
        if re.search(pattern, re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen)):
            return
    pytest.fail(f"no {pattern!r} in {seen[-2000:]!r}")


class Pages(http.server.BaseHTTPRequestHandler):
    """Pages that are no metrics of dora-cache."""

    def do_GET(self):
        if self.path == "/missing":
            self.send_error(404)
            return
        self.send_response(200)
        self.end_headers()
        with contextlib.suppress(OSError):  # the client has had enough
            if self.path == "/endless":
                while True:
                    self.wfile.write(b"# HELP a b\n" * 10000)
            elif self.path == "/slow":
                while True:
                    self.wfile.write(b"#")
                    self.wfile.flush()
                    time.sleep(0.05)
            else:
                self.wfile.write({"/html": b"<html> {", "/other": b"up 1\n"}[self.path])

    def log_message(self, *_):
        pass


@pytest.fixture
def pages():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/missing", "answers 404 Not Found: give the address of the metrics"),
        ("/html", "is no page of Prometheus metrics"),
        ("/other", "has no metrics of a cache or pool that is open: export one with"),
        ("/endless", "has more than 16 MiB"),
        ("/slow", "(no answer in time): see that the server runs"),
    ],
)
def test_pages_that_are_no_metrics(pages, path, said):
    """Each is one line and exit code 2, within bounded time and memory."""
    assert_said(top(pages + path, "--once", "--timeout", 2), said)


def assert_said(result, said):
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert said in result.stderr


def test_a_server_that_cannot_be_reached():
    """A port that nobody listens on, a server that says nothing, and a name that is none."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        result = top(f"127.0.0.1:{port}", "--once", "--timeout", 0.3)
        assert_said(result, "(no answer in time): see that the server runs")
    assert_said(top(f"http://127.0.0.1:{port}", "--once"), f"cannot read http://127.0.0.1:{port}/")
    for wrong in ("ftp://a", "http://", "http://a:b", "http://a:99999", "file:///etc/hosts"):
        assert_said(top(wrong), "is no address of a server: give one such as http://127.0.0.1:8000")
    assert_said(top("http://a b/"), "cannot read http://a b/metrics")
    assert_said(top("http://127.0.0.1:1/\u00e9"), "cannot read")


# The dashboard and the page


def samples_of(name):
    kind = FAMILIES[name].kind
    endings = {"counter": ["_total"], "info": ["_info"], "histogram": ["_bucket", "_sum", "_count"]}
    return [name + ending for ending in endings.get(kind, [""])]


EXPORTED = {one for name in FAMILIES for one in samples_of(name)}


def test_the_dashboard_asks_for_what_is_exported():
    """Every name in a query or a variable is a sample's, and every metric is on the dashboard."""
    queries = [target["expr"] for panel in panels() for target in panel.get("targets", ())]
    queries += [one["definition"] for one in DASHBOARD["templating"]["list"] if "definition" in one]
    asked = {name for query in queries for name in re.findall(r"\bdora_cache_\w+", query)}
    assert asked - {"dora_cache_"} <= EXPORTED
    families = {name for name in FAMILIES if asked & set(samples_of(name))}
    assert families == set(FAMILIES)


def panels():
    return DASHBOARD["panels"]


def test_the_queries_use_labels_that_there_are(model, pool, registry):
    """Labels that queries select by or group by are those of the samples, or Prometheus' own."""
    with dora_cache.attach(model, backend="lru", max_bytes=99) as cache:
        registry.register(collector(pool, cache))
        found = list(text_string_to_metric_families(generate_latest(registry).decode()))
    labels = {}
    for family in found:
        for one in family.samples:
            labels.setdefault(one.name, {"instance", "job"}).update(one.labels)
    for panel in panels():
        for target in panel.get("targets", ()):
            expression = target["expr"]
            used = re.findall(r"(dora_cache_\w+)\{([^}]*)\}", expression)
            assert used, expression
            for name, selector in used:
                assert set(re.findall(r"(\w+)=", selector)) <= labels[name]
            for group in re.findall(r"by \(([^)]*)\)", expression):
                assert set(group.split(", ")) <= set.intersection(
                    *(labels[name] for name, _ in used)
                )
            shown = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            assert shown <= {
                one for g in re.findall(r"by \(([^)]*)\)", expression) for one in g.split(", ")
            }


def test_the_panels_are_well_formed():
    """As Grafana reads them: ids, places on a grid of 24 columns, targets, units, a data source."""
    assert DASHBOARD["schemaVersion"] >= 36
    assert "id" not in DASHBOARD  # else importing would overwrite another dashboard
    source, *variables = DASHBOARD["templating"]["list"]
    assert (source["type"], source["query"], source["name"]) == (
        "datasource", "prometheus", "datasource"
    )  # fmt: skip
    everywhere = {"type": "prometheus", "uid": "${datasource}"}
    assert all(one["type"] == "query" and one["datasource"] == everywhere for one in variables)
    numbers = [panel["id"] for panel in panels()]
    assert len(set(numbers)) == len(numbers)
    taken = set()
    for panel in panels():
        place = panel["gridPos"]
        assert 0 <= place["x"] < place["x"] + place["w"] <= 24
        cells = {
            (place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])
        }
        assert cells.isdisjoint(taken), panel["title"]
        taken |= cells
        assert panel["title"]
        if panel["type"] == "row":
            continue
        assert panel["type"] in {"stat", "timeseries"}
        assert panel["datasource"] == everywhere
        assert panel["fieldConfig"]["defaults"]["unit"] in {
            "bytes", "ops", "percentunit", "s", "short"
        }  # fmt: skip
        letters = [target["refId"] for target in panel["targets"]]
        assert letters
        assert len(set(letters)) == len(letters)
        for target in panel["targets"]:
            assert target["datasource"] == everywhere
            named = set(re.findall(r"\$(\w+)", target["expr"]))
            known = {one["name"] for one in variables} | {"__rate_interval", "__range"}
            assert named <= known
            assert target["expr"].count("(") == target["expr"].count(")")


def test_the_page_lists_every_metric():
    """Names, types and labels in docs/monitoring.md are those that are exported."""
    text = (DOCS / "monitoring.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(dora_cache_\w+)` \| (\w+) \|", text, re.MULTILINE)
    expected = {
        (samples_of(name)[0] if one.kind != "histogram" else name, one.kind)
        for name, one in FAMILIES.items()
    }
    assert len(rows) == len(expected)
    assert set(rows) == {(name, "gauge" if kind == "info" else kind) for name, kind in expected}
    queries = [block.text for block in blocks(DOCS / "monitoring.md") if block.language == "text"]
    asked = {name for query in queries for name in re.findall(r"\bdora_cache_\w+", query)}
    assert asked
    assert asked <= EXPORTED


def test_the_code_of_the_page_runs(monkeypatch, tmp_path):
    """With the extra, the Python code of docs/monitoring.md runs as it is written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)  # it is for good
    monkeypatch.setattr(logging.getLogger("dora_cache.serving"), "level", logging.NOTSET)
    namespace = {"__name__": "page"}
    try:
        for block in blocks(DOCS / "monitoring.md"):
            if block.language == "python":
                code = block.text.replace("9400", "0")  # any port that is free
                exec(compile(code, "monitoring.md", "exec"), namespace)
        port = namespace["server"].server_port
        found = scrape(f"http://127.0.0.1:{port}", model="two-layers")
        assert_agrees_with_cache(found, namespace["cache"])
    finally:
        if "server" in namespace:
            namespace["server"].shutdown()
            namespace["server"].server_close()
        if "cache" in namespace:
            namespace["cache"].detach()
