"""A call of a decorated function: its key and its dependencies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dora_cache.ambient import environment
from dora_cache.core.contents import Contents
from dora_cache.core.dependencies import Listed, listed
from dora_cache.core.facts import UncheckableError, read
from dora_cache.core.keys import PLAIN_KEYS, UnkeyableError, freeze, own_state
from dora_cache.reasons import Reason

if TYPE_CHECKING:
    from collections.abc import Hashable

    from dora_cache.core.binding import Binding
    from dora_cache.core.cells import Key
    from dora_cache.core.decorator import Derivation
    from dora_cache.core.explain import State
    from dora_cache.core.facts import Reading
    from dora_cache.core.keys import Adapters

__all__ = ["SPELLINGS", "Call", "spelled_as"]

SPELLINGS = 4096
"""Calls whose keys each binding remembers."""


class Call:
    """A call, ready to be looked up.

    Args:
        derivation: of the function.
        binding: of the owner.
        args: positional arguments, the owner included.
        kwargs: keyword arguments.
        spelled: what stands for the call as it is spelled; None if an argument is not plain.
        compares_contents: whether to hash what it depends on.

    Attributes:
        key: see :data:`dora_cache.core.cells.Key`.
        adapter: whose value it asks for.
        dependencies: what its value depends on.
        reading: of these, at the moment.
        contents: hashes of these, with ``guard="content"``.
        listed: those that ``depends_on`` returned; None if there is no such function.
        is_plain: whether ``spelled`` says all of the arguments, defaults included.

    Raises:
        UnkeyableError: an argument cannot be part of a key.
        UncheckableError: it cannot be told whether the value holds.
        Exception: whatever ``depends_on`` raises.
    """

    __slots__ = (
        "adapter",
        "args",
        "binding",
        "contents",
        "dependencies",
        "derivation",
        "is_plain",
        "key",
        "kwargs",
        "listed",
        "reading",
        "spelled",
    )

    def __init__(
        self,
        derivation: Derivation,
        binding: Binding,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        spelled: Hashable,
        *,
        compares_contents: bool,
    ) -> None:
        self.derivation = derivation
        self.binding = binding
        self.args = args
        self.kwargs = kwargs
        self.spelled = spelled
        self.adapter: Adapters
        self.is_plain = False
        frozen, self.adapter, self.dependencies = self._bind()
        self.listed: Listed | None = None
        if derivation.depends_on is not None:
            self.listed = listed(derivation.depends_on(*args, **kwargs))
            self.dependencies += self.listed
        elif isinstance(binding.owner, nn.Module):
            self.dependencies += own_state(binding.owner)
        self.reading: Reading = read(self.dependencies)
        self.contents = None
        if compares_contents:
            loaded = [one.load() for one in self.reading.elsewhere]
            self.contents = Contents([*self.reading.tensors, *loaded])
        if self.reading.requires_grad and not derivation.detach and torch.is_grad_enabled():
            msg = "gradients are wanted through the value"
            raise UncheckableError(msg, Reason.GRADIENTS)
        plain = self.reading.plain
        self.key: Key = (derivation.number, binding.token, frozen, environment(), plain)

    def again(self) -> Call:
        """Return the same call, with what it depends on as it is now."""
        compares = self.contents is not None
        return Call(
            self.derivation,
            self.binding,
            self.args,
            self.kwargs,
            self.spelled,
            compares_contents=compares,
        )

    def run(self) -> Any:
        """Derive the value."""
        return self.derivation.function(*self.args, **self.kwargs)

    def equals(self, other: Call) -> bool:
        """Whether the two have the same key, and the same dependencies unchanged."""
        return self.key == other.key and self.reading.rows == other.reading.rows

    def read_before(self, earlier: Call) -> str | None:
        """Return the kind of an iterator that ``depends_on`` returned both times, or None.

        The second time it gave nothing.
        """
        if earlier.listed is None or self.listed is None:
            return None
        return self.listed.read_before(earlier.listed)

    @property
    def state(self) -> State:
        """What was read, for explanations."""
        return self.reading.plain, self.reading.rows

    def _bind(self) -> tuple[Hashable, Adapters, list[object]]:
        """Return the frozen arguments, the adapter, and the dependencies among the arguments."""
        derivation, binding, spelled = self.derivation, self.binding, self.spelled
        if spelled is not None:
            known = binding.spellings.get(spelled)
            if known is not None:
                self.is_plain = True
                return (*known, [])
        try:
            bound = derivation.bind(*self.args, **self.kwargs)
        except TypeError as error:  # the function itself will say so
            raise UnkeyableError(str(error)) from None
        index = derivation.adapter_index
        adapter = binding.adapter if index is None else bound[index]
        if type(adapter) is tuple and len(adapter) == 1:
            adapter = adapter[0]  # a value for several adapters, of which there is one
        rest = bound[1:] if binding.has_owner else bound
        dependencies: list[object] = []
        frozen = tuple([freeze(value, dependencies) for value in rest])
        plain = all(type(value) in PLAIN_KEYS for value in rest)
        self.is_plain = spelled is not None and plain
        if self.is_plain and len(binding.spellings) < SPELLINGS:
            binding.spellings[spelled] = (frozen, adapter)
        return frozen, adapter, dependencies


def spelled_as(derivation: Derivation, binding: Binding, args: tuple[Any, ...]) -> Hashable:
    """Return what stands for a call as it is spelled; None if an argument is not plain."""
    rest = args[1:] if binding.has_owner else args
    for value in rest:
        if type(value) not in PLAIN_KEYS:
            return None
    return (derivation.number, *rest)
