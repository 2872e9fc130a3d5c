"""Keep entries in host memory, with an optional bounded tier on the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dora_cache.backends.dict import DictBackend
from dora_cache.backends.lru import LRUBackend
from dora_cache.backends.protocol import Entry, Value
from dora_cache.backends.storage import Ready

if TYPE_CHECKING:
    from collections.abc import Collection, Hashable

__all__ = ["CPUBackend"]


@dataclass(frozen=True, slots=True, eq=False)
class _HostEntry(Entry):
    """An entry whose tensors were copied to the host; ``devices`` says where they belong."""

    devices: tuple[torch.device, ...] = ()


class _HostTier(LRUBackend):
    """The bounded host tier: what it evicts leaves the device as well."""

    def __init__(self, max_bytes: int, device: LRUBackend | None) -> None:
        super().__init__(max_bytes)
        self._device = device

    def removed(self, key: Hashable, entry: Entry) -> None:
        super().removed(key, entry)
        if self._device is not None:
            self._device.delete(key)


class CPUBackend:
    """Store entries in host memory, pinned where CUDA is present, and copy them back on use.

    The most recently used ones also stay on their device, within ``device_bytes``. Values that
    live on the CPU anyway are stored as they are.

    Args:
        max_bytes: cap on the host's bytes (least recently used go first); None for no cap.
        device_bytes: cap on the bytes of the copies kept on the device; None for no such copies.
    """

    host_sizes = frozenset({"max_bytes"})
    """Settings that are sizes of host memory, whatever device the model is on."""

    def __init__(self, max_bytes: int | None = None, device_bytes: int | None = None) -> None:
        self._device = None if device_bytes is None else LRUBackend(device_bytes)
        self._host: DictBackend | _HostTier = (
            DictBackend() if max_bytes is None else _HostTier(max_bytes, self._device)
        )

    @property
    def max_bytes(self) -> int | None:
        """The caps of both tiers together; None where the host's is unbounded."""
        if self._host.max_bytes is None:
            return None
        return self._host.max_bytes + (0 if self._device is None else self._device.max_bytes)

    @property
    def nbytes(self) -> int:
        """Bytes held by both tiers."""
        return self._host.nbytes + self.device_nbytes

    @property
    def device_nbytes(self) -> int:
        """Bytes of the copies held on the device."""
        return 0 if self._device is None else self._device.nbytes

    def get(self, key: Hashable) -> Entry | None:
        """Return the entry under ``key`` with its tensors on their own device, or None."""
        stored = self._host.get(key)
        if not isinstance(stored, _HostEntry):
            return stored
        if self._device is not None:
            resident = self._device.get(key)
            if resident is not None:
                return resident
        entry = _to_devices(stored)
        if self._device is not None:
            self._device.put(key, entry)
        return entry

    def resize(self, max_bytes: int) -> None:
        """Change the cap on the host's bytes; what was used least recently goes at once.

        Where there was no cap, what was stored first goes first.
        """
        if isinstance(self._host, _HostTier):
            self._host.resize(max_bytes)
            return
        bounded = _HostTier(max_bytes, self._device)
        for key in list(self._host.keys()):
            entry = self._host.get(key)
            self._host.delete(key)
            if entry is not None and not bounded.put(key, entry):
                self._drop_copy(key)
        self._host = bounded

    def put(self, key: Hashable, entry: Entry) -> bool:
        """Store ``entry`` on the host, and on its device while it is recent."""
        self._drop_copy(key)
        stored = _to_host(entry)
        kept = self._host.put(key, stored)
        if kept and stored is not entry and self._device is not None:
            self._device.put(key, entry)
        return kept

    def delete(self, key: Hashable) -> bool:
        """Drop the entry under ``key``; return whether there was one."""
        self._drop_copy(key)
        return self._host.delete(key)

    def clear(self) -> None:
        """Drop every entry."""
        self._host.clear()
        if self._device is not None:
            self._device.clear()

    def keys(self) -> Collection[Hashable]:
        """Return the keys held now."""
        return self._host.keys()

    def __len__(self) -> int:
        """Return the number of entries."""
        return len(self._host)

    def close(self) -> None:
        """Drop every entry."""
        self.clear()

    def _drop_copy(self, key: Hashable) -> None:
        if self._device is not None:
            self._device.delete(key)


def _like(value: Value, tensors: tuple[Tensor, ...]) -> Value:
    return tensors if isinstance(value, tuple) else tensors[0]


def _to_host(entry: Entry) -> Entry:
    """Copy an entry to the host; one that is there already is returned as it is."""
    if all(tensor.device.type == "cpu" for tensor in entry.tensors):
        return entry
    # Preserves strides, so that what comes back is used exactly as what was derived.
    copies = tuple(
        torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda).copy_(tensor)
        for tensor in entry.tensors
    )
    return _HostEntry(
        value=_like(entry.value, copies),
        stamp=entry.stamp,
        cost=entry.cost,
        devices=tuple(tensor.device for tensor in entry.tensors),
    )


def _to_devices(stored: _HostEntry) -> Entry:
    tensors = tuple(
        tensor.to(device, non_blocking=True)
        for tensor, device in zip(stored.tensors, stored.devices, strict=True)
    )
    ready = Ready.now(tensors)
    value = _like(stored.value, tensors)
    return Entry(value=value, stamp=stored.stamp, cost=stored.cost, ready=ready)
