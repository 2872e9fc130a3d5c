"""Unmerged PEFT adapters at LoRA speed, under a memory cap you set, never stale.

::

    cache = dora_cache.attach(model, backend="lru", max_bytes="256MiB")
"""

import logging
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

if not Path(__file__).with_name("backends").is_dir():
    # Sources without the link to ../backends: a checkout without symbolic links, or an sdist.
    __path__.append(str(Path(__file__).parents[1]))

from dora_cache.attachment import attach
from dora_cache.cache import AdapterCache
from dora_cache.config import CacheConfig
from dora_cache.core.decorator import CacheInfo, cached
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

# Where the application configures no logging, nothing is printed.
logging.getLogger(__name__).addHandler(logging.NullHandler())

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
