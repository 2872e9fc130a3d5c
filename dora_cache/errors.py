"""All exceptions and warnings of dora-cache."""

from __future__ import annotations

import logging
import warnings
from contextlib import suppress

__all__ = [
    "AdapterFileError",
    "AdapterNotFoundError",
    "AlreadyAttachedError",
    "BackendError",
    "BakedError",
    "CacheWarning",
    "CapError",
    "ConfigError",
    "DetachedError",
    "DoraCacheError",
    "NothingToCacheError",
    "PinError",
    "UnknownBackendError",
]


class DoraCacheError(Exception):
    """Base class of the errors below."""


class ConfigError(DoraCacheError, ValueError):
    """A setting is unknown, cannot be parsed, or contradicts another one."""


class BackendError(DoraCacheError):
    """A backend breaks the contract of :class:`dora_cache.backends.Backend`."""


class UnknownBackendError(ConfigError):
    """No backend of that name is registered or installed."""


class AlreadyAttachedError(DoraCacheError, RuntimeError):
    """Part of the model belongs to another cache already."""


class DetachedError(DoraCacheError, RuntimeError):
    """The cache has been detached and cannot be used any more."""


class NothingToCacheError(DoraCacheError, ValueError):
    """Nothing in the model derives a value that dora-cache knows how to store."""


class PinError(ConfigError):
    """What is pinned would take more than the cap."""


class BakedError(DoraCacheError, RuntimeError):
    """The model cannot be exported with constants, or was changed while it was."""


class CapError(DoraCacheError):
    """A batch needs more of the device than the pool's cap leaves."""


class AdapterNotFoundError(DoraCacheError, KeyError):
    """No cached layer of the model has an adapter of that name."""

    def __str__(self) -> str:
        """Return the message itself; ``KeyError`` would show its ``repr``."""
        return str(self.args[0]) if self.args else ""


class AdapterFileError(DoraCacheError, ValueError):
    """An adapter's files are missing, damaged, unsupported, or made for another model."""


class CacheWarning(UserWarning):
    """Something in the cache failed; inference went on without it."""


_log = logging.getLogger(__name__)
_warned: set[str] = set()


def warn(text: str, *, stacklevel: int = 2) -> None:
    """Issue a :class:`CacheWarning`, and log it; never an error, whatever filters and handlers do.

    Args:
        text: what it says.
        stacklevel: whose line it names, as for ``warnings.warn``.
    """
    with suppress(Exception):
        _log.warning("%s", text)
    with suppress(Exception):
        warnings.warn(text, CacheWarning, stacklevel=stacklevel + 1)


def warn_once(text: str) -> None:
    """Likewise, once in a process."""
    if text not in _warned:
        _warned.add(text)
        warn(text, stacklevel=3)
