"""Generate one expression that checks everything a hit depends on.

It compares what :class:`dora_cache.core.facts.Facts` compare, for calls in the common state.
"""

from __future__ import annotations

import functools
import struct
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dora_cache import ambient
from dora_cache.copying import Uncopyable
from dora_cache.core.facts import EXACT, UncheckableError, frozen, inner_of, is_plain
from dora_cache.core.refilled import content_of, is_refilled

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

    from dora_cache.backends import Entry
    from dora_cache.core.facts import Facts

__all__ = ["Shortcut", "make_shortcut"]

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
        packed: identity, version, storage and address of the tensors (see :class:`Reading` for
            refilled ones), the numbers, and version and address of the value's tensors if the entry
            is fixed, as bytes: one piece of memory is read much faster than many objects when it is
            in no cache.
        others: strings and shapes, and the types of all scalars; equal ones are the same object.
        facts: the :class:`Facts` of the entry; None once the entry has gone.
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
        "gradients",
        "guards",
        "key",
        "others",
        "packed",
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
    packed: bytes
    others: tuple[object, ...]
    facts: Facts | None
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
        self.facts = self.entry = self.ready = None


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
    shortcut.packed = _packer(pattern, len(parts) if fixed else 0)(*noted.facts)
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
            if kind in EXACT or is_plain(kind):
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
        if type(item) in EXACT:
            return "t"
        types = _types(item)
        if any(issubclass(one, Tensor) for one in types):
            raise _TooLongError
        self.contexts.append(types)
        return "a"

    def _add_wrapper(self, item: Any) -> _Kind:
        if any(item is other for other in self.tensors):
            raise _TooLongError
        inner, _ = inner_of(item)
        flat = item.__tensor_flatten__()
        names = flat[0]
        if not all(type(name) is str and name.isidentifier() for name in names):
            raise _TooLongError
        self.facts += (id(item), item._version)
        self.tensors.append(item)
        self.contexts.append(frozen(flat))
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
        f"pack({', '.join(facts)}) == shortcut.packed",
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
        "frozen": frozen,
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
