"""What eviction policies save on traces, compared with the offline optimum.

Nothing is derived: a trace says what is looked up, and what deriving it costs. The built-in
backends are driven as the cache drives them, ``get`` and after a miss ``put``, with entries whose
tensors have the size of the real ones but no memory.
"""

from __future__ import annotations

import inspect
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import cachetools
import numpy as np
import torch

from dora_cache.backends import BudgetBackend, Entry, LRUBackend
from dora_cache.lab.simulator.bounds import optimum

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from dora_cache.lab.simulator.traces import Trace

__all__ = ["SHARES", "CachetoolsBackend", "Score", "play", "policies", "simulate"]

SHARES = (0.1, 0.25, 0.5, 0.75, 0.9)
"""Caps, as shares of the bytes of all values that a trace looks up."""

_NOISE = 0.25
"""Standard deviation of the logarithm of a measured cost; what is saved counts without it."""


class Store(Protocol):
    """What a policy must be able to do: a part of :class:`dora_cache.backends.Backend`."""

    def get(self, key: Hashable) -> Entry | None:
        """Return an entry or None."""

    def put(self, key: Hashable, entry: Entry) -> bool:
        """Keep an entry or not."""


class CachetoolsBackend:
    """Any cache of cachetools that is bounded by a sum of sizes.

    Args:
        cache: made with ``getsizeof`` of an entry's bytes.
    """

    def __init__(self, cache: cachetools.Cache[Any, Any]) -> None:
        self._cache = cache

    def get(self, key: Hashable) -> Entry | None:
        """Return the entry under ``key``, or None."""
        entry: Entry | None = self._cache.get(key)
        return entry

    def put(self, key: Hashable, entry: Entry) -> bool:
        """Store ``entry`` unless it is larger than the cache."""
        try:
            self._cache[key] = entry
        except ValueError:
            return False
        return True


def policies(seed: int = 0) -> dict[str, Callable[[int], Store]]:
    """Return what makes a store of so many bytes, by the policy's name.

    The backends ``lru`` and ``budget``, and those caches of the installed cachetools that need
    nothing but a size.

    Args:
        seed: for those that choose at random.
    """
    found: dict[str, Callable[[int], Store]] = {"budget": BudgetBackend, "lru": LRUBackend}
    for name in cachetools.__all__:
        kind = getattr(cachetools, name)
        if not (inspect.isclass(kind) and issubclass(kind, cachetools.Cache)):
            continue
        if kind in {cachetools.Cache, cachetools.LRUCache}:
            continue
        required = [
            parameter.name
            for parameter in inspect.signature(kind).parameters.values()
            if parameter.default is parameter.empty
        ]
        if required == ["maxsize"]:
            found[name.removesuffix("Cache").lower()] = _of_cachetools(kind, seed)
    return found


def _of_cachetools(kind: Callable[..., Any], seed: int) -> Callable[[int], Store]:
    takes = inspect.signature(kind).parameters

    def make(max_bytes: int) -> Store:
        settings = {"choice": random.Random(seed).choice} if "choice" in takes else {}  # noqa: S311
        return CachetoolsBackend(kind(max_bytes, getsizeof=_nbytes, **settings))

    return make


def _nbytes(entry: Entry) -> int:
    return entry.nbytes


@dataclass(frozen=True, slots=True)
class Score:
    """What a policy saved on a trace under a cap.

    Attributes:
        trace: the trace's name.
        share: the cap as a share of the working set.
        max_bytes: the cap.
        policy: the policy's name.
        saved: seconds of deriving that hits saved.
        optimum: seconds that the offline optimum saves, or a bound of it.
        exact: whether it is the optimum, and not a bound.
        total: seconds that all lookups would take without a cache.
    """

    trace: str
    share: float
    max_bytes: int
    policy: str
    saved: float
    optimum: float
    exact: bool
    total: float

    @property
    def part(self) -> float:
        """What was saved as a share of the optimum; 1 where there is nothing to save."""
        return self.saved / self.optimum if self.optimum else 1.0


def play(trace: Trace, store: Store, *, seed: int = 0, noise: float = _NOISE) -> float:
    """Look up all of a trace's keys in turn; return the seconds that hits saved.

    Args:
        trace: what is looked up.
        store: empty at first.
        seed: of the noise.
        noise: of measured costs, which are all that a policy gets to see: the standard deviation of
            their logarithms.
    """
    rng = np.random.default_rng(seed)
    factors = rng.lognormal(-(noise**2) / 2, noise, 1 << 12).tolist()
    values = [torch.empty(int(n), dtype=torch.uint8, device="meta") for n in trace.sizes]
    costs = trace.costs.tolist()
    hits = np.zeros(len(costs), dtype=np.int64)
    misses = 0
    get, put = store.get, store.put
    for key in trace.lookups.tolist():
        if get(key) is not None:
            hits[key] += 1
        else:
            measured = costs[key] * factors[misses % len(factors)]
            put(key, Entry(values[key], cost=measured))
            misses += 1
    return float(hits @ trace.costs)


def simulate(
    traces: Iterable[Trace],
    contestants: Mapping[str, Callable[[int], Store]],
    *,
    shares: Sequence[float] = SHARES,
    seed: int = 0,
    moved: Callable[[], object] = lambda: None,
) -> list[Score]:
    """Play every trace with every policy under every cap.

    Args:
        traces: see :func:`dora_cache.lab.simulator.traces.standard_traces`.
        contestants: what makes a store of so many bytes, by the policy's name.
        shares: caps, as shares of a trace's working set.
        seed: of the noise of measured costs.
        moved: called after each trace and cap.
    """
    scores = []
    for trace in traces:
        total = float(_total(trace.costs, trace.lookups))
        for share in shares:
            cap = int(trace.working_set * share)
            best, exact = optimum(trace, cap)
            for name, make in contestants.items():
                saved = play(trace, make(cap), seed=seed)
                scores.append(Score(trace.name, share, cap, name, saved, best, exact, total))
            moved()
    return scores


def _total(costs: NDArray[np.float64], lookups: NDArray[np.int64]) -> float:
    return float(costs[lookups].sum())
