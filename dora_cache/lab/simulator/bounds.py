"""What an offline policy, which knows the future, could save at most."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dora_cache.lab.simulator.traces import Trace

__all__ = ["belady", "optimum", "previous_lookups", "upper_bound"]

_WINDOWS = 256
_STEPS = 30
_STEP = 0.5


def previous_lookups(lookups: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return for every lookup the place of the one before of the same key; -1 for the first."""
    order = np.argsort(lookups, kind="stable")
    keys = lookups[order]
    before = np.full(len(lookups), -1)
    again = keys[1:] == keys[:-1]
    before[order[1:][again]] = order[:-1][again]
    return before


def belady(lookups: NDArray[np.int64], slots: int) -> int:
    """Return how many hits are possible with ``slots`` values of equal size.

    Belady's MIN, with the choice of not keeping a new value: of those held and the new one, the
    value that is needed again last goes. No policy has more hits.
    """
    if slots < 1:
        return 0
    before = previous_lookups(lookups)
    following = np.full(len(lookups), len(lookups))
    again = before >= 0
    following[before[again]] = np.flatnonzero(again)
    needed: dict[int, int] = {}  # the next lookup of every key that is held
    latest: list[tuple[int, int]] = []  # the same, latest first; may be out of date
    hits = 0
    for key, later in zip(lookups.tolist(), following.tolist(), strict=True):
        hits += key in needed
        needed[key] = later
        heapq.heappush(latest, (-later, key))
        while len(needed) > slots:
            when, other = heapq.heappop(latest)
            if needed.get(other) == -when:
                del needed[other]
    return hits


def optimum(trace: Trace, cap: int) -> tuple[float, bool]:
    """Return the seconds that can be saved under ``cap`` bytes, and whether that is exact.

    Exact where all values are alike (:func:`belady`), otherwise an :func:`upper_bound`.
    """
    if trace.uniform:
        return belady(trace.lookups, cap // int(trace.sizes[0])) * float(trace.costs[0]), True
    return upper_bound(trace, cap), False


def upper_bound(trace: Trace, cap: int) -> float:
    """Return seconds that no policy under ``cap`` bytes can save more than.

    Between two lookups of a key its value is either held throughout, and the second is a hit that
    saves its cost, or it is not. So what a policy does is a choice of such intervals, and at any
    time those chosen have at most ``cap`` bytes together. The best choice is an integer programme:
    the largest sum of c[i] x[i], where x[i] is 0 or 1, and for every time t the sum of s[i] x[i]
    over the intervals i around t is at most ``cap``. (This is the flow-based offline optimum, FOO,
    of Berger, Beckmann and Harchol-Balter, "Practical Bounds on Optimal Caching with Variable
    Object Sizes", 2018.)

    By weak duality, any prices p[t] >= 0 of a byte at a time t give an upper bound of that sum::

        cap * sum of p[t]  +  sum over i of max(0, c[i] - s[i] * (sum of p[t] within i))

    One price for all times makes this the fractional knapsack, whose best price is found exactly.
    From there, prices that differ between some hundred windows of time are improved step by step,
    up where more bytes are wanted than there are, down elsewhere. The least value met is returned;
    how good the prices are decides how tight it is, not whether it is a bound.
    """
    before = previous_lookups(trace.lookups)
    ends = np.flatnonzero(before >= 0)
    ends = ends[trace.sizes[trace.lookups[ends]] <= cap]
    if not len(ends) or cap == 0:
        return 0.0
    starts, keys = before[ends], trace.lookups[ends]
    costs, sizes = trace.costs[keys], trace.sizes[keys].astype(float)
    total = len(trace.lookups)
    best, price = _one_price(costs, sizes, (ends - starts).astype(float), cap, total)
    if price == 0:
        return best
    return min(best, _many_prices(costs, sizes, starts, ends, cap, total, price))


def _one_price(
    costs: NDArray[np.float64],
    sizes: NDArray[np.float64],
    lengths: NDArray[np.float64],
    cap: int,
    total: int,
) -> tuple[float, float]:
    """Fill a knapsack of ``cap`` times the whole duration; return its value and last density."""
    weights = sizes * lengths
    order = np.argsort(-costs / np.maximum(weights, 1e-9))
    filled = np.cumsum(weights[order])
    value = np.cumsum(costs[order])
    room = float(cap) * (total - 1)
    last = int(np.searchsorted(filled, room, side="right"))
    if last >= len(order):
        return float(value[-1]) if len(value) else 0.0, 0.0
    density = costs[order[last]] / weights[order[last]]
    below = (value[last - 1], filled[last - 1]) if last else (0.0, 0.0)
    return float(below[0] + density * (room - below[1])), float(density)


def _many_prices(
    costs: NDArray[np.float64],
    sizes: NDArray[np.float64],
    starts: NDArray[np.int64],
    ends: NDArray[np.int64],
    cap: int,
    total: int,
    price: float,
) -> float:
    """Improve prices of windows of time; return the least bound met."""
    windows = min(_WINDOWS, total - 1)
    edges = np.linspace(0, total - 1, windows + 1)
    widths = np.diff(edges)
    # How far an interval's ends reach into their windows: its price is linear in the prices.
    first = np.minimum(np.searchsorted(edges, starts, side="right") - 1, windows - 1)
    last = np.minimum(np.searchsorted(edges, ends, side="right") - 1, windows - 1)
    prices = np.full(windows, price)
    best = np.inf
    for step in range(_STEPS):
        paid = np.concatenate(([0.0], np.cumsum(prices * widths)))
        until_end = paid[last] + prices[last] * (ends - edges[last])
        until_start = paid[first] + prices[first] * (starts - edges[first])
        gains = costs - sizes * (until_end - until_start)
        bound = cap * paid[-1] + np.maximum(gains, 0.0).sum()
        best = min(best, bound)
        # The subgradient: byte-lookups wanted in every window, as a share of those that there are.
        chosen = gains > 0
        level = np.zeros(windows + 1)
        np.add.at(level, first[chosen], sizes[chosen])
        np.add.at(level, last[chosen], -sizes[chosen])
        wanted = np.cumsum(level)[:-1] * widths
        np.add.at(wanted, first[chosen], -(sizes * (starts - edges[first]))[chosen])
        np.add.at(wanted, last[chosen], (sizes * (ends - edges[last]))[chosen])
        excess = np.clip(wanted / (cap * widths) - 1, -1, 1)
        prices *= np.exp(excess * _STEP / np.sqrt(1 + step))
    return float(best)
