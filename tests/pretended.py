"""A device that is only pretended: the cpu backend's two tiers without a GPU."""

import dataclasses

import torch

from dora_cache import backends
from dora_cache.backends import CPUBackend, Entry
from dora_cache.backends.transfer import HostEntry, Transfer


class Pretended(Transfer):
    """Takes every entry for one of a device, and copies within host memory."""

    rate = 1e5  # bytes per second

    def __init__(self):
        super().__init__()
        self.loads = []
        self.broken = False

    @staticmethod
    def is_elsewhere(entry):
        return not isinstance(entry, HostEntry)

    def seconds(self, nbytes):
        return nbytes / self.rate

    def to_host(self, entry, cost):
        if self.broken:
            raise RuntimeError("no host memory")
        stored = super().to_host(entry, cost)
        copies = tuple(tensor.clone() for tensor in entry.tensors)
        value = copies if isinstance(entry.value, tuple) else copies[0]
        return dataclasses.replace(stored, value=value)

    def to_device(self, stored):
        if self.broken:
            raise torch.OutOfMemoryError("no device memory")
        self.loads.append(stored)
        copies = tuple(torch.empty_like(tensor).copy_(tensor) for tensor in stored.tensors)
        value = copies if isinstance(stored.value, tuple) else copies[0]
        return Entry(value, stored.stamp, stored.cost)


class TiersBackend(CPUBackend):
    """The cpu backend with its tiers, for models that are on the CPU; every copy pays."""

    def __init__(self, max_bytes=None, device_bytes=None):
        super().__init__(max_bytes, device_bytes)
        self._transfer = Pretended()
        self._transfer.rate = 1e12


TIERS = "pretended-tiers"
backends.register(TIERS, TiersBackend)
