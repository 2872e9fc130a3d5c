"""Unmerged PEFT adapters at LoRA speed, under a memory cap you set, never stale.

::

    cache = dora_cache.attach(model, backend="lru", max_bytes="256MiB")
"""

from importlib.metadata import PackageNotFoundError, version

from dora_cache.attachment import attach
from dora_cache.cache import AdapterCache
from dora_cache.config import CacheConfig
from dora_cache.decorator import CacheInfo, cached
from dora_cache.errors import (
    AdapterFileError,
    AdapterNotFoundError,
    AlreadyAttachedError,
    BackendError,
    CacheWarning,
    ConfigError,
    DetachedError,
    DoraCacheError,
    NothingToCacheError,
    PinError,
    UnknownBackendError,
)
from dora_cache.recipes import register_recipe
from dora_cache.stats import CacheStats

try:
    __version__ = version("dora-cache")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"

__all__ = [
    "AdapterCache",
    "AdapterFileError",
    "AdapterNotFoundError",
    "AlreadyAttachedError",
    "BackendError",
    "CacheConfig",
    "CacheInfo",
    "CacheStats",
    "CacheWarning",
    "ConfigError",
    "DetachedError",
    "DoraCacheError",
    "NothingToCacheError",
    "PinError",
    "UnknownBackendError",
    "__version__",
    "attach",
    "cached",
    "register_recipe",
]
