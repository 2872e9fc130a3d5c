"""What a value was derived from, and whether that is still so."""

from __future__ import annotations

import struct
from contextlib import suppress
from types import BuiltinFunctionType, FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from dora_cache.copying import Uncopyable
from dora_cache.keys import freeze
from dora_cache.reasons import Reason

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable

    from dora_cache.audit import Audit
    from dora_cache.contents import Contents

__all__ = [
    "Held",
    "Signature",
    "Stamp",
    "UncheckableError",
    "environment",
    "functorch_stack",
    "mark_refilled",
    "place",
    "sign",
    "split",
    "tensors_in",
    "untraceable",
]

Signature = bytes | tuple[bytes, list[Any]]
"""Compares equal as long as nothing that a value depends on has changed.

Tensors are packed into bytes: at a hit the old signature is seldom in the processor's caches, and
one piece of memory is read much faster than the many objects of a tuple of tuples.
"""


class UncheckableError(Exception):
    """It cannot be told whether a dependency changes; the call must go past the cache.

    Args:
        text: what cannot be checked.
        reason: the kind of it.
    """

    def __init__(self, text: str, reason: Reason = Reason.UNSIGNABLE) -> None:
        super().__init__(text)
        self.reason = reason


_refilled: dict[int, StorageWeakRef] = {}


def mark_refilled(tensor: Tensor | torch.UntypedStorage) -> bool:
    """Sign no tensor on this storage from now on: its content changes and nothing counts it.

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
    _refilled[storage._cdata] = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
    return True


_storage_address: Callable[[Tensor], int] = torch._C._storage_address  # type: ignore[attr-defined]
_pack_tensor = struct.Struct("5q").pack
_pack_float = struct.Struct("5sd").pack
_TENSOR_BYTES, _FLOAT_BYTES = struct.calcsize("5q"), struct.calcsize("5sd")
_plain_types: dict[type, bool] = {Tensor: True, torch.nn.Parameter: True}


def _is_plain(kind: type) -> bool:
    """Whether tensors of this type carry their own data (no fake, wrapped or functional ones)."""
    plain = _plain_types.get(kind)
    if plain is None:
        plain = getattr(kind, "__torch_dispatch__", None) is Tensor.__torch_dispatch__
        _plain_types[kind] = plain
    return plain


def sign(dependencies: Iterable[object]) -> tuple[Signature, bool]:
    """Sign tensors and scalars, in order.

    A tensor's signature is its identity, version counter, storage, address, dtype, shape, strides,
    and whether it is to be read negated or conjugated. Any in-place operation that PyTorch counts,
    any replacement of the tensor or of its data, and any move changes it. The storage part is sound
    only while a :class:`Stamp` made of the same tensors is alive, since a weak reference keeps the
    storage's number from being used again.

    Args:
        dependencies: tensors, plain scalars (None, numbers, strings, dtypes, devices, enums), and
            functions that close over nothing; tuples, lists and dicts of these; sets of scalars.

    Returns:
        The signature, and whether any of the tensors requires gradients.

    Raises:
        UncheckableError: a tensor without a version counter (an inference tensor) or without data
            of its own (fake, functional, wrapper subclass), or something else altogether.
    """
    parts: list[bytes] = []
    others: list[object] = []
    requires_grad = False
    for item in dependencies:
        if isinstance(item, Tensor):
            if not (_plain_types.get(type(item)) or _is_plain(type(item))):
                msg = f"a {type(item).__name__} has no data of its own"
                sharded = type(item).__name__ == "DTensor"
                raise UncheckableError(msg, Reason.SHARDED if sharded else Reason.SUBCLASS)
            try:  # spelled out here, not in a function: it runs for every weight at every hit
                parts.append(
                    _pack_tensor(
                        id(item),
                        item._version,
                        _storage_address(item),
                        item.data_ptr(),
                        hash(
                            (item.dtype, item.size(), item.stride(), item.is_neg(), item.is_conj())
                        ),
                    )
                )
                if item.requires_grad:
                    requires_grad = True
            except (RuntimeError, NotImplementedError) as error:
                raise UncheckableError(str(error), Reason.UNVERSIONED) from None
            if _refilled and _storage_address(item) in _refilled:
                msg = "the storage of a dependency is refilled without counting it"
                raise UncheckableError(msg, Reason.REFILLED)
        elif item is None:
            parts.append(b"none")
        elif type(item) is float:
            parts.append(_pack_float(b"float", item))
        elif isinstance(item, tuple | list | dict):
            inner = [*item.keys(), *item.values()] if isinstance(item, dict) else item
            signature, wanted = sign(inner)
            others.append((len(parts), type(item), len(item), signature))
            requires_grad = requires_grad or wanted
        elif isinstance(item, FunctionType | BuiltinFunctionType):
            if getattr(item, "__closure__", None) is not None:
                msg = f"{item.__qualname__} is a closure, and what it closes over may change"
                raise UncheckableError(msg)
            others.append((len(parts), item))
        else:
            others.append((len(parts), _freeze_plain(item)))
    packed = b"".join(parts)
    return (packed, others) if others else packed, requires_grad


def split(dependencies: Iterable[object], signature: Signature) -> list[object]:
    """Take a signature apart: return what it says of each dependency, in order.

    Args:
        dependencies: those that were signed; what has been written into them since does not matter.
        signature: what :func:`sign` returned.
    """
    packed, others = signature if isinstance(signature, tuple) else (signature, [])
    rest = iter(others)
    found: list[object] = []
    start = 0
    for item in dependencies:
        if isinstance(item, Tensor):
            size = _TENSOR_BYTES
        elif item is None:
            size = len(b"none")
        elif type(item) is float:
            size = _FLOAT_BYTES
        else:
            _, *piece = next(rest)  # without its place, which goes by what comes before it
            found.append(piece)
            continue
        found.append(packed[start : start + size])
        start += size
    return found


def _freeze_plain(item: object) -> object:
    inside: list[object] = []
    with suppress(TypeError):
        frozen = freeze(item, inside)
        if not inside and not isinstance(item, torch.nn.Module):
            return frozen
    msg = f"a dependency is a {type(item).__name__}: yield tensors and plain scalars"
    raise UncheckableError(msg)


def tensors_in(dependencies: Iterable[object]) -> Iterable[Tensor]:
    """Yield the tensors among dependencies, in order."""
    for item in dependencies:
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, tuple | list):
            yield from tensors_in(item)
        elif isinstance(item, dict):
            yield from tensors_in(item.values())


class Held(Uncopyable, StorageWeakRef):
    """A weak reference to a storage: it owns a raw count, which a copy would give back again."""

    __slots__ = ()


class Stamp(Uncopyable):
    """The state of everything that one stored value was derived from.

    It keeps no tensor alive, only the numbers of their storages from being used again.

    Attributes:
        key: the key of the call that the value answers.
        signature: what :func:`sign` said before the value was derived.
        born: the cache's clock when deriving began; an event that comes later voids the value.
        contents: with ``guard="content"``, what the dependencies held before and after deriving.
        audit: hashes of them, if they are audited.
    """

    __slots__ = ("_held", "audit", "born", "contents", "key", "signature")

    def __init__(
        self, key: Hashable, signature: Signature, dependencies: Iterable[object], born: int
    ) -> None:
        self.key = key
        self.signature = signature
        self.born = born
        self.contents: tuple[Contents, ...] = ()
        self.audit: Audit | None = None
        # Not weak references to the tensors: torch.utils.swap_tensors refuses tensors that have
        # them. Storages may have them.
        self._held = tuple(
            Held(tensor.untyped_storage())  # type: ignore[no-untyped-call]
            for tensor in tensors_in(dependencies)
        )

    @property
    def storages(self) -> tuple[int, ...]:
        """Ids of the dependencies' storages; valid for as long as the stamp lives."""
        return tuple(held.cdata for held in self._held)

    @property
    def expired(self) -> bool:
        """Whether a dependency's storage was freed, so that the value can never be valid again."""
        return any(held.expired() for held in self._held)  # type: ignore[no-untyped-call]


def environment() -> tuple[object, ...]:
    """Return the global settings that change what the same operations compute.

    Autocast for every device type, the precision of float32 matrix products, the default dtype, and
    where new tensors are made that are told no device.
    """
    precision: object
    try:
        precision = torch._C._get_float32_matmul_precision()
    except RuntimeError:  # it was set for each backend by itself
        precision = (
            torch.backends.mkldnn.matmul.fp32_precision,  # type: ignore[attr-defined]
            torch.backends.cuda.matmul.fp32_precision,
        )
    default = torch.get_default_dtype()
    if not torch._C._is_any_autocast_enabled():
        return (precision, default, place())
    autocast = tuple(
        (kind, torch.get_autocast_dtype(kind))
        for kind in ("cpu", "cuda", "xpu", "mps")
        if torch.is_autocast_enabled(kind)
    )
    return (precision, default, place(), autocast)


def place() -> tuple[torch.device, int]:
    """Return the default device of this thread, and which CUDA device ``"cuda"`` means."""
    device: torch.device | None = None
    if torch._C._len_torch_function_stack():
        for mode in _get_current_function_mode_stack():  # type: ignore[no-untyped-call]
            if isinstance(mode, DeviceContext):
                device = mode.device  # the innermost decides
    elif not _HAS_CUDA:
        return _CPU
    if device is None:
        device = torch.device(torch._C._get_default_device())
    return device, torch._C._cuda_getDevice() if torch.cuda._initialized else 0


_CPU = torch.device("cpu"), 0
_HAS_CUDA = hasattr(torch._C, "_cuda_getDevice")
"""Whether PyTorch is built with it; without, nothing but a function mode changes the place."""


def untraceable() -> bool:
    """Whether somebody follows the operations, so that a stored value must not stand in for them.

    True under jit tracing, functorch transforms (vmap, grad, ...), forward-mode differentiation,
    dispatch and function modes (fake and proxy tensors have one; a default device does not count),
    and while a CUDA graph is captured. Callers look for torch.compile themselves.
    """
    if (
        _tracing_state() is not None
        or functorch_stack() is not None
        or forward_ad._current_level >= 0
    ):
        return True
    if torch._C._len_torch_dispatch_stack():
        return True
    if torch._C._len_torch_function_stack() and not all(
        isinstance(mode, DeviceContext)
        for mode in _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    ):
        return True
    return torch.cuda._initialized and torch.cuda.is_current_stream_capturing()


_tracing_state = torch._C._get_tracing_state
functorch_stack = torch._C._functorch.peek_interpreter_stack
