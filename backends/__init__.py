"""Storage backends for derived tensors, one in each file.

To add a backend, write a class with the methods of :class:`Backend` in a file of its own and add
its row to the table in ``registry.py``; from another package, use :func:`register` or an entry
point.
"""

from dora_cache.backends.budget import BudgetBackend
from dora_cache.backends.cpu import CPUBackend
from dora_cache.backends.dict import DictBackend
from dora_cache.backends.lru import LRUBackend
from dora_cache.backends.null import NullBackend
from dora_cache.backends.protocol import Backend, Declining, Entry, Pinning, Resizable, Value
from dora_cache.backends.registry import (
    ENTRY_POINT_GROUP,
    BackendInfo,
    available,
    check_options,
    create,
    host_sizes,
    register,
)
from dora_cache.backends.storage import Ledger, Ready, storage_bytes

__all__ = [
    "ENTRY_POINT_GROUP",
    "Backend",
    "BackendInfo",
    "BudgetBackend",
    "CPUBackend",
    "Declining",
    "DictBackend",
    "Entry",
    "LRUBackend",
    "Ledger",
    "NullBackend",
    "Pinning",
    "Ready",
    "Resizable",
    "Value",
    "available",
    "check_options",
    "create",
    "host_sizes",
    "register",
    "storage_bytes",
]
