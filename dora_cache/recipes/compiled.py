"""What compiled code reads: derived values at fixed addresses, filled ahead of its use.

Compiled code cannot look anything up. It reads tensors, and its guards are checked before each
call. Guards on names and numbers would have each adapter compiled anew. So recipes' forwards are
traced with a :class:`View` in a layer's place, which has the layer's active adapters under names
that are the same for all, and scalings as tensors. The view, and the values that were derived for
its adapters, are attributes of a :class:`Holder`. Compiled code guards on their types, shapes and
dtypes; events change what they are.

- ``torch.compile`` runs :func:`_prepare` and :func:`_slot` as ordinary code while a layer is
  traced, and takes what they return for constants. The first brings views up to date. The second
  derives the value that a forward asks for, for all layers of the same form: blocks that are
  compiled one by one share their code, so no guard may tell one layer from another.
- Events that void stored values take the tensors out of the holder and fill them again at the same
  addresses, without a recompilation. Another active adapter's values are at other addresses.
- What raises no event is noticed where compiled code is entered: see
  :mod:`dora_cache.recipes.entry`.
- Where that cannot be done at once, the holder has None. Then a guard fails, the layer is traced
  again, and tracing fills it: at worst compiled code costs a recompilation, never a wrong number.
- A value that cannot be kept (for lack of room, or since nothing tells when it changes) is derived
  in the graph: by an operator of its own, which runs the very function at each call.
- Compiled code uses a view only while the parameters in it are those that it was made of, the very
  objects. So it notices by itself if others are put in their place, for the duration of a
  ``functional_call`` for example; also if that is part of what is traced.
"""

from __future__ import annotations

import functools
import itertools
import operator
import threading
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from dora_cache.ambient import (
    entry_guards_work,
    environment,
    traced_writes,
    traced_writes_show,
    untraceable,
)
from dora_cache.backends.storage import storage_bytes
from dora_cache.binding import with_children
from dora_cache.copying import Uncopyable
from dora_cache.decorator import GATE, SLOT, derivations
from dora_cache.dependencies import listed
from dora_cache.facts import Facts, Reading, UncheckableError, read
from dora_cache.reasons import Reason
from dora_cache.recipes.entry import (
    BEHIND,
    Key,
    enter,
    joined,
    watch,
    watch_later,
    watch_places,
)
from dora_cache.recipes.views import canonical, form_of, layout_of, looks_of, stand_in

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Mapping, Sequence

    from dora_cache.binding import Binding
    from dora_cache.decorator import Derivation
    from dora_cache.engine import Engine
    from dora_cache.recipes.entry import Entry, Place, Watch

__all__ = ["Buffer", "Holder", "noted", "opaque", "view_of", "viewed"]

_ATTEMPTS = 3
_NO_GUARDS = (
    "this version of PyTorch has no guards that call a function. It derives the values itself. "
    "With compiled_check=False it reads stored ones, and you call refresh() after writes to weights"
)
_NO_EFFECTS = "this version of PyTorch does not tell what compiled code writes while it is traced"
_SURPRISES = 3  # below PyTorch's limit of recompilations
_SCALINGS = ("scaling",)
"""Attributes of layers with a number for each adapter that is not part of what is derived."""


class _GoneError(Exception):
    """The layer has no such adapter any more, or only a part of it."""


class _Call(NamedTuple):
    """A call of a decorated function, without its owner.

    Attributes:
        number: the derivation's.
        args: the other positional arguments; adapters by the names that views have for them.
        kwargs: keyword arguments, as pairs.
    """

    number: int
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]


class _Known:
    """What compiled code of this process knows by number: it cannot refer to anything else."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.holders: weakref.WeakValueDictionary[int, Holder] = weakref.WeakValueDictionary()
        self.calls: dict[_Call, int] = {}
        self.forms: dict[object, int] = {}
        self.notes: dict[int, tuple[weakref.ref[Engine], str, Hashable]] = {}
        self.outputs: dict[tuple[int, int], list[tuple[Any, ...]]] = {}
        self.handles = itertools.count(1)

    def number(self, table: dict[Any, int], key: Any) -> int:
        """Return the number of something; the same one for what is equal."""
        with self.lock:
            return table.setdefault(key, len(table) + 1)


_known = _Known()
_prepared: weakref.WeakKeyDictionary[Engine, weakref.ref[Any]] = weakref.WeakKeyDictionary()


class Face(nn.Module):
    """What compiled code looks at, beside the model's own modules.

    A module whose attributes are tensors, modules and plain values: TorchDynamo skips the guards of
    such a module, and of all in it, while no dictionary in it has changed. It copies and pickles as
    None.
    """

    def __reduce_ex__(self, protocol: object) -> tuple[Callable[[], None], tuple[()]]:
        return type(None), ()


class Gate(Face):
    """Where compiled code begins to look.

    Attributes:
        key: what is traced passes it to :func:`_prepare`: in a tuple, since TorchDynamo guards a
            bare argument by its identity.
        form: a number that stands for all of the view but contents, names and scalings.
        own: without the check at entry, tables with parameters and buffers, names in them, and what
            the view has been made of; else None.
        view: stands for the layer; None while it cannot.
    """

    def __init__(self, key: Key) -> None:
        super().__init__()
        self.training = False
        self.key = (key,)
        self.form = 0
        self.own: tuple[tuple[Mapping[Any, Any], Hashable, object], ...] | None = None
        self.__dict__["view"] = None  # no submodule


class Reads(Face):
    """What a view has in place of a layer's binding; cached functions read values through it.

    The values are attributes: of call 5 it is ``v5``, or ``v5_0``, ``v5_1``, ... if there are
    several. ``v5`` is None while there are none.

    Attributes:
        form: as the gate's.
        handle: a number that stands for the holder, as a tensor: no guard is on its value.
        tensors: the parameters and buffers in the view that have a place.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.training = False
        self.form = 0
        self.handle = torch.tensor(number, device="cpu")
        self.tensors: tuple[Tensor, ...] = ()

    @property
    def reader(self) -> Reads:
        """Itself."""
        return self

    def read(self, derivation: Derivation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the value of a call whose owner is the view; ``torch.compile`` traces this."""
        form = self.form
        if torch.is_autocast_enabled(_device_of(form)) or (  # the library may derive another value
            torch.is_grad_enabled() and not derivation.detach and self.wants_gradients()
        ):
            return derivation.function(*args, **kwargs)
        slot, count = _slot(form, derivation.number, args[1:], tuple(kwargs.items()))
        if not slot:
            raise UncheckableError("the value cannot be derived")
        values = getattr(self, f"v{slot}")
        if values is None:
            found = torch.ops.dora_cache.derive(self.handle, form, slot)
            return tuple(found) if count else found[0]
        if not count:
            return values
        return tuple([getattr(self, f"v{slot}_{number}") for number in range(count)])

    def wants_gradients(self) -> bool:
        """Whether a tensor of the view requires a gradient."""
        return any([tensor.requires_grad for tensor in self.tensors])  # noqa: C419 - it is traced


class Buffer(Uncopyable):
    """A value of one layer and its adapters, at a fixed address; empty until it is filled.

    Args:
        holder: of the layer.
        number: the call's.
        derivation: derives it.
        args: the arguments, without the layer; adapters by their own names.
        kwargs: keyword arguments.

    Attributes:
        adapters: the names of the adapters that were active.
        values: what compiled code reads; None while that does not hold.
        facts: what the values were derived from; None if there are none.
        watch: likewise, to be compared fast.
        stale: whether an event has voided it since it was last filled.
        nbytes: the bytes of its tensors, those out of use for the moment included.
    """

    def __init__(
        self,
        holder: Holder,
        number: int,
        derivation: Derivation,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        self.adapters = tuple(holder.names)
        self.values: Tensor | tuple[Tensor, ...] | None = None
        self.facts: Facts | None = None
        self.watch: Watch | None = None
        self.stale = True
        self.nbytes = 0
        self.number = number
        self.outputs: list[tuple[Any, ...]] | None = None
        self._holder = holder
        self._derivation = derivation
        self._args = args
        self._kwargs = kwargs
        self._tensors: tuple[Tensor, ...] = ()
        self._plain: object = None
        self._surroundings: object = None
        self._filling = threading.RLock()
        self._busy = False

    def void(self) -> None:
        """Keep compiled code from reading it until it is filled; the cache's lock is held."""
        self.stale = True
        self.values = None
        self._holder.show(self)

    def drop(self) -> None:
        """Void it and free its tensors; the cache's lock is held."""
        self.void()
        self.nbytes = 0
        self._tensors = ()
        self.facts = None

    def publish(self, values: Tensor | tuple[Tensor, ...]) -> None:
        """Let compiled code read it; the cache's lock is held."""
        self.values = values
        self._holder.show(self)

    def derived_from(self, storages: set[int]) -> bool:
        """Whether one of these storages holds something that the values were derived from."""
        return self.facts is not None and not storages.isdisjoint(self.facts.storages)

    def holds(self, owner: Any) -> bool:
        """Whether the values are what would be derived at present."""
        if self.stale or self.facts is None:
            return False
        reading = read(self._dependencies(owner))
        return self.facts.rows == reading.rows and self._plain == reading.plain

    def fill(self) -> bool:
        """Derive the values again if they no longer hold.

        Returns:
            Whether they were derived. If they do not hold and cannot be derived, they are void.
        """
        holder = self._holder
        owner, cache = holder.owner, holder.engine
        if owner is None or cache is None:
            return False
        with self._filling:
            if self._busy or untraceable():  # deriving has caused an event
                return False
            self._busy = True
            try:
                for _ in range(_ATTEMPTS):
                    filled = self._fill(cache, owner)
                    if filled is not None:
                        return filled
            except (_GoneError, UncheckableError) as error:
                if isinstance(error, UncheckableError):
                    cache.passed_by(error.reason, holder.binding)
                cache.buffers.drop(self)
                return False
            except Exception as error:  # noqa: BLE001 - never an inference failure: it is void
                cache.failed("filling a buffer for compiled code", error)
            finally:
                self._busy = False
            cache.buffers.void(self)
        return False

    def _fill(self, cache: Engine, owner: Any) -> bool | None:
        """Fill it once, as :meth:`fill`; None if something has happened meanwhile."""
        held, self.stale = not self.stale and self.values is not None, False
        # An event from now on shows.
        with _plainly(owner):
            dependencies = self._dependencies(owner)
            reading = read(dependencies)
            if reading.refilled:
                msg = "compiled code cannot tell what a refilled storage holds"
                raise UncheckableError(msg, Reason.REFILLED)
            self.watch = self._watched(owner, dependencies, reading)
            surroundings = environment()
            if (
                held
                and self.facts is not None
                and self.facts.rows == reading.rows
                and self._plain == reading.plain
                and self._surroundings == surroundings
            ):
                return False
            self.facts, self._plain, self._surroundings = (
                Facts(reading),
                reading.plain,
                surroundings,
            )
            derived, single = self.derive(owner)
            after = read(self._dependencies(owner))
            if after.rows != reading.rows or after.plain != reading.plain:
                return None
            if _alike(self._tensors, derived):
                for tensor, value in zip(self._tensors, derived, strict=True):
                    tensor.copy_(value)
            else:
                # Storages of their own: what is counted is what is held.
                tensors = tuple(value.detach().clone() for value in derived)
                nbytes = storage_bytes(tensors)
                if not cache.buffers.reserve(self, nbytes, tensors[0].device):
                    cache.passed_by(Reason.CAP, self._holder.binding)
                    return False
                for tensor in tensors:  # CUDA graphs read them in place
                    torch._dynamo.mark_static_address(tensor, guard=False)
                self._tensors = tensors
        values = self._tensors[0] if single else self._tensors
        return True if cache.buffers.publish(self, values) else None

    def derive(self, owner: Any) -> tuple[tuple[Tensor, ...], bool]:
        """Derive the values; return them, and whether they are one tensor and no tuple."""
        found = self._derivation.function(owner, *self._args, **self._kwargs)
        single = isinstance(found, Tensor)
        derived: tuple[Tensor, ...] = (found,) if single else found
        self.outputs = [layout_of(value) for value in derived] + [(single,)]
        return derived, single

    def describe(self) -> list[tuple[Any, ...]] | None:
        """Return what the values are like, deriving them if need be; None if they cannot be."""
        owner = self._holder.owner
        if self.outputs is None and owner is not None:
            try:
                with _plainly(owner):
                    self.derive(owner)
            except Exception:  # noqa: BLE001 - the library's own code says why
                return None
        return self.outputs

    def _dependencies(self, owner: Any) -> list[object]:
        depends_on = self._derivation.depends_on
        assert depends_on is not None  # noqa: S101 - recipes give one
        try:
            return list(listed(depends_on(owner, *self._args, **self._kwargs)))
        except KeyError:
            raise _GoneError from None

    def _watched(self, owner: Any, dependencies: list[object], reading: Reading) -> Watch:
        guarded = set(map(id, self._holder.tensors))
        found = watch(owner, self.adapters, dependencies, reading, guarded)
        if not getattr(self._derivation.depends_on, "__module__", "").startswith("dora_cache."):
            found = found._replace(complete=False)  # of others: scalars may be from anywhere
        return found


class Holder(Uncopyable):
    """Keeps what compiled code reads of one layer up to date.

    Args:
        binding: the layer's.
        active: called with the layer; returns the names of its active adapters, in order. It raises
            an UncheckableError if the library's own code has to run at present.
        shallow: whether the layer's modules and parameters are no matter of the view's.

    Attributes:
        gate: where compiled code begins to look.
        reads: what it reads values from.
        entries: the checks of the code that reads the view.
        watch: what the view and the values were made from; None while there is no view.
        names: the active adapters that the view has.
        used: whether compiled code has ever asked for it.
        idle: whether the layer has none of the active adapters.
        dependants: holders of layers to which it matters what this layer's active adapters are.
        finish: called with the layer and a view of it that has just been made; completes the view.
        remark: called with a view; returns what else compiled code is made for, hashable; and what
            it is to find as attributes of :attr:`reads`.
    """

    def __init__(
        self,
        binding: Binding,
        active: Callable[[Any], Sequence[str]],
        *,
        shallow: bool = False,
    ) -> None:
        cache = f"cache {binding.cache.token}"
        number = next(_known.handles)
        self.gate = Gate(Key(cache, self, checks=binding.cache.config.compiled_check))
        self.reads = Reads(number)
        self.entries: weakref.WeakSet[Entry] = weakref.WeakSet()
        self.watch: Watch | None = None
        self.names: tuple[str, ...] = ()
        self.used = False
        self.idle = False
        self.dependants: weakref.WeakSet[Holder] = weakref.WeakSet()
        self.finish: Callable[[Any, Any], None] | None = None
        self.remark: Callable[[Any], tuple[Hashable, Mapping[str, object]]] = _nothing
        self.shallow = shallow
        self._slots: dict[int, int] = {}
        self._copies: set[int] = set()
        self._binding = weakref.ref(binding)
        self._active = active
        self._scalings: dict[str, Tensor] = {}
        self._numbers: dict[str, float] = {}
        self._places: Watch = watch_places([])
        self.lease = _Lease(self)
        self._updating = threading.RLock()
        self._busy = False
        self._surprises = 0
        self._arrivals = itertools.count()
        self._coming: dict[int, tuple[Mapping[str, Any], str, weakref.ref[Any] | None]] = {}
        _known.holders[number] = self
        binding.holder = self
        owner: Any = binding.owner
        owner.__dict__[GATE] = self.gate
        binding.undo.callback(_remove_gate, weakref.ref(owner))

    @property
    def view(self) -> Any:
        """Stands for the layer; None while it cannot."""
        return self.gate.__dict__["view"]

    @property
    def form(self) -> int:
        """A number that stands for all of the view but contents, names and scalings."""
        return self.gate.form

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The parameters and buffers in the view that have a place."""
        return self.reads.tensors

    @property
    def binding(self) -> Any:
        """The layer's binding, or None if it is gone."""
        return self._binding()

    @property
    def engine(self) -> Engine | None:
        """The cache, or None if it is gone."""
        binding = self._binding()
        return None if binding is None else binding.cache

    @property
    def owner(self) -> Any:
        """The layer, or None if it is gone."""
        binding = self._binding()
        return None if binding is None else binding.owner

    def show(self, buffer: Buffer) -> None:
        """Have compiled code read what a buffer of the active adapters has; the lock is held."""
        if buffer.adapters != self.names:
            return
        values, table, slot = buffer.values, self.reads.__dict__, f"v{buffer.number}"
        table[slot] = values
        if isinstance(values, tuple):
            for number, value in enumerate(values):
                table[f"{slot}_{number}"] = value
            table[slot], self._slots[buffer.number] = True, len(values)

    def changed(self) -> None:
        """Follow something that has happened to the layer or a part of it."""
        for holder in (self, *self.dependants):
            if holder.used:
                holder.update()

    def gets(self, table: Mapping[str, Any], name: str, new: object) -> None:
        """Take note that a container that the view has copied gets a part; takes no lock."""
        weak = None if new is None else weakref.ref(new)
        self._coming[next(self._arrivals)] = table, name, weak
        if self.gate.key[0].checks:
            self._note(BEHIND)
        else:
            self.clear()

    def clear(self) -> None:
        """Have no view until it is made again; the lock is held."""
        self._face(None, 0, (), {})
        self._note(None)

    def _face(
        self, view: Any, form: int, tensors: tuple[Tensor, ...], parts: Mapping[str, object]
    ) -> None:
        """Have compiled code see another view; the lock is held."""
        self.gate.__dict__.update(view=view, form=form)
        self.reads.__dict__.update(parts, form=form, tensors=tensors)

    def _note(self, watch: Watch | None) -> None:
        """Watch something else from now on; the lock is held."""
        self.watch = watch
        for entry in list(self.entries):
            entry.changed()

    def check(self) -> bool:
        """Bring it up to date; return whether what compiled code has read of it still holds.

        It never raises.
        """
        watch = self.watch
        if watch is None:
            return True
        # What was watched may not be there any more, or worse: updating shows it.
        with suppress(Exception):
            if watch.holds() and (watch.complete or self._holds()):
                return True
        before, values = self._shown()
        try:
            self.update()
        except Exception as error:  # noqa: BLE001 - never an inference failure: it is given up
            cache = self.engine
            if cache is not None:
                cache.failed("the check of compiled code", error)
        if self.watch is watch:  # it has not even been looked at
            self._give_up()
        after, others = self._shown()
        return after == before and all(map(operator.is_, values, others))

    def _holds(self) -> bool:
        """Whether the values are what would be derived now. Raises if that cannot be told."""
        binding, owner = self._binding(), self.owner
        return binding is not None and all(buffer.holds(owner) for buffer in self._filled())

    def written(self) -> bool:
        """Whether code that is traced has written to what the view and the values are made from."""
        watch, owner = self.watch, self.owner
        if watch is None:
            return False
        mappings, names, *_ = watch.named
        nested = [mapping[name] for mapping, name in zip(mappings, names, strict=True)]
        objects = [owner, *watch.tables, *mappings, *nested]
        return traced_writes(objects, (*self.tensors, *watch.tensors))

    def _filled(self) -> list[Buffer]:
        """Return the buffers that compiled code reads now."""
        binding = self._binding()
        found: list[Any] = [] if binding is None else list(binding.buffers.values())
        return [one for one in found if one.adapters == self.names and one.values is not None]

    def _shown(self) -> tuple[tuple[object, ...], list[object]]:
        """Return what compiled code reads that an update may change, to be compared."""
        table = self.reads.__dict__
        names = [f"v{slot}" for slot in self._slots]
        names += [f"v{slot}_{one}" for slot, many in self._slots.items() for one in range(many)]
        values = [*map(table.get, names), *self._scalings.values()]
        looks = None if self.view is None else looks_of(self.view, shallow=self.shallow)
        kinds = [(type(tensor), tensor.requires_grad) for tensor in self.tensors]
        return (self.form, len(values), looks, kinds), values

    def _give_up(self) -> None:
        """Have no view: compiled code is compiled again before it reads one."""
        cache = self.engine
        if cache is not None:
            with cache.mutex.held():
                self.clear()

    def close(self) -> None:
        """Show nothing any more; the lock is held."""
        self.clear()
        self.used = False
        self._scalings.clear()

    def update(self, *, traced: bool = False) -> int:
        """Bring the view up to date, and the values that compiled code reads of it.

        If time and again a trace finds that it no longer holds, each time may have been a
        recompilation (weights come and go with offloading, for example): then it is given up.

        Args:
            traced: whether a layer is being traced.

        Returns:
            How many values were derived.
        """
        binding = self._binding()
        if binding is None or not self.used:
            return 0
        with self._updating:
            if self._busy or untraceable():
                return 0
            self._busy = True
            try:
                return self._update(binding, traced=traced) + sum(
                    member.holder.update()
                    for member in with_children(binding)
                    if member is not binding and member.holder is not None
                )
            finally:
                self._busy = False

    def _update(self, binding: Binding, *, traced: bool) -> int:
        owner, cache = binding.owner, binding.cache
        if owner is None or cache.closed:
            return 0
        reason = binding.why_training(owner)
        try:
            if reason is not None:
                raise UncheckableError("it trains", reason)
            names = tuple(self._active(owner))
            places: list[Place] = []
            view = self._view(owner, names, places) if names else None
            if view is not None and self.finish is not None:
                self.finish(owner, view)
            note, flat = (None, {}) if view is None else self.remark(view)
            self.idle = not names
        except Exception as error:  # noqa: BLE001 - never an inference failure
            if not isinstance(error, (UncheckableError, KeyError, AttributeError)):
                cache.failed("preparing a layer for compiled code", error)
            names, view = (), None
            self.idle = False
        if view is None:
            with cache.mutex.held():
                self.clear()
            if traced and reason is not None:
                cache.passed_by(reason, binding)
            return 0
        parts, tensors, signs = form_of(view, self._copies, shallow=self.shallow)
        device = tensors[0].device.type if tensors else "cpu"
        form = _known.number(_known.forms, (cache.token, signs, note, device))
        others = (
            self.view is not None
            and names == self.names
            and any(one is not two for one, two in zip(tensors, self.tensors, strict=False))
        )
        with cache.mutex.held():
            if traced and others and self._is_surprised():
                self.clear()
                cache.buffers.drop(self.lease)
                return 0
            switched, known = names != self.names, form == self.form
            self.names = names
            self._face(view, form, tensors, flat)
            for tensor in tensors:  # as the compiler does with a module's own: not to be copied
                torch._dynamo.mark_static_address(tensor, guard=False)
            self._places = watch_places(places + parts)
            if not self.gate.key[0].checks:
                own = [(table, key, item) for table, _, key, item in parts]
                self.gate.__dict__["own"] = tuple(own)
            _known.notes.setdefault(form, (weakref.ref(cache), device, note))
            wanted = cache.buffers.wanted.get(form, ())
            if switched:
                for slot in self._slots:
                    self.reads.__dict__[f"v{slot}"] = None
            buffers: list[tuple[Any, Any]] = list(binding.buffers.items())
            for key, buffer in buffers:
                if buffer.adapters == names and buffer.number not in wanted:  # of another form
                    cache.buffers.drop(binding.buffers.pop(key))
        derived = sum(self.want(call) for call in list(wanted))
        self.watched()
        if traced and known and derived and not others:
            self._is_surprised()
        return derived

    def watched(self) -> None:
        """Watch what the view and the values there are were made from."""
        binding = self._binding()
        if binding is None or self.view is None:
            return
        with binding.cache.mutex.held():
            coming: list[int] | None = None
            while coming != list(self._coming):  # others may be announced meanwhile, by any thread
                for number, one in list(self._coming.items()):
                    if not _is_pending(*one):
                        del self._coming[number]
                coming = list(self._coming)
                pending = watch_later([one[:2] for one in self._coming.values()])
                found = [buffer.watch for buffer in self._filled() if buffer.watch is not None]
                self._note(joined([self._places, pending, *found]))

    def _is_surprised(self) -> bool:
        """Take note that what was traced no longer holds; return whether to give up.

        Without its values, a layer derives them in the graph.
        """
        self._surprises += 1
        binding = self._binding()
        if self._surprises <= _SURPRISES or binding is None:
            return False
        for buffer in list(binding.buffers.values()):
            binding.cache.buffers.drop(buffer)
        return True

    def refresh(self) -> int:
        """Do as :meth:`update`, for adapters that are not active as well."""
        found = self.update()
        binding = self._binding()
        if binding is not None and self.used and self._surprises <= _SURPRISES:
            buffers: list[Any] = list(binding.buffers.values())
            found += sum(buffer.fill() for buffer in buffers)
        return found

    def want(self, number: int) -> bool:
        """Have the value of a call there; return whether it was derived."""
        self._slots.setdefault(number, 0)
        self.reads.__dict__.setdefault(f"v{number}", None)
        buffer = self._buffer(number)
        cache = self.engine
        if buffer is None or cache is None:
            return False
        if cache.compares_contents or self._surprises > _SURPRISES:
            cache.buffers.drop(buffer)
            return False
        filled = buffer.fill()
        with cache.mutex.held():
            self.show(buffer)
        return filled

    def _buffer(self, number: int) -> Buffer | None:
        """Return the buffer of a call for the active adapters; None if there is no such call."""
        binding = self._binding()
        if binding is None or self.view is None:
            return None
        key = number, self.names
        buffer: Any = binding.buffers.get(key)
        if buffer is None:
            call = next((one for one, known in _known.calls.items() if known == number), None)
            derivation = None if call is None else derivations.get(call.number)
            if call is None or derivation is None:
                return None
            real = {known: name for name, known in canonical(self.names).items()}
            buffer = Buffer(
                self,
                number,
                derivation,
                tuple(real.get(one, one) if type(one) is str else one for one in call.args),
                {name: real.get(one, one) for name, one in call.kwargs},
            )
            binding.cache.buffers.follow(binding, key, buffer)
        return buffer

    def describe(self, number: int) -> list[tuple[Any, ...]] | None:
        """Return what the values of a call are like; None if they cannot be derived."""
        buffer = self._buffer(number)
        return None if buffer is None else buffer.describe()

    def derive(self, number: int) -> list[Tensor]:
        """Derive the value of a call, in compiled code, whatever is stored."""
        buffer, owner = self._buffer(number), self.owner
        if buffer is None or owner is None:
            msg = "compiled code runs a layer that is gone, or is not as it was when it was traced"
            raise RuntimeError(msg)
        with _plainly(owner):
            derived, _ = buffer.derive(owner)
            return [value.detach().clone() for value in derived]

    def _view(self, owner: Any, names: tuple[str, ...], places: list[Place]) -> Any:
        """Make a view of a layer; it shares its modules and parameters.

        Args:
            owner: the layer.
            names: of the active adapters.
            places: gets what the view has copied and no event reports.
        """
        known = canonical(names)
        copied: list[tuple[nn.Module, nn.Module]] = []
        view = stand_in(owner, known, copied)
        for container, _ in copied:
            binding = self._binding()
            if binding is not None:
                binding.cache.buffers.copied(container, self)
        for name in _SCALINGS:
            if type(owner.__dict__.get(name)) is dict:
                scaling = dict(owner.__dict__[name])
                view.__dict__[name] = self._scaled(owner, scaling, known)
                places += [
                    (owner.__dict__, name, one, scaling[one]) for one in names if one in scaling
                ]
        tuner = view._modules.get("base_model")
        if "active_adapter" in view.__dict__ and tuner is not None:  # which has the configurations
            view._modules["base_model"] = stand_in(tuner, known, copied)
        if "base_layer" in owner._modules:
            base = owner._modules["base_layer"]
            places.append((owner._modules, None, "base_layer", base))
        self._copies = {id(clone) for _, clone in copied}
        view.__dict__[SLOT] = self.reads
        view.__dict__.pop(GATE, None)
        return view

    def _scaled(
        self, owner: Any, scaling: Mapping[str, Any], names: Mapping[str, str]
    ) -> dict[str, Any]:
        """Return scalings as tensors: a guard on a number would be a recompilation.

        If the cap has no room for all of them, they are the numbers.
        """
        found = {known: scaling[name] for name, known in names.items() if name in scaling}
        numbers = {known: one for known, one in found.items() if type(one) in {int, float}}
        like = _like(owner)
        # Without dimensions it promotes nothing, as a number would not.
        dtype = torch.float64 if like.dtype is torch.float64 else torch.float32
        missing = [
            known
            for known in numbers
            if (there := self._scalings.get(known)) is None
            or there.dtype is not dtype
            or there.device != like.device
        ]
        if missing:
            with torch.inference_mode(mode=False):
                new = {known: torch.empty((), dtype=dtype, device=like.device) for known in missing}
            tensors = {**self._scalings, **new}
            cache, nbytes = self.engine, storage_bytes(tuple(tensors.values()))
            if cache is None or not cache.buffers.reserve(self.lease, nbytes, like.device):
                return found
            for known, tensor in new.items():
                torch._dynamo.mark_static_address(tensor, guard=False)
                self._numbers.pop(known, None)
            self._scalings = tensors
        for known, value in numbers.items():
            tensor = self._scalings[known]
            if self._numbers.get(known) != value:  # a backward may have saved it as it is
                with torch.inference_mode(mode=False), torch.no_grad():
                    tensor.fill_(value)
                self._numbers[known] = value
            found[known] = tensor
        return found


class _Lease(Uncopyable):
    """Bytes set aside for scalings."""

    adapters: tuple[str, ...] = ()
    stale = False

    def __init__(self, holder: Holder) -> None:
        self.nbytes = 0
        self._holder = holder

    def drop(self) -> None:
        """Give them back; the cache's lock is held."""
        self.nbytes = 0
        self._holder.clear()
        self._holder._scalings.clear()

    def void(self) -> None:
        """Leave it as it is: updates set scalings anew."""

    def publish(self, values: object) -> None:
        """Leave it as it is."""

    def derived_from(self, storages: set[int]) -> bool:  # noqa: ARG002
        """Whether it holds derived values: it does not."""
        return False


def _is_pending(table: Mapping[str, Any], name: str, new: weakref.ref[Any] | None) -> bool:
    """Whether a part that was announced may still come."""
    part = None if new is None else new()
    gone = new is not None and part is None
    return not gone and table.get(name) is not part


def _remove_gate(layer: weakref.ref[Any]) -> None:
    owner = layer()
    if owner is not None:
        owner.__dict__.pop(GATE, None)


def _nothing(_: object) -> tuple[None, dict[str, object]]:
    return None, {}


def view_of(layer: Any) -> Any:
    """Return what a recipe's forward is to be traced with in a layer's place, or None.

    ``torch.compile`` traces this, and guards what is looked at, for each layer and at each call: so
    it is little.
    """
    gate = layer.__dict__.get(GATE)  # None in a copy
    if gate is None or torch.compiler._is_exporting_flag:
        return None
    if not _prepare(gate.key) or not _is_form(gate.form):
        return None
    if gate.own is not None:
        for table, name, tensor in gate.own:
            if table.get(name) is not tensor:
                return None
    return gate.view


@functools.cache
def viewed(plain: Callable[..., Any]) -> Callable[..., Any]:
    """Return a forward that is traced with a layer's view in its place.

    Args:
        plain: the forward of the layer's class.
    """

    @functools.wraps(plain)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            view = view_of(self)
            if view is not None:
                with suppress(UncheckableError):
                    return plain(view, *args, **kwargs)
        return plain(self, *args, **kwargs)

    return forward


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_form(form: int) -> bool:
    """Have compiled code be for this form alone; runs while a layer is traced."""
    return form in _known.notes


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def noted(form: int) -> Any:
    """Return what :attr:`Holder.remark` said of views of a form; runs while a layer is traced."""
    return _known.notes[form][-1]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _device_of(form: int) -> str:
    """Return the type of the device of layers of a form; runs while a layer is traced."""
    return _known.notes[form][1]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _prepare(keys: tuple[Key]) -> bool:
    """Bring all of a model's views up to date; runs while a layer is traced.

    Args:
        keys: the layer's key.
    """
    (key,) = keys
    holder = key.holder
    living = None if holder is None else holder.engine
    if living is None or holder is None or untraceable():
        return False
    why = None if traced_writes_show() else _NO_EFFECTS
    if key.checks and not entry_guards_work():
        why = _NO_GUARDS
    if why is not None:
        living.decline("compiled code", "every layer", why)
        with living.mutex.held():
            for one in living.buffers.holders():
                one.close()
        return False
    context = torch._guards.CompileContext.try_get()
    done = _prepared.get(living, lambda: None)()
    if context is None or done is not context:
        if context is not None:
            _prepared[living] = weakref.ref(context)
        for one in living.buffers.holders():
            one.used = True
            one.update(traced=True)
    if holder.written():
        living.passed_by(Reason.WRITTEN, holder.binding)
        return False
    if key.checks:
        enter(living, holder)
    return True


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _slot(
    form: int, number: int, args: tuple[Any, ...], kwargs: tuple[tuple[str, Any], ...]
) -> tuple[int, int]:
    """Fill the value of a call for all layers of a form; runs while a layer is traced.

    Returns:
        The call's number, 0 if the value cannot be derived; and how many tensors the value has, 0
        if it is a tensor and no tuple.
    """
    living = _known.notes[form][0]()
    if living is None:
        return 0, 0
    call = _known.number(_known.calls, _Call(number, args, kwargs))
    wanted = living.buffers.wanted.setdefault(form, {})
    holders = [one for one in living.buffers.holders() if one.form == form]
    if call not in wanted:
        wanted[call] = None
        for holder in holders:
            holder.want(call)
            holder.watched()
    outputs = _known.outputs.get((form, call))
    if outputs is None:
        outputs = next((found for one in holders if (found := one.describe(call))), None)
        if outputs is None:
            return 0, 0
        _known.outputs[form, call] = outputs
    return call, 0 if outputs[-1][0] else len(outputs) - 1


# Derived in the graph

_library = torch.library.Library("dora_cache", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("derive(Tensor handle, int form, int call) -> Tensor[]")  # type: ignore[no-untyped-call]


def _derive(handle: Tensor, _: int, call: int) -> list[Tensor]:
    holder = _known.holders.get(int(handle))
    if holder is None:
        msg = "compiled code runs a layer that is gone"
        raise RuntimeError(msg)
    return holder.derive(call)


def _derive_fake(handle: Tensor, form: int, call: int) -> list[Tensor]:
    del handle
    return [
        torch.empty_strided(size, stride, dtype=dtype, device=device)
        for size, stride, dtype, device in _known.outputs[form, call][:-1]
    ]


_library.impl("derive", _derive, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("dora_cache::derive", _derive_fake, lib=_library)


def opaque(
    signature: str, function: Callable[..., Tensor], like: Callable[..., Tensor]
) -> Callable[..., Tensor]:
    """Return a function whose operations compiled code calls, and does not look into.

    Args:
        signature: the operator's name, arguments and result, as
            :meth:`torch.library.Library.define` takes them.
        function: what it does, for inference; the result is contiguous.
        like: called likewise; returns an empty tensor like the result.
    """
    name = signature.partition("(")[0]
    _library.define(signature)  # type: ignore[no-untyped-call]
    _library.impl(name, function, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"dora_cache::{name}", like, lib=_library)
    operator: Any = getattr(torch.ops.dora_cache, name)

    def call(*args: Any) -> Tensor:
        found: Tensor = (operator if torch.compiler.is_dynamo_compiling() else function)(*args)
        return found

    return call


def _like(owner: Any) -> Tensor:
    """Return a floating-point parameter of a layer."""
    for tensor in itertools.chain(owner.parameters(), owner.buffers()):
        if tensor.is_floating_point():
            found: Tensor = tensor
            return found
    return torch.empty(0)


class _plainly:  # noqa: N801 - a context manager
    """Derive as eager inference does, whatever the surroundings of an event are."""

    def __init__(self, owner: Any) -> None:
        self._contexts = (
            torch.inference_mode(mode=False),
            torch.no_grad(),
            torch.autocast(_like(owner).device.type, enabled=False),
        )

    def __enter__(self) -> None:
        for context in self._contexts:
            context.__enter__()

    def __exit__(self, *args: object) -> None:
        for context in reversed(self._contexts):
            context.__exit__(*args)


def _alike(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> bool:
    return len(ours) == len(theirs) and all(
        a.shape == b.shape and a.dtype is b.dtype and a.device == b.device
        for a, b in zip(ours, theirs, strict=True)
    )
