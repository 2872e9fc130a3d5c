"""cache.report(): what is held and what it has saved."""

import itertools
import sys
import warnings

import pytest
import torch
from test_capped import SIZE, Owner
from zoo import activate, dora_model, run, sample

import dora_cache
from dora_cache import cells
from dora_cache.report import Declined


def rows(report):
    return {(row.kind, row.adapter): row for row in report.rows}


def test_rows_are_by_kind_and_adapter():
    """Entries, bytes, hits and misses of each add up to the cache's own counters."""
    model = dora_model(adapters=("first", "second"))
    x = sample("linear")
    with dora_cache.attach(model, backend="lru", max_bytes=1000) as cache:
        for adapter, times in (("first", 5), ("second", 2)):
            activate(model, adapter)
            for _ in range(times):
                run(model, x)
        cache.pin("second")
        report = cache.report()
    found = rows(report)
    assert [(row.hits, row.misses, row.entries, row.nbytes, row.pinned) for row in report.rows] == [
        (4, 1, 1, 32, False),
        (1, 1, 1, 32, True),
    ]
    assert {adapter for _, adapter in found} == {"first", "second"}
    assert report.working_set == report.stats.nbytes == 64
    assert report.hit_rate == 5 / 7
    assert report.pins == ("second",)
    assert report.caps == (("cpu", 64, 1000),)
    assert report.stats.hits == sum(row.hits for row in report.rows)


def test_time_saved_is_hits_times_the_cost_of_deriving(monkeypatch):
    """Each hit saves what a derivation of the same key has taken on average."""
    from dora_cache import deriver

    ticks = itertools.count()
    monkeypatch.setattr(deriver.time, "perf_counter", lambda: float(next(ticks)))
    owner = Owner()
    with dora_cache.attach(owner) as cache:
        for name, times in (("a", 5), ("b", 2)):
            for _ in range(times):
                owner.value(name)
        report = cache.report()
    assert [(row.saved, row.derive) for row in report.rows] == [(4.0, 1.0), (1.0, 1.0)]
    assert report.saved == 5.0
    assert [(one.nbytes, one.cost, one.uses) for one in report.seen] == [(16, 1.0, 5), (16, 1.0, 2)]


def test_the_working_set_is_what_has_been_seen_and_holds():
    """Evicted values count, those that an event has voided do not."""
    owner = Owner()
    with dora_cache.attach(owner, backend="lru", max_bytes=SIZE) as cache:
        for name in "abc":
            owner.value(name)
        assert cache.report().working_set == 3 * SIZE
        owner.value("c")
        cache.invalidate(adapter="c")
        assert cache.report().working_set == 2 * SIZE
        cache.invalidate(adapter="a")  # which has been evicted
        report = cache.report()
        assert report.working_set == SIZE
        assert report.stats.nbytes == 0
        assert [row.entries for row in report.rows] == [0, 0, 0]


def test_the_curve_keeps_what_saves_most_per_byte(monkeypatch):
    """At every cap listed, no other fixed set of the values seen would have saved more."""
    from dora_cache import deriver

    ticks = itertools.count()
    monkeypatch.setattr(deriver.time, "perf_counter", lambda: float(next(ticks)))
    owner = Owner("abcd")
    with dora_cache.attach(owner) as cache:
        for name, times in (("a", 2), ("b", 9), ("c", 1), ("d", 4)):
            for _ in range(times):
                owner.value(name)
        report = cache.report()
    curve = report.curve()
    assert [point.max_bytes for point in curve] == [0, 16, 32, 48, 64]
    worth = [(max(0, one.uses - 1) * one.cost, one.nbytes) for one in report.seen]
    for point in curve:
        best = max(
            sum(saved for saved, _ in chosen)
            for count in range(5)
            for chosen in itertools.combinations(worth, count)
            if sum(nbytes for _, nbytes in chosen) <= point.max_bytes
        )
        assert point.saved == best
        assert point.share == best / report.saved
    assert curve[-1].saved == report.saved == 12.0


def test_the_report_shows_itself():
    """As text it shows every row, the cap, the pins and what is declined."""
    owner = Owner()
    with dora_cache.attach(owner, backend="lru", max_bytes="1KiB") as cache:
        for _ in range(3):
            owner.value("a")
            owner.value("b")
        cache.pin("b")
        with pytest.warns(dora_cache.CacheWarning):
            cache._engine.decline(
                "OFT", "model.layer.3", "constrained OFT writes its weight", adapter="b"
            )
        report = cache.report()
    text = str(report)
    for words in ("b (pinned)", "66.7%", "32 B held under a cap of 1 KiB", "Pinned: b"):
        assert words in text
    assert "OFT 'b', model.layer.3: constrained OFT writes its weight" in text


def test_long_names_leave_the_table_readable():
    """Each line of the table is as wide as the others, and a long name is cut."""
    name = "a" * 500
    owner = Owner(("b", name))
    with dora_cache.attach(owner) as cache:
        owner.value("b")
        owner.value(name)
        report = cache.report()
    head, rule, *shown = str(report).splitlines()[:4]
    assert {len(line) for line in (rule, *shown)} == {len(head)}
    assert len(head) < 150
    assert f"{name[:20]}" in shown[1]
    assert "…" in shown[1]
    assert report.rows[1].adapter == name


def test_an_empty_report():
    """Before the first lookup there is nothing to show, and that is shown."""
    with dora_cache.attach(Owner()) as cache:
        report = cache.report()
    assert report.rows == ()
    assert report.curve() == ((0, 0.0, 0.0),)
    assert "0.0% hits" in str(report)
    assert "no cap" in str(report)


def test_what_is_declined_is_listed_once_and_told_once_per_reason():
    """Layers are listed one by one; the warning is one for each kind and reason."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with dora_cache.attach(Owner()) as cache:
            for _ in range(2):
                for where in ("layer.0", "layer.1"):
                    cache._engine.decline("OFT", where, "no reason")
            cache._engine.decline("OFT", "layer.0", "another reason")
            cache._engine.decline("LoHa", "layer.0", "no reason", adapter="a")
            declined = cache.declined
    assert declined == [
        Declined("OFT", None, "layer.0", "no reason"),
        Declined("OFT", None, "layer.1", "no reason"),
        Declined("OFT", None, "layer.0", "another reason"),
        Declined("LoHa", "a", "layer.0", "no reason"),
    ]
    assert [str(one.message) for one in caught] == [
        "OFT is not cached in layer.0: no reason",
        "OFT is not cached in layer.0: another reason",
        "LoHa is not cached in layer.0: no reason",
    ]
    declined.clear()
    assert len(cache.declined) == 4


def test_declining_from_many_threads():
    """Every one is listed once, whichever thread says so."""
    from concurrent.futures import ThreadPoolExecutor

    with dora_cache.attach(Owner()) as cache, ThreadPoolExecutor(8) as pool:
        with pytest.warns(dora_cache.CacheWarning):
            list(
                pool.map(
                    lambda i: cache._engine.decline("OFT", f"layer.{i % 20}", "so"), range(400)
                )
            )
        assert sorted(one.where for one in cache.declined) == sorted(
            f"layer.{i}" for i in range(20)
        )


def test_plot(tmp_path):
    """The curve is drawn in the format that the suffix names."""
    owner = Owner()
    with dora_cache.attach(owner, backend="lru", max_bytes=100) as cache:
        for _ in range(2):
            owner.value("a")
        report = cache.report()
    report.plot(tmp_path / "curve.png")
    report.plot(str(tmp_path / "curve.svg"))
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "curve.svg").read_text()


def test_plot_without_matplotlib(monkeypatch, tmp_path):
    """The error says what to install."""
    with dora_cache.attach(Owner()) as cache:
        report = cache.report()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'needs matplotlib: pip install "dora-cache\[cli\]"'):
        report.plot(tmp_path / "curve.png")


def test_sums_outlive_the_keys(monkeypatch):
    """Of keys held no more only so many are remembered, and no count is lost with them."""
    monkeypatch.setattr(cells, "_REMEMBERED", 8)
    owner = Owner()
    with dora_cache.attach(owner, backend="lru", max_bytes=2 * SIZE) as cache:
        for place in range(500):
            for _ in range(3):
                owner.value("a", place)
        assert len(cache._engine.cells) < 200
        (row,) = cache.report().rows
        assert (row.hits, row.misses, row.entries) == (1000, 500, 2)
        stats = cache.stats()
        assert (stats.hits, stats.misses) == (1000, 500)
        assert cache._engine.derivation_counts(type(owner).value.__dora_cache_derivation__) == (
            1000,
            500,
            2,
        )


def test_hits_by_the_short_way_are_counted_by_key():
    """Hits that take no lock count for the key that they hit, in any backend."""
    owner = Owner()
    for settings in ({}, {"backend": "lru", "max_bytes": 1000}):
        with dora_cache.attach(owner, **settings) as cache, torch.no_grad():
            for _ in range(10):
                owner.value("a")
                owner.value("b")
                owner.value("b")
            assert [(row.hits, row.misses) for row in cache.report().rows] == [(9, 1), (19, 1)]
