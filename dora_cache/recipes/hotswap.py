"""PEFT's hotswap: it writes through ``.data``, which no version counter shows."""

from __future__ import annotations

import functools
from functools import partial
from typing import TYPE_CHECKING, Any

from peft.utils import hotswap

from dora_cache.attributes import SLOT
from dora_cache.lifecycle import Followers, wrap

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import ExitStack

    from torch import nn

    from dora_cache.core.engine import Engine

__all__ = ["follow_hotswap"]


def follow_hotswap(cache: Engine) -> None:
    """Void a model's values when PEFT swaps an adapter in place, until the cache detaches.

    All adapters' values go: PEFT finds an adapter's weights by its name as a part of their names,
    so it may write to others as well, and it writes zeros into layers that the new adapter lacks.

    PEFT offers no hook, so while any cache is attached two functions of its module are wrapped:
    the one that swaps, for an event once all is written; and the one it calls for each layer, for
    those who imported the first before it was wrapped.
    """
    _followers.add(cache)


def _begin(undo: ExitStack) -> None:
    wrap(undo, hotswap, "hotswap_adapter_from_state_dict", partial(_telling, _swapped))
    wrap(undo, hotswap, "_update_scaling", partial(_telling, _swapping))


_followers = Followers(_begin)


def _telling(event: Callable[..., None], original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return original(*args, **kwargs)
        finally:
            event(*args, **kwargs)

    return wrapper


def _swapped(model: nn.Module, *_: Any, **__: Any) -> None:
    caches = {_cache_of(module) for module in model.modules()}
    for follower in _followers:
        if follower in caches:
            follower.invalidate()


def _swapping(lora_module: nn.Module, *_: Any, **__: Any) -> None:
    cache = _cache_of(lora_module)
    for follower in _followers if cache is None else [cache]:
        follower.suspect()  # the weights are written after this


def _cache_of(module: nn.Module) -> Engine | None:
    binding = vars(module).get(SLOT)
    return None if binding is None else binding.cache
