"""The audit: compare contents that values were derived from, a few at each use.

Version counters do not show writes through ``p.data``, numpy or collectives. So the contents of a
value's dependencies, and of the value itself, are hashed when it is derived, and hashed again at
some of its uses: tensors of up to :data:`SMALL` bytes at every 32nd use on a CPU and every 64th on
CUDA, larger ones less often in proportion, at the latest at every 1,024th.

On CUDA a kernel hashes and compares, and writes what it finds into pinned host memory. That is read
at later audits, so nothing waits for the device. Tensors on other devices are not audited.
"""

from __future__ import annotations

import functools
import itertools
import threading
import weakref
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from cachetools import LRUCache

from dora_cache.ambient import current_device, raw_stream, storage_of
from dora_cache.backends import Ready
from dora_cache.copying import Uncopyable
from dora_cache.core.contents import digest, is_freed, sums_of
from dora_cache.core.facts import tensors_in
from dora_cache.core.refilled import content_of, is_refilled
from dora_cache.core.weak import Held
from dora_cache.triton_launch import Launcher

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from contextlib import AbstractContextManager

    from torch import Tensor

__all__ = ["EVERY", "MOST", "SMALL", "Audit", "Auditor"]

EVERY = 32
"""A value is audited at each use whose number is a multiple of this; a power of two."""

MOST = 32
"""At every how-manieth audit of a value everything is compared; a power of two."""
SMALL = {"cpu": 1 << 17, "cuda": 1 << 21}
"""Bytes of a tensor that counts as small, by its device."""

LEAST = {"cpu": 1, "cuda": 2}
"""At every how-manieth audit of a value its small tensors are compared: a launch takes longer."""

SPANS = 8
"""Tensors that one launch of the kernel hashes, at most."""

_BLOCK_BYTES = 1 << 16
_REMEMBERED = 4096
_PRUNED = 64  # digests added before those of freed storages are dropped
_SPARE = 16  # blocks: a megabyte of a value is hashed together with what it is derived from
_numbers = itertools.count(1)


def _period(nbytes: int, kind: str) -> int:
    """Return at every how-manieth audit of a value a tensor is compared; a power of two."""
    times = max(0, nbytes - 1) // SMALL[kind]
    return min(MOST, LEAST[kind] << times.bit_length())


class _Digest(Uncopyable):
    """The hashes of tensors in host memory."""

    __slots__ = ("__weakref__", "_digests")

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._digests = [digest(tensor) for tensor in tensors]

    def equals(self, tensors: Sequence[Tensor]) -> bool:
        return [digest(tensor) for tensor in tensors] == self._digests


def _span(tensor: Tensor) -> tuple[int, int]:
    """Return a tensor's address and the bytes of its elements."""
    return tensor.data_ptr(), tensor.numel() * tensor.element_size()


class _DeviceDigest(Uncopyable):
    """Hashes of tensors on one CUDA device, kept there and compared there.

    Args:
        tensors: up to :data:`SPANS`.
        spare: blocks of further tensors that :meth:`extend` may take.
        shared: whether other values use it, perhaps on other streams.
    """

    __slots__ = ("__weakref__", "_blocks", "_device", "_expected", "_ready", "_spans", "_stream")

    def __init__(self, tensors: Sequence[Tensor], *, spare: int = 0, shared: bool = False) -> None:
        self._device = tensors[0].get_device()
        self._stream = raw_stream(self._device)
        self._spans: list[tuple[int, int]] = []
        self._blocks = 0
        size = sum(map(_blocks, map(_span, tensors))) + spare
        with _current(self._device):
            self._expected = torch.empty(size, dtype=torch.int64, device=tensors[0].device)
            self._append(tensors)
        self._ready = Ready.now([self._expected]) if shared else None

    def on(self, device: torch.device) -> bool:
        """Whether it is on a device, and has room."""
        return self._device == device.index and self._blocks < self._expected.numel()

    def extend(self, tensors: Sequence[Tensor]) -> bool:
        """Hash further tensors into it; return False if it has no room for them."""
        if len(self._spans) + len(tensors) > SPANS:
            return False
        if self._blocks + sum(map(_blocks, map(_span, tensors))) > self._expected.numel():
            return False
        if raw_stream(self._device) != self._stream:
            return False
        with _current(self._device):
            self._append(tensors)
        return True

    def _append(self, tensors: Sequence[Tensor]) -> None:
        spans = [_span(tensor) for tensor in tensors]
        if _kernel() is None:
            end = self._blocks + 2 * len(tensors)
            torch.cat(
                [sums_of(tensor) for tensor in tensors], out=self._expected[self._blocks : end]
            )
        else:
            blocks = sum(map(_blocks, spans))
            end = self._blocks + blocks
            self._launch(self._expected, 0, spans, first=self._blocks, blocks=blocks)
        self._spans += spans
        self._blocks = end

    def compare(self, tensors: Sequence[Tensor], flag: Tensor, number: int) -> None:
        """Have the device write ``number`` to ``flag``, pinned memory, if contents differ."""
        spans = [_span(tensor) for tensor in tensors]
        if not all(map(_comparable, spans, self._spans)):
            return  # a value that somebody has freed; that shows elsewhere
        if raw_stream(self._device) != self._stream:
            # Using the value has made this stream wait for what came before it on its own.
            if self._ready is not None:
                self._ready.join([])
            self._expected.record_stream(torch.cuda.current_stream(self._device))
        with _current(self._device):
            if _kernel() is None:
                found = torch.cat([sums_of(tensor) for tensor in tensors])
                differ = (found != self._expected[: found.numel()]).any()
                flag.copy_(torch.where(differ, number, 0), non_blocking=True)
            else:
                self._launch(flag, number, spans, blocks=sum(map(_blocks, spans)))

    def _launch(
        self,
        flag: Tensor,
        number: int,
        spans: Sequence[tuple[int, int]],
        *,
        blocks: int,
        first: int = 0,
    ) -> None:
        if not blocks:
            return
        width = 1 if any((start | size) % 4 for start, size in spans) else 4
        unused = SPANS - len(spans)
        starts = [start for start, _ in spans] + [spans[0][0]] * unused
        sizes = [size // width for _, size in spans] + [0] * unused
        constants = (flag is not self._expected, width, _BLOCK_BYTES // width, 1024)
        numbers = (number, first, *starts, *sizes)
        _launcher(self._device, constants).launch(blocks, (self._expected, flag), numbers)


def _comparable(span: tuple[int, int], hashed: tuple[int, int]) -> bool:
    """Whether what lies in a span can be compared with what was hashed, perhaps elsewhere.

    A refilled tensor is at another address each time. Empty tensors have the address 0, and so
    has a tensor whose memory was freed.
    """
    start, size = span
    return size == hashed[1] and (not size or (start != 0 and start % 4 == hashed[0] % 4))


def _blocks(span: tuple[int, int]) -> int:
    """Return how many hashes the tensor in a span takes."""
    return 2 if _kernel() is None else -(-span[1] // _BLOCK_BYTES)


def _current(device: int) -> AbstractContextManager[object]:
    """Return a context in which a CUDA device is the current one."""
    return _NOTHING if current_device() == device else torch.cuda.device(device)


_NOTHING: AbstractContextManager[object] = nullcontext()


@functools.cache
def _kernel() -> Any:
    """Return the kernel; None without Triton, where PyTorch's operations hash."""
    try:
        from dora_cache.core.audit_kernel import hash_blocks
    except ImportError:
        return None
    return hash_blocks


@functools.cache
def _launcher(device: int, constants: tuple[object, ...]) -> Launcher:
    return Launcher(_kernel(), device, 1, (), constants)


class _Large:
    """Digests of large tensors, which many values share, as adapters share a base weight.

    They outlive the values: those that no cap has room for are derived again and again.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # With a weak reference each, which keeps the storage's number from being used again.
        self._known: LRUCache[tuple[int | None, ...], tuple[Any, Held]] = LRUCache(_REMEMBERED)
        self._added = 0

    def of(self, tensor: Tensor) -> Any:
        """Return the digest of a tensor: an earlier one, if none of its facts has changed.

        If the contents have, the earlier one is what other values were derived from, and finds it.
        """
        number = storage_of(tensor)
        content = content_of(number) if is_refilled(number) else None
        facts = (number, *_span(tensor), hash(tensor.stride()), tensor._version, content)
        with self._lock:
            found = self._known.get(facts)
        if found is None:
            kept = _DeviceDigest([tensor], shared=True) if tensor.is_cuda else _Digest([tensor])
            found = kept, Held(tensor.untyped_storage())  # type: ignore[no-untyped-call]
            with self._lock:
                self._known[facts] = found
                self._added += 1
                if self._added % _PRUNED == 0:
                    for old, (_, held) in list(self._known.items()):
                        if held.expired():  # type: ignore[no-untyped-call]
                            del self._known[old]
        return found[0]

    def clear(self) -> None:
        with self._lock:
            self._known.clear()


class Audit(Uncopyable):
    """Hashes of what one value was derived from, and of the value.

    Args:
        name: what the value is called.
        dependencies: what it is derived from, before it is.
        large: where digests of large tensors are shared.
    """

    __slots__ = ("__weakref__", "_checks", "_count", "_large", "_value", "name", "number")

    def __init__(self, name: str, dependencies: Iterable[object], large: _Large) -> None:
        self.name = name
        self._large = large
        self.number = next(_numbers)
        self._checks: list[tuple[int, tuple[int, ...], Any]] = []
        self._value: tuple[int, ...] = ()
        tensors = tensors_in(dependencies)
        self._count = len(tensors)
        self._add(tensors, 0)

    def _add(self, tensors: Sequence[Tensor], first: int) -> None:
        """Hash tensors; the small ones of a device together, on CUDA if one launch takes them."""
        small: dict[torch.device, list[int]] = {}
        for index, tensor in enumerate(tensors, start=first):
            device = tensor.device
            kind = device.type
            if kind not in SMALL or not _auditable(tensor, kind):
                continue
            nbytes = tensor.numel() * tensor.element_size()
            if nbytes <= SMALL[kind]:
                small.setdefault(device, []).append(index)
            else:
                self._checks.append((_period(nbytes, kind), (index,), self._large.of(tensor)))
        for device, indices in small.items():
            if device.type == "cpu":
                together = _Digest([tensors[index - first] for index in indices])
                self._checks.append((LEAST["cpu"], tuple(indices), together))
                continue
            for start in range(0, len(indices), SPANS):
                some = tuple(indices[start : start + SPANS])
                self._hash_together(device, some, [tensors[index - first] for index in some])

    def _hash_together(
        self, device: torch.device, indices: tuple[int, ...], tensors: Sequence[Tensor]
    ) -> None:
        for place, (_, before, kept) in enumerate(self._checks):
            if type(kept) is _DeviceDigest and kept.on(device) and kept.extend(tensors):
                self._checks[place] = (LEAST["cuda"], (*before, *indices), kept)
                return
        self._checks.append((LEAST["cuda"], indices, _DeviceDigest(tensors, spare=_SPARE)))

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
            dependencies: unchanged as far as version counters and addresses tell.
            value: the tensors of the value.
            flags: where CUDA devices write what they find.

        Returns:
            Whether contents in host memory are as they were.
        """
        tensors = tensors_in(dependencies)
        if len(tensors) != self._count:
            return True
        if self._value == tuple(map(id, value)):
            tensors += value
        for period, indices, kept in self._checks:
            if (turn + self.number) % period:
                continue
            # Without the value, where it has been moved.
            chosen = [tensors[index] for index in indices if index < len(tensors)]
            if not chosen:
                continue
            if type(kept) is _Digest:
                if not kept.equals(chosen):
                    return False
            elif not torch.cuda.is_current_stream_capturing():
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
        self._large = _Large()
        self._audits: weakref.WeakValueDictionary[int, Audit] = weakref.WeakValueDictionary()

    def begin(self, name: str, dependencies: Iterable[object]) -> Audit:
        """Hash what a value is about to be derived from."""
        return Audit(name, dependencies, self._large)

    def close(self) -> None:
        """Forget the digests that values share."""
        self._large.clear()

    def changed(
        self, audit: Audit, uses: int, dependencies: Iterable[object], value: Sequence[Tensor]
    ) -> str | None:
        """Compare what is due at a use of a value.

        Returns:
            The name of a value whose contents, or those of what it was derived from, have changed
            without being counted: that one or, found by a device meanwhile, another; or None.
        """
        self._audits[audit.number] = audit  # a device may report it from now on
        if not audit.holds(uses // EVERY, dependencies, value, self._flags):
            self.found += 1
            return audit.name
        for number in self._flags.take():
            other = self._audits.get(number)
            if other is not None:  # else it has gone since
                self.found += 1
                return other.name
        return None


def _auditable(tensor: Tensor, kind: str) -> bool:
    if tensor.layout is not torch.strided or is_freed(tensor):
        return False
    return kind == "cpu" or _is_dense(tensor)


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill a span of memory, in whatever order."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
