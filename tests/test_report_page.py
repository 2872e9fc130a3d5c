"""report().to_html(): one HTML file that says what the report says, whatever names there are."""

import dataclasses
import itertools
import re
import types
from html.parser import HTMLParser

import pytest
import torch
from pool_oracle import NET_KINDS, Folders, net, output, tokens
from test_capped import SIZE, Owner
from zoo import activate, dora_model, run, sample

import dora_cache
from dora_cache import AdapterPool, CacheStats, PoolStats
from dora_cache.core import history
from dora_cache.core.history import History, Sample
from dora_cache.reasons import Declined, Reason
from dora_cache.report import CacheReport, LayerRow, ReasonRow, ReportRow, Seen
from dora_cache.serving import kernels
from dora_cache.serving.report import AdapterRow, PoolReport, kernel_reasons
from dora_cache.units import format_bytes

VOID = {"meta", "br", "hr", "img", "input", "link"}
HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "$body ${title} %s {0}",
    "&lt;b&gt; &amp; ]]> -->",
    "</title></style></head>",
    "right\u202eto left\x00\ud800\n",
    "a" * 5000,
    "",
)


class Page(HTMLParser):
    """A page taken apart; elements that do not match are errors."""

    def __init__(self, html):
        super().__init__()
        self.html = html
        self.open, self.tags, self.ids = [], [], []
        self.tables, self.figures = {}, {}
        self._cell = self._row = self._table = None
        self.texts = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        assert len(found) == len(attributes), tag
        self.tags.append((tag, found))
        if tag in VOID:
            return
        self.open.append(tag)
        if tag == "table":
            self._table = []
        elif tag == "tr":
            self._row = []
        elif tag in {"td", "th", "caption", "dt", "dd"}:
            self._cell = [None, ""]
        elif tag == "data" and self._cell is not None:
            self._cell[0] = self._cell[0] or found["value"]

    def handle_startendtag(self, tag, attributes):
        raise AssertionError(f"<{tag}/> is not HTML")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag in {"td", "th"}:
            self._row.append(self._cell[0] or self._cell[1])
        elif tag == "caption":
            self.tables[self._cell[1]] = self._table
        elif tag == "tr":
            self._table.append(self._row)
        elif tag == "dt":
            self._label = self._cell[1]
        elif tag == "dd":
            self.figures.setdefault(self._label, self._cell[0] or self._cell[1])
        if tag in {"td", "th", "caption", "dt", "dd"}:
            self._cell = None

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(data)
        if self._cell is not None:
            self._cell[1] += data

    @property
    def text(self):
        return " ".join("".join(self.texts).split())

    def table(self, caption):
        """Return a table's rows as dictionaries."""
        head, *rows = self.tables[caption]
        return [dict(zip(head, row, strict=True)) for row in rows]


def page_of(report, folder):
    path = folder / "report.html"
    report.to_html(path)
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    assert_self_contained(page)
    return page


def assert_self_contained(page):
    """Nothing is loaded and nothing runs; headings, language, and what is drawn has a label."""
    kinds = {tag for tag, _ in page.tags}
    assert not kinds & {"script", "link", "img", "iframe", "object", "embed", "form", "base"}
    for tag, attributes in page.tags:
        assert not {"src", "href", "srcset", "action", "data"} & set(attributes), tag
        assert not [name for name in attributes if name.startswith("on")]
        if tag in {"svg", "html"} or attributes.get("role") in {"img", "region"}:
            assert attributes.get("aria-label") or attributes.get("lang") == "en"
    style = re.search(r"<style>(.*?)</style>", page.html, re.DOTALL)[1]
    assert "url(" not in style
    assert "@import" not in style
    assert "//" not in page.html
    assert [tag for tag, _ in page.tags].count("h1") == 1
    assert [tag for tag, _ in page.tags].count("style") == 1
    assert page.html.startswith("<!DOCTYPE html>")


@pytest.fixture
def cache():
    """A cache under a cap that has had hits, evictions, a pin, and calls past it."""
    owner = Owner("abc")
    with dora_cache.attach(owner, backend="lru", max_bytes=2 * SIZE) as found:
        for name, times in (("a", 5), ("b", 2), ("c", 3), ("a", 1)):
            for _ in range(times):
                owner.value(name)
        found.pin("a")
        with found.bypass():
            owner.value("a")
        yield found


def test_the_page_says_what_the_report_says(cache, tmp_path):
    """Every counter, every row and every reason is there, to the byte."""
    report = cache.report()
    stats, page = report.stats, page_of(report, tmp_path)
    counters = {row["counter"]: row["value"] for row in page.table("All counters, as in stats()")}
    expected = {one.name: getattr(stats, one.name) for one in dataclasses.fields(stats)}
    del expected["reasons"]
    assert counters == {name: str(value) for name, value in expected.items()}
    assert stats == cache.stats()
    assert stats.evictions > 0
    assert page.figures["Hits per lookup"] == f"{stats.hit_rate:.1%}"
    assert page.figures["Held"] == str(stats.nbytes)
    assert page.figures["Evictions"] == str(stats.evictions)
    assert page.figures["Past the cache"] == str(stats.bypasses) == "1"
    assert page.figures["Time saved"] == repr(report.saved)
    each = {row["adapter"]: row for row in page.table("By kind and adapter")}
    for row in report.rows:
        name = f"{row.adapter} (pinned)" if row.pinned else row.adapter
        found = each[name]
        assert (found["kind"], found["entries"], found["bytes"]) == (
            row.kind,
            str(row.entries),
            str(row.nbytes),
        )
        assert (found["hits"], found["misses"]) == (str(row.hits), str(row.misses))
        assert (found["saved"], found["deriving"]) == (repr(row.saved), repr(row.derive))
    (why,) = page.table("Why calls went past the cache, or values were not kept")
    assert (why["reason"], why["what to do"], why["times"]) == (
        f"{Reason.BYPASS.value} in Owner",
        Reason.BYPASS.advice,
        "1",
    )
    assert f"max_bytes={report.working_set} they would all be kept" in page.text
    assert "100.0% of the cap" in page.text
    assert "Pinned: a." in page.text
    spans = page.table("Lookups, evictions and bytes over time")
    assert sum(int(row["lookups"]) for row in spans) == stats.lookups
    assert sum(int(row["evictions"]) for row in spans) == stats.evictions
    assert spans[-1]["held, at the end"] == str(stats.nbytes)


def test_layers_are_summed_by_their_kind(tmp_path):
    """Layers whose names differ in numbers alone are one row, and each is listed beside that."""
    model = dora_model(adapters=("first", "second"))
    x = sample("linear")
    stack = torch.nn.ModuleList([model, dora_model(adapters=("first",))]).eval()
    with dora_cache.attach(stack) as cache:
        for part in stack:
            activate(part, "first")
            run(part, x)
        activate(model, "second")
        run(model, x)
        report = cache.report()
        page = page_of(report, tmp_path)
    assert {row.layer: (row.entries, row.nbytes) for row in report.layers} == {
        "0.base_model.model.layer": (2, 64),
        "1.base_model.model.layer": (1, 32),
    }
    (row,) = page.table("Bytes by kind of layer")
    assert row == {
        "layer": "{0,1}.base_model.model.layer", "layers": "2", "bytes": "96", "share": "100.0%"
    }  # fmt: skip
    singles = page.table("The 2 largest of 2 layers")
    assert [int(row["bytes"]) for row in singles] == [64, 32]
    assert sum(row.nbytes for row in report.layers) == cache_bytes(report)


def cache_bytes(report):
    return sum(row.nbytes for row in report.rows)


def test_an_empty_cache(tmp_path):
    """Before the first lookup the page says so, and that there is no cap."""
    with dora_cache.attach(Owner()) as cache:
        page = page_of(cache.report(), tmp_path)
    for words in (
        "no cap", "No value has been asked for", "No value is held", "no lookup so far",
        "Every call was answered",
    ):  # fmt: skip
        assert words in page.text
    assert "Other caps" not in page.text
    assert "svg" not in {tag for tag, _ in page.tags}


def test_after_detach(cache, tmp_path):
    """The counters are still there; nothing is held."""
    hits = cache.stats().hits
    cache.detach()
    page = page_of(cache.report(), tmp_path)
    assert page.figures["Held"] == "0"
    counters = {row["counter"]: row["value"] for row in page.table("All counters, as in stats()")}
    assert counters["hits"] == str(hits)


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_names_are_text(name, tmp_path):
    """Names of adapters, layers and devices are shown, and are never part of the page's code."""
    plain = Page(page_of(fake(), tmp_path).html)
    page = page_of(fake(name), tmp_path)
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in plain.tags]
    shown = re.sub(r"\s+", " ", name[:90].partition("\u202e")[0]).strip()
    assert shown in page.text
    assert not re.search("[\x00-\x09\x0b-\x1f\u202a-\u202e\ud800-\udfff]", page.html)
    assert len(page.html) < len(plain.html) + 5000


def fake(name="x", adapters=1, layers=1, count=1):
    """Return a report of so many adapters and layers, all of one name or numbered."""

    def named(number):
        return name if number == 0 else f"{name}-{number}"

    rows = [
        ReportRow(named(0), named(number), False, 1, 16, 3, 1, 0.5, 0.1)
        for number in range(adapters)
    ]
    places = [f"model.layers.{number}.{name}" for number in range(layers)]
    stats = CacheStats(hits=3 * count, misses=count, entries=count, nbytes=16 * count)
    return CacheReport(
        backend=name,
        rows=tuple(rows),
        layers=tuple(LayerRow(place, 1, 16) for place in places),
        stats=stats,
        working_set=16,
        buffers=0,
        caps=((name, 16, None), (name, 16, 32)),
        pins=(name,),
        declined=tuple(Declined(name, name, place, name) for place in places),
        reasons=(ReasonRow(Reason.CAP, 1, dict.fromkeys(places, 1)),),
        uncounted=1,
        history=tuple(Sample(float(n), 3 * n, n, n, 16 * n) for n in range(241)),
        seen=tuple(Seen(16, 0.1, 4) for _ in range(layers * adapters)),
    )


def test_large_models_give_a_small_page(tmp_path):
    """224 layers, 50 adapters with long names: the largest are listed, the others summed up."""
    report = fake("n" * 300, adapters=50, layers=224, count=50 * 224)
    page = page_of(report, tmp_path)
    assert len(page.html.encode()) < 200_000
    *largest, rest = page.table("Bytes by adapter")
    assert len(largest) == 12
    assert (rest["adapter"], rest["bytes"], rest["hits"]) == ("38 more adapters", "608", "114")
    assert sum(int(row["bytes"]) for row in (*largest, rest)) == cache_bytes(report)
    (row,) = page.table("Bytes by kind of layer")
    assert (row["layers"], row["bytes"]) == ("224", str(224 * 16))


def test_many_kinds_of_layers_are_summed_up(tmp_path):
    """Names without anything in common are no reason for a long page either."""
    report = fake()
    layers = tuple(LayerRow(f"part{number}.{number}", 1, number) for number in range(3000))
    page = page_of(dataclasses.replace(report, layers=layers), tmp_path)
    *shown, rest = page.table("Bytes by kind of layer")
    assert [row["bytes"] for row in shown] == [str(2999 - place) for place in range(12)]
    assert rest["layer"] == "2988 more kinds of layers"
    assert sum(int(row["bytes"]) for row in (*shown, rest)) == sum(range(3000))
    assert len(page.html) < 200_000


def test_a_folder_that_is_not_there(cache, tmp_path):
    """The error says so, and nothing is written."""
    with pytest.raises(FileNotFoundError, match="missing does not exist: make it first"):
        cache.report().to_html(tmp_path / "missing" / "report.html")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(IsADirectoryError):
        cache.report().to_html(tmp_path)


def test_another_page_is_replaced(cache, tmp_path):
    """The path may be a string."""
    path = tmp_path / "report.html"
    path.write_text("x" * 10**6)
    cache.report().to_html(str(path))
    Page(path.read_text(encoding="utf-8"))


# Colours


def luminance(colour):
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    ]
    return sum(w * part for w, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, two):
    low, high = sorted((luminance(one), luminance(two)))
    return (high + 0.05) / (low + 0.05)


def test_colours_can_be_told_apart(cache, tmp_path):
    """In the light and in the dark, text has a contrast of 4.5, and what is drawn one of 3."""
    html = page_of(cache.report(), tmp_path).html
    light, dark = (
        dict(re.findall(r"--(\w+): (#\w{6})", block))
        for block in re.findall(r":root \{(.*?)\}", html, re.DOTALL)
    )
    assert set(light) == set(dark)
    for colours in (light, dark):
        for behind in ("page", "card"):
            for text in ("text", "muted", "accent"):
                assert contrast(colours[text], colours[behind]) >= 4.5, (text, behind)
        for drawn in ("accent", "second"):
            for behind in ("page", "fill"):
                assert contrast(colours[drawn], colours[behind]) >= 3, (drawn, behind)


# Samples


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(history.time, "monotonic", lambda: now[0])
    return now


def test_a_history_covers_all_the_time(clock):
    """However long it takes, samples are few, in order, and the first and the last are kept."""
    found = History()
    for number in range(1, 50_000):
        clock[0] += 0.3
        found.add(number, 2 * number, 0, number)
        samples = found.samples()
        assert len(samples) <= 241
        assert samples[0] == (0.0, 0, 0, 0, 0)
        assert samples[-1][1:] == (number, 2 * number, 0, number)
    steps = [two.seconds - one.seconds for one, two in itertools.pairwise(samples)]
    assert min(steps[:-1]) > 0
    assert max(steps) < 4 * samples[-1].seconds / len(samples)


def test_samples_that_are_near_each_other(clock):
    """Of many in a moment, the latest counts."""
    found = History()
    clock[0] += 1
    for number in range(100):
        clock[0] += 0.0001
        found.add(number, 0, 0, 0)
    assert [one.hits for one in found.samples()] == [0, 0, 99]


def test_samples_that_take_long_are_rare(clock):
    """Those that nobody asks for take a hundredth of the time at most."""
    found = History()
    assert found.is_due
    found.add(0, 1, 0, 0, cost=2.0)
    clock[0] += 199
    assert not found.is_due
    clock[0] += 2
    assert found.is_due


def test_samples_are_taken_at_misses_and_when_asked(clock):
    """A hit takes none."""
    owner = Owner("abc")
    with dora_cache.attach(owner, backend="lru", max_bytes=2 * SIZE) as cache, torch.no_grad():
        kept = cache._engine.holdings.history
        clock[0] += 10
        owner.value("a")
        clock[0] += 10
        before = kept.samples()
        for _ in range(100):
            owner.value("a")
        assert kept.samples() == before
        owner.value("b")
        clock[0] += 10
        cache.stats()
        assert cache.report().history == (
            (0.0, 0, 0, 0, 0),
            (10.0, 0, 1, 0, SIZE),
            (20.0, 100, 2, 0, 2 * SIZE),
            (30.0, 100, 2, 0, 2 * SIZE),
        )


# Pools


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return Folders(net(), NET_KINDS, tmp_path_factory.mktemp("adapters"))


@pytest.fixture
def pool(folders):
    """A pool that holds two of its adapters on the device."""
    names = list(NET_KINDS)[:4]
    model = net()
    with AdapterPool(model) as found, torch.no_grad():
        for name in names:
            found.add(name, folders.get(name, 0))
        sizes = sorted(row.nbytes for row in found.report().adapters)
        found.resize(device_bytes=sum(sizes[-2:]))
        for name in (*names, names[-1], None):
            with found.use([name, None]):
                output(model, tokens(2))
        yield found


def test_the_pools_page_says_what_its_report_says(pool, tmp_path):
    """Every counter and every adapter is there, to the byte."""
    pool.pin(pool.names[-1])
    report = pool.report()
    page, stats = page_of(report, tmp_path), report.stats
    assert stats == pool.stats()
    assert stats.evictions > 0
    counters = {row["counter"]: row["value"] for row in page.table("All counters, as in stats()")}
    expected = {one.name: getattr(stats, one.name) for one in dataclasses.fields(stats)}
    del expected["reasons"]
    times = expected.pop("load_times")
    assert counters == {
        name: "no cap" if value is None else str(value) for name, value in expected.items()
    }
    loads = page.table("Loads by the time that they took")
    assert [int(row["loads"]) for row in loads] == list(times)
    assert (loads[0]["time"], loads[-1]["time"]) == ("up to 1 ms", "more")
    each = {row["adapter"]: row for row in page.table("Each adapter")}
    assert list(report.pins) == [pool.names[-1]]
    for row in report.adapters:
        found = each[row.name]
        assert (found["where"], found["hits"], found["misses"]) == (
            row.where,
            str(row.hits),
            str(row.misses),
        )
        assert found["bytes when on the device"] == str(row.nbytes)
    assert page.figures["On the device"] == str(stats.device_bytes)
    assert "The model is on cpu" in page.text
    assert f"device_bytes={sum(row.nbytes for row in report.adapters)}" in page.text
    spans = page.table("Lookups, evictions and bytes over time")
    assert sum(int(row["lookups"]) for row in spans) == stats.lookups


def test_rows_of_a_pool_add_up(pool):
    """Of adapters that are still there: their lookups, places and bytes are the pool's."""
    report, stats = pool.report(), pool.stats()
    assert sum(row.hits for row in report.adapters) == stats.hits == 1
    assert sum(row.misses for row in report.adapters) == stats.misses
    there = [row for row in report.adapters if row.where == "device"]
    assert len(there) == stats.on_device
    assert sum(row.nbytes for row in there) == stats.device_bytes
    taken = sum(row.nbytes for row in report.layers)
    assert 0 < taken < stats.device_bytes  # beside tables and gaps
    assert max(row.entries for row in report.layers) <= stats.on_device
    assert sum(report.kinds.values()) == len(report.layers)


def test_bytes_of_a_pools_layers_are_those_of_the_tensors(folders):
    """Factors, scales and shifts of each layer."""
    name = next(iter(NET_KINDS))
    with AdapterPool(net()) as pool:
        pool.add(name, folders.get(name, 0))
        pool.pin(name)
        found = {row.layer: row.nbytes for row in pool.report().layers}
        resident = pool._names[name].resident
        for layer in pool._by_index:
            placed = resident.placed[layer.index]
            tensors = [*placed.weights.values(), placed.scale, placed.shift]
            assert found[layer.name] == sum(one.nbytes for one in tensors if one is not None)


def test_an_adapter_that_follows_a_move_keeps_its_counts(pool):
    """A model in another dtype gets its adapters anew; what they did is still theirs."""
    before = {row.name: (row.hits, row.misses) for row in pool.report().adapters}
    model = pool._model
    model.to(torch.float64)
    with pool.use(None):
        pass
    assert {row.name: (row.hits, row.misses) for row in pool.report().adapters} == before


def test_an_empty_pool(tmp_path):
    """It says that there is no adapter, and no cap."""
    with AdapterPool(net()) as pool:
        report = pool.report()
        page = page_of(report, tmp_path)
    assert "There is none: call pool.add" in page.text
    assert "No adapter is on the device now" in page.text
    assert "no lookup so far" in page.text
    assert str(report).startswith("0 adapters on 0 layers\n")


def test_a_pools_report_as_text(pool):
    """It says what is where, under which caps."""
    stats, text = pool.stats(), str(pool.report())
    for words in (
        f"4 adapters on {len(pool._layers)} layers",
        f"device: 2 adapters, {format_bytes(stats.device_bytes)} of",
        f"files: {stats.on_disk} more",
        f"loads: {stats.loads}, {stats.reads} from files; {stats.evictions} evictions",
    ):
        assert words in text


def fake_pool(name="x", adapters=1, device="cuda:0", failed=0, **more):
    stats = PoolStats(
        hits=1, misses=1, loads=1, reads=1, evictions=0, device_bytes=16, host_bytes=0, nbytes=16,
        max_device_bytes=32, max_host_bytes=None, on_device=1, on_host=0, on_disk=adapters - 1,
        load_seconds=0.5, load_times=(0,) * 8 + (1,) + (0,) * 5, failures=failed, reasons={},
    )  # fmt: skip
    settings = {"reasons": (), "kernels": (), "failures": ()} | more
    return PoolReport(
        stats=stats,
        device=device,
        adapters=tuple(
            AdapterRow(name if number == 0 else f"{name}-{number}", "device", False, 16, 1, 1)
            for number in range(adapters)
        ),
        layers=(LayerRow(name, 1, 16),),
        kinds={"linear": 1},
        history=(Sample(0.0, 0, 0, 0, 0), Sample(1.0, 1, 1, 0, 16)),
        **settings,
    )


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_names_in_a_pool_are_text(name, tmp_path):
    """Also those of layers, and what Triton says."""
    why = (ReasonRow(kernels.WithoutKernel.AUTOCAST, 1, {name: 1}),)
    more = {"reasons": why, "kernels": why, "failures": (name,)}
    plain = {"reasons": why, "kernels": why, "failures": ("x",)}
    page = page_of(fake_pool(name, **more), tmp_path)
    assert [tag for tag, _ in page.tags] == [
        tag for tag, _ in page_of(fake_pool(**plain), tmp_path).tags
    ]


def test_a_pool_of_many_adapters_gives_a_small_page(tmp_path):
    """The largest are listed, and the others summed up."""
    page = page_of(fake_pool("n" * 300, adapters=10_000), tmp_path)
    assert len(page.html.encode()) < 200_000
    *shown, rest = page.table("Bytes on the device by adapter")
    assert len(shown) == 12
    assert (rest["adapter"], rest["bytes"]) == ("9,988 more adapters", str(9988 * 16))


def test_loads_that_failed_are_told(tmp_path):
    """On the page and in the text, and only where there are any."""
    report = fake_pool(failed=3)
    assert "Loads that failed: 3. The log says" in page_of(report, tmp_path).text
    assert "loads that failed: 3; the log says" in str(report)
    assert "failed" not in page_of(fake_pool(), tmp_path).text + str(fake_pool())


def test_kernels_that_did_not_run_are_told(tmp_path):
    """Each reason has its count, its layers and what to do; errors of Triton are shown."""
    why = kernels.WithoutKernel.AUTOCAST
    report = fake_pool(
        kernels=(ReasonRow(why, 7, {"model.0.q": 3, "model.1.q": 4}),), failures=("no compiler",)
    )
    page = page_of(report, tmp_path)
    (row,) = page.table("Linear layers that ran without the pool's kernels")
    assert row == {
        "reason": f"{why.value} in model.{{0,1}}.q", "what to do": why.advice, "times": "7"
    }  # fmt: skip
    assert "Triton failed: no compiler" in page.text
    for words in (f"7 x {why.value}: {why.advice}", "in model.{0,1}.q", "Triton: no compiler"):
        assert words in str(report)
    assert "No linear layer has run without" in page_of(fake_pool(), tmp_path).text


def test_why_no_kernel_ran(monkeypatch):
    """The reason is the first that applies."""
    why, no = kernels.why_not, kernels.WithoutKernel
    x = torch.zeros(2, 2)
    wanted = torch.zeros(2, 2, requires_grad=True)
    assert why(wanted, x, torch.float32) is no.GRADIENTS
    assert why(x, x.half(), torch.float32) is no.OTHER_DTYPE
    with torch.autocast("cpu", torch.bfloat16):
        assert why(x, x.bfloat16(), torch.float32) is no.AUTOCAST
        assert why(x, x, torch.float32) is not no.AUTOCAST
    double = x.double()
    assert why(double, double, torch.float64) is no.DTYPE
    monkeypatch.setattr(kernels, "_kernels", lambda: None)
    assert why(x, x, torch.float32) is no.NO_TRITON
    monkeypatch.setattr(kernels, "_kernels", lambda: kernels)
    assert why(x, x, torch.float32) is no.FAILED
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert why(x, x, torch.float32) is no.ROCM


def test_what_runs_without_kernels_is_counted_by_layer(pool):
    """Of tensors on CUDA; embeddings have no kernels, so they are not counted."""
    linear = [layer for layer in pool._by_index if layer.kind == "linear"]
    other = [layer for layer in pool._by_index if layer.kind != "linear"]
    assert linear
    assert other
    half = types.SimpleNamespace(
        is_cuda=True, dtype=torch.bfloat16, requires_grad=False, device=torch.device("cuda")
    )
    for layer in pool._by_index:
        assert not layer._launched(half, torch.zeros(2, 2), None)
        assert not layer._launched(torch.zeros(2, 2), torch.zeros(2, 2), None)
    (row,) = pool.report().kernels
    assert (row.reason, row.count) == (kernels.WithoutKernel.OTHER_DTYPE, len(linear))
    assert row.layers == {layer.name: 1 for layer in linear}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_layers_without_kernels_are_counted(folders, monkeypatch):
    """Autocast, gradients and a broken build count for each linear layer that had an adapter."""
    name = next(iter(NET_KINDS))
    model = net().cuda()
    with AdapterPool(model) as pool:
        pool.add(name, folders.get(name, 0))

        def counted(act):
            for layer in pool._by_index:
                layer.without_kernel.clear()
            with pool.use(name):
                act()
            return {row.reason for row in pool.report().kernels}

        def forward():
            with torch.no_grad():
                output(model, tokens(2).cuda())

        assert counted(forward) == set()
        with torch.autocast("cuda", torch.bfloat16):
            assert counted(forward) == {kernels.WithoutKernel.AUTOCAST}
        assert kernels.WithoutKernel.GRADIENTS in counted(lambda: output(model, tokens(2).cuda()))
        monkeypatch.setattr(kernels, "_kernels", lambda: None)
        assert counted(forward) == {kernels.WithoutKernel.NO_TRITON}
        assert kernel_reasons(pool._by_index) == pool.report().kernels
