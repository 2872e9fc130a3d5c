"""Switches from training to evaluation, of any module: what trains may be written to in silence.

Training code writes through ``.data``, which no version counter shows, and not to the adapter that
trains alone: old policies and averages are written so as well. What it wrote to is in use again
after a switch to evaluation.

Owners of values are observed, however their mode is set. Here ``train`` and ``eval`` of any other
module are followed that has some of the weights: a container within a layer, a bank that layers
share, a module whose weights are tied to a layer's.
"""

from __future__ import annotations

import functools
import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dora_cache.lifecycle.followers import Followers, wrap
from dora_cache.lifecycle.writers import look_again

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import ExitStack

    from dora_cache.core.engine import Engine

__all__ = ["follow_modes"]

_here = threading.local()


def follow_modes(cache: Engine) -> None:
    """Void values derived from weights of modules that stop training, until the cache detaches.

    PyTorch offers no hook, so while any cache is attached ``nn.Module.train`` is wrapped, which
    ``eval`` calls as well.
    """
    _followers.add(cache)


def _begin(undo: ExitStack) -> None:
    wrap(undo, nn.Module, "train", _followed)


_followers = Followers(_begin)


def _followed(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def train(self: nn.Module, mode: bool = True) -> Any:  # noqa: FBT001, FBT002 - PyTorch's
        if torch.compiler.is_dynamo_compiling():
            return original(self, mode)
        switching: set[nn.Module] = getattr(_here, "switching", set())
        if self in switching:  # by a module that contains it
            return original(self, mode)
        look_again()
        if mode:
            return original(self, mode)
        modules = set(self.modules())
        # Before the switch: all is written by then, and layers' own events fill buffers after it.
        _void([module for module in modules if getattr(module, "training", False)])
        _here.switching = switching | modules
        try:
            return original(self, mode)
        finally:
            _here.switching = switching

    return train


def _void(modules: list[nn.Module]) -> None:
    tensors = [
        tensor
        for module in modules
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
    ]
    if tensors:
        for cache in _followers:
            cache.touched(tensors)
