"""Why a value is never stored: what changes while it is derived."""

from __future__ import annotations

from difflib import SequenceMatcher
from typing import TYPE_CHECKING

from torch import nn

from dora_cache.keys import state_names
from dora_cache.stamps import split

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dora_cache.decorator import Derivation
    from dora_cache.stamps import Signature

__all__ = ["UNSETTLED", "changed_attributes", "why_unsettled"]

UNSETTLED = 2
"""Derivations in a row with a change before it is told: one alone may be another thread's write."""

_SHOWN = 5


def why_unsettled(
    derivation: Derivation,
    owner: object,
    before: tuple[Sequence[object], Signature],
    after: tuple[Sequence[object], Signature],
) -> str:
    """Say what to do about a derivation whose dependencies change while it runs.

    Args:
        derivation: whose value is not stored.
        owner: the module, or what else has the method; None for a plain function.
        before: the dependencies and their signature before the derivation.
        after: the same after it.
    """
    name, function = derivation.name, derivation.function.__qualname__
    if derivation.depends_on is not None:
        return (
            f"{name!r} is never stored: what its depends_on lists is not the same before and after "
            "deriving. Have it list the parameters and buffers themselves, no tensors made from "
            "them, and nothing that the function changes"
        )
    found = changed_attributes(owner, before, after) if isinstance(owner, nn.Module) else []
    if not found and len(before[0]) == len(after[0]):
        return (
            f"{name!r} is never stored: {function} writes into an argument, on which its result "
            "depends. Have it write into a copy"
        )
    first, *others = derivation.parameters
    what = ", ".join(f"{first}.{attribute}" for attribute in found[:_SHOWN]) or "attributes"
    more = " and others" if len(found) > _SHOWN else ""
    arguments = f"{first}, ..." if others else first
    return (
        f"{name!r} is never stored: {function} changes {what}{more}, on which its result depends "
        f"as long as no depends_on says otherwise. Write @cached({name!r}, depends_on=lambda "
        f"{arguments}: [...]) with the parameters, buffers and numbers that it is derived from"
    )


def changed_attributes(
    owner: nn.Module,
    before: tuple[Sequence[object], Signature],
    after: tuple[Sequence[object], Signature],
) -> list[str]:
    """Name the attributes of a module that changed between two signatures of its state.

    Args:
        owner: the module, as it is after the change; ``own_state`` of it ends the dependencies.
        before: the dependencies and their signature before the change.
        after: the same after it.

    Returns:
        Names such as ``"calls"`` and ``"layer.weight"``; none if only other dependencies changed,
        or attributes were only taken away.
    """
    labels: list[str | None] = list(state_names(owner))
    if len(labels) > len(after[0]):  # changed once more since it was signed
        return []
    labels[:0] = [None] * (len(after[0]) - len(labels))
    old, new = ([repr(piece) for piece in split(*pair)] for pair in (before, after))
    found: list[str | None] = []
    if len(old) == len(new):
        found += [label for label, one, two in zip(labels, old, new, strict=True) if one != two]
    else:
        matcher = SequenceMatcher(a=old, b=new, autojunk=False)
        for kind, _, _, low, high in matcher.get_opcodes():
            if kind != "equal":
                found += labels[low:high]
    return list(dict.fromkeys(name for name in found if name))
