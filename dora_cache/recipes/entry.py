"""The check at entry of compiled code: what it reads is up to date before it runs.

In-place writes, other data in a parameter and scalings set by hand raise no event, and compiled
code looks nothing up. So TorchDynamo's guards, which are checked at each call and outside of CUDA
graphs, come here: one pass compares what the buffers were filled from with what is there now. Those
for which that has changed are filled again, at the same addresses. A guard fails only if that
cannot be done.

Two guards share the work. One of the code as a whole checks the layers that were traced. Where
other layers run the same code, as blocks do that are compiled one by one, the :class:`Key` of each
is compared with that of the layer that was traced, and checks its own.
"""

from __future__ import annotations

import weakref
from functools import partial
from operator import attrgetter, getitem, is_
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from dora_cache.ambient import EntryGuard, traced_constant, traced_region
from dora_cache.copying import Uncopyable
from dora_cache.facts import EXACT

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

    from dora_cache.engine import Engine
    from dora_cache.facts import Reading
    from dora_cache.recipes.compiled import Buffer

__all__ = ["Entry", "Key", "Watch", "enter", "watch"]

_version: Callable[[Tensor], int] = attrgetter("_version")
_address = Tensor.data_ptr
Layouts = tuple[tuple[object, ...], ...]
_SCALARS = (bool, int, float, complex, str)


class Watch(NamedTuple):
    """What values depend on as it was when they were derived, to be compared fast.

    Attributes:
        tensors: the tensors.
        versions: their version counters.
        addresses: of their data.
        layouts: their sizes, strides and dtypes; equal ones are the same object.
        mappings: where scalars are, and tensors that are no parameters: in a mapping of mappings.
        names: keys in these.
        keys: keys in what is found there.
        items: what was found there in turn.
        complete: whether nothing else matters. Else all dependencies have to be listed and read.
    """

    tensors: list[Tensor]
    versions: list[int]
    addresses: list[int]
    layouts: Layouts
    mappings: list[Mapping[Any, Any]]
    names: list[Hashable]
    keys: list[Hashable]
    items: list[object]
    complete: bool

    def holds(self) -> bool:
        """Whether all but the layouts is as it was. Raises if something is not there any more."""
        found = map(getitem, map(getitem, self.mappings, self.names), self.keys)
        return (
            list(map(_version, self.tensors)) == self.versions
            and list(map(_address, self.tensors)) == self.addresses
            and all(map(is_, found, self.items))
        )

    def holds_entirely(self) -> bool:
        """Whether everything is as it was, layouts included. Raises as :meth:`holds`."""
        return self.complete and self.holds() and _layouts_of(self.tensors) is self.layouts


def watch(owner: Any, adapter: str, dependencies: Iterable[object], reading: Reading) -> Watch:
    """Note what a layer's values depend on.

    Args:
        owner: the layer.
        adapter: the adapter's name.
        dependencies: as they are listed. Scalars are looked for among the layer's attributes, and
            under the adapter's name in those that are dictionaries.
        reading: of the dependencies.
    """
    complete = not reading.elsewhere
    places: list[tuple[Mapping[Any, Any], Hashable, Hashable, object]] = []
    for item in dependencies:
        if isinstance(item, Tensor):
            complete &= type(item) in EXACT  # one that wraps others may exchange them
            places += _places(owner, adapter, item)
        elif item is not None:  # that is a parameter's place, which compiled code compares itself
            found = _places(owner, adapter, item) if isinstance(item, _SCALARS) else []
            complete &= bool(found)
            places += found
    tensors = list(reading.tensors)
    mappings, names, keys, items = [list(column) for column in zip(*places)] or ([], [], [], [])
    return Watch(
        tensors,
        list(map(_version, tensors)),
        list(map(_address, tensors)),
        _layouts_of(tensors),
        mappings,
        names,
        keys,
        items,
        complete,
    )


def _layouts_of(tensors: Iterable[Tensor]) -> Layouts:
    found = tuple([(tensor.size(), tensor.stride(), tensor.dtype) for tensor in tensors])
    return _known_layouts.setdefault(found, found)


_known_layouts: dict[Layouts, Layouts] = {}


def _places(
    owner: Any, adapter: str, item: object
) -> list[tuple[Mapping[Any, Any], Hashable, Hashable, object]]:
    state = owner.__dict__
    found: list[tuple[Mapping[Any, Any], Hashable, Hashable, object]] = []
    for name, value in state.items():
        if value is item:
            found.append(({None: state}, None, name, item))
        elif type(value) is dict and value.get(adapter) is item:
            found.append((state, name, adapter, item))
    return found


def _joined(watches: Sequence[Watch]) -> Watch:
    """Return what several complete ones watch as one, each tensor once."""
    facts = {
        (id(tensor), version, address): tensor
        for one in watches
        for tensor, version, address in zip(one.tensors, one.versions, one.addresses, strict=True)
    }
    return Watch(
        list(facts.values()),
        [version for _, version, _ in facts],
        [address for _, _, address in facts],
        (),  # compared for each, where they matter
        [mapping for one in watches for mapping in one.mappings],
        [name for one in watches for name in one.names],
        [key for one in watches for key in one.keys],
        [item for one in watches for item in one.items],
        complete=True,
    )


@traced_constant
class Key(Uncopyable):
    """Stands for a buffer where compiled code is traced; equal to those of the same cache.

    Comparing it with one that was traced brings the buffer up to date; see the module.

    Args:
        cache: a string that stands for the cache.
        buffer: the buffer; no strong reference is kept.
        checks: whether the buffer is to be checked.
        layouts: those that the buffer was filled from when the layer was traced. The compiler's
            own guards see to it that other layers that run the code have the same.
    """

    __slots__ = ("__weakref__", "_buffer", "cache", "checks", "layouts")

    def __init__(
        self, cache: str, buffer: Buffer, *, checks: bool, layouts: Layouts | None = None
    ) -> None:
        self.cache = cache
        self.checks = checks
        self.layouts = layouts
        self._buffer = weakref.ref(buffer)

    @property
    def buffer(self) -> Buffer | None:
        """The buffer, or None if it is gone."""
        return self._buffer()

    def __eq__(self, other: object) -> bool:
        if type(other) is not Key or other.cache != self.cache:
            return False
        if not self.checks:
            return True
        buffer = self._buffer()
        return buffer is not None and buffer.check(other.layouts)

    def __hash__(self) -> int:
        return hash(self.cache)

    def __repr__(self) -> str:
        return self.cache


class Entry(Uncopyable):
    """The check of all buffers that one piece of compiled code reads.

    Layouts are not compared at each call. The compiler's own guards see to it that they are those
    that were traced. So only what has been filled since, from other layouts, is looked at again.
    """

    __slots__ = ("__weakref__", "_buffers", "_changes", "_known")

    def __init__(self) -> None:
        self._buffers: dict[weakref.ref[Buffer], Layouts | None] = {}
        self._changes = 0
        self._known: tuple[int, Watch, list[Buffer]] | None = None

    def add(self, buffer: Buffer) -> None:
        """Check a buffer as well, whose key has been traced; the cache's lock is held."""
        buffer.entries.add(self)
        self._buffers[weakref.ref(buffer)] = buffer.cache[0].layouts
        self.changed()

    def changed(self) -> None:
        """Look anew at what the buffers were filled from; the cache's lock is held."""
        self._changes += 1
        self._known = None  # and keep nothing of it alive

    def check(self) -> bool:
        """Bring the buffers up to date; return whether the code may read what it has read before.

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
            return self._renew(others if held else self._living())
        except Exception:  # noqa: BLE001 - what it was filled from is not there any more, or worse
            for buffer in self._living():
                buffer.give_up()
            return False

    def _living(self) -> list[Buffer]:
        return [buffer for weak in list(self._buffers) if (buffer := weak()) is not None]

    def _look(self) -> tuple[int, Watch, list[Buffer]]:
        """Note what all buffers watch, and which of them have to be looked at one by one."""
        changes = self._changes  # before anything is read: what comes meanwhile shows
        fast: list[Watch] = []
        others: list[Buffer] = []
        for weak, layouts in list(self._buffers.items()):
            buffer = weak()
            watch = None if buffer is None else buffer.watch
            if buffer is not None and watch is not None:
                if watch.complete and watch.layouts is layouts:
                    fast.append(watch)
                else:
                    others.append(buffer)
        self._known = known = changes, _joined(fast), others
        return known

    def _renew(self, buffers: list[Buffer]) -> bool:
        before = [(buffer, buffer.values) for buffer in self._living()]
        for buffer in buffers:
            buffer.renew()
        return all(buffer.values is values for buffer, values in before)


def enter(cache: Engine, buffer: Buffer) -> None:
    """Have the code that is traced now check a buffer, whose key is traced, at each call."""
    region = traced_region()
    if region is None:
        return
    guards = _regions.setdefault(region, {})
    guard, reference = guards.get(cache.token, (None, lambda: None))
    entry = reference()
    if guard is None or entry is None:
        entry = Entry()
        reference = weakref.ref(entry)
        check = partial(_check, reference)
        # The cache keeps it for as long as there is code that calls the check.
        cache.buffers.entries[check] = entry
        guard = EntryGuard(check)
        guards[cache.token] = guard, reference
    with cache.mutex.lock:
        entry.add(buffer)
    guard.install()


def _check(reference: weakref.ref[Entry]) -> bool:
    entry = reference()
    return entry is not None and entry.check()


_regions: weakref.WeakKeyDictionary[
    Any, dict[int, tuple[EntryGuard, Callable[[], Entry | None]]]
] = weakref.WeakKeyDictionary()
