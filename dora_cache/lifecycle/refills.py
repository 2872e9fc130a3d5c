"""Storages that are freed and filled again while version counters stay as they were.

FSDP2 does this with each unsharded parameter, FSDP1 with its flat one: the tensor, its version and
its storage remain, and the allocator often gives the same address again. Nothing that a signature
has would differ. So the two operations that make it possible are followed.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dora_cache.facts import mark_refilled
from dora_cache.lifecycle.followers import Followers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from contextlib import ExitStack

    from dora_cache.engine import Engine

__all__ = ["follow_refills"]

_Preserving: Any = torch.autograd.grad_mode._unsafe_preserve_version_counter
_resize: Callable[..., Any] = torch.UntypedStorage.resize_
_exit: Callable[..., Any] = _Preserving.__exit__


def follow_refills(cache: Engine) -> None:
    """Cache nothing that is derived from refilled storages, until the cache detaches."""
    _followers.add(cache)


def _begin(undo: ExitStack) -> None:
    setattr(torch.UntypedStorage, "resize_", _resizing)  # noqa: B010 - typed as a method
    undo.callback(_restore)
    _Preserving.__exit__ = _preserving
    undo.callback(setattr, _Preserving, "__exit__", _exit)


_followers = Followers(_begin)


def _restore() -> None:
    # The method is inherited from the C type, so that deleting the override brings it back.
    if vars(torch.UntypedStorage).get("resize_") is _resizing:
        del torch.UntypedStorage.resize_


@functools.wraps(_resize)
def _resizing(self: torch.UntypedStorage, size: int) -> Any:
    try:
        return _resize(self, size)
    finally:
        _refilled([self])


@functools.wraps(_exit)
def _preserving(self: Any, *args: Any) -> Any:
    try:
        return _exit(self, *args)
    finally:
        _refilled(self.tensors)


def _refilled(filled: Iterable[Tensor | torch.UntypedStorage]) -> None:
    new = []
    for one in filled:
        try:
            if mark_refilled(one):
                new.append(one)
        except (RuntimeError, NotImplementedError):  # no storage: nothing is derived from it
            continue
    if new:  # what was marked before has nothing derived from it
        for cache in _followers:
            cache.touched(new)
