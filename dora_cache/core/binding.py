"""The connection between an owner of derived values and a cache."""

from __future__ import annotations

import itertools
import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from dora_cache.core.keys import ALL_ADAPTERS, concerns
from dora_cache.reasons import Reason

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Iterator, Mapping

    from torch import Tensor

    from dora_cache.core.keys import Adapters
    from dora_cache.core.shortcuts import Shortcut

__all__ = ["Binding", "Buffer", "Holder", "Warmers", "next_token", "with_children"]

_tokens = itertools.count(1)


def next_token() -> int:
    """Return a number that no other binding or cache has."""
    return next(_tokens)


Warmers = Callable[[Any, list[str] | None], "Iterable[tuple[str | None, Callable[[], object]]]"]
"""Called with an owner and the wanted adapters (None: all); yields an adapter's name, and a
function that derives its values exactly as the first forward would."""


class Buffer(Protocol):
    """A value that compiled code reads in place, past any lookup.

    It is kept outside the backend, and counts towards its cap.
    """

    adapters: tuple[str, ...]
    stale: bool
    nbytes: int

    def void(self) -> None:
        """Keep compiled code from reading it until it is filled; the lock is held."""

    def drop(self) -> None:
        """Void it and free its memory; the lock is held."""

    def publish(self, values: Tensor | tuple[Tensor, ...]) -> None:
        """Let compiled code read it; the lock is held."""

    def derived_from(self, storages: set[int]) -> bool:
        """Whether one of these storages holds something that it was derived from."""


class Holder(Protocol):
    """What compiled code reads of one owner.

    Attributes:
        used: whether compiled code has ever asked for it.
    """

    used: bool

    @property
    def scalings(self) -> Buffer:
        """What takes bytes besides the owner's buffers."""

    def update(self) -> int:
        """Derive again what no longer holds; return how many values. Never raises."""

    def refresh(self) -> int:
        """Do so for adapters that are not active as well."""

    def gets(self, table: Mapping[str, Any], name: str, new: object) -> None:
        """Take note that a container of the owner's gets a part; takes no lock."""

    def close(self) -> None:
        """Show compiled code nothing any more; the lock is held."""


class Binding:
    """One owner's tie to a cache: the module (or object, or function) whose values it may hold.

    It refers to the owner weakly, and each owner has its own; a copy of the owner that carries it
    along by accident is recognised and gets no cached values.

    Attributes:
        cache: the cache.
        token: a number no other binding has; part of every key.
        trains: whether the owner is known to be trained, for as long as its ``training`` is True.
        adapter: the adapter of all its values where the derivation names none.
        bake: makes an adapter's values constants of a copy of the owner: called with the copy, the
            adapter's name, and what keeps a value and returns the names of its buffers. None: calls
            of decorated functions are enough.
        buffers: the values that compiled code reads of it.
        holder: what compiled code reads of it; None if that derives everything.
        children: bindings that this one's events are passed on to.
        reference: weak reference to the owner; None for a plain function, which has none.
        has_owner: whether there is one.
        layer: name of the owner's layer, for logs and spans; "" if it has none, and None until
            somebody asks (see ``Engine.layer_of``).
        infers: tells why an owner whose ``training`` is True does more than inference, or returns
            None; called with the owner and the binding. None: it always does.
        reasons: how often its calls went past the cache, or its values were not kept, and why.
        resting: calls that go past the cache for a while, as they are spelled, and for how long.
        spellings: frozen arguments and adapters of calls as they were spelled, to save time.
        shortcuts: short ways to stored values, by the calls' arguments as they were spelled.
        undo: what to call on detach to give the owner back as it was, last added first.
        warmers: see :data:`Warmers`.
    """

    __slots__ = (
        "__weakref__",
        "_voided",
        "_voided_all",
        "adapter",
        "bake",
        "buffers",
        "cache",
        "children",
        "has_owner",
        "holder",
        "infers",
        "layer",
        "reasons",
        "reference",
        "resting",
        "shortcuts",
        "spellings",
        "token",
        "trains",
        "undo",
        "warmers",
    )

    reader: ClassVar[None] = None

    def __init__(self, cache: Any, owner: object | None, adapter: str | None) -> None:
        self.cache = cache
        self.token = next_token()
        self.adapter = adapter
        self.bake: Callable[[Any, str, Callable[[str, Any], list[str]]], object] | None = None
        self.buffers: dict[Hashable, Buffer] = {}
        self.holder: Holder | None = None
        self.children: list[weakref.ref[Binding]] = []
        self.infers: Callable[[Any, Binding], Reason | None] | None = None
        self.layer: str | None = None
        self.trains = False
        self.reasons: Counter[Reason] = Counter()
        self.resting: dict[Hashable, int] = {}
        self.spellings: dict[Hashable, tuple[Hashable, Adapters]] = {}
        self.shortcuts: dict[Hashable, Shortcut] = {}
        self.undo = ExitStack()
        self.warmers: Warmers | None = None
        self._voided: dict[str | None, int] = {}
        self._voided_all = 0
        self.reference: weakref.ref[Any] | None = None
        self.has_owner = owner is not None
        if owner is not None:
            gone, token = weakref.ref(cache), self.token

            def forget(_: object) -> None:
                living = gone()
                if living is not None:
                    living.owner_died(token)

            self.reference = weakref.ref(owner, forget)

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        """Copy and pickle as None: a copy of the owner belongs to no cache."""
        return type(None), ()

    def adopt(self, child: Binding) -> None:
        """Pass this binding's events on to ``child`` as well."""
        self.children = [known for known in self.children if known() is not None]
        self.children.append(weakref.ref(child))

    @property
    def owner(self) -> Any:
        """The owner, or None where there is none or it is gone."""
        return None if self.reference is None else self.reference()

    def owned_by(self, args: tuple[Any, ...]) -> bool:
        """Whether a call with these arguments is the owner's own, not that of a copy of it."""
        return self.reference is None or self.reference() is args[0]

    def why_training(self, owner: Any) -> Reason | None:
        """Return why the owner does more than inference, or None."""
        if self.reference is None:
            return None
        try:
            if not getattr(owner, "training", False):
                return None
        except Exception:  # noqa: BLE001 - an object whose __getattr__ objects to the name
            return None
        return Reason.TRAINING if self.infers is None else self.infers(owner, self)

    def passed_by(self, reason: Reason) -> None:
        """Count a call of the owner's that went past the cache without asking it."""
        self.cache.passed_by(reason, self)

    def voided(self, adapter: Adapters) -> int:
        """Return the time of the last event that voids values of ``adapter``."""
        if not self._voided:
            return self._voided_all
        if isinstance(adapter, tuple):
            return max(self._voided_all, *(self._voided.get(one, 0) for one in adapter), 0)
        return max(self._voided_all, self._voided.get(adapter, 0))

    def forget(self, adapter: str) -> None:
        """Keep nothing of an adapter that is gone; nothing of it is being derived for storing."""
        self._voided.pop(adapter, None)
        for spelled, (_, owners) in list(self.spellings.items()):
            if concerns(adapter, owners):
                self.spellings.pop(spelled, None)
                self.resting.pop(spelled, None)

    def void(self, adapter: str | None, now: int) -> None:
        """Void every value of ``adapter`` whose derivation began before ``now``."""
        if adapter is ALL_ADAPTERS:
            self._voided_all = now
            self._voided.clear()
        else:
            self._voided[adapter] = now


def with_children(binding: Binding) -> Iterator[Binding]:
    """Yield a binding, its children, and theirs."""
    yield binding
    for reference in binding.children:
        child = reference()
        if child is not None:
            yield from with_children(child)
