"""How much every value has been used: what reports and counters are made of."""

from __future__ import annotations

import itertools
from collections import defaultdict
from typing import TYPE_CHECKING

from dora_cache.copying import Uncopyable

if TYPE_CHECKING:
    from collections.abc import Container, Hashable, Iterable

    import torch

    from dora_cache.binding import Adapters
    from dora_cache.decorator import Derivation

__all__ = ["Totals", "Usage", "Usages"]

_REMEMBERED = 1 << 16  # keys whose values are held no more


class Usage(Uncopyable):
    """What happened under one key; changed with the cache's lock held, but for ``short``.

    Attributes:
        derivation: number of the derivation.
        kind: the derivation's name.
        adapter: the adapter, or several, that the value belongs to.
        short: counts hits without the lock; made of an iterator, whose next() is atomic.
        misses: lookups that derived.
        derived: derivations that came to a value.
        seconds: what these took, all together.
        nbytes: size of the last value.
        device: where it was.
        owner: token of the binding whose value it was.
        born: the cache's clock when deriving it began; 0 if it is known not to hold any more.
    """

    __slots__ = (
        "_long",
        "adapter",
        "born",
        "derivation",
        "derived",
        "device",
        "kind",
        "misses",
        "nbytes",
        "owner",
        "seconds",
        "short",
    )

    def __init__(self, derivation: Derivation, adapter: Adapters) -> None:
        self.derivation = derivation.number
        self.kind = derivation.name
        self.adapter = adapter
        self.short = itertools.count()
        self._long = 0
        self.misses = 0
        self.derived = 0
        self.seconds = 0.0
        self.nbytes = 0
        self.device: torch.device | None = None
        self.owner = 0
        self.born = 0

    @property
    def hits(self) -> int:
        """Lookups answered without deriving."""
        return self._long + int(repr(self.short)[len("count(") : -1])

    @property
    def cost(self) -> float:
        """Seconds that deriving takes, on average."""
        return self.seconds / self.derived if self.derived else 0.0

    def derive(self, seconds: float) -> None:
        """Count a derivation."""
        self.derived += 1
        self.seconds += seconds

    def add(self, *, hit: bool, count: int = 1) -> None:
        """Count one lookup, or take one back."""
        if hit:
            self._long += count
        else:
            self.misses += count


class Totals:
    """Sums over the usages of one derivation and adapter."""

    __slots__ = ("hits", "misses", "saved", "seconds")

    def __init__(self) -> None:
        self.hits = 0
        self.misses = 0
        self.seconds = 0.0
        self.saved = 0.0

    def add(self, usage: Usage) -> None:
        """Count a usage in."""
        hits = usage.hits
        self.hits += hits
        self.misses += usage.misses
        self.seconds += usage.seconds
        self.saved += hits * usage.cost


class Usages:
    """The usage of every key: of those held, and of many that are held no more.

    Beyond that, only the sums of the oldest are kept.
    """

    def __init__(self) -> None:
        self._by_key: dict[Hashable, Usage] = {}
        self._retired: defaultdict[tuple[int, str, Adapters], Totals] = defaultdict(Totals)
        self._limit = _REMEMBERED

    def of(
        self,
        key: Hashable,
        derivation: Derivation,
        adapter: Adapters,
        held: Container[Hashable],
    ) -> Usage:
        """Return the usage of a key, a new one if need be; those of ``held`` keys are kept."""
        usage = self._by_key.get(key)
        if usage is None:
            if len(self._by_key) >= self._limit:
                self._retire(held)
            usage = self._by_key[key] = Usage(derivation, adapter)
        return usage

    def get(self, key: Hashable) -> Usage | None:
        """Return the usage of a key, or None."""
        return self._by_key.get(key)

    def items(self) -> list[tuple[Hashable, Usage]]:
        """Return keys and usages, oldest first."""
        return list(self._by_key.items())

    def values(self) -> list[Usage]:
        """Return the usages, oldest first."""
        return list(self._by_key.values())

    def retired(self) -> list[tuple[tuple[int, str, Adapters], Totals]]:
        """Return the sums of what is not remembered by key: (derivation, kind, adapter), sums."""
        return list(self._retired.items())

    def count(
        self, usages: Iterable[Usage] | None = None, *, derivation: int | None = None
    ) -> tuple[int, int]:
        """Return hits and misses.

        Args:
            usages: what :meth:`values` returned; reading it takes no lock.
            derivation: count this one's only.
        """
        hits = misses = 0
        for usage in self._by_key.values() if usages is None else usages:
            if derivation in (None, usage.derivation):
                hits += usage.hits
                misses += usage.misses
        for (number, _, _), totals in list(self._retired.items()):
            if derivation in (None, number):
                hits += totals.hits
                misses += totals.misses
        return hits, misses

    def _retire(self, held: Container[Hashable]) -> None:
        for key in [key for key in self._by_key if key not in held]:
            usage = self._by_key.pop(key)
            self._retired[usage.derivation, usage.kind, usage.adapter].add(usage)
            if len(self._by_key) <= self._limit // 2:
                break
        # Where nearly all are held, not at every new key.
        self._limit = max(_REMEMBERED, 2 * len(self._by_key))
