"""Merges of other models: they write a base weight through ``.data``, and it may be a shared one.

An attached layer's own merges are followed by its observer, see ``peft_layers.follow_layer``.
"""

from __future__ import annotations

import functools
import threading
import weakref
from typing import TYPE_CHECKING, Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from dora_cache.cache import AdapterCache

__all__ = ["follow_merges"]

_METHODS = ("merge_adapter", "unmerge_adapter", "merge_and_unload")
_lock = threading.Lock()
_followers: weakref.WeakSet[AdapterCache] = weakref.WeakSet()
_originals: dict[str, Callable[..., Any]] = {}


def follow_merges(cache: AdapterCache) -> None:
    """Void what is derived from a weight that any PEFT model merges into, until detaching.

    PEFT offers no hook, so while any cache is attached three methods of its ``BaseTuner`` are
    wrapped. Calls of a layer's own ``merge`` outside the attached model are not noticed.
    """
    with _lock:
        _followers.add(cache)
        if not _originals:
            for name in _METHODS:
                _originals[name] = getattr(BaseTuner, name)
                setattr(BaseTuner, name, _wrapped(_originals[name]))
    reference = weakref.ref(cache)
    cache.on_detach(lambda: _unfollow(reference()))


def _unfollow(cache: AdapterCache | None) -> None:
    with _lock:
        if cache is not None:
            _followers.discard(cache)
        if not _followers:
            for name, original in _originals.items():
                setattr(BaseTuner, name, original)
            _originals.clear()


def _wrapped(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        weights = _base_weights(self)  # before it: afterwards the layers may be gone
        try:
            return original(self, *args, **kwargs)
        finally:
            for follower in list(_followers):
                follower.touched(weights)

    return wrapper


def _base_weights(tuner: BaseTuner) -> list[Tensor]:
    layers = [part for part in tuner.model.modules() if isinstance(part, BaseTunerLayer)]
    bases = [layer.get_base_layer() for layer in layers]
    return [weight for base in bases for weight in (*base.parameters(), *base.buffers())]
