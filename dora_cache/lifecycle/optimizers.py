"""Optimizers and averages: some write weights without telling their version counters.

Fused optimizers do, and so does ``torch._foreach_lerp_`` on CUDA, which averages weights.
"""

from __future__ import annotations

import functools
import threading
from typing import TYPE_CHECKING, Any

from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.optim.swa_utils import AveragedModel

from dora_cache.lifecycle.followers import Followers, wrap
from dora_cache.lifecycle.writers import look_again

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import ExitStack

    from torch import Tensor

    from dora_cache.core.engine import Engine

__all__ = ["follow_optimizers"]

_stepping: dict[tuple[int, int], list[Tensor]] = {}


def follow_optimizers(cache: Engine) -> None:
    """Void values derived from whatever PyTorch steps or averages, until the cache detaches."""
    _followers.add(cache)


def _begin(undo: ExitStack) -> None:
    undo.callback(register_optimizer_step_pre_hook(_steps).remove)
    undo.callback(register_optimizer_step_post_hook(_stepped).remove)
    wrap(undo, AveragedModel, "update_parameters", _averaging)  # it has no hooks


_followers = Followers(_begin)


def _steps(optimizer: Optimizer, *_: Any) -> None:
    look_again()
    # By the time of the other hook the optimizer's own hooks may have cleared the gradients.
    _stepping[threading.get_ident(), id(optimizer)] = _may_write(optimizer)


def _stepped(optimizer: Optimizer, *_: Any) -> None:
    before = _stepping.pop((threading.get_ident(), id(optimizer)), [])
    _touched([*before, *_may_write(optimizer)])


def _averaging(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def update(self: AveragedModel, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(self, *args, **kwargs)
        finally:
            _touched([*self.module.parameters(), *self.module.buffers()])

    return update


def _touched(tensors: list[Tensor]) -> None:
    for cache in _followers:
        cache.touched(tensors)


def _may_write(optimizer: Optimizer) -> list[Tensor]:
    """Return the parameters that a step may write: those that have gradients now.

    A fused step may write any: its own hooks, or its closure, may make gradients after this
    module's first hook and clear them before its second, and no version counter shows it.
    """
    return [
        parameter
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.grad is not None or group.get("fused")
    ]
