"""Optimizer steps: fused ones change weights without telling their version counters."""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Any

from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from dora_cache.cache import AdapterCache

__all__ = ["follow_optimizers"]

_lock = threading.Lock()
_followers: weakref.WeakSet[AdapterCache] = weakref.WeakSet()
_handle: RemovableHandle | None = None


def follow_optimizers(cache: AdapterCache) -> None:
    """Void values derived from whatever any PyTorch optimizer steps, until the cache detaches."""
    global _handle  # noqa: PLW0603 - PyTorch's hook is global
    with _lock:
        _followers.add(cache)
        if _handle is None:
            _handle = register_optimizer_step_post_hook(_stepped)
    reference = weakref.ref(cache)
    cache.on_detach(lambda: _unfollow(reference()))


def _unfollow(cache: AdapterCache | None) -> None:
    global _handle  # noqa: PLW0603 - PyTorch's hook is global
    with _lock:
        if cache is not None:
            _followers.discard(cache)
        if not _followers and _handle is not None:
            _handle.remove()
            _handle = None


def _stepped(optimizer: Optimizer, *_: Any) -> None:
    parameters = [
        parameter
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.grad is not None
    ]
    for cache in list(_followers):
        cache.touched(parameters)
