"""What a value was derived from, and whether that is still so.

:class:`Facts` are compared in full, on any kind of call. A :class:`Shortcut` compares the same
facts in one generated expression, for calls in the common state.
"""

from __future__ import annotations

import dataclasses
import functools
import struct
import sys
from contextlib import suppress
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from dora_cache import ambient
from dora_cache.copying import Uncopyable
from dora_cache.keys import UnkeyableError, check_container, freeze
from dora_cache.moved import NOTHING, contents
from dora_cache.reasons import Reason
from dora_cache.refilled import content_of, is_refilled
from dora_cache.weak import Held

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Sequence

    from dora_cache.backends import Entry

__all__ = [
    "Elsewhere",
    "Facts",
    "Reading",
    "Shortcut",
    "UncheckableError",
    "is_plain",
    "make_shortcut",
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
        UncheckableError: it wraps none.
    """
    kind = type(tensor)
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is not None:
        with suppress(Exception):
            names, context = flatten()
            parts = [getattr(tensor, name) for name in names]
            tensors = [one for one in parts if isinstance(one, Tensor)]
            others = tuple(one for one in parts if not isinstance(one, Tensor))
            if tensors and all(one is not tensor for one in tensors):
                return tensors, (context, *others)
    msg = f"a {kind.__name__} has no data of its own"
    raise UncheckableError(msg, Reason.SUBCLASS)


class Reading:
    """Dependencies as they are at one moment.

    Attributes:
        rows: of each tensor, its identity, version counter, storage, address, dtype, shape, strides
            and whether it is read negated or conjugated. Of one whose storage is refilled, what
            stands for the content and the offset into the storage, in place of the address. Where
            its data is exchanged by a library, its content and device instead of the first four:
            see :mod:`dora_cache.moved`.
        plain: everything else among the dependencies, and where the tensors are among it; hashable.
        tensors: the tensors, in order.
        moved: ids of those whose data is exchanged.
        elsewhere: what is in no tensor, in order.
        refilled: whether any of them has a storage that is refilled.
        requires_grad: whether any of them does.
    """

    __slots__ = ("elsewhere", "moved", "plain", "refilled", "requires_grad", "rows", "tensors")

    def __init__(self) -> None:
        self.moved: set[int] = set()
        self.elsewhere: list[Elsewhere] = []
        self.rows: list[tuple[object, ...]] = []
        self.plain: Hashable = ()
        self.tensors: list[Tensor] = []
        self.refilled = False
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
        if type(item).__name__ == "DTensor":
            msg = "a DTensor is spread over processes"
            raise UncheckableError(msg, Reason.SHARDED)
        inner, context = _inner(item)
        try:
            # Operations on it need not count up the versions of what it wraps.
            self.rows.append((id(item), item._version))
        except (RuntimeError, NotImplementedError) as error:
            raise UncheckableError(str(error), Reason.UNVERSIONED) from None
        if item.requires_grad:
            self.requires_grad = True
        return type(item), Tensor, self.add(inner), _frozen(context)

    def _add_tensor(self, item: Tensor) -> None:
        try:
            storage, version = ambient.storage_of(item), item._version
            place: tuple[object, ...]
            if is_refilled(storage):
                self.refilled = True
                content = content_of(storage)
                if content is None:
                    msg = "the storage of a dependency is refilled without counting it"
                    raise UncheckableError(msg, Reason.REFILLED)
                place = id(item), version, storage, content, item.storage_offset()
            else:
                place = id(item), version, storage, item.data_ptr()
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
        if item._base is not None and getattr(item._base, "_is_flat_param", False):
            msg = "FSDP1 makes the views of its flat parameter anew for each forward"
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


def _freeze(item: object) -> Hashable:
    inside: list[object] = []
    with suppress(TypeError):
        frozen = freeze(item, inside)
        if not inside and not isinstance(item, nn.Module):
            return frozen
    msg = f"a dependency is a {type(item).__name__}: yield tensors and plain scalars"
    raise UncheckableError(msg)


def _frozen(context: object) -> Hashable:
    """Return what a tensor is beside those that it wraps, in a form that equals only its like.

    Raises:
        UncheckableError: it is none of the things that libraries put there.
    """
    kind = type(context)
    if kind in _LEAVES:
        return kind, context
    if kind is list or kind is tuple:
        return kind, tuple([_frozen(item) for item in context])  # type: ignore[attr-defined]
    if kind is dict:
        return tuple([(name, _frozen(item)) for name, item in context.items()])  # type: ignore[attr-defined]
    if dataclasses.is_dataclass(kind) and hasattr(context, "__dict__"):
        return kind, _frozen(vars(context))
    try:
        return freeze(context, _Nothing())
    except (TypeError, UnkeyableError):
        msg = f"a tensor that wraps others has a {kind.__name__} beside them"
        raise UncheckableError(msg, Reason.SUBCLASS) from None


class _Nothing(list[object]):
    """Refuses what is put into it."""

    def append(self, _: object) -> None:
        raise TypeError

    def extend(self, _: Iterable[object]) -> None:
        raise TypeError


_LEAVES = frozenset({type(None), str, int, bool, torch.dtype, torch.device, torch.Size})


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


_SCALARS = frozenset({str, int, bool, torch.Size, torch.dtype})


class Shortcut(Uncopyable):
    """One call's last answer, and a check of all that it rests on.

    Attributes:
        check: called with the dependencies, the entry and the shortcut; whether everything is as it
            was. Raises if the dependencies are of other kinds.
        clear: lead nowhere from now on.
        contexts: what the tensors that wrap others, or have attributes of their own, are beside
            these; in order.
        count: counts a hit; atomic, since it is one call into C.
        default_dtype: PyTorch's.
        entry: the entry itself if it is fixed: the backend never drops one of its own accord, and
            makes no copies; else None.
        device: type of the default device.
        facts: identity, version, storage and address of the tensors (see :class:`Reading` for
            refilled ones), the numbers, and version and address of the value's tensors if the entry
            is fixed, as bytes: one piece of memory is read much faster than many objects when it is
            in no cache.
        others: strings and shapes, and the types of all scalars; equal ones are the same object.
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
        "contexts",
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
    contexts: tuple[object, ...]
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
    dependencies: Sequence[object],
    entry: Entry,
    *,
    gradients: bool,
    fixed: bool,
    form: str = "items",
) -> Shortcut | None:
    """Note the facts of now; None where they cannot be checked in short, as under autocast.

    Args:
        dependencies: tensors, None, scalars, and shapes.
        entry: the value's.
        gradients: whether the value must not be used while gradients are enabled.
        fixed: whether it is this entry each time, and not a copy that the backend makes of it.
        form: how the dependencies will be given to ``check``: one by one as the ``"items"`` of
            something, as the keys and values of a ``"mapping"``, or as a ``"tensor"``.
    """
    if not ambient.is_quiet():
        return None
    noted = _Noted()
    try:
        pattern = tuple([noted.add(item) for item in dependencies])
    except (UncheckableError, _TooLongError):
        return None
    tensors = noted.tensors
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
    shortcut.entry = entry if fixed else None
    if fixed:
        noted.facts += entry.marks
    shortcut.check = _checker(pattern, form, 0 if single else len(parts), fixed=fixed)
    shortcut.facts = _packer(pattern, len(parts) if fixed else 0)(*noted.facts)
    shortcut.others = _shared(tuple(noted.others))
    shortcut.contexts = tuple(noted.contexts)
    shortcut.guards = guards
    shortcut.place = ambient.place()
    shortcut.device = sys.intern(shortcut.place[0].type)
    shortcut.gradients = gradients
    return shortcut


@functools.lru_cache(maxsize=1024)
def _shared(others: tuple[object, ...]) -> tuple[object, ...]:
    """Return one object for all that are equal: it then stays in the processor's caches."""
    return others


_Kind = str | tuple[tuple[str, "_Kind"], ...]
"""How a dependency is checked: a letter, or names and kinds of the tensors that it wraps."""


class _TooLongError(Exception):
    """A dependency cannot be checked in short."""


class _Noted:
    """The facts of dependencies, in the order in which :func:`_checker` has them."""

    def __init__(self) -> None:
        self.facts: list[float] = []
        self.others: list[object] = []
        self.contexts: list[object] = []
        self.tensors: list[Tensor] = []

    def add(self, item: Any) -> _Kind:
        """Note one dependency; return its kind."""
        kind = type(item)
        if isinstance(item, Tensor):
            if kind in _EXACT or is_plain(kind):
                return self._add_tensor(item)
            return self._add_wrapper(item)
        if item is None:
            return "n"
        if kind is float:
            self.facts.append(item)
            return "f"
        if kind not in _SCALARS:
            raise _TooLongError
        self.others += (kind, item)
        return "s"

    def _add_tensor(self, item: Tensor) -> _Kind:
        storage = ambient.storage_of(item)
        self.facts += (id(item), item._version, storage)
        if not is_refilled(storage):
            self.facts.append(item.data_ptr())
            return self._add_layout(item)
        content = content_of(storage)
        if content is None:
            raise _TooLongError
        self.facts += (content, int(item.storage_offset()))
        return self._add_layout(item).upper()

    def _add_layout(self, item: Tensor) -> str:
        if any(item is other for other in self.tensors):  # the guards take no tensor twice
            return "r"
        self.tensors.append(item)
        if type(item) in _EXACT:
            return "t"
        types = _types(item)
        if any(issubclass(one, Tensor) for one in types):
            raise _TooLongError
        self.contexts.append(types)
        return "a"

    def _add_wrapper(self, item: Any) -> _Kind:
        if any(item is other for other in self.tensors):
            raise _TooLongError
        inner, _ = _inner(item)
        flat = item.__tensor_flatten__()
        names = flat[0]
        if not all(type(name) is str and name.isidentifier() for name in names):
            raise _TooLongError
        self.facts += (id(item), item._version)
        self.tensors.append(item)
        self.contexts.append(_frozen(flat))
        return tuple([(name, self.add(one)) for name, one in zip(names, inner, strict=True)])


def _types(item: object) -> tuple[type, ...]:
    """Return the types of a tensor's own attributes; a tensor may come among them."""
    return tuple(map(type, vars(item).values()))


@functools.cache
def _packer(pattern: tuple[_Kind, ...], parts: int) -> Callable[..., bytes]:
    """Return what packs the facts of certain kinds and of a value; see :func:`_checker`."""
    return struct.Struct(f"={''.join(map(_packed, pattern))}{2 * parts}q").pack


def _packed(kind: _Kind) -> str:
    if isinstance(kind, tuple):
        return "2q" + "".join(_packed(part) for _, part in kind)
    return {"t": "4q", "r": "4q", "a": "4q", "f": "d"}.get(kind) or ("5q" if kind in "TRA" else "")


class _Terms:
    """What a check is written from, gathered from the dependencies in their order."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.wrapped: list[str] = []
        self.facts: list[str] = []
        self.others: list[str] = []
        self.first: list[str] = []
        self.contexts: list[str] = []
        self.tensors: list[str] = []

    def add(self, name: str, kind: _Kind) -> None:
        """Write out what is to be looked at of one dependency, which the check calls ``name``."""
        if isinstance(kind, tuple):
            self.facts.append(f"id({name}), {name}._version")
            self.tensors.append(name)
            self.contexts.append(f"frozen({name}.__tensor_flatten__())")
            for index, (attribute, part) in enumerate(kind):
                inner = f"{name}_{index}"
                self.wrapped.append(f"{inner} = {name}.{attribute}")
                self.add(inner, part)
        elif kind in "traTRA":
            self.facts.append(f"id({name}), {name}._version, storage_of({name})")
            # Content that is not known is None, which cannot be packed; that raises.
            content = f"content_of(storage_of({name})), {name}.storage_offset()"
            self.facts.append(content if kind.isupper() else f"{name}.data_ptr()")
            if kind not in "rR":
                self.tensors.append(name)
            if kind in "aA":
                self.contexts.append(f"types({name})")
        elif kind == "n":
            self.first.append(f"{name} is None")
        elif kind == "f":
            self.facts.append(name)
            self.first.append(f"type({name}) is float")
        else:
            self.others.append(f"type({name}), {name}")


@functools.cache
def _checker(
    pattern: tuple[_Kind, ...], form: str, parts: int, *, fixed: bool
) -> Callable[[Sequence[object], Entry, Shortcut], bool]:
    """Write the check out for dependencies and values of certain kinds, as one expression.

    It runs at every hit, where each call of a function would cost a twentieth of the whole.

    Args:
        pattern: the kind of each dependency: a letter for a tensor, a tensor once more (r), one
            with attributes (a), each in capitals if its storage is refilled, None, a float, or
            another scalar; names and kinds for a wrapper.
        form: see :func:`make_shortcut`.
        parts: how many tensors the value has; 0 for one that is no tuple.
        fixed: see :func:`make_shortcut`.
    """
    names = [f"d{index}" for index in range(len(pattern))]
    values = [f"v{index}" for index in range(parts or 1)]
    found = _Terms()
    for name, kind in zip(names, pattern, strict=True):
        found.add(name, kind)
    first, facts, tensors = found.first, found.facts, found.tensors
    if found.others:
        first.append(f"({', '.join(found.others)},) == shortcut.others")
    marks = [f"{name}._version, {name}.data_ptr()" for name in values]
    if fixed:
        facts += marks
    terms = [
        *first,
        f"pack({', '.join(facts)}) == shortcut.facts",
        *([] if fixed else [f"({', '.join(marks)}) == entry.marks"]),
        f"shortcut.guards({', '.join(tensors + values)})",
        *(f"{name}.grad is None" for name in values),
        *([f"({', '.join(found.contexts)},) == shortcut.contexts"] if found.contexts else ()),
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
    lines = [
        f"{', '.join(names)}{'' if form == 'tensor' else ','} = {given}",
        f"{', '.join(values)}{',' if parts else ''} = entry.value",
    ]
    last = [*found.wrapped, f"return {' and '.join(terms)}"]
    if found.contexts:  # their classes may follow even reading a version
        last = ["with without_functions():", *(f"    {line}" for line in last)]
    body = "\n    ".join(lines + last)
    source = f"def check(dependencies, entry, shortcut):\n    {body}\n"
    namespace: dict[str, Any] = {
        "content_of": content_of,
        "default_dtype": torch.get_default_dtype,
        "frozen": _frozen,
        "types": _types,
        "pack": _packer(pattern, len(values) if fixed else 0),
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
        "without_functions",
    ):
        namespace[name] = getattr(ambient, name)
    exec(source, namespace)  # noqa: S102 - made of the kinds above, and identifiers
    check: Callable[[Sequence[object], Entry, Shortcut], bool] = namespace["check"]
    return check
