"""Holders: what compiled code reads of a layer is kept up to date.

A holder has a view of its layer, and the values that were derived for the active adapters. Events
update it, and so does the check where compiled code is entered.
"""

from __future__ import annotations

import itertools
import operator
import threading
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dora_cache.ambient import untraceable
from dora_cache.attributes import FACE, SLOT
from dora_cache.copying import Uncopyable
from dora_cache.core.binding import with_children
from dora_cache.core.decorator import derivations
from dora_cache.core.facts import UncheckableError
from dora_cache.recipes.buffer import Buffer, Scalings, plainly
from dora_cache.recipes.compiled import Face
from dora_cache.recipes.dynamo import traced_writes
from dora_cache.recipes.entry import BEHIND, LayerKey, joined, watch_later, watch_places
from dora_cache.recipes.numbered import numbered
from dora_cache.recipes.views import canonical, form_of, looks_of, stand_in

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Mapping, Sequence

    from dora_cache.core.binding import Binding
    from dora_cache.core.engine import Engine
    from dora_cache.recipes.entry import EntryCheck, Place, Watch

__all__ = ["Holder"]

_SURPRISES = 3  # below PyTorch's limit of recompilations
_SCALINGS = ("scaling",)
"""Attributes of layers with a number for each adapter that is not part of what is derived."""


class Holder(Uncopyable):
    """Keeps what compiled code reads of one layer up to date.

    Args:
        binding: the layer's.
        active: called with the layer; returns the names of its active adapters, in order. It raises
            an UncheckableError if the library's own code has to run at present.
        shallow: whether the layer's modules and parameters are no matter of the view's.

    Attributes:
        face: what compiled code looks at.
        entries: the checks of the code that reads the view.
        watch: what the view and the values were made from; None while there is no view.
        names: the active adapters that the view has.
        used: whether compiled code has ever asked for it.
        idle: whether the layer has none of the active adapters.
        dependants: holders of layers to which it matters what this layer's active adapters are.
        finish: called with the layer and a view of it that has just been made; completes the view.
        remark: called with a view; returns what else compiled code is made for, hashable; and what
            it is to find as attributes of :attr:`face`.
    """

    def __init__(
        self,
        binding: Binding,
        active: Callable[[Any], Sequence[str]],
        *,
        shallow: bool = False,
    ) -> None:
        cache = f"cache {binding.cache.token}"
        number = next(numbered.handles)
        key = LayerKey(cache, self, checks=binding.cache.config.compiled_check)
        self.face, self._inner = Face(key, number), Face(key, number)
        self.entries: weakref.WeakSet[EntryCheck] = weakref.WeakSet()
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
        self._places: Watch = watch_places([])
        self.scalings = Scalings(self)
        self._updating = threading.RLock()
        self._busy = False
        self._surprises = 0
        self._arrivals = itertools.count()
        self._coming: dict[int, tuple[Mapping[str, Any], str, weakref.ref[Any] | None]] = {}
        numbered.holders[number] = self
        binding.holder = self
        owner: Any = binding.owner
        owner.__dict__[FACE] = self.face
        binding.undo.callback(_remove_face, weakref.ref(owner))

    @property
    def view(self) -> Any:
        """Stands for the layer; None while it cannot."""
        return self.face.__dict__["view"]

    @property
    def form(self) -> int:
        """A number that stands for all of the view but contents, names and scalings."""
        return self.face.form

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The parameters and buffers in the view that have a place."""
        return self.face.tensors

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
        values, slot = buffer.values, f"v{buffer.number}"
        shown: dict[str, object] = {slot: values}
        if isinstance(values, tuple):
            shown = {f"{slot}_{number}": value for number, value in enumerate(values)}
            shown[slot], self._slots[buffer.number] = True, len(values)
        self._set(shown)

    def _set(self, attributes: Mapping[str, object]) -> None:
        """Have compiled code find something; the lock is held."""
        self._inner.__dict__.update(attributes)
        self.face.__dict__.update(attributes)

    def changed(self, *_: object) -> None:
        """Follow something that has happened to the layer or a part of it.

        Whatever an event's handler is called with is ignored.
        """
        for holder in (self, *self.dependants):
            if holder.used:
                holder.update()

    def gets(self, table: Mapping[str, Any], name: str, new: object) -> None:
        """Take note that a container that the view has copied gets a part; takes no lock."""
        weak = None if new is None else weakref.ref(new)
        self._coming[next(self._arrivals)] = table, name, weak
        if self.face.key[0].checks:
            self._note(BEHIND)
        else:
            self.clear()

    def clear(self) -> None:
        """Have no view until it is made again; the lock is held."""
        self._present(None, 0, (), {})
        self._note(None)

    def _present(
        self, view: Any, form: int, tensors: tuple[Tensor, ...], parts: Mapping[str, object]
    ) -> None:
        """Have compiled code see another view; the lock is held."""
        self._set({**parts, "view": view, "form": form, "tensors": tensors})

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
        table = self.face.__dict__
        names = [f"v{slot}" for slot in self._slots]
        names += [f"v{slot}_{one}" for slot, many in self._slots.items() for one in range(many)]
        values = [*map(table.get, names), *self.scalings.tensors.values()]
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
        self.scalings.tensors.clear()

    @torch.compiler.disable  # type: ignore[untyped-decorator] # events may come from compiled code
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
        form = numbered.number(numbered.forms, (cache.token, signs, note, device))
        others = (
            self.view is not None
            and names == self.names
            and any(one is not two for one, two in zip(tensors, self.tensors, strict=False))
        )
        with cache.mutex.held():
            if traced and others and self._is_surprised():
                self.clear()
                cache.buffers.drop(self.scalings)
                return 0
            switched, known = names != self.names, form == self.form
            self.names = names
            self._present(view, form, tensors, flat)
            for tensor in tensors:  # as the compiler does with a module's own: not to be copied
                torch._dynamo.mark_static_address(tensor, guard=False)
            self._places = watch_places(places + parts)
            if not self.face.key[0].checks:
                own = [(table, key, item) for table, _, key, item in parts]
                self.face.__dict__["own"] = tuple(own)
            numbered.notes.setdefault(form, (weakref.ref(cache), device, note))
            wanted = cache.buffers.wanted.get(form, ())
            if switched:
                self._set({f"v{slot}": None for slot in self._slots})
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
                pending = watch_later([one[:2] for one in list(self._coming.values())])
                found = [buffer.watch for buffer in self._filled() if buffer.watch is not None]
                self._note(joined([self._places, pending, *found]))
            if coming and not self.face.key[0].checks:  # nobody would see that they have come
                self.clear()

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
        for face in (self._inner, self.face):
            face.__dict__.setdefault(f"v{number}", None)
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
            call = next((one for one, its in numbered.calls.items() if its == number), None)
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
        with plainly(owner):
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
                named = {known[one]: scaling[one] for one in names if one in scaling}
                view.__dict__[name] = self.scalings.set(owner, named)
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
        view.__dict__[SLOT] = self._inner
        view.__dict__.pop(FACE, None)
        return view


def _is_pending(table: Mapping[str, Any], name: str, new: weakref.ref[Any] | None) -> bool:
    """Whether a part that was announced may still come."""
    part = None if new is None else new()
    gone = new is not None and part is None
    return not gone and table.get(name) is not part


def _remove_face(layer: weakref.ref[Any]) -> None:
    owner = layer()
    if owner is not None:
        owner.__dict__.pop(FACE, None)


def _nothing(_: object) -> tuple[None, dict[str, object]]:
    return None, {}
