"""The check at entry of compiled code: what it reads is up to date before it runs.

In-place writes, other data in a parameter and scalings set by hand raise no event, and compiled
code looks nothing up. So TorchDynamo's guards, which are checked at each call and outside of CUDA
graphs, come here: one pass compares what views and values were made from with what is there now.
Layers for which that has changed are brought up to date, at the same addresses. A guard fails only
if that cannot be done.

Two guards share the work. One of the code as a whole checks the layers that were traced. Where
other layers run the same code, as blocks do that are compiled one by one, the :class:`LayerKey` of
each is compared with that of the layer that was traced, and checks its own.

Layouts of tensors that a view has are not compared here: the compiler's own guards see to them.
"""

from __future__ import annotations

import weakref
from array import array
from functools import partial
from operator import attrgetter, getitem, is_
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from dora_cache.copying import Uncopyable
from dora_cache.core.facts import EXACT
from dora_cache.recipes.dynamo import EntryGuard, traced_constant, traced_region

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

    from dora_cache.core.engine import Engine
    from dora_cache.core.facts import Reading

__all__ = [
    "BEHIND",
    "EntryCheck",
    "LayerKey",
    "Place",
    "Watch",
    "enter",
    "joined",
    "text_of",
    "watch",
    "watch_later",
    "watch_places",
]

_version: Callable[[Tensor], int] = attrgetter("_version")
_address = Tensor.data_ptr
Place = tuple["Mapping[Any, Any]", "Hashable", "Hashable", object]
"""A mapping, a name or None, a key, and what is there: under the key, in the mapping; with a name,
in the mapping that this one has under the name."""


class Watch(NamedTuple):
    """What views and values were made from, as it was then, to be compared fast.

    Attributes:
        tensors: the tensors.
        versions: their version counters.
        addresses: of their data.
        places: where parts of layers and scalars are.
        tables: the mappings of places without a name.
        keys: their keys.
        items: what was there.
        named: mappings, names, keys and items of the places with a name.
        lists: lists of numbers of the layers, in the same way; their copies in place of items.
        loose: those of the tensors whose layouts have to be compared.
        layouts: their sizes, strides and dtypes.
        complete: whether nothing else matters. Else all dependencies have to be listed and read.
    """

    tensors: list[Tensor]
    versions: list[int]
    addresses: list[int]
    places: list[Place]
    tables: list[Mapping[Any, Any]]
    keys: list[Hashable]
    items: list[object]
    named: tuple[list[Any], list[Any], list[Any], list[Any]]
    lists: tuple[list[Any], list[Any], list[Any], list[Any]]
    loose: list[Tensor]
    layouts: list[tuple[object, ...]]
    complete: bool

    def holds(self) -> bool:
        """Whether all of it is as it was. Raises if something is not there any more."""
        mappings, names, keys, items = self.named
        of_lists, their_names, their_keys, copies = self.lists
        return (
            list(map(_version, self.tensors)) == self.versions
            and list(map(_address, self.tensors)) == self.addresses
            and all(map(is_, map(getitem, self.tables, self.keys), self.items))
            and all(map(is_, map(getitem, map(getitem, mappings, names), keys), items))
            and (
                not copies
                or [*map(getitem, map(getitem, of_lists, their_names), their_keys)] == copies
            )
            and (not self.loose or list(map(_layout, self.loose)) == self.layouts)
        )


def watch(
    owner: nn.Module,
    adapters: Sequence[str],
    dependencies: Iterable[object],
    reading: Reading,
    guarded: set[int],
) -> Watch:
    """Note what a value of a recipe of this package depends on.

    Scalars are looked for among the attributes of the layer and its parts, and under the adapters'
    names in those that are dictionaries; recipes take them from nowhere else. So are lists of whole
    numbers, for a :func:`text_of` them.

    Args:
        owner: the layer.
        adapters: names of adapters.
        dependencies: as they are listed.
        reading: of the dependencies.
        guarded: ids of the tensors that compiled code has guards on.
    """
    complete = not reading.elsewhere
    places: list[Place] = []
    sizes = {size for tensor in reading.tensors for size in tensor.size()}
    for item in dependencies:
        if isinstance(item, Tensor):
            complete &= type(item) in EXACT  # one that wraps others may exchange them
        elif item is not None:  # that is a parameter's place, which compiled code compares itself
            found = _places(owner, adapters, item) if _is_plain(item) else []
            complete &= bool(found) or (type(item) is int and item in sizes)
            places += found
    loose = [tensor for tensor in reading.tensors if id(tensor) not in guarded]
    layouts = [(tensor, _layout(tensor)) for tensor in loose]
    return _made(_facts(reading.tensors), places, layouts, complete=complete)


def watch_places(places: Sequence[Place]) -> Watch:
    """Note what is found in some places."""
    return _made([], places)


class _Optional:
    """A mapping's items, and None where it has none."""

    def __init__(self, table: Mapping[Any, Any]) -> None:
        self._table = table

    def __getitem__(self, key: Hashable) -> object:
        return self._table.get(key)


def watch_later(coming: Iterable[tuple[Mapping[Any, Any], Hashable]]) -> Watch:
    """Note what some tables have under a key, None included, where another part may be put."""
    found: list[Place] = []
    for table, key in coming:
        lenient: Any = _Optional(table)
        found.append((lenient, None, key, lenient[key]))
    return watch_places(found)


def joined(watches: Sequence[Watch]) -> Watch:
    """Return what several watch as one, each tensor once."""
    facts = {
        (id(tensor), version, address): tensor
        for one in watches
        for tensor, version, address in zip(one.tensors, one.versions, one.addresses, strict=True)
    }
    return _made(
        [(tensor, version, address) for (_, version, address), tensor in facts.items()],
        [place for one in watches for place in one.places],
        [pair for one in watches for pair in zip(one.loose, one.layouts, strict=True)],
        complete=all(one.complete for one in watches),
    )


def _facts(tensors: Iterable[Tensor]) -> list[tuple[Tensor, int, int]]:
    return [(tensor, _version(tensor), _address(tensor)) for tensor in tensors]


def _made(
    facts: Sequence[tuple[Tensor, int, int]],
    places: Sequence[Place],
    loose: Sequence[tuple[Tensor, tuple[object, ...]]] = (),
    *,
    complete: bool = True,
) -> Watch:
    distinct = list({(id(place[0]), *place[1:3]): place for place in places}.values())
    plain: list[Place] = []
    named: list[Place] = []
    lists: list[Place] = []
    for place in distinct:
        kind = lists if type(place[3]) is list else plain if place[1] is None else named
        kind.append(place)
    mappings, names, keys, items = _columns(named, 4)
    of_lists, their_names, their_keys, copies = _columns(lists, 4)
    tables, _, own, there = _columns(plain, 4)
    tensors, versions, addresses = _columns(facts, 3)
    changing, layouts = _columns(loose, 2)
    return Watch(
        tensors,
        versions,
        addresses,
        distinct,
        tables,
        own,
        there,
        (mappings, names, keys, items),
        (of_lists, their_names, their_keys, copies),
        changing,
        layouts,
        complete,
    )


def _columns(rows: Iterable[tuple[Any, ...]], count: int) -> list[list[Any]]:
    found: list[list[Any]] = [list(column) for column in zip(*rows, strict=True)]
    return found or [[] for _ in range(count)]


def _layout(tensor: Tensor) -> tuple[object, ...]:
    return tensor.size(), tensor.stride(), tensor.dtype


_SCALARS = (bool, int, float, complex, str, torch.dtype, torch.device, type(None))


def _is_plain(item: object) -> bool:
    if isinstance(item, tuple):
        return all(isinstance(one, _SCALARS) for one in item)
    return isinstance(item, _SCALARS)


def _places(owner: nn.Module, adapters: Sequence[str], item: object) -> list[Place]:
    found: list[Place] = []
    for module in owner.modules():
        state = module.__dict__
        for name, value in state.items():
            if value is item:
                found.append((state, None, name, item))
            elif type(value) is dict:
                found += [(state, name, key, item) for key in adapters if value.get(key) is item]
                lists = [(key, list(value[key])) for key in adapters if _is_list(value.get(key))]
                found += [(state, name, key, copy) for key, copy in lists if text_of(copy) == item]
    return found


def _is_list(value: object) -> bool:
    return type(value) is list and all(type(one) is int for one in value)


def text_of(numbers: list[int]) -> str:
    """Return whole numbers as one string: to store and to compare, it is cheaper than a list.

    Recipes give it as a dependency for such a list among a layer's attributes; see :func:`watch`.
    """
    return array("q", numbers).tobytes().decode("latin-1")


class Checked(Protocol):
    """What is brought up to date: a :class:`dora_cache.recipes.holder.Holder`."""

    watch: Watch | None
    entries: weakref.WeakSet[EntryCheck]

    @property
    def engine(self) -> Engine | None:
        """The cache, or None if it is gone."""

    @property
    def binding(self) -> Any:
        """The layer's binding, or None if it is gone."""

    def written(self) -> bool:
        """Whether code that is traced has written to what is watched."""

    def check(self) -> bool:
        """Bring it up to date; return whether what compiled code has read of it still holds."""


BEHIND = _made([], [({None: object()}, None, None, None)])
"""A watch that never holds: the layer is brought up to date at the next check."""


@traced_constant
class LayerKey(Uncopyable):
    """Stands for a layer where compiled code is traced; equal to those of the same cache.

    Comparing it with one that was traced brings the layer up to date; see the module.

    Args:
        cache: a string that stands for the cache.
        holder: the layer's; no strong reference is kept.
        checks: whether the layer is to be checked.
    """

    __slots__ = ("__weakref__", "_holder", "cache", "checks")

    def __init__(self, cache: str, holder: Checked, *, checks: bool) -> None:
        self.cache = cache
        self.checks = checks
        self._holder = weakref.ref(holder)

    @property
    def holder(self) -> Checked | None:
        """The layer's, or None if it is gone."""
        return self._holder()

    def __eq__(self, other: object) -> bool:
        if other is self:  # the code's own check sees to it
            return True
        if type(other) is not LayerKey or other.cache != self.cache:
            return False
        if not self.checks:
            return True
        holder = self._holder()
        return holder is not None and holder.check()

    def __hash__(self) -> int:
        return hash(self.cache)

    def __repr__(self) -> str:
        return self.cache


class EntryCheck(Uncopyable):
    """The check of all layers whose views one piece of compiled code reads."""

    __slots__ = ("__weakref__", "_changes", "_holders", "_known")

    def __init__(self) -> None:
        self._holders: dict[weakref.ref[Checked], None] = {}
        self._changes = 0
        self._known: tuple[int, Watch, list[Checked]] | None = None

    def add(self, holder: Checked) -> None:
        """Check a layer as well; the cache's lock is held."""
        holder.entries.add(self)
        self._holders[weakref.ref(holder)] = None
        self.changed()

    def changed(self) -> None:
        """Look anew at what the layers watch; the cache's lock is held."""
        self._changes += 1
        self._known = None  # and keep nothing of it alive

    def check(self) -> bool:
        """Bring the layers up to date; return whether the code may read what it has read before.

        It never raises.
        """
        try:
            known = self._known
            if known is None or known[0] != self._changes:
                known = self._look()
            _, watch, others = known
            held = watch.holds()
            if held and not others:
                return True
            holders = others if held else self._living()
        except Exception:  # noqa: BLE001 - what was watched is not there any more, or worse
            holders = self._living()
        # In any case all of them: what is behind is brought up to date before the next call.
        found = [holder.check() for holder in holders]
        return all(found)

    def _living(self) -> list[Checked]:
        return [holder for weak in list(self._holders) if (holder := weak()) is not None]

    def _look(self) -> tuple[int, Watch, list[Checked]]:
        """Note what all layers watch, and which of them have to be looked at one by one."""
        changes = self._changes  # before anything is read: what comes meanwhile shows
        fast: list[Watch] = []
        others: list[Checked] = []
        for holder in self._living():
            watch = holder.watch
            if watch is not None:
                if watch.complete:
                    fast.append(watch)
                else:
                    others.append(holder)
        self._known = known = changes, joined(fast), others
        return known


def enter(cache: Engine, holder: Checked) -> None:
    """Have the code that is traced now check a layer at each call."""
    region = traced_region()
    if region is None:
        return
    guards = _regions.setdefault(region, {})
    guard, reference = guards.get(cache.token, (None, lambda: None))
    entry = reference()
    if guard is None or entry is None:
        entry = EntryCheck()
        reference = weakref.ref(entry)
        check = partial(_check, reference)
        # The cache keeps it for as long as there is code that calls the check.
        cache.buffers.entries[check] = entry
        guard = EntryGuard(check)
        guards[cache.token] = guard, reference
    with cache.mutex.held():
        entry.add(holder)
    guard.install()


def _check(reference: weakref.ref[EntryCheck]) -> bool:
    entry = reference()
    return entry is not None and entry.check()


_regions: weakref.WeakKeyDictionary[
    Any, dict[int, tuple[EntryGuard, Callable[[], EntryCheck | None]]]
] = weakref.WeakKeyDictionary()
