"""The lists of operations, and how functions get into them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from dora_cache.lab.freshness.scene import Pick, Scene

__all__ = ["OPERATIONS", "RAW", "Operation", "named", "operation"]


@dataclass(frozen=True, slots=True)
class Operation:
    """Something that people do to a model.

    Attributes:
        group: what it changes.
        name: names it; no other operation has it.
        apply: does it; may return tensors that it computed on the way.
        repeatable: whether it may be done to any scene at any time, again and again.
        ends: whether PEFT leaves a model that cannot be run as before.
        device: the type of device it needs, or None.
    """

    group: str
    name: str
    apply: Callable[[Scene, Pick], Sequence[Tensor | None] | None]
    repeatable: bool = True
    ends: bool = False
    device: str | None = None


OPERATIONS: list[Operation] = []
"""Ordinary operations: whatever follows them must be fresh."""

RAW: list[Operation] = []
"""Writes that PyTorch itself does not notice."""


def named(name: str) -> Operation:
    """Return the operation of a name."""
    return next(one for one in (*OPERATIONS, *RAW) if one.name == name)


def operation(
    group: str,
    name: str,
    *,
    into: list[Operation] = OPERATIONS,
    repeatable: bool = True,
    ends: bool = False,
    device: str | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Enter a function into a list of operations."""

    def enter(function: Callable[..., Any]) -> Callable[..., Any]:
        into.append(Operation(group, name, function, repeatable and not ends, ends, device))
        return function

    return enter
