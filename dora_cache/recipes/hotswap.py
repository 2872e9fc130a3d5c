"""PEFT's hotswap: it writes through ``.data``, which no version counter shows."""

from __future__ import annotations

import functools
import threading
import weakref
from typing import TYPE_CHECKING, Any

from peft.utils import hotswap

from dora_cache.decorator import SLOT

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from dora_cache.cache import AdapterCache

__all__ = ["follow_hotswap"]

_lock = threading.Lock()
_followers: weakref.WeakSet[AdapterCache] = weakref.WeakSet()
_originals: dict[str, Callable[..., Any]] = {}


def follow_hotswap(cache: AdapterCache) -> None:
    """Void a model's values when PEFT swaps an adapter in place, until the cache detaches.

    All adapters' values go: PEFT finds an adapter's weights by its name as a part of their names,
    so it may write to others as well, and it writes zeros into layers that the new adapter lacks.

    PEFT offers no hook, so while any cache is attached two functions of its module are wrapped:
    the one that swaps, for an event once all is written; and the one it calls for each layer, for
    those who imported the first before it was wrapped.
    """
    with _lock:
        _followers.add(cache)
        if not _originals:
            _wrap("hotswap_adapter_from_state_dict", _swapped)
            _wrap("_update_scaling", _swapping)
    reference = weakref.ref(cache)
    cache.on_detach(lambda: _unfollow(reference()))


def _unfollow(cache: AdapterCache | None) -> None:
    with _lock:
        if cache is not None:
            _followers.discard(cache)
        if not _followers:
            for name, original in _originals.items():
                setattr(hotswap, name, original)
            _originals.clear()


def _wrap(name: str, event: Callable[..., None]) -> None:
    original = getattr(hotswap, name, None)
    if original is None:
        return

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return original(*args, **kwargs)
        finally:
            event(*args, **kwargs)

    _originals[name] = original
    setattr(hotswap, name, wrapper)


def _swapped(model: nn.Module, *_: Any, **__: Any) -> None:
    caches = {_cache_of(module) for module in model.modules()}
    for follower in list(_followers):
        if follower in caches:
            follower.invalidate()


def _swapping(lora_module: nn.Module, *_: Any, **__: Any) -> None:
    cache = _cache_of(lora_module)
    for follower in list(_followers) if cache is None else [cache]:
        follower.suspect()  # the weights are written after this


def _cache_of(module: nn.Module) -> AdapterCache | None:
    binding = vars(module).get(SLOT)
    return None if binding is None else binding.cache
