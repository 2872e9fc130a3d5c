"""Weak references to storages."""

from __future__ import annotations

from torch.multiprocessing.reductions import StorageWeakRef

from dora_cache.copying import Uncopyable

__all__ = ["Held"]


class Held(Uncopyable, StorageWeakRef):
    """A weak reference to a storage: it owns a raw count, which a copy would give back again."""

    __slots__ = ()
