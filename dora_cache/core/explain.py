"""Explanations for values that are never stored or never reused: what changed, and when."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import TYPE_CHECKING

from torch import Tensor, nn

from dora_cache.core.cells import VARIANTS
from dora_cache.core.keys import state_names
from dora_cache.core.results import described

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable

    from dora_cache.core.decorator import Derivation

State = tuple["Hashable", Sequence[object]]
"""The plain part and the rows of a :class:`dora_cache.core.facts.Reading`."""

__all__ = [
    "UNSETTLED",
    "changed_attributes",
    "pieces",
    "why_made_anew",
    "why_read_once",
    "why_unsettled",
    "why_unstorable",
    "why_unused",
]

UNSETTLED = 2
"""Derivations in a row with a change before it is told: one alone may be another thread's write."""

_SHOWN = 5


def why_unsettled(
    derivation: Derivation,
    owner: object,
    before: State,
    after: State,
) -> str:
    """Say what to do about a derivation whose dependencies change while it runs.

    Args:
        derivation: whose value is not stored.
        owner: the module, or what else has the method; None for a plain function.
        before: what it depends on, before the derivation.
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
    if not found and len(pieces(before)) == len(pieces(after)):
        return (
            f"{name!r} is never stored: {function} writes into an argument, on which its result "
            "depends. Have it write into a copy"
        )
    return (
        f"{name!r} is never stored: {function} changes {_shown(derivation, found)}, on which its "
        f"result depends as long as no depends_on says otherwise. {_remedy(derivation)}"
    )


def why_unused(derivation: Derivation, owner: object, before: State, after: State) -> str | None:
    """Say what to do about a derivation whose values are void before their first use.

    Args:
        derivation: one without a ``depends_on``.
        owner: what has the method.
        before: what it depends on, at the last derivation.
        after: the same now.

    Returns:
        None where it is tensors that change: those are what a cache is to follow.
    """
    if not isinstance(owner, nn.Module):
        return None
    found = changed_attributes(owner, before, after)
    tensors = {name for name, _ in (*owner.named_parameters(), *owner.named_buffers())}
    if not found or not tensors.isdisjoint(found):
        return None
    return (
        f"{derivation.name!r} has been derived {VARIANTS} times and never used again: "
        f"{_shown(derivation, found)} changes between calls, on which its result depends as long "
        f"as no depends_on says otherwise. {_remedy(derivation)}"
    )


def _shown(derivation: Derivation, attributes: Sequence[str]) -> str:
    owner = derivation.parameters[0]
    what = ", ".join(f"{owner}.{attribute}" for attribute in attributes[:_SHOWN]) or "attributes"
    return f"{what} and others" if len(attributes) > _SHOWN else what


def _remedy(derivation: Derivation) -> str:
    first, *others = derivation.parameters
    arguments = f"{first}, ..." if others else first
    return (
        f"Write @cached({derivation.name!r}, depends_on=lambda {arguments}: [...]) with the "
        "parameters, buffers and numbers that it is derived from"
    )


def changed_attributes(
    owner: nn.Module,
    before: State,
    after: State,
) -> list[str]:
    """Name the attributes of a module that changed between two readings of its state.

    Args:
        owner: the module, as it is after the change; ``own_state`` of it ends the dependencies.
        before: what is read before the change.
        after: the same after it.

    Returns:
        Names such as ``"calls"`` and ``"layer.weight"``; none if only other dependencies changed,
        or attributes were only taken away.
    """
    labels: list[str | None] = list(state_names(owner))
    old, new = pieces(before), pieces(after)
    if len(labels) > len(new):  # changed once more since it was read
        return []
    labels[:0] = [None] * (len(new) - len(labels))
    found: list[str | None] = []
    if len(old) == len(new):
        found += [label for label, one, two in zip(labels, old, new, strict=True) if one != two]
    else:
        matcher = SequenceMatcher(a=old, b=new, autojunk=False)
        for kind, _, _, low, high in matcher.get_opcodes():
            if kind != "equal":
                found += labels[low:high]
    return list(dict.fromkeys(name for name in found if name))


def pieces(state: State) -> list[str]:
    """Return what a reading says of each dependency, in order."""
    plain, rows = state
    rest = iter(rows)
    parts: Iterable[Hashable] = plain if isinstance(plain, tuple) else ()
    return [repr((piece, [next(rest, None) for _ in range(_tensors(piece))])) for piece in parts]


def _tensors(piece: Hashable) -> int:
    if piece is Tensor:
        return 1
    return sum(map(_tensors, piece)) if isinstance(piece, tuple) else 0


def why_unstorable(derivation: Derivation, value: object) -> str:
    """Say what to do about a derivation whose result can never be stored."""
    return (
        f"{derivation.name!r} is never stored, since it returned {described(value)}: return a "
        "tensor or a plain tuple of tensors, such as (one, two) or tuple(result)"
    )


def why_read_once(derivation: Derivation, kind: str) -> str:
    """Say what to do about a ``depends_on`` that returns the same iterator each time."""
    return (
        f"{derivation.name!r} is never stored, since its depends_on returns the same {kind} each "
        "time, which can be read only once: return a list"
    )


def why_made_anew(derivation: Derivation) -> str:
    """Say what to do about a ``depends_on`` that returns new tensors each time."""
    return (
        f"{derivation.name!r} is never stored, since its depends_on returns new tensors each time: "
        "return the weights themselves, such as [self.weight] rather than [self.weight.T], and "
        "state_dict(keep_vars=True) rather than state_dict()"
    )
