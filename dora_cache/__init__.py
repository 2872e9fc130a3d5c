"""Unmerged PEFT adapters at LoRA speed, under a memory cap you set, never stale.

::

    cache = dora_cache.attach(model, backend="lru", max_bytes="256MiB")
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from dora_cache.attachment import attach
from dora_cache.cache import AdapterCache
from dora_cache.config import CacheConfig
from dora_cache.decorator import CacheInfo, cached
from dora_cache.errors import (
    AdapterFileError,
    AdapterNotFoundError,
    AlreadyAttachedError,
    BackendError,
    BakedError,
    CacheWarning,
    CapError,
    ConfigError,
    DetachedError,
    DoraCacheError,
    NothingToCacheError,
    PinError,
    UnknownBackendError,
)
from dora_cache.recipes import register_recipe
from dora_cache.stats import CacheStats

if TYPE_CHECKING:
    from dora_cache.serving import AdapterPool, PoolStats

try:
    __version__ = version("dora-cache")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"

__all__ = [
    "AdapterCache",
    "AdapterFileError",
    "AdapterNotFoundError",
    "AdapterPool",
    "AlreadyAttachedError",
    "BackendError",
    "BakedError",
    "CacheConfig",
    "CacheInfo",
    "CacheStats",
    "CacheWarning",
    "CapError",
    "ConfigError",
    "DetachedError",
    "DoraCacheError",
    "NothingToCacheError",
    "PinError",
    "PoolStats",
    "UnknownBackendError",
    "__version__",
    "attach",
    "cached",
    "register_recipe",
]


def __getattr__(name: str) -> object:
    """Import what serves many adapters when it is asked for: it imports PEFT."""
    if name in {"AdapterPool", "PoolStats"}:
        return getattr(import_module("dora_cache.serving"), name)
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)
