"""Cells: the entry, facts and counters of one owner, derivation and key."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import defaultdict
from operator import attrgetter
from typing import TYPE_CHECKING

from dora_cache.copying import Uncopyable
from dora_cache.core.decorator import derivations
from dora_cache.core.facts import Facts
from dora_cache.core.keys import concerns

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Iterator

    import torch

    from dora_cache.backends import Entry
    from dora_cache.core.audit import Audit
    from dora_cache.core.binding import Binding
    from dora_cache.core.contents import Contents
    from dora_cache.core.decorator import Derivation
    from dora_cache.core.facts import Reading
    from dora_cache.core.keys import Adapters
    from dora_cache.core.shortcuts import Shortcut
    from dora_cache.reasons import Reason

__all__ = ["VARIANTS", "Cell", "Cells", "Family", "Key", "Pending", "Totals"]

VARIANTS = 4
"""Cells kept of one call, which differ in scalars that it depends on, such as the scaling."""

Key = tuple["Hashable", ...]
"""The derivation's number, the owner's token, the arguments, the environment, and the scalars that
the value depends on."""

_REMEMBERED = 1 << 16  # cells that hold nothing


class Family(list["Cell"]):
    """The cells of one call, the latest used last.

    Attributes:
        unsettled: derivations in a row during which a dependency changed.
        wasted: values in a row that were void before their first use.
        rest: for how many calls it was last given up.
    """

    unsettled = 0
    wasted = 0
    rest = 0


class Cell(Uncopyable):
    """One owner x derivation x arguments.

    It is changed with the cache's lock held, except for ``short``, ``due``, and :meth:`void`.

    Attributes:
        key: of the entry in the backend.
        adapter: the adapter, or several, that the value belongs to.
        binding: returns the owner's binding, or None once it is gone.
        kind: the derivation's name.
        number: the derivation's number.
        owner: token of the binding.
        family: this and the cells of the same call.
        facts: what the entry held was derived from; None if none is held.
        born: the cache's clock when deriving it began; 0 if it is known not to hold any more.
        contents: with ``guard="content"``, what the dependencies held before and after deriving.
        audit: hashes of them, if they are audited.
        shortcuts: those that lead to the entry.
        pending: derivations under way; several, where a call that read the dependencies earlier
            derives beside one that read them later.
        short: counts hits without the lock; made of an iterator, whose next() is atomic.
        misses: lookups that derived.
        derived: derivations that came to a value.
        seconds: what these took, all together.
        nbytes: size of the last value.
        device: where it was.
        due: whether the next use by the long way is to be audited.
    """

    __slots__ = (
        "_long",
        "adapter",
        "audit",
        "binding",
        "born",
        "contents",
        "derived",
        "device",
        "due",
        "facts",
        "family",
        "key",
        "kind",
        "misses",
        "nbytes",
        "number",
        "owner",
        "pending",
        "seconds",
        "short",
        "shortcuts",
    )

    def __init__(
        self,
        key: Key,
        derivation: Derivation,
        adapter: Adapters,
        binding: Binding,
        family: Family,
    ) -> None:
        self.key = key
        self.adapter = adapter
        self.binding = weakref.ref(binding)
        self.kind = derivation.name
        self.number = derivation.number
        self.owner = binding.token
        self.family = family
        self.facts: Facts | None = None
        self.born = 0
        self.contents: tuple[Contents, ...] = ()
        self.audit: Audit | None = None
        self.shortcuts: list[Shortcut] = []
        self.pending: list[Pending] = []
        self.short = itertools.count()
        self._long = 0
        self.misses = 0
        self.derived = 0
        self.seconds = 0.0
        self.nbytes = 0
        self.device: torch.device | None = None
        self.due = False

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
        """Count one lookup, or take one back; return the hits by the long way so far."""
        if hit:
            self._long += count
        else:
            self.misses += count
        return self._long

    def void(self) -> None:
        """Have the entry not used any more, without the lock; it is still to be dropped."""
        self.born = 0
        for shortcut in list(self.shortcuts):
            shortcut.clear()

    def clear_shortcuts(self) -> None:
        """Have every shortcut to the entry lead nowhere."""
        binding = self.binding()
        for shortcut in self.shortcuts:
            shortcut.clear()
            if binding is not None and binding.shortcuts.get(shortcut.spelled) is shortcut:
                del binding.shortcuts[shortcut.spelled]
        self.shortcuts = []


class Pending(Uncopyable):
    """A derivation under way in one thread, which others may wait for.

    Attributes:
        cell: whose value it is.
        facts: what it is derived from.
        born: the cache's clock when it began; an event that comes later voids the value.
        contents: with ``guard="content"``, what the dependencies held before.
        audit: hashes of them, if they are audited.
        thread: the thread that derives.
        done: set at its end.
        touched: whether a dependency may have been written to meanwhile.
        unstored: why there is no entry, if there is none.
        entry: what it came to, to be stored; None if that cannot be.
        error: what it raised.
    """

    __slots__ = (
        "audit",
        "born",
        "cell",
        "contents",
        "done",
        "entry",
        "error",
        "facts",
        "thread",
        "touched",
        "unstored",
    )

    def __init__(self, cell: Cell, reading: Reading, contents: Contents | None, born: int) -> None:
        self.cell = cell
        self.facts = Facts(reading)
        self.born = born
        self.contents = () if contents is None else (contents,)
        self.audit: Audit | None = None
        self.thread = threading.get_ident()
        self.done = threading.Event()
        self.touched = False
        self.unstored: Reason | None = None
        self.entry: Entry | None = None
        self.error: Exception | None = None

    def result(self) -> Entry | None:
        """Return what another thread has derived; None if it came to nothing.

        Raises:
            Exception: what the derivation raised.
        """
        if self.error is not None:
            raise self.error
        entry = self.entry
        return entry if entry is not None and entry.intact else None  # its caller may change it


class Totals:
    """Sums over the cells of one derivation and adapter."""

    __slots__ = ("hits", "misses", "saved", "seconds")

    def __init__(self) -> None:
        self.hits = 0
        self.misses = 0
        self.seconds = 0.0
        self.saved = 0.0

    def add(self, cell: Cell) -> None:
        """Count a cell in."""
        hits = cell.hits
        self.hits += hits
        self.misses += cell.misses
        self.seconds += cell.seconds
        self.saved += hits * cell.cost


class Cells(Uncopyable):
    """All cells of a cache: those that hold an entry, and many that hold none.

    Beyond that, only the sums of the oldest are kept; of owners and adapters that are gone, only
    the numbers of lookups.
    """

    def __init__(self) -> None:
        self._by_key: dict[Hashable, Cell] = {}
        # In the order of insertion, so that what is done to several cells is done in one order.
        self._by_owner: defaultdict[int, dict[Cell, None]] = defaultdict(dict)
        self._by_storage: dict[int, dict[Cell, None]] = {}
        self._families: dict[Key, Family] = {}
        self._retired: defaultdict[tuple[int, str, Adapters], Totals] = defaultdict(Totals)
        self._departed = [0, 0]  # hits and misses
        self._departed_of: weakref.WeakKeyDictionary[Derivation, list[int]] = (
            weakref.WeakKeyDictionary()
        )
        self._limit = _REMEMBERED

    def __iter__(self) -> Iterator[Cell]:
        """Iterate over a copy, oldest first."""
        return iter(list(self._by_key.values()))

    def __len__(self) -> int:
        return len(self._by_key)

    def get(self, key: Hashable) -> Cell | None:
        """Return the cell of a key, or None."""
        return self._by_key.get(key)

    def of(self, key: Key, derivation: Derivation, adapter: Adapters, binding: Binding) -> Cell:
        """Return the cell of a key, a new one if need be, as the latest used of its family.

        Args:
            key: the key.
            derivation: of the call.
            adapter: whose value it is.
            binding: the owner's.
        """
        cell = self._by_key.get(key)
        if cell is None:
            if len(self._by_key) >= self._limit:
                self._retire_oldest()
            family = self._families.setdefault(key[:-1], Family())
            # In this order, so that an interrupt leaves nothing half done.
            cell = Cell(key, derivation, adapter, binding, family)
            self._by_owner[binding.token][cell] = None
            family.append(cell)
            self._by_key[key] = cell
        elif cell.family[-1] is not cell:
            cell.family[:] = [*(one for one in cell.family if one is not cell), cell]
        return cell

    def hold(self, cell: Cell, facts: Facts) -> None:
        """Take note that the backend holds an entry of a cell."""
        cell.facts = facts
        for storage in facts.storages:
            self._by_storage.setdefault(storage, {})[cell] = None

    def release(self, cell: Cell) -> None:
        """Take note that the entry of a cell has gone."""
        facts, cell.facts = cell.facts, None
        cell.clear_shortcuts()
        cell.contents, cell.audit = (), None
        if facts is not None:
            self._leave(cell, facts)

    def follow(self, cell: Cell, facts: Facts, reading: Reading) -> None:
        """Take note that what an entry is derived from has moved."""
        cell.clear_shortcuts()
        self._leave(cell, facts)
        facts.follow(reading)
        self.hold(cell, facts)

    def _leave(self, cell: Cell, facts: Facts) -> None:
        for storage in facts.storages:
            cells = self._by_storage.get(storage)
            if cells is not None:
                cells.pop(cell, None)
                if not cells:
                    del self._by_storage[storage]

    def held(self) -> list[Cell]:
        """Return the cells that hold an entry."""
        return [cell for cell in self._by_key.values() if cell.facts is not None]

    def of_owner(self, token: int) -> list[Cell]:
        """Return the cells of a binding."""
        return list(self._by_owner.get(token, ()))

    def on(self, storages: Iterable[int]) -> list[Cell]:
        """Return the cells whose entries are derived from some storages."""
        # Copied at once, since it is called without the lock as well.
        found = (cell for storage in storages for cell in tuple(self._by_storage.get(storage, ())))
        return sorted(dict.fromkeys(found), key=attrgetter("born"))

    def retired(self) -> list[tuple[tuple[int, str, Adapters], Totals]]:
        """Return the sums of what is not remembered by key: (derivation, kind, adapter), sums."""
        return list(self._retired.items())

    def count(self, of: Derivation | None = None) -> tuple[int, int]:
        """Return hits and misses, of all or of one derivation."""
        hits, misses = self._departed if of is None else self._departed_of.get(of, (0, 0))
        for cell in self:
            if of is None or cell.number == of.number:
                hits += cell.hits
                misses += cell.misses
        for (number, _, _), totals in self.retired():
            if of is None or number == of.number:
                hits += totals.hits
                misses += totals.misses
        return hits, misses

    def depart(self, owner: int, adapter: str | None) -> None:
        """Forget the cells of an owner's adapter, or of all its adapters, but for the numbers."""
        for cell in self.of_owner(owner):
            if concerns(adapter, cell.adapter):
                self._remove(cell)
                self._count_departed(cell.number, cell.hits, cell.misses)
        gone = [name for name in self._retired if adapter is not None and name[2] == adapter]
        if gone and not any(cell.adapter == adapter for cell in self._by_key.values()):
            for name in gone:
                totals = self._retired.pop(name)
                self._count_departed(name[0], totals.hits, totals.misses)

    def _count_departed(self, number: int, hits: int, misses: int) -> None:
        counted = [self._departed]
        derivation = derivations.get(number)
        if derivation is not None:
            counted.append(self._departed_of.setdefault(derivation, [0, 0]))
        for total in counted:
            total[0] += hits
            total[1] += misses

    def retire(self, cell: Cell) -> None:
        """Keep only the sums of a cell that holds nothing."""
        self._remove(cell)
        self._retired[cell.number, cell.kind, cell.adapter].add(cell)

    def _retire_oldest(self) -> None:
        for cell in self:
            if cell.facts is None and not cell.pending:
                self.retire(cell)
                if len(self._by_key) <= self._limit // 2:
                    break
        # Where nearly all are held, not at every new key.
        self._limit = max(_REMEMBERED, 2 * len(self._by_key))

    def _remove(self, cell: Cell) -> None:
        del self._by_key[cell.key]
        cells = self._by_owner[cell.owner]
        cells.pop(cell, None)
        if not cells:
            del self._by_owner[cell.owner]
        if cell in cell.family:
            cell.family.remove(cell)
        if not cell.family:
            self._families.pop(cell.key[:-1], None)
