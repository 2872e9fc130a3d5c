"""What a backend is, and what it stores."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from torch import Tensor

from dora_cache.backends.storage import Ready, storage_bytes
from dora_cache.copying import Uncopyable

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Hashable

__all__ = ["Backend", "Declining", "Entry", "Pinning", "Resizable", "Value"]

Value = Tensor | tuple[Tensor, ...]
"""A derived value: one tensor or a tuple of tensors."""


@dataclass(frozen=True, slots=True, eq=False)
class Entry(Uncopyable):
    """A stored value and what the cache needs to know before it may be used.

    A backend keeps entries and gives them back; only a backend that moves tensors between devices
    looks inside, and returns ``dataclasses.replace(entry, value=..., ready=...)``. Copying or
    pickling one is a ``TypeError``.

    Attributes:
        value: the derived value, one tensor or a tuple of tensors.
        stamp: what the value was derived from; opaque to backends, to be handed back unchanged.
        cost: seconds that deriving the value took.
        ready: on CUDA, the event after which the value's data may be read; None where the data is
            there already.
        marks: version and address of each tensor when the entry was made.
    """

    INSTEAD = "it belongs to one cache; copy its tensors, entry.value"

    value: Value
    stamp: object = None
    cost: float = 0.0
    ready: Ready | None = None
    marks: tuple[int, ...] = field(init=False, repr=False)
    _facts: tuple[object, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Note how the tensors are, for :attr:`intact`."""
        object.__setattr__(self, "marks", _marks(self.tensors))
        object.__setattr__(self, "_facts", tuple(map(_facts, self.tensors)))

    @property
    def intact(self) -> bool:
        """Whether the tensors are as they were when the entry was made.

        That is, nobody has written into them, put other data or other tensors into them, freed
        their memory, or made them require or hold gradients.
        """
        tensors = self.tensors
        return _marks(tensors) == self.marks and tuple(map(_facts, tensors)) == self._facts

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors of the value, one or several."""
        return self.value if isinstance(self.value, tuple) else (self.value,)

    @property
    def nbytes(self) -> int:
        """Bytes of the distinct storages under the value (a view counts its whole storage)."""
        return storage_bytes(self.tensors)


def _marks(tensors: tuple[Tensor, ...]) -> tuple[int, ...]:
    return tuple([mark for one in tensors for mark in (one._version, one.data_ptr())])


def _facts(tensor: Tensor) -> tuple[object, ...]:
    wanted = tensor.requires_grad
    # To ask for the gradient of what is no leaf warns.
    grad = None if wanted else tensor.grad
    return wanted, grad is None, tensor.dtype, tensor.size(), tensor.stride()


@runtime_checkable
class Backend(Protocol):
    """Storage for derived tensors.

    A backend stores entries under hashable keys. It never computes, never checks freshness, and
    knows nothing of modules or adapters. Every call comes from one thread at a time: the cache
    holds its lock. A backend that raises costs a recomputation, never an inference.

    An *eviction* is an entry that the backend drops of its own accord, to make room. Each is
    reported to the function given to :meth:`on_evict`. What ``delete``, ``clear`` and ``close``
    drop is not evicted, nor is the older entry under the key of a ``put``, whether the new one is
    kept or refused.

    What comes back is what was stored: the same stamp and cost, one tensor or a tuple as before,
    each of the same dtype, device, shape and contents. Strides survive, and so the memory format
    (``channels_last``), since other strides may give outputs other bits; only a tensor that has
    gaps, or shows elements several times, may come back without these.

    Two attributes are optional. ``keeps_everything = True`` says that the backend never evicts, and
    that ``get`` has no effect: repeated calls are then answered without asking it. ``host_sizes``,
    of the class, has the names of those settings that are sizes of host memory.

    :class:`dora_cache.testing.BackendConformance` checks all that is said here of the methods.
    """

    @property
    def max_bytes(self) -> int | None:
        """The most bytes it will ever hold over all its tiers; None if unbounded."""

    @property
    def nbytes(self) -> int:
        """Bytes it holds now: distinct storages, each counted once and whole."""

    def on_evict(self, evicted: Callable[[Hashable], object]) -> None:
        """Call ``evicted`` with the key of each entry evicted from now on.

        Once for each eviction, after the entry is gone and before the method returns that evicted
        it. ``evicted`` is cheap, raises nothing, and does not call the backend. This method is
        called before anything is stored; of several functions, the last one given counts.
        """

    def get(self, key: Hashable) -> Entry | None:
        """Return the entry under ``key`` (a use, for the eviction order), or None."""

    def put(self, key: Hashable, entry: Entry) -> bool:
        """Store ``entry`` in place of any older one, and say whether it was kept.

        Whatever the answer, the older entry under ``key`` is gone. False means that the entry was
        not kept: it is larger than the backend, or the backend does not want it. One of more than
        ``max_bytes`` must be refused so. To make room a backend with a cap may evict entries under
        other keys; no method but this and ``resize`` evicts any.
        """

    def delete(self, key: Hashable) -> bool:
        """Drop the entry under ``key``; return whether there was one."""

    def clear(self) -> None:
        """Drop every entry."""

    def keys(self) -> Collection[Hashable]:
        """Return the keys of the entries held now; not a use of any of them."""

    def __len__(self) -> int:
        """Return the number of entries held now."""

    def close(self) -> None:
        """Drop every entry and free what else the backend owns; called once, at the end."""


@runtime_checkable
class Resizable(Protocol):
    """A backend whose cap can be changed while it holds entries; not every backend is one."""

    def resize(self, max_bytes: int) -> None:
        """Change the cap that the setting ``max_bytes`` gave, and evict at once what is above it.

        The same holds afterwards as if the backend had been made with this cap.

        Raises:
            ConfigError: the cap is negative; nothing has changed.
        """


@runtime_checkable
class Declining(Protocol):
    """A backend that can tell ahead which values it would not keep; not every backend is one.

    Such a value is derived as if there were no cache, which costs less than to offer it.
    """

    def declines(self, key: Hashable) -> bool:
        """Whether ``put`` under ``key`` would return False, for a value like those before it.

        Called after a ``get`` that found nothing. True only where ``put`` would really refuse
        an entry of the latest one's size and cost; False whenever in doubt.
        """


@runtime_checkable
class Pinning(Protocol):
    """A backend that can be told to keep what is under some keys; not every backend is one.

    Pins are of keys. They last until :meth:`unpin` or ``close()``, whatever becomes of the entries
    meanwhile.
    """

    def pin(self, key: Hashable) -> None:
        """Do not evict the entry under ``key``, be it held already or put later.

        ``put`` for a pinned key evicts others, and is refused only if the entry does not fit beside
        the other pinned ones. Only a cap that no longer holds all the pinned entries evicts any.
        """

    def unpin(self, key: Hashable) -> None:
        """Let the entry under ``key`` be evicted like others again, now the latest used."""
