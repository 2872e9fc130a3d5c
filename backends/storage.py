"""Bytes and identities of tensor storages, and readiness of data on CUDA."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dora_cache.ambient import raw_stream
from dora_cache.copying import Uncopyable
from dora_cache.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable

__all__ = [
    "Ledger",
    "Ready",
    "UncopyableBackend",
    "checked_cap",
    "storage_bytes",
    "storages",
    "timing_event",
]


def checked_cap(max_bytes: int) -> int:
    """Return a cap in bytes as it is.

    Raises:
        ConfigError: it is negative.
    """
    if max_bytes < 0:
        msg = f"max_bytes is {max_bytes}: give a size of zero bytes or more"
        raise ConfigError(msg)
    return max_bytes


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Map the id of every distinct storage under ``tensors`` to its size in bytes."""
    found = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        found[storage._cdata] = storage.nbytes()
    return found


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the distinct storages under ``tensors``.

    A view keeps its whole storage alive, so the whole storage counts, not the view's elements.
    """
    return sum(storages(tensors).values())


def timing_event() -> torch.cuda.Event:
    """Return an event that can tell the time."""
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _nobody(key: Hashable) -> None:
    """Hear of an eviction where nobody wants to."""


class UncopyableBackend(Uncopyable):
    """Base of the backends that hold entries: they refuse to be copied and pickled.

    Those that evict call ``self._evicted(key)`` for each eviction.
    """

    INSTEAD = "its entries belong to one cache; make a new backend"
    _evicted: Callable[[Hashable], object] = staticmethod(_nobody)

    def on_evict(self, evicted: Callable[[Hashable], object]) -> None:
        """Call ``evicted`` with the key of each entry evicted from now on."""
        self._evicted = evicted


class Ledger(Uncopyable):
    """Counts the bytes of a changing set of tensors, each distinct storage once.

    What was counted in is counted out, whatever has become of the tensors' storages meanwhile.
    It knows storages by number, so a copy would count those of other tensors.
    """

    INSTEAD = "it counts storages by number; make a new one, and add the tensors"

    def __init__(self) -> None:
        self._added: dict[tuple[int, ...], list[dict[int, int]]] = {}
        self._uses: Counter[int] = Counter()
        self._sizes: dict[int, int] = {}
        self.nbytes = 0

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Count ``tensors`` in; they must stay alive until removed."""
        tensors = tuple(tensors)
        found = storages(tensors)
        self._added.setdefault(tuple(map(id, tensors)), []).append(found)
        for key, size in found.items():
            if key not in self._sizes:
                self._sizes[key] = size
                self.nbytes += size
            self._uses[key] += 1

    def remove(self, tensors: Iterable[Tensor]) -> None:
        """Count out ``tensors`` that were added before."""
        ids = tuple(map(id, tensors))
        found = self._added[ids].pop()
        if not self._added[ids]:
            del self._added[ids]
        for key in found:
            self._uses[key] -= 1
            if not self._uses[key]:
                del self._uses[key]
                self.nbytes -= self._sizes.pop(key)

    def clear(self) -> None:
        """Count everything out."""
        self._added.clear()
        self._uses.clear()
        self._sizes.clear()
        self.nbytes = 0


@dataclass(frozen=True, slots=True, eq=False)
class Ready(Uncopyable):
    """A point on a CUDA stream after which some tensors' data may be read.

    A tensor written on one stream and read on another needs two things: the reader waits for the
    writer, and the allocator learns of the reader, so that the memory is not reused too early.

    Attributes:
        device: the device's index.
        stream: the stream, as CUDA knows it.
        event: the point.
        began: where on the same device's streams the work that made the data began, if known.
    """

    device: int
    stream: int
    event: torch.cuda.Event
    began: torch.cuda.Event | None = None

    @classmethod
    def now(cls, tensors: Iterable[Tensor], began: torch.cuda.Event | None = None) -> Ready | None:
        """Mark the present point of the current stream; None if no tensor is on CUDA.

        The tensors of one value are on one device.

        Args:
            tensors: the value.
            began: an event that can tell the time, from :meth:`begin`.
        """
        for tensor in tensors:
            if tensor.is_cuda:
                current = torch.cuda.current_stream(tensor.device)
                if began is not None and began.device != tensor.device:
                    began = None  # times of two devices cannot be compared
                event = current.record_event(None if began is None else timing_event())
                return cls(current.device_index, current.cuda_stream, event, began)
        return None

    @staticmethod
    def begin(tensors: Iterable[Tensor]) -> torch.cuda.Event | None:
        """Mark where work on some tensors begins, to tell later what it took; None off CUDA."""
        for tensor in tensors:
            if tensor.is_cuda:
                return torch.cuda.current_stream(tensor.device).record_event(timing_event())
        return None

    def seconds(self) -> float | None:
        """Return what the work took on its stream; None if that is not known, or not yet."""
        if self.began is None or not self.event.query():  # type: ignore[no-untyped-call]
            return None
        return self.began.elapsed_time(self.event) / 1e3

    def join(self, tensors: Iterable[Tensor]) -> None:
        """Make the current stream wait until the data is there, if it is another stream."""
        if raw_stream(self.device) == self.stream:
            return
        current = torch.cuda.current_stream(self.device)
        current.wait_event(self.event)
        for tensor in tensors:
            if tensor.is_cuda:
                tensor.record_stream(current)
