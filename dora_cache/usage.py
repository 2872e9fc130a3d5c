"""How much every value has been used: what reports and counters are made of."""

from __future__ import annotations

import itertools
import weakref
from collections import defaultdict
from typing import TYPE_CHECKING

from dora_cache.copying import Uncopyable
from dora_cache.keys import concerns

if TYPE_CHECKING:
    from collections.abc import Container, Hashable, Iterable

    import torch

    from dora_cache.decorator import Derivation
    from dora_cache.keys import Adapters

__all__ = ["Totals", "Usage", "Usages"]

_REMEMBERED = 1 << 16  # keys whose values are held no more


class Usage(Uncopyable):
    """What happened under one key; changed with the cache's lock held, but for ``short``.

    Attributes:
        derivation: number of the derivation.
        living_derivation: returns it, or None once it is gone.
        kind: the derivation's name.
        adapter: the adapter, or several, that the value belongs to.
        short: counts hits without the lock; made of an iterator, whose next() is atomic.
        misses: lookups that derived.
        derived: derivations that came to a value.
        seconds: what these took, all together.
        nbytes: size of the last value.
        device: where it was.
        owner: token of the binding whose value it is.
        due: whether the next use by the long way is to be audited.
        born: the cache's clock when deriving it began; 0 if it is known not to hold any more.
        unsettled: derivations in a row during which a dependency changed.
    """

    __slots__ = (
        "_long",
        "adapter",
        "born",
        "derivation",
        "derived",
        "device",
        "due",
        "kind",
        "living_derivation",
        "misses",
        "nbytes",
        "owner",
        "seconds",
        "short",
        "unsettled",
    )

    def __init__(self, derivation: Derivation, adapter: Adapters, owner: int) -> None:
        self.living_derivation = weakref.ref(derivation)
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
        self.owner = owner
        self.due = False
        self.born = 0
        self.unsettled = 0

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

    def add(self, *, hit: bool, count: int = 1) -> int:
        """Count one lookup, or take one back; return the hits of this way so far."""
        if hit:
            self._long += count
        else:
            self.misses += count
        return self._long


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

    Beyond that, only the sums of the oldest are kept; of owners and adapters that are gone, only
    the numbers of lookups.
    """

    def __init__(self) -> None:
        self._by_key: dict[Hashable, Usage] = {}
        self._by_owner: defaultdict[int, set[Hashable]] = defaultdict(set)
        self._retired: defaultdict[tuple[int, str, Adapters], Totals] = defaultdict(Totals)
        self._departed = [0, 0]  # hits and misses
        self._departed_of: weakref.WeakKeyDictionary[Derivation, list[int]] = (
            weakref.WeakKeyDictionary()
        )
        self._limit = _REMEMBERED

    def of(
        self,
        key: Hashable,
        derivation: Derivation,
        adapter: Adapters,
        owner: int,
        held: Container[Hashable],
    ) -> Usage:
        """Return the usage of a key, a new one if need be; those of ``held`` keys are kept."""
        usage = self._by_key.get(key)
        if usage is None:
            if len(self._by_key) >= self._limit:
                self._retire(held)
            usage = self._by_key[key] = Usage(derivation, adapter, owner)
            self._by_owner[owner].add(key)
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
        self, usages: Iterable[Usage] | None = None, *, of: Derivation | None = None
    ) -> tuple[int, int]:
        """Return hits and misses.

        Args:
            usages: what :meth:`values` returned; reading it takes no lock.
            of: count this derivation's only.
        """
        hits, misses = self._departed if of is None else self._departed_of.get(of, (0, 0))
        for usage in self._by_key.values() if usages is None else usages:
            if of is None or usage.derivation == of.number:
                hits += usage.hits
                misses += usage.misses
        for (number, _, _), totals in list(self._retired.items()):
            if of is None or number == of.number:
                hits += totals.hits
                misses += totals.misses
        return hits, misses

    def depart(self, owner: int, adapter: str | None) -> None:
        """Forget the usages of an owner's adapter, or of all its adapters, but for the numbers."""
        keys = self._by_owner.get(owner, ())
        for key in [key for key in keys if concerns(adapter, self._by_key[key].adapter)]:
            usage = self._forget(key)
            derivation = usage.living_derivation()
            self._count_departed(derivation, usage.hits, usage.misses)
        gone = [name for name in self._retired if adapter is not None and name[2] == adapter]
        if gone and not any(usage.adapter == adapter for usage in self._by_key.values()):
            for name in gone:
                totals = self._retired.pop(name)
                self._count_departed(None, totals.hits, totals.misses)

    def _count_departed(self, derivation: Derivation | None, hits: int, misses: int) -> None:
        counted = [self._departed]
        if derivation is not None:
            counted.append(self._departed_of.setdefault(derivation, [0, 0]))
        for total in counted:
            total[0] += hits
            total[1] += misses

    def _retire(self, held: Container[Hashable]) -> None:
        for key in [key for key in self._by_key if key not in held]:
            usage = self._forget(key)
            self._retired[usage.derivation, usage.kind, usage.adapter].add(usage)
            if len(self._by_key) <= self._limit // 2:
                break
        # Where nearly all are held, not at every new key.
        self._limit = max(_REMEMBERED, 2 * len(self._by_key))

    def _forget(self, key: Hashable) -> Usage:
        usage = self._by_key.pop(key)
        keys = self._by_owner[usage.owner]
        keys.discard(key)
        if not keys:
            del self._by_owner[usage.owner]
        return usage
