"""Optimizer steps: fused ones change weights without telling their version counters."""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Any

from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.hooks import RemovableHandle

    from dora_cache.cache import AdapterCache

__all__ = ["follow_optimizers"]

_lock = threading.Lock()
_followers: weakref.WeakSet[AdapterCache] = weakref.WeakSet()
_handles: list[RemovableHandle] = []
_stepping: dict[tuple[int, int], list[Tensor]] = {}


def follow_optimizers(cache: AdapterCache) -> None:
    """Void values derived from whatever any PyTorch optimizer steps, until the cache detaches."""
    with _lock:
        _followers.add(cache)
        if not _handles:
            _handles.append(register_optimizer_step_pre_hook(_steps))
            _handles.append(register_optimizer_step_post_hook(_stepped))
    reference = weakref.ref(cache)
    cache.on_detach(lambda: _unfollow(reference()))


def _unfollow(cache: AdapterCache | None) -> None:
    with _lock:
        if cache is not None:
            _followers.discard(cache)
        if not _followers:
            while _handles:
                _handles.pop().remove()


def _steps(optimizer: Optimizer, *_: Any) -> None:
    # By the time of the other hook the optimizer's own hooks may have cleared the gradients.
    _stepping[threading.get_ident(), id(optimizer)] = _with_gradients(optimizer)


def _stepped(optimizer: Optimizer, *_: Any) -> None:
    before = _stepping.pop((threading.get_ident(), id(optimizer)), [])
    parameters = [*before, *_with_gradients(optimizer)]
    for cache in list(_followers):
        cache.touched(parameters)


def _with_gradients(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
