"""Writes through ``.data`` to a base weight, by PEFT: merges of other models, and OLoRA.

A merge writes to a weight that may be a shared one. The initialisation of a new adapter by OLoRA
takes the adapter's part out of the weight, which all adapters have in common.

An attached layer's own merges are followed by its observer, see ``peft_layers.follow_layer``.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

from dora_cache.lifecycle import Followers, wrap

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import ExitStack

    from torch import Tensor

    from dora_cache.core.engine import Engine

__all__ = ["follow_merges"]

_METHODS = ("merge_adapter", "unmerge_adapter", "merge_and_unload")


def follow_merges(cache: Engine) -> None:
    """Void what is derived from a base weight that PEFT writes in place, until detaching.

    PEFT offers no hook, so while any cache is attached three methods of its ``BaseTuner`` are
    wrapped, and one of its ``LoraLayer``. Calls of a layer's own ``merge`` outside the attached
    model are not noticed.
    """
    _followers.add(cache)


def _begin(undo: ExitStack) -> None:
    for name in _METHODS:
        wrap(undo, BaseTuner, name, _wrapped)
    wrap(undo, LoraLayer, "olora_init", _wrapped)


_followers = Followers(_begin)


def _wrapped(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        weights = _base_weights(self)  # before it: afterwards the layers may be gone
        try:
            return original(self, *args, **kwargs)
        finally:
            for follower in _followers:
                follower.touched(weights)

    return wrapper


def _base_weights(written: BaseTuner | BaseTunerLayer) -> list[Tensor]:
    parts = [written] if isinstance(written, BaseTunerLayer) else written.model.modules()
    layers = [part for part in parts if isinstance(part, BaseTunerLayer)]
    bases = [layer.get_base_layer() for layer in layers]
    return [weight for base in bases for weight in (*base.parameters(), *base.buffers())]
