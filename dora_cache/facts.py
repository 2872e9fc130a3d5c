"""What a value was derived from, and whether that is still so.

:class:`Facts` are compared in full, on any kind of call. A :class:`Shortcut` compares the same
facts in one generated expression, for calls in the common state.
"""

from __future__ import annotations

import functools
import struct
from contextlib import suppress
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from dora_cache import ambient
from dora_cache.copying import Uncopyable
from dora_cache.custody import NOTHING, Held, contents
from dora_cache.keys import UnkeyableError, check_container, freeze
from dora_cache.reasons import Reason

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Sequence

    from dora_cache.backends import Entry

__all__ = [
    "Elsewhere",
    "Facts",
    "Held",
    "Reading",
    "Shortcut",
    "UncheckableError",
    "is_plain",
    "make_shortcut",
    "mark_refilled",
    "read",
    "tensors_in",
]


class UncheckableError(Exception):
    """It cannot be told whether a dependency changes; the call must go past the cache.

    Args:
        text: what cannot be checked.
        reason: the kind of it.
    """

    def __init__(self, text: str, reason: Reason = Reason.UNSIGNABLE) -> None:
        super().__init__(text)
        self.reason = reason


class Elsewhere(NamedTuple):
    """A dependency whose content is in no tensor at present, such as one that is kept in a file.

    Attributes:
        facts: what tells whether it has changed; hashable.
        load: reads it; for those who compare contents.
    """

    facts: Hashable
    load: Callable[[], Tensor]


_refilled: dict[int, Held] = {}


def mark_refilled(tensor: Tensor | torch.UntypedStorage) -> bool:
    """Accept no tensor on this storage from now on: its content changes and nothing counts it.

    Returns:
        Whether the storage was not marked before.
    """
    storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else tensor
    if storage._cdata in _refilled:
        return False
    if len(_refilled) % 1024 == 1023:  # noqa: PLR2004 - now and then
        for number, held in list(_refilled.items()):
            if held.expired():  # type: ignore[no-untyped-call]
                del _refilled[number]
    # The weak reference keeps the number from being given to another storage.
    _refilled[storage._cdata] = Held(storage)  # type: ignore[no-untyped-call]
    return True


_plain_types: dict[type, bool] = {Tensor: True, nn.Parameter: True}


def is_plain(kind: type) -> bool:
    """Whether tensors of this type carry their own data (no fake, wrapped or functional ones)."""
    plain = _plain_types.get(kind)
    if plain is None:
        plain = getattr(kind, "__torch_dispatch__", None) is Tensor.__torch_dispatch__
        _plain_types[kind] = plain
    return plain


def tensors_in(dependencies: Iterable[object]) -> list[Tensor]:
    """Return the tensors among dependencies in order; of a tensor that wraps others, these."""
    found: list[Tensor] = []
    for item in dependencies:
        if isinstance(item, Tensor):
            if _plain_types.get(type(item)) or is_plain(type(item)):
                found.append(item)
            else:
                found += tensors_in(_inner(item)[0])
        elif isinstance(item, tuple | list):
            found += tensors_in(item)
        elif isinstance(item, dict):
            found += tensors_in(item.values())
    return found


def _inner(tensor: Any) -> tuple[list[Tensor], object]:
    """Return the tensors that one wraps, as ``__tensor_flatten__`` names them, and what else it is.

    Raises:
        UncheckableError: it wraps none, or is spread over processes.
    """
    kind = type(tensor)
    if kind.__name__ == "DTensor":
        msg = "a DTensor is spread over processes"
        raise UncheckableError(msg, Reason.SHARDED)
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is not None:
        with suppress(Exception):
            names, context = flatten()
            tensors = [getattr(tensor, name) for name in names]
            if tensors and all(isinstance(one, Tensor) and one is not tensor for one in tensors):
                return tensors, context
    msg = f"a {kind.__name__} has no data of its own"
    raise UncheckableError(msg, Reason.SUBCLASS)


class Reading:
    """Dependencies as they are at one moment.

    Attributes:
        rows: of each tensor, its identity, version counter, storage, address, dtype, shape, strides
            and whether it is read negated or conjugated. Where its data is exchanged by a library,
            its content and device instead of the first four: see :mod:`dora_cache.custody`.
        plain: everything else among the dependencies, and where the tensors are among it; hashable.
        tensors: the tensors, in order.
        moved: ids of those whose data is exchanged.
        elsewhere: what is in no tensor, in order.
        requires_grad: whether any of them does.
    """

    __slots__ = ("elsewhere", "moved", "plain", "requires_grad", "rows", "tensors")

    def __init__(self) -> None:
        self.moved: set[int] = set()
        self.elsewhere: list[Elsewhere] = []
        self.rows: list[tuple[object, ...]] = []
        self.plain: Hashable = ()
        self.tensors: list[Tensor] = []
        self.requires_grad = False

    def add(self, dependencies: Iterable[object]) -> tuple[Hashable, ...]:
        """Read dependencies; return what there is beside the tensors."""
        plain: list[Hashable] = []
        for item in dependencies:
            if isinstance(item, Tensor):
                if _plain_types.get(type(item)) or is_plain(type(item)):
                    self._add_tensor(item)
                    plain.append(Tensor)
                else:
                    plain.append(self._add_wrapper(item))
            elif item is None:
                plain.append(None)
            elif isinstance(item, Elsewhere):
                self.elsewhere.append(item)
                plain.append((Elsewhere, item.facts))
            elif isinstance(item, tuple | list):
                check_container(item)
                plain.append((type(item), self.add(item)))
            elif isinstance(item, dict):
                check_container(item)
                plain.append((type(item), self.add(item.keys()), self.add(item.values())))
            elif isinstance(item, FunctionType | BuiltinFunctionType):
                owner = getattr(item, "__self__", None)
                if owner is not None and not isinstance(owner, ModuleType):
                    msg = f"{item.__qualname__} is a method of an object, which may change"
                    raise UncheckableError(msg)
                if getattr(item, "__closure__", None) is not None:
                    msg = f"{item.__qualname__} is a closure, and what it closes over may change"
                    raise UncheckableError(msg)
                defaults = [getattr(item, name, None) for name in _OF_FUNCTIONS]
                plain.append((item, self.add(defaults)))
            elif isinstance(item, Reason):  # see keys.own_state
                raise UncheckableError(item.value, item)
            else:
                plain.append(_freeze(item))
        return tuple(plain)

    def _add_wrapper(self, item: Any) -> Hashable:
        """Read a tensor that wraps others; return what there is beside these."""
        inner, context = _inner(item)
        try:
            # Operations on it need not count up the versions of what it wraps.
            self.rows.append((id(item), item._version))
        except (RuntimeError, NotImplementedError) as error:
            raise UncheckableError(str(error), Reason.UNVERSIONED) from None
        if item.requires_grad:
            self.requires_grad = True
        return type(item), Tensor, self.add(inner), _freeze(context, Reason.SUBCLASS)

    def _add_tensor(self, item: Tensor) -> None:
        try:
            storage = ambient.storage_of(item)
            place: tuple[object, ...] = (id(item), item._version, storage, item.data_ptr())
            if contents:
                place = self._content(item, place)
            self.rows.append(
                (
                    *place,
                    item.dtype,
                    item.size(),
                    item.stride(),
                    item.is_neg(),
                    item.is_conj(),
                )
            )
        except (RuntimeError, NotImplementedError) as error:
            raise UncheckableError(str(error), Reason.UNVERSIONED) from None
        if _refilled and storage in _refilled:
            msg = "the storage of a dependency is refilled without counting it"
            raise UncheckableError(msg, Reason.REFILLED)
        self.tensors.append(item)
        if item.requires_grad:
            self.requires_grad = True
        if type(item) not in _EXACT:  # scales and zero points, perhaps
            for value in vars(item).values():
                if isinstance(value, Tensor) and is_plain(type(value)):
                    self._add_tensor(value)

    def _content(self, item: Tensor, place: tuple[object, ...]) -> tuple[object, ...]:
        """Return what a tensor contains, where a library exchanges its data, and its device."""
        content = contents.get(id(item))
        if content is None or content.place != place[1:]:
            return place
        if content.number == NOTHING:
            msg = "a dependency is offloaded, and there is nothing in its place"
            raise UncheckableError(msg, Reason.OFFLOADED)
        self.moved.add(id(item))
        return content.number, item.device


_EXACT = frozenset({Tensor, nn.Parameter})
_OF_FUNCTIONS = ("__defaults__", "__kwdefaults__", "__dict__")


def read(dependencies: Iterable[object]) -> Reading:
    """Read tensors and scalars, in order.

    Any in-place operation that PyTorch counts, another tensor in a tensor's place, other data in a
    tensor, and any move changes a tensor's row. (Not a new Python object over the same memory at
    the same address, which ``Engine.replaced`` is told of.) Rows are sound only while
    :class:`Facts` of the same tensors are alive, since these keep the storages' numbers from being
    used again.

    Args:
        dependencies: tensors, plain scalars (None, numbers, strings, dtypes, devices, enums), and
            functions that close over nothing; tuples, lists and dicts of these; sets of scalars.

    Raises:
        UncheckableError: a tensor without a version counter (an inference tensor) or without data
            of its own (fake, functional, sharded), or something else altogether.
    """
    found = Reading()
    try:
        found.plain = found.add(dependencies)
    except UnkeyableError as error:
        raise UncheckableError(str(error)) from None
    return found


def _freeze(item: object, reason: Reason = Reason.UNSIGNABLE) -> Hashable:
    inside: list[object] = []
    with suppress(TypeError):
        frozen = freeze(item, inside)
        if not inside and not isinstance(item, nn.Module):
            return frozen
    msg = f"a dependency is a {type(item).__name__}: yield tensors and plain scalars"
    raise UncheckableError(msg, reason)


class Facts(Uncopyable):
    """What one stored value was derived from.

    It keeps no tensor alive, only the numbers of their storages from being used again.

    Args:
        reading: of the dependencies, before the value is derived.
    """

    __slots__ = ("_held", "_lasting", "rows")

    def __init__(self, reading: Reading) -> None:
        self.rows = reading.rows
        self.follow(reading)

    def follow(self, reading: Reading) -> None:
        """Take note of where the same contents are now, whose data may have been exchanged."""
        # Not weak references to the tensors: torch.utils.swap_tensors refuses tensors that have
        # them. Storages may have them.
        self._held = tuple(
            Held(tensor.untyped_storage())  # type: ignore[no-untyped-call]
            for tensor in reading.tensors
        )
        self._lasting = self._held
        if reading.moved:
            pairs = zip(reading.tensors, self._held, strict=True)
            self._lasting = tuple(held for one, held in pairs if id(one) not in reading.moved)

    def is_at(self, reading: Reading) -> bool:
        """Whether the same contents are where they were when that was last noted."""
        return self.storages == tuple(ambient.storage_of(one) for one in reading.tensors)

    @property
    def storages(self) -> tuple[int, ...]:
        """Numbers of the dependencies' storages; valid for as long as this object lives."""
        return tuple(held.cdata for held in self._held)

    @property
    def expired(self) -> bool:
        """Whether a dependency's storage was freed, so that the value can never be valid again."""
        return any(held.expired() for held in self._lasting)  # type: ignore[no-untyped-call]


_SCALARS = frozenset({str, int, bool, torch.Size})


class Shortcut(Uncopyable):
    """One call's last answer, and a check of all that it rests on.

    Attributes:
        check: called with the dependencies, the entry and the shortcut; whether everything is as it
            was. Raises if the dependencies are of other kinds.
        clear: lead nowhere from now on.
        count: counts a hit; atomic, since it is one call into C.
        default_dtype: PyTorch's.
        entry: the entry itself, where the backend never drops one of its own accord; else None.
        device: type of the default device.
        facts: identity, version, storage and address of the tensors, and the numbers, as bytes: one
            piece of memory is read much faster than many objects when it is in no cache.
        others: strings and shapes, and the types of all scalars.
        facts_of: the :class:`Facts` of the entry; None once the entry has gone.
        gradients: whether the value must not be used while gradients are enabled.
        guards: checks the layout of the tensors and of the value, and what follows operations; see
            :func:`dora_cache.ambient.tensor_guards`.
        key: the call's key in the backend.
        phase: at which of so many hits the audit compares contents; -1 for never.
        place: where new tensors are made, see :func:`dora_cache.ambient.place`.
        precision: that of float32 matrix products.
        ready: the entry's.
        spelled: the arguments that lead to it.
    """

    __slots__ = (
        "check",
        "count",
        "default_dtype",
        "device",
        "entry",
        "facts",
        "facts_of",
        "gradients",
        "guards",
        "key",
        "others",
        "phase",
        "place",
        "precision",
        "ready",
        "spelled",
    )

    check: Callable[[Sequence[object], Entry, Shortcut], bool]
    count: Callable[[], int]
    entry: Entry | None
    device: str
    facts: bytes
    others: tuple[object, ...]
    facts_of: Facts | None
    gradients: bool
    guards: Callable[..., bool]
    key: Hashable
    phase: int
    place: tuple[torch.device, int]
    precision: str
    default_dtype: torch.dtype
    ready: Any
    spelled: Hashable

    def clear(self) -> None:
        """Lead nowhere from now on, and keep nothing alive."""
        self.facts_of = self.entry = self.ready = None


def make_shortcut(
    dependencies: Sequence[object], entry: Entry, *, gradients: bool, form: str = "items"
) -> Shortcut | None:
    """Note the facts of now; None where they cannot be checked in short, as under autocast.

    Args:
        dependencies: tensors, None, scalars, and shapes.
        entry: the value's.
        gradients: whether the value must not be used while gradients are enabled.
        form: how the dependencies will be given to ``check``: one by one as the ``"items"`` of
            something, as the keys and values of a ``"mapping"``, or as a ``"tensor"``.
    """
    if not ambient.is_quiet():
        return None
    pattern = ""
    facts: list[float] = []
    others: list[object] = []
    tensors: list[Tensor] = []
    for item in dependencies:
        kind = type(item)
        if kind is nn.Parameter or kind is Tensor:
            assert isinstance(item, Tensor)  # noqa: S101 - for the type checker
            if any(item is other for other in tensors):  # the guards take no tensor twice
                pattern += "r"
            else:
                pattern += "t"
                tensors.append(item)
            facts += (id(item), item._version, ambient.storage_of(item), item.data_ptr())
        elif item is None:
            pattern += "n"
        elif kind is float:
            pattern += "f"
            others.append(kind)
            facts.append(item)  # type: ignore[arg-type]
        elif kind in _SCALARS:
            pattern += "s"
            others += (kind, item)
        else:
            return None
    parts = entry.tensors
    if not tensors or len({id(part) for part in (*tensors, *parts)}) < len(tensors) + len(parts):
        return None
    guards = ambient.tensor_guards([*tensors, *parts])
    if guards is None:
        return None
    shortcut = Shortcut()
    try:
        shortcut.precision = ambient.precision()
    except RuntimeError:  # it was set for each backend by itself
        return None
    single = isinstance(entry.value, Tensor)
    shortcut.default_dtype = torch.get_default_dtype()
    shortcut.check = _checker(pattern, form, 0 if single else len(parts))
    shortcut.facts = _packer(pattern)(*facts)
    shortcut.others = tuple(others)
    shortcut.guards = guards
    shortcut.place = ambient.place()
    shortcut.device = shortcut.place[0].type
    shortcut.gradients = gradients
    return shortcut


@functools.cache
def _packer(pattern: str) -> Callable[..., bytes]:
    """Return what packs the facts of dependencies of certain kinds; see :func:`_checker`."""
    parts = {"t": "4q", "r": "4q", "f": "d"}
    return struct.Struct("=" + "".join(parts.get(kind, "") for kind in pattern)).pack


@functools.cache
def _checker(
    pattern: str, form: str, parts: int
) -> Callable[[Sequence[object], Entry, Shortcut], bool]:
    """Write the check out for dependencies and values of certain kinds, as one expression.

    It runs at every hit, where each call of a function would cost a twentieth of the whole.

    Args:
        pattern: a letter for each dependency: tensor, tensor once more (r), None, float, or another
            scalar.
        form: see :func:`make_shortcut`.
        parts: how many tensors the value has; 0 for one that is no tuple.
    """
    names = [f"d{index}" for index in range(len(pattern))]
    values = [f"v{index}" for index in range(parts or 1)]
    facts, others, nones, tensors = [], [], [], []
    for name, kind in zip(names, pattern, strict=True):
        if kind in "tr":
            facts.append(f"id({name}), {name}._version, storage_of({name}), {name}.data_ptr()")
            if kind == "t":
                tensors.append(name)
        elif kind == "n":
            nones.append(f"{name} is None")
        elif kind == "f":
            facts.append(name)
            others.append(f"type({name})")
        else:
            others.append(f"type({name}), {name}")
    if others:
        nones.append(f"({', '.join(others)},) == shortcut.others")
    marks = ", ".join(f"{name}._version, {name}.data_ptr()" for name in values)
    terms = [
        *nones,
        f"pack({', '.join(facts)}) == shortcut.facts",
        f"({marks}) == entry.marks",
        f"shortcut.guards({', '.join(tensors + values)})",
        *(f"{name}.grad is None" for name in values),
        "not function_modes()",
        "not any_autocast()",
        "forward._current_level < 0",
        "precision() == shortcut.precision",
        "default_dtype() is shortcut.default_dtype",
        "not (shortcut.gradients and grad_enabled())",
        "(shortcut.ready is None or not is_capturing())",
    ]
    if torch.cuda.is_available():  # else there is one place only
        terms.append("default_device() == shortcut.device")
        if torch.cuda.device_count() > 1:
            terms.append("current_device() == shortcut.place[1]")
    given = "*dependencies, *dependencies.values()" if form == "mapping" else "dependencies"
    source = (
        f"def check(dependencies, entry, shortcut):\n"
        f"    {', '.join(names)}{'' if form == 'tensor' else ','} = {given}\n"
        f"    {', '.join(values)}{',' if parts else ''} = entry.value\n"
        f"    return {' and '.join(terms)}\n"
    )
    namespace: dict[str, Any] = {
        "default_dtype": torch.get_default_dtype,
        "pack": _packer(pattern),
    }
    for name in (
        "any_autocast",
        "current_device",
        "default_device",
        "forward",
        "function_modes",
        "grad_enabled",
        "is_capturing",
        "precision",
        "storage_of",
    ):
        namespace[name] = getattr(ambient, name)
    exec(source, namespace)  # noqa: S102 - made of the letters above alone
    check: Callable[[Sequence[object], Entry, Shortcut], bool] = namespace["check"]
    return check
