"""Modules that come into a model, or leave it, after a cache was attached to it."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from torch.nn.modules.module import register_module_module_registration_hook

from dora_cache.attributes import SLOT
from dora_cache.lifecycle.followers import Followers

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import ExitStack

    from torch import nn

    from dora_cache.core.engine import Engine

__all__ = ["follow_arrivals"]


class _Model:
    """The modules of one cache's models.

    Args:
        roots: the models.
        arrived: called with the cache and each module that is put into one of them.
    """

    def __init__(
        self, roots: list[nn.Module], arrived: Callable[[Engine, nn.Module], object]
    ) -> None:
        self.arrived = arrived
        # By id: modules may have an equality of their own, and then no hash.
        self._modules: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()
        for root in roots:
            self.add(root)

    def __contains__(self, module: nn.Module) -> bool:
        return self._modules.get(id(module)) is module

    def add(self, module: nn.Module) -> None:
        for part in module.modules():
            self._modules[id(part)] = part


def follow_arrivals(
    cache: Engine, roots: list[nn.Module], arrived: Callable[[Engine, nn.Module], object]
) -> None:
    """Call ``arrived`` with each module that is put into a model, until the cache detaches.

    It is called before the module is in its place, and may raise: the cache then warns. Values of
    owners that are replaced are dropped.

    Args:
        cache: the cache.
        roots: the models.
        arrived: called with the cache and a module, whose submodules are there already. It must
            not refer to the cache.
    """
    cache.arrivals = _Model(roots, arrived)
    _followers.add(cache)


def _begin(undo: ExitStack) -> None:
    undo.callback(register_module_module_registration_hook(_registers).remove)


_followers = Followers(_begin)


def _registers(parent: nn.Module, name: str, new: nn.Module | None) -> None:
    for cache in _followers:
        model = cache.arrivals
        if model is None or parent not in model:
            continue
        cache.buffers.comes(parent, "_modules", name, new)
        old = parent._modules.get(name)
        if old is not None and old is not new:
            for part in old.modules():
                binding = part.__dict__.get(SLOT)
                if binding is not None and binding.cache is cache:
                    cache.event(binding)
        if new is not None and new not in model:
            try:
                model.arrived(cache, new)
            except Exception as error:  # noqa: BLE001 - the caller is changing a model
                cache.failed("attaching a new module", error)
            model.add(new)
