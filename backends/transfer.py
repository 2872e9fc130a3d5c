"""Copies of entries between a device and host memory, on a stream of their own on CUDA."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from dora_cache.backends.protocol import Entry
from dora_cache.backends.storage import Ready, timing_event

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from dora_cache.backends.protocol import Value

__all__ = ["HostEntry", "Transfer"]

_LAUNCH = 3e-5
"""Seconds that a copy takes however small it is, about."""

_BYTES_PER_SECOND = 2e10
"""Until some copies have been timed: what PCIe 4.0 x16 gives, about."""

_TIMED_FROM = 1 << 20
"""Bytes of a copy that says something about the rate."""

_SMOOTHING = 0.25


@dataclass(frozen=True, slots=True, eq=False)
class HostEntry(Entry):
    """An entry whose tensors were copied to the host; ``devices`` says where they belong."""

    devices: tuple[torch.device, ...] = ()


class Transfer:
    """Copies entries to the host and back, and knows what that takes.

    On CUDA all copies of a device go through one stream, in order: so one to the host is over
    before one back from it begins. A copy back waits for nothing else, and whoever uses it waits
    for it alone; the stream that a copy to the host is asked for on waits until it is made. Host
    memory is pinned there.
    """

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._rate = _BYTES_PER_SECOND
        self._timing: tuple[int, Ready] | None = None

    @staticmethod
    def is_elsewhere(entry: Entry) -> bool:
        """Whether an entry is not in host memory."""
        return any(tensor.device.type != "cpu" for tensor in entry.tensors)

    def seconds(self, nbytes: int) -> float:
        """Return what copying so many bytes to the device is expected to take."""
        if self._timing is not None:
            timed, ready = self._timing
            taken = ready.seconds()
            if taken is not None:
                self._timing = None
                if taken > 0:
                    self._rate += _SMOOTHING * (timed / taken - self._rate)
        return _LAUNCH + nbytes / self._rate

    def to_host(self, entry: Entry, cost: float) -> HostEntry:
        """Copy an entry to the host; its tensors may be let go of at once.

        Args:
            entry: on some device.
            cost: of the copy, see ``Entry.cost``.

        Raises:
            RuntimeError: there is no memory for it.
        """
        device = next((one.device for one in entry.tensors if one.is_cuda), None)
        current = None if device is None else torch.cuda.current_stream(device)
        with self._on_stream(device) as stream:
            if stream is not None and entry.ready is not None:
                stream.wait_event(entry.ready.event)
            elif stream is not None and current is not None:
                stream.wait_stream(current)
            copies = tuple(_host_copy(tensor) for tensor in entry.tensors)
            for tensor in entry.tensors:
                if stream is not None and tensor.is_cuda:
                    tensor.record_stream(stream)
        if stream is not None and current is not None:
            current.wait_event(stream.record_event())  # whoever writes into them next does so later
        devices = tuple(tensor.device for tensor in entry.tensors)
        return HostEntry(_like(entry.value, copies), entry.stamp, cost, devices=devices)

    def to_device(self, stored: HostEntry) -> Entry:
        """Copy an entry back to where it was; it is there once its ``ready`` says so.

        Raises:
            torch.OutOfMemoryError: the device has no memory for it.
        """
        device = next((one for one in stored.devices if one.type == "cuda"), None)
        with self._on_stream(device) as stream:
            timed = stream is not None and self._timing is None and stored.nbytes >= _TIMED_FROM
            began = stream.record_event(timing_event()) if stream is not None and timed else None
            tensors = tuple(
                tensor.to(place, non_blocking=True)
                for tensor, place in zip(stored.tensors, stored.devices, strict=True)
            )
            ready = Ready.now(tensors, began)
            if ready is not None and timed:
                self._timing = stored.nbytes, ready
                ready = replace(ready, began=None)  # of the copy, not of what the value took
            return Entry(_like(stored.value, tensors), stored.stamp, stored.cost, ready)

    @contextmanager
    def _on_stream(self, device: torch.device | None) -> Iterator[torch.cuda.Stream | None]:
        """Run what is within outside all modes, and on the stream for a device of CUDA."""
        with torch.inference_mode(mode=False), torch.no_grad():
            if device is None:
                yield None
                return
            stream = self._streams.get(device)
            if stream is None:
                stream = self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            with torch.cuda.stream(stream):
                yield stream


def _host_copy(tensor: Tensor) -> Tensor:
    # Preserves strides, so that what comes back is used exactly as what was derived.
    empty = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
    return empty.copy_(tensor, non_blocking=tensor.is_cuda)


def _like(value: Value, tensors: tuple[Tensor, ...]) -> Value:
    return tensors if isinstance(value, tuple) else tensors[0]
