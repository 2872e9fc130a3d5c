"""What takes bytes for compiled code: derived values and scalings, at fixed addresses."""

from __future__ import annotations

import itertools
import threading
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from dora_cache.ambient import environment, untraceable
from dora_cache.backends.storage import storage_bytes
from dora_cache.copying import Uncopyable
from dora_cache.core.dependencies import listed
from dora_cache.core.facts import Facts, Reading, UncheckableError, read
from dora_cache.reasons import Reason
from dora_cache.recipes.entry import watch
from dora_cache.recipes.views import layout_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dora_cache.core.decorator import Derivation
    from dora_cache.core.engine import Engine
    from dora_cache.recipes.entry import Watch

__all__ = ["Buffer", "Scalings", "Shown", "plainly"]

_ATTEMPTS = 3


class _GoneError(Exception):
    """The layer has no such adapter any more, or only a part of it."""


class Shown(Protocol):
    """What a buffer belongs to: a :class:`dora_cache.recipes.holder.Holder`."""

    names: tuple[str, ...]

    @property
    def owner(self) -> Any:
        """The layer, or None if it is gone."""

    @property
    def engine(self) -> Engine | None:
        """The cache, or None if it is gone."""

    @property
    def binding(self) -> Any:
        """The layer's binding, or None if it is gone."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Those that compiled code has guards on."""

    def show(self, buffer: Buffer) -> None:
        """Have compiled code read what a buffer has; the cache's lock is held."""

    def clear(self) -> None:
        """Have compiled code read nothing; the cache's lock is held."""


class Buffer(Uncopyable):
    """A value of one layer and its adapters, at a fixed address; empty until it is filled.

    Args:
        holder: of the layer.
        number: the call's.
        derivation: derives it.
        args: the arguments, without the layer; adapters by their own names.
        kwargs: keyword arguments.

    Attributes:
        adapters: the names of the adapters that were active.
        values: what compiled code reads; None while that does not hold.
        facts: what the values were derived from; None if there are none.
        watch: likewise, to be compared fast.
        stale: whether an event has voided it since it was last filled.
        nbytes: the bytes of its tensors, those out of use for the moment included.
    """

    def __init__(
        self,
        holder: Shown,
        number: int,
        derivation: Derivation,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        self.adapters = tuple(holder.names)
        self.values: Tensor | tuple[Tensor, ...] | None = None
        self.facts: Facts | None = None
        self.watch: Watch | None = None
        self.stale = True
        self.nbytes = 0
        self.number = number
        self.outputs: list[tuple[Any, ...]] | None = None
        self._holder = holder
        self._derivation = derivation
        self._args = args
        self._kwargs = kwargs
        self._tensors: tuple[Tensor, ...] = ()
        self._plain: object = None
        self._surroundings: object = None
        self._filling = threading.RLock()
        self._busy = False

    def void(self) -> None:
        """Keep compiled code from reading it until it is filled; the cache's lock is held."""
        self.stale = True
        self.values = None
        self._holder.show(self)

    def drop(self) -> None:
        """Void it and free its tensors; the cache's lock is held."""
        self.void()
        self.nbytes = 0
        self._tensors = ()
        self.facts = None

    def publish(self, values: Tensor | tuple[Tensor, ...]) -> None:
        """Let compiled code read it; the cache's lock is held."""
        self.values = values
        self._holder.show(self)

    def derived_from(self, storages: set[int]) -> bool:
        """Whether one of these storages holds something that the values were derived from."""
        return self.facts is not None and not storages.isdisjoint(self.facts.storages)

    def holds(self, owner: Any) -> bool:
        """Whether the values are what would be derived at present."""
        if self.stale or self.facts is None:
            return False
        reading = read(self._dependencies(owner))
        return self.facts.rows == reading.rows and self._plain == reading.plain

    def fill(self) -> bool:
        """Derive the values again if they no longer hold.

        Returns:
            Whether they were derived. If they do not hold and cannot be derived, they are void.
        """
        holder = self._holder
        owner, cache = holder.owner, holder.engine
        if owner is None or cache is None:
            return False
        with self._filling:
            if self._busy or untraceable():  # deriving has caused an event
                return False
            self._busy = True
            try:
                for _ in range(_ATTEMPTS):
                    filled = self._fill(cache, owner)
                    if filled is not None:
                        return filled
            except (_GoneError, UncheckableError) as error:
                if isinstance(error, UncheckableError):
                    cache.passed_by(error.reason, holder.binding)
                cache.buffers.drop(self)
                return False
            except Exception as error:  # noqa: BLE001 - never an inference failure: it is void
                cache.failed("filling a buffer for compiled code", error)
            finally:
                self._busy = False
            cache.buffers.void(self)
        return False

    def _fill(self, cache: Engine, owner: Any) -> bool | None:
        """Fill it once, as :meth:`fill`; None if something has happened meanwhile."""
        held, self.stale = not self.stale and self.values is not None, False
        # An event from now on shows.
        with plainly(owner):
            dependencies = self._dependencies(owner)
            reading = read(dependencies)
            if reading.refilled:
                msg = "compiled code cannot tell what a refilled storage holds"
                raise UncheckableError(msg, Reason.REFILLED)
            self.watch = self._watched(owner, dependencies, reading)
            surroundings = environment()
            if (
                held
                and self.facts is not None
                and self.facts.rows == reading.rows
                and self._plain == reading.plain
                and self._surroundings == surroundings
            ):
                return False
            self.facts, self._plain, self._surroundings = (
                Facts(reading),
                reading.plain,
                surroundings,
            )
            derived, single = self.derive(owner)
            after = read(self._dependencies(owner))
            if after.rows != reading.rows or after.plain != reading.plain:
                return None
            if _alike(self._tensors, derived):
                for tensor, value in zip(self._tensors, derived, strict=True):
                    tensor.copy_(value)
            else:
                # Storages of their own: what is counted is what is held.
                tensors = tuple(_as_parameter(value.detach().clone()) for value in derived)
                nbytes = storage_bytes(tensors)
                if not cache.buffers.reserve(self, nbytes, tensors[0].device):
                    cache.passed_by(Reason.CAP, self._holder.binding)
                    return False
                for tensor in tensors:  # CUDA graphs read them in place
                    torch._dynamo.mark_static_address(tensor, guard=False)
                self._tensors = tensors
        values = self._tensors[0] if single else self._tensors
        return True if cache.buffers.publish(self, values) else None

    def derive(self, owner: Any) -> tuple[tuple[Tensor, ...], bool]:
        """Derive the values; return them, and whether they are one tensor and no tuple."""
        found = self._derivation.function(owner, *self._args, **self._kwargs)
        single = isinstance(found, Tensor)
        derived: tuple[Tensor, ...] = (found,) if single else found
        self.outputs = [layout_of(value) for value in derived] + [(single,)]
        return derived, single

    def describe(self) -> list[tuple[Any, ...]] | None:
        """Return what the values are like, deriving them if need be; None if they cannot be."""
        owner = self._holder.owner
        if self.outputs is None and owner is not None:
            try:
                with plainly(owner):
                    self.derive(owner)
            except Exception:  # noqa: BLE001 - the library's own code says why
                return None
        return self.outputs

    def _dependencies(self, owner: Any) -> list[object]:
        depends_on = self._derivation.depends_on
        assert depends_on is not None  # noqa: S101 - recipes give one
        try:
            return list(listed(depends_on(owner, *self._args, **self._kwargs)))
        except KeyError:
            raise _GoneError from None

    def _watched(self, owner: Any, dependencies: list[object], reading: Reading) -> Watch:
        guarded = set(map(id, self._holder.tensors))
        found = watch(owner, self.adapters, dependencies, reading, guarded)
        if not getattr(self._derivation.depends_on, "__module__", "").startswith("dora_cache."):
            found = found._replace(complete=False)  # of others: scalars may be from anywhere
        return found


class Scalings(Uncopyable):
    """Scalings of one layer's active adapters as tensors: a guard on a number would recompile.

    Attributes:
        tensors: of no dimensions, by the names that views have for adapters.
        nbytes: the bytes set aside for them.
    """

    adapters: tuple[str, ...] = ()
    stale = False

    def __init__(self, holder: Shown) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.nbytes = 0
        self._numbers: dict[str, float] = {}
        self._holder = holder

    def drop(self) -> None:
        """Free them; the cache's lock is held."""
        self.nbytes = 0
        self._holder.clear()
        self.tensors.clear()

    def void(self) -> None:
        """Leave them as they are: updates set them anew."""

    def publish(self, values: object) -> None:
        """Leave them as they are."""

    def derived_from(self, storages: set[int]) -> bool:  # noqa: ARG002
        """Whether they are derived values: they are not."""
        return False

    def set(self, owner: Any, scaling: Mapping[str, Any]) -> dict[str, Any]:
        """Return scalings with tensors in place of numbers.

        If the cap has no room for all of them, they are the numbers.

        Args:
            owner: the layer.
            scaling: by the names that views have for adapters.
        """
        found = dict(scaling)
        numbers = {name: one for name, one in found.items() if type(one) in {int, float}}
        like = _like(owner)
        # Without dimensions it promotes nothing, as a number would not.
        dtype = torch.float64 if like.dtype is torch.float64 else torch.float32
        missing = [
            name
            for name in numbers
            if (there := self.tensors.get(name)) is None
            or there.dtype is not dtype
            or there.device != like.device
        ]
        if missing:
            with torch.inference_mode(mode=False):
                new = {
                    name: _as_parameter(torch.empty((), dtype=dtype, device=like.device))
                    for name in missing
                }
            tensors = {**self.tensors, **new}
            cache, nbytes = self._holder.engine, storage_bytes(tuple(tensors.values()))
            if cache is None or not cache.buffers.reserve(self, nbytes, like.device):
                return found
            for name, tensor in new.items():
                torch._dynamo.mark_static_address(tensor, guard=False)
                self._numbers.pop(name, None)
            self.tensors = tensors
        for name, value in numbers.items():
            tensor = self.tensors[name]
            if self._numbers.get(name) != value:  # a backward may have saved it as it is
                with torch.inference_mode(mode=False), torch.no_grad():
                    tensor.fill_(value)
                self._numbers[name] = value
            found[name] = tensor
        return found


def _as_parameter(value: Tensor) -> Tensor:
    """Return it as what compiled code does not compare with all other tensors at each call."""
    return nn.Parameter(value, requires_grad=False)


def _like(owner: Any) -> Tensor:
    """Return a floating-point parameter of a layer."""
    for tensor in itertools.chain(owner.parameters(), owner.buffers()):
        if tensor.is_floating_point():
            found: Tensor = tensor
            return found
    return torch.empty(0)


class plainly:  # noqa: N801 - a context manager
    """Derive as eager inference does, whatever the surroundings of an event are."""

    def __init__(self, owner: Any) -> None:
        self._contexts = (
            torch.inference_mode(mode=False),
            torch.no_grad(),
            torch.autocast(_like(owner).device.type, enabled=False),
        )

    def __enter__(self) -> None:
        for context in self._contexts:
            context.__enter__()

    def __exit__(self, *args: object) -> None:
        for context in reversed(self._contexts):
            context.__exit__(*args)


def _alike(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> bool:
    return len(ours) == len(theirs) and all(
        a.shape == b.shape and a.dtype is b.dtype and a.device == b.device
        for a, b in zip(ours, theirs, strict=True)
    )
