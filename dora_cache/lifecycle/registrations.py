"""Parameters and buffers that modules are given while a value is derived.

One that is replaced during a derivation, and put back before its end, leaves no trace: the
dependencies are the same before and after, and the value is of both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from dora_cache.core.moved import take_over
from dora_cache.lifecycle.followers import Followers

if TYPE_CHECKING:
    from contextlib import ExitStack

    from dora_cache.core.engine import Engine

__all__ = ["follow_registrations"]


def follow_registrations(cache: Engine) -> None:
    """Drop what was derived from parameters and buffers that are replaced, until detaching."""
    _followers.add(cache)


def _begin(undo: ExitStack) -> None:
    undo.callback(register_module_parameter_registration_hook(_parameter).remove)
    undo.callback(register_module_buffer_registration_hook(_buffer).remove)


_followers = Followers(_begin)


def _parameter(module: nn.Module, name: str, new: Tensor | None) -> None:
    for cache in _followers:
        cache.buffers.comes(module, "_parameters", name, new)
    _registers(module, name, new)


def _buffer(module: nn.Module, name: str, new: Tensor | None) -> None:
    for cache in _followers:
        cache.buffers.comes(module, "_buffers", name, new)
    _registers(module, name, new)


def _registers(module: nn.Module, name: str, new: Tensor | None) -> None:
    old = module._parameters.get(name)
    # On a CPU, PEFT puts a new object in place at each dequantization, over the same memory.
    if type(new).__name__ == "Params4bit" and old is not None and take_over(old, new):  # type: ignore[arg-type]
        return
    found = (old, module._buffers.get(name), new)
    tensors = [tensor for tensor in found if isinstance(tensor, Tensor)]
    for cache in _followers:
        cache.replaced(tensors)
