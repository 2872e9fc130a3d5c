"""The simulator: its traces, its offline optimum against brute force, and what it reports."""

import itertools
import json

import cachetools
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from dora_cache.backends import BudgetBackend, LRUBackend
from dora_cache.cli.app import app
from dora_cache.lab.simulator import bounds, report, scoring
from dora_cache.lab.simulator import traces as known
from dora_cache.lab.simulator.traces import TUNERS, Layer, Trace, make_trace

LAYERS = [Layer(64, 64), Layer(64, 16), Layer(64, 128), Layer(128, 64)]


def trace_of(lookups, sizes, costs):
    return Trace(
        "t", "a trace", np.array(sizes), np.array(costs, dtype=float), np.array(lookups, dtype=int)
    )


def cycle(forwards, *, kind="FourierFT", layers=20):
    return make_trace(
        "cycle", "one adapter", [(TUNERS[kind], [Layer(64, 64)] * layers)], [0] * forwards
    )


def best_by_trying(trace, cap):
    """Return the most seconds that any choice of what to hold after each lookup saves."""
    best = {frozenset(): 0.0}
    for key in trace.lookups.tolist():
        after = {}
        for held, saved in best.items():
            gain = saved + (trace.costs[key] if key in held else 0.0)
            for count in range(len(held | {key}) + 1):
                for kept in itertools.combinations(sorted(held | {key}), count):
                    if sum(trace.sizes[k] for k in kept) <= cap:
                        state = frozenset(kept)
                        after[state] = max(after.get(state, 0.0), gain)
        best = after
    return max(best.values())


keys = st.lists(st.integers(0, 3), max_size=12)


@given(keys)
def test_previous_lookups_are_found(lookups):
    """Every lookup knows the place of the one before of its key, the first ones none."""
    found = bounds.previous_lookups(np.array(lookups, dtype=int)).tolist()
    last = {}
    for place, key in enumerate(lookups):
        assert found[place] == last.get(key, -1)
        last[key] = place


@given(keys, st.integers(0, 4))
@settings(deadline=None)
def test_belady_is_the_best_there_is(lookups, slots):
    """Belady's hits are those of the best of all possible choices, where all values are alike."""
    trace = trace_of(lookups, [1] * 4, [1.0] * 4)
    assert bounds.belady(trace.lookups, slots) == best_by_trying(trace, slots)


@given(
    keys,
    st.lists(st.integers(1, 5), min_size=4, max_size=4),
    st.lists(st.sampled_from([0.5, 1.0, 2.0, 7.0]), min_size=4, max_size=4),
    st.integers(0, 20),
)
@settings(deadline=None, max_examples=200)
def test_the_bound_is_never_below_the_best(lookups, sizes, costs, cap):
    """No choice saves more than the bound, whatever sizes and costs; and it is no mere total."""
    trace = trace_of(lookups, sizes, costs)
    bound = bounds.upper_bound(trace, cap)
    assert bound >= best_by_trying(trace, cap) * (1 - 1e-9)
    again = bounds.previous_lookups(trace.lookups) >= 0
    assert bound <= trace.costs[trace.lookups[again]].sum() * (1 + 1e-9)


@pytest.mark.parametrize("slots", [0, 1, 5, 10, 19, 20])
def test_the_bound_is_tight_on_a_cycle(slots):
    """Of a long cycle, the bound lets as large a part hit as fits, and no more than that."""
    trace = cycle(100)
    size, cost = int(trace.sizes[0]), float(trace.costs[0])
    bound = bounds.upper_bound(trace, slots * size)
    assert bound == pytest.approx(slots * 99 * cost, rel=0.02)
    assert bounds.belady(trace.lookups, slots) == pytest.approx(slots * 99, rel=0.02)
    assert bounds.optimum(trace, slots * size)[1]


def test_prices_that_differ_over_time_tighten_the_bound():
    """Where a cap binds only for a while, one price for all times is too kind."""
    quiet, busy = [0, 1] * 200, [*range(2, 12)] * 40
    trace = trace_of(quiet + busy, [1] * 12, [1.0] * 12)
    exact = bounds.belady(trace.lookups, 4)
    bound = bounds.upper_bound(trace, 4)
    one_price = min(398 + 390, 4 * (len(trace.lookups) - 1) / 10 + 398 * (1 - 2 / 10))
    assert exact <= bound < 1.05 * exact < one_price


@pytest.mark.parametrize("part", [0.25, 0.5, 0.75])
def test_budget_keeps_its_part_of_a_cycle_and_lru_nothing(part):
    """On a cycle, budget saves about what the optimum saves, and an LRU nothing at all."""
    trace = cycle(60)
    cap = int(trace.working_set * part)
    best, _ = bounds.optimum(trace, cap)
    assert scoring.play(trace, BudgetBackend(cap)) > 0.95 * best
    assert scoring.play(trace, LRUBackend(cap)) == 0


def test_budget_saves_most_of_the_optimum_on_short_traces():
    """On traces a tenth as long as those of the command, start included, it saves nine tenths."""
    traces = known.standard_traces(scale=0.1)
    short = [trace for trace in traces if trace.name in {"cyclic", "shifting", "together"}]
    for score in scoring.simulate(short, {"budget": BudgetBackend}, shares=(0.25, 0.75)):
        assert 0.9 < score.part <= 1, score


def test_no_policy_saves_more_than_the_optimum():
    """Every policy, under every cap, stays within the optimum or its bound."""
    mixed = [(TUNERS[kind], LAYERS) for kind in ("DoRA", "LoHa", "OFT")]
    rng = np.random.default_rng(0)
    forwards = known.requests(rng, rng.integers(0, 3, 30), 1, 5)
    traces = [cycle(10), make_trace("mixed", "three kinds", mixed, forwards)]
    moves = []
    scores = scoring.simulate(traces, scoring.policies(), moved=lambda: moves.append(1))
    assert len(moves) == len(traces) * len(scoring.SHARES)
    assert len(scores) == len(moves) * len(scoring.policies())
    assert {score.exact for score in scores} == {True, False}
    for score in scores:
        assert 0 <= score.saved <= score.optimum * (1 + 1e-9) <= score.total
        assert 0 <= score.part <= 1 + 1e-9


def test_policies_are_those_of_the_installed_cachetools():
    """Besides the two backends, every cachetools cache that takes just a size takes part."""
    found = scoring.policies()
    assert list(found)[:2] == ["budget", "lru"]
    assert {"fifo", "lfu", "rr"} <= set(found)
    assert not {"ttl", "tlru", ""} & set(found)


def test_cachetools_entries_are_bounded_by_their_bytes():
    """The adapter counts bytes, and refuses what is larger than the cache."""
    trace = trace_of([0, 1, 0, 1, 2, 2], [10, 10, 25], [1.0, 2.0, 4.0])
    store = scoring.CachetoolsBackend(cachetools.FIFOCache(20, getsizeof=lambda e: e.nbytes))
    assert scoring.play(trace, store) == 3.0


def test_what_is_saved_counts_without_the_noise_of_measurements():
    """Noise changes what a policy sees, not what a hit is worth."""
    trace = cycle(5)
    for noise in (0.0, 0.5):
        saved = scoring.play(trace, LRUBackend(trace.working_set), noise=noise)
        assert saved == pytest.approx(4 * trace.costs.sum())


def test_traces_are_the_same_each_time():
    """The same seed gives the same traces and scores, another seed others."""
    first, again, other = (known.standard_traces(seed, scale=0.01) for seed in (0, 0, 1))
    for one, two in zip(first, again, strict=True):
        assert np.array_equal(one.lookups, two.lookups)
    assert any(len(a.lookups) != len(b.lookups) for a, b in zip(first, other, strict=True))
    rr = {"rr": scoring.policies(3)["rr"]}
    assert scoring.simulate(first[:1], rr) == scoring.simulate(again[:1], rr)


def test_a_forward_looks_up_every_layer_in_order():
    """Lookups go through the layers of the adapter that each forward runs, with real sizes."""
    trace = make_trace("t", "two", [(TUNERS["DoRA"], LAYERS), (TUNERS["LoHa"], LAYERS)], [1, 0, 1])
    assert trace.lookups.tolist() == [4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7]
    assert trace.sizes.tolist()[:4] == [4 * layer.outputs for layer in LAYERS]
    assert trace.sizes.tolist()[4:] == [4 * layer.inputs * layer.outputs for layer in LAYERS]
    assert trace.working_set == trace.sizes.sum()
    assert not trace.uniform
    assert cycle(1).uniform


def test_layers_are_those_of_the_model():
    """The layers of a named shape are its seven projections, times its depth."""
    assert known.layers_of("tiny") == [
        Layer(32, 32), Layer(32, 16), Layer(32, 16), Layer(32, 32),
        Layer(32, 48), Layer(32, 48), Layer(48, 32),
    ] * 2  # fmt: skip


def test_requests_at_once_take_turns():
    """Of requests that run together, each has a token in turn, and the next one follows at once."""
    forwards = known.together(np.random.default_rng(0), [0, 1, 2], 2, 2, 2)
    assert forwards.tolist() == [0, 1, 0, 1, 2, 2]


def run(*arguments):
    return CliRunner().invoke(app, ["lab", "simulate", *map(str, arguments)])


def test_the_command_prints_and_writes_what_it_found(tmp_path):
    """The table, the JSON file and the chart show every trace and policy that was asked for."""
    folder = tmp_path / "made"
    done = run(
        "--traces", "cyclic,mixed", "--policies", "lru,budget", "--scale", 0.01, "--out", folder
    )
    assert done.exit_code == 0, done.output
    assert "cyclic" in done.output
    assert "zipf" not in done.output
    data = json.loads((folder / "simulate.json").read_text())
    assert set(data["traces"]) == {"cyclic", "mixed"}
    assert len(data["scores"]) == 2 * 2 * len(scoring.SHARES)
    for score in data["scores"]:
        assert score["part"] == pytest.approx(score["saved"] / score["optimum"])
    assert (folder / "simulate.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--traces", "cycle"), "--traces: there is no 'cycle': choose from cyclic, turns"),
        (("--policies", "mru"), "--policies: there is no 'mru': choose from budget, lru"),
        (("--policies", ","), "--policies names none: choose from budget, lru"),
    ],
)
def test_mistakes_are_explained(arguments, message):
    """A wrong name is one line that lists the right ones."""
    done = run(*arguments, "--scale", 0.01)
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())


def test_a_bound_is_marked_as_one():
    """The table tells an exact optimum from a bound of it."""
    scores = [
        scoring.Score("one", 0.5, 10, "lru", 1.0, 2.0, True, 4.0),
        scoring.Score("two", 0.5, 10, "lru", 1.0, 2.0, False, 4.0),
    ]
    cells = [list(column.cells) for column in report.table(scores).columns]
    assert cells == [["one", "two"], ["50%", "50%"], ["50.0 %", "≤ 50.0 %"], ["50.0", "50.0"]]
