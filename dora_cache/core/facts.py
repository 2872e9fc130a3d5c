"""Facts: what a value was derived from, and whether it is unchanged."""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from dora_cache import ambient
from dora_cache.copying import Uncopyable
from dora_cache.core.keys import UnkeyableError, check_container, freeze
from dora_cache.core.moved import NOTHING, contents
from dora_cache.core.refilled import content_of, is_refilled
from dora_cache.core.weak import Held
from dora_cache.reasons import Reason

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable


__all__ = [
    "EXACT",
    "Elsewhere",
    "Facts",
    "Reading",
    "UncheckableError",
    "frozen",
    "inner_of",
    "is_plain",
    "read",
    "tensors_in",
]


class UncheckableError(Exception):
    """It cannot be told whether a dependency changes; the call must go past the cache.

    Args:
        text: what cannot be checked.
        reason: the kind of it; by default that of the class.
    """

    # No __init__, which torch.compile could not trace where a recipe's forward raises one.
    usual: ClassVar[Reason] = Reason.UNSIGNABLE

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""

    @property
    def reason(self) -> Reason:
        """The kind of what cannot be checked."""
        return self.args[1] if len(self.args) > 1 else self.usual


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
                found += tensors_in(inner_of(item)[0])
        elif isinstance(item, tuple | list):
            found += tensors_in(item)
        elif isinstance(item, dict):
            found += tensors_in(item.values())
    return found


def inner_of(tensor: Any) -> tuple[list[Tensor], object]:
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
            see :mod:`dora_cache.core.moved`.
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
                    before = len(self.rows)
                    self._add_tensor(item)
                    exact = type(item) in EXACT
                    plain.append(Tensor if exact else (Tensor,) * (len(self.rows) - before))
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
        inner, context = inner_of(item)
        try:
            # Operations on it need not count up the versions of what it wraps.
            self.rows.append((id(item), item._version))
        except (RuntimeError, NotImplementedError) as error:
            raise UncheckableError(str(error), Reason.UNVERSIONED) from None
        if item.requires_grad:
            self.requires_grad = True
        return type(item), Tensor, self.add(inner), frozen(context)

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
        if type(item) not in EXACT:  # scales and zero points, perhaps
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


EXACT = frozenset({Tensor, nn.Parameter})
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


def frozen(context: object) -> Hashable:
    """Return what a tensor is beside those that it wraps, in a form that equals only its like.

    Raises:
        UncheckableError: it is none of the things that libraries put there.
    """
    kind = type(context)
    if kind in _LEAVES:
        return kind, context
    if kind is list or kind is tuple:
        return kind, tuple([frozen(item) for item in context])  # type: ignore[attr-defined]
    if kind is dict:
        return tuple([(name, frozen(item)) for name, item in context.items()])  # type: ignore[attr-defined]
    if dataclasses.is_dataclass(kind) and hasattr(context, "__dict__"):
        return kind, frozen(vars(context))
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

    Attributes:
        rows: see :class:`Reading`.
        storages: numbers of the dependencies' storages; valid for as long as this object lives.
    """

    __slots__ = ("_held", "_lasting", "rows", "storages")

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
        self.storages = tuple([held.cdata for held in self._held])
        self._lasting = self._held
        if reading.moved:
            pairs = zip(reading.tensors, self._held, strict=True)
            self._lasting = tuple(held for one, held in pairs if id(one) not in reading.moved)

    def is_at(self, reading: Reading) -> bool:
        """Whether the same contents are where they were when that was last noted."""
        return self.storages == tuple(ambient.storage_of(one) for one in reading.tensors)

    @property
    def expired(self) -> bool:
        """Whether a dependency's storage was freed, so that the value can never be valid again."""
        return any(held.expired() for held in self._lasting)  # type: ignore[no-untyped-call]
