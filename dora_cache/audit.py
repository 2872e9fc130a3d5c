"""The audit: contents that values were derived from are compared in turn, a little at each use.

Version counters do not show writes through ``p.data``, numpy or collectives. So the contents of a
value's dependencies, and of the value itself, are hashed when it is derived, and hashed again at
some of its uses: tensors of up to :data:`SMALL` bytes at every :data:`EVERY`-th use, larger ones
less often in proportion, at the latest at every :data:`EVERY` * :data:`MOST`-th.

On CUDA a kernel hashes and compares, and writes what it finds into pinned host memory. That is read
at later audits, so nothing waits for the device. Tensors on other devices are not audited.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from typing import TYPE_CHECKING, Any

import torch

from dora_cache.backends import Ready
from dora_cache.contents import digest, is_freed, sums_of
from dora_cache.copying import Uncopyable
from dora_cache.stamps import tensors_in

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

__all__ = ["EVERY", "MOST", "SMALL", "Audit", "Auditor"]

EVERY = 32  # uses of a value; a power of two
MOST = 32  # a power of two
SMALL = {"cpu": 1 << 17, "cuda": 1 << 21}
"""Bytes of a tensor that is compared at each audit of a value, by its device."""

_BLOCK_BYTES = 1 << 16
_numbers = itertools.count(1)


def _period(tensor: Tensor) -> int:
    """Return at every how-manieth audit of a value a tensor is compared; a power of two."""
    times = _span(tensor)[1] // SMALL[tensor.device.type]
    return min(MOST, 1 << times.bit_length()) if times else 1


class _Digest(Uncopyable):
    """The hash of a tensor in host memory."""

    __slots__ = ("__weakref__", "_digest")

    def __init__(self, tensor: Tensor) -> None:
        self._digest = digest(tensor)

    def equals(self, tensor: Tensor) -> bool:
        return digest(tensor) == self._digest


def _span(tensor: Tensor) -> tuple[int, int]:
    """Return a tensor's address and the bytes of its elements."""
    return tensor.data_ptr(), tensor.numel() * tensor.element_size()


class _DeviceDigest(Uncopyable):
    """Hashes of tensors on one CUDA device, kept there and compared there."""

    __slots__ = ("__weakref__", "_device", "_expected", "_ready", "_spans", "_table", "_width")

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._device = tensors[0].device
        rows: list[int] = []
        self._spans = [_span(tensor) for tensor in tensors]
        self._width = 1 if any((start | size) % 4 for start, size in self._spans) else 4
        for start, size in self._spans:
            for offset in range(0, size, _BLOCK_BYTES):
                block = min(_BLOCK_BYTES, size - offset)
                rows += (start + offset, block // self._width)
        with torch.cuda.device(self._device):
            table = torch.tensor(rows, dtype=torch.int64).pin_memory()
            self._table = table.to(self._device, non_blocking=True)
            if _kernel() is None:
                self._expected = self._sums(tensors)
            else:
                self._expected = torch.empty(len(rows) // 2, dtype=torch.int64, device=self._device)
                self._launch(self._expected, 0, compare=False)
        self._ready = Ready.now([self._expected])

    def compare(self, tensors: Sequence[Tensor], flag: Tensor, number: int) -> None:
        """Have the device write ``number`` to ``flag``, pinned memory, if contents differ."""
        if [_span(tensor) for tensor in tensors] != self._spans:
            return  # a value that somebody has freed or moved; that shows elsewhere
        with torch.cuda.device(self._device):
            if self._ready is not None:
                self._ready.join([self._table, self._expected])
            if _kernel() is None:
                differ = (self._sums(tensors) != self._expected).any()
                flag.copy_(torch.where(differ, number, flag.to(self._device)), non_blocking=True)
            else:
                self._launch(flag, number, compare=True)

    def _launch(self, flag: Tensor, number: int, *, compare: bool) -> None:
        blocks = self._expected.numel()
        if blocks:
            _kernel()[(blocks,)](
                self._table, self._expected, flag, number, compare, self._width, 1024
            )

    @staticmethod
    def _sums(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([sums_of(tensor) for tensor in tensors])


@functools.cache
def _kernel() -> Any:
    """Return the kernel; None without Triton, where PyTorch's operations hash."""
    try:
        from dora_cache.audit_kernel import hash_blocks
    except ImportError:
        return None
    return hash_blocks


# Large tensors are shared by many values, as a base weight by all adapters of its layer.
_large: weakref.WeakValueDictionary[tuple[int, ...], _Digest | _DeviceDigest] = (
    weakref.WeakValueDictionary()
)


def _digest_of(tensor: Tensor) -> Any:
    """Return the digest of a large tensor: an earlier one, if none of its facts has changed.

    If the contents have, the earlier one is what other values were derived from, and finds it.
    """
    storage = torch._C._storage_address(tensor)  # type: ignore[attr-defined]
    facts = (storage, *_span(tensor), hash(tensor.stride()), tensor._version)
    found = _large.get(facts)
    if found is None:
        found = _DeviceDigest([tensor]) if tensor.is_cuda else _Digest(tensor)
        _large[facts] = found
    return found


class Audit(Uncopyable):
    """Hashes of what one value was derived from, and of the value.

    It lives in the value's stamp, whose references keep storages' numbers from being used again:
    the digests of large tensors are found by them.

    Args:
        name: what the value is called.
        dependencies: what it is derived from, before it is.
    """

    __slots__ = ("__weakref__", "_checks", "_count", "_value", "name", "number")

    def __init__(self, name: str, dependencies: Iterable[object]) -> None:
        self.name = name
        self.number = next(_numbers)
        self._checks: list[tuple[int, tuple[int, ...], Any]] = []
        self._value: tuple[int, ...] = ()
        tensors = list(tensors_in(dependencies))
        self._count = len(tensors)
        self._add(tensors, 0)

    def _add(self, tensors: Sequence[Tensor], first: int) -> None:
        """Hash tensors; the small ones of a CUDA device together."""
        small: dict[torch.device, list[int]] = {}
        for index, tensor in enumerate(tensors):
            if not _auditable(tensor):
                continue
            period = _period(tensor)
            if period > 1:
                self._checks.append((period, (first + index,), _digest_of(tensor)))
            elif tensor.is_cuda:
                small.setdefault(tensor.device, []).append(index)
            else:
                self._checks.append((period, (first + index,), _Digest(tensor)))
        for indices in small.values():
            digest = _DeviceDigest([tensors[index] for index in indices])
            self._checks.append((1, tuple(first + index for index in indices), digest))

    def add_value(self, tensors: Sequence[Tensor]) -> None:
        """Hash the value once it has been derived; it is compared for as long as it stays there."""
        self._value = tuple(map(id, tensors))
        self._add(tensors, self._count)

    def holds(
        self, turn: int, dependencies: Iterable[object], value: Sequence[Tensor], flags: _Flags
    ) -> bool:
        """Compare those tensors whose turn it is.

        Args:
            turn: the how-manieth audit of the value it is.
            dependencies: as they were, by their signature.
            value: the tensors of the value.
            flags: where CUDA devices write what they find.

        Returns:
            Whether contents in host memory are as they were.
        """
        tensors = list(tensors_in(dependencies))
        if self._value == tuple(map(id, value)):
            tensors += value
        for period, indices, kept in self._checks:
            if (turn + self.number) % period or indices[-1] >= len(tensors):
                continue
            if type(kept) is _Digest:
                if not kept.equals(tensors[indices[0]]):
                    return False
            elif not torch.cuda.is_current_stream_capturing():
                chosen = [tensors[index] for index in indices]
                kept.compare(chosen, flags.on(chosen[0].device), self.number)
        return True


class _Flags:
    """One number in pinned memory for each CUDA device: that of an audit that found a change."""

    def __init__(self) -> None:
        self._by_device: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> Tensor:
        flag = self._by_device.get(device)
        if flag is None:
            flag = torch.zeros(1, dtype=torch.int64).pin_memory()
            self._by_device[device] = flag
        return flag

    def take(self) -> list[int]:
        """Return what devices have written since the last time."""
        found = []
        for flag in self._by_device.values():
            number = int(flag)
            if number:
                flag.zero_()
                found.append(number)
        return found


class Auditor:
    """The audits of one cache.

    Attributes:
        found: how often contents had changed without being counted.
    """

    def __init__(self) -> None:
        self.found = 0
        self._flags = _Flags()
        self._audits: weakref.WeakValueDictionary[int, Audit] = weakref.WeakValueDictionary()

    def begin(self, name: str, dependencies: Iterable[object]) -> Audit:
        """Hash what a value is about to be derived from."""
        audit = Audit(name, dependencies)
        self._audits[audit.number] = audit
        return audit

    def changed(
        self, audit: Audit, uses: int, dependencies: Iterable[object], value: Sequence[Tensor]
    ) -> str | None:
        """Compare what is due at a use of a value.

        Returns:
            The name of a value whose contents, or those of what it was derived from, have changed
            without being counted: that one or, found by a device meanwhile, another; or None.
        """
        if not audit.holds(uses // EVERY, dependencies, value, self._flags):
            self.found += 1
            return audit.name
        for number in self._flags.take():
            other = self._audits.get(number)
            if other is not None:  # else it has gone since
                self.found += 1
                return other.name
        return None


def _auditable(tensor: Tensor) -> bool:
    kind = tensor.device.type
    if is_freed(tensor):
        return False
    if kind == "cpu":
        return tensor.layout is torch.strided
    return kind == "cuda" and _is_dense(tensor)


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill a span of memory, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
