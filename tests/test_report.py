"""cache.report(): what is held and what it has saved."""

import gc
import itertools
import sys
import types
import warnings

import pytest
import torch
from peft import LoHaConfig
from test_capped import SIZE, Owner
from zoo import activate, dora_model, run, sample

import dora_cache
from dora_cache.core import cells
from dora_cache.lab.field.of_transformers import llama
from dora_cache.reasons import Declined, Reason
from dora_cache.recipes import RECIPES, load_recipes
from dora_cache.recipes.examples import make_model


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
    from dora_cache.core import deriver

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
    from dora_cache.core import deriver

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


@pytest.mark.filterwarnings("ignore::dora_cache.CacheWarning")
def test_what_is_declined_is_shown_with_the_layers_in_a_line():
    """Layers of one kind, adapter and reason share a line, however many there are."""
    with dora_cache.attach(Owner()) as cache:
        for index in range(32):
            where = f"base_model.model.h.{index}.q"
            cache._engine.decline("OFT", where, "so", adapter="a")
        report = cache.report()
    assert str(report).splitlines()[-2:] == ["Not cached:", "  OFT 'a', h.{0..31}.q: so"]
    assert len(report.declined) == 32


def loha():
    model = llama(16)
    model.add_adapter(LoHaConfig(r=2, target_modules=["q_proj", "v_proj"]), "a")
    return model.eval()


def forward_of(model):
    ids = torch.arange(5)[None]
    return lambda: model(ids)


def test_a_reason_has_the_layers_that_it_applies_to():
    """Each layer has its count, by its name in the model, and the text has them in a line."""
    model = loha()
    model.requires_grad_(False)
    forward = forward_of(model)
    with dora_cache.attach(model) as cache:
        forward()
        assert cache.report().reasons == ()
        model.model.layers[1].requires_grad_(True)
        forward()
        forward()
        with cache.bypass():
            forward()
        first, second = cache.report().reasons
        text = str(cache.report())
        assert (first.reason, first.count) == (Reason.GRADIENTS, 4)
        assert first.layers == {f"model.layers.1.self_attn.{part}_proj": 2 for part in ("q", "v")}
        assert f"    in {first.where}\n" in text
        assert (second.reason, second.count, set(second.layers.values())) == (Reason.BYPASS, 4, {1})
        assert second.where == "model.layers.{0,1}.self_attn.{q,v}_proj"
        assert all(model.get_submodule(name) for name in second.layers)


@pytest.mark.parametrize(
    "example",
    [recipe.examples[0] for recipe in load_recipes() if recipe.name in RECIPES and recipe.examples],
    ids=lambda example: example.name,
)
@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
def test_of_two_reasons_every_kind_gives_the_same(example):
    """A training forward within ``bypass()``."""
    model, x = make_model(example, layers=1)
    with dora_cache.attach(model) as cache, cache.bypass():
        model.train()
        model(x)
        assert {row.reason for row in cache.report().reasons} == {Reason.BYPASS}


def test_values_that_find_no_room_have_their_layers_too():
    """So have those that the backend did not keep."""
    model = loha()
    with dora_cache.attach(model, backend="lru", max_bytes=8) as cache, torch.no_grad():
        forward_of(model)()
        (row,) = cache.report().reasons
    assert row.reason is Reason.CAP
    assert row.where == "model.layers.{0,1}.self_attn.{q,v}_proj"
    assert set(row.layers.values()) == {1}


def test_a_layer_that_is_gone_leaves_its_count():
    """What it was called is known no more, nor is anything else kept of it."""
    model = torch.nn.ModuleDict({"kept": Part(), "gone": Part()})
    with dora_cache.attach(model) as cache, cache.bypass():
        model["kept"].value()
        model["gone"].value()
        (row,) = cache.report().reasons
        assert (row.count, row.layers) == (2, {"kept": 1, "gone": 1})
        del model["gone"]
        gc.collect()
        (row,) = cache.report().reasons
        assert (row.count, row.layers) == (2, {"kept": 1})


def test_parts_of_a_pipeline_are_named():
    """Names begin with the component's."""
    pipeline = types.SimpleNamespace(components={"unet": torch.nn.Sequential(Part())})
    with dora_cache.attach(pipeline) as cache, cache.bypass():
        pipeline.components["unet"][0].value()
        (row,) = cache.report().reasons
    assert row.layers == {"unet.0": 1}


class Part(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3), requires_grad=False)
        self.eval()

    @dora_cache.cached("value")
    def value(self):
        return 2 * self.weight


def warnings_of(action, times):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(times):
            action()
    return [str(one.message) for one in caught]


@torch.no_grad()
def test_a_cache_without_a_hit_says_why_once():
    """After many calls it names the most frequent reason, and what to do."""
    model = torch.nn.Sequential(Part(), Part())
    model[0].train()
    with dora_cache.attach(model) as cache:
        assert warnings_of(model[0].value, 10) == []
        (text,) = warnings_of(model[0].value, 1000)
        with cache.bypass():
            assert warnings_of(model[1].value, 1000) == []
    assert Reason.TRAINING.value in text
    assert Reason.TRAINING.advice in text


def test_a_layer_that_passes_by_by_itself_says_so_too():
    """The warning does not wait for a call that asks the cache."""
    model = loha()
    with dora_cache.attach(model):
        (text,) = warnings_of(forward_of(model), 100)
    assert Reason.GRADIENTS.advice in text


@torch.no_grad()
def test_a_cache_with_hits_says_nothing():
    """A single hit is enough, however many calls go past."""
    model = torch.nn.Sequential(Part(), Part())
    with dora_cache.attach(model):
        model[0].value()
        model[0].value()
        model[1].train()
        assert warnings_of(model[1].value, 1000) == []


def test_what_callers_ask_for_is_no_reason_to_warn():
    """Neither a block of ``bypass()`` nor training with gradients is a mistake."""
    part = Part()
    with dora_cache.attach(part) as cache:
        with cache.bypass():
            assert warnings_of(part.value, 1000) == []
        part.train()
        assert warnings_of(part.value, 1000) == []
        with torch.no_grad():
            assert len(warnings_of(part.value, 1000)) == 1


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
