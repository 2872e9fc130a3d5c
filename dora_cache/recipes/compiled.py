"""What compiled code reads: derived values at fixed addresses, filled ahead of its use.

Compiled code cannot look anything up. It reads tensors, and its guards are checked before each
call. So for each layer and adapter there is one :class:`Buffer`:

- It is filled *while a layer is traced*: ``torch.compile`` runs :func:`prepare` as ordinary code
  and takes its answer for a constant. So no graph has a cold branch to be compiled again later.
  All layers' buffers are filled at once: blocks that are compiled one by one share their code, so
  no guard may tell one layer from another.
- Events that void stored values take the tensors out of ``values`` and fill them again at the same
  addresses, without a recompilation.
- What raises no event is noticed where compiled code is entered: see
  :mod:`dora_cache.recipes.entry`.
- Where buffers cannot be filled, ``values`` stays None. Then a guard fails, the layer is traced
  again, and tracing fills it: at worst compiled code costs a recompilation, never a wrong number.
- Compiled code reads a buffer only while the layer's parameters are the ones it was filled from,
  the very objects. So it notices by itself if others are put in their place, for the duration of a
  ``functional_call`` for example; also if that is part of what is traced.
"""

from __future__ import annotations

import threading
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dora_cache.ambient import entry_guards_work, environment, untraceable
from dora_cache.backends.storage import storage_bytes
from dora_cache.copying import Uncopyable
from dora_cache.facts import Facts, UncheckableError, read
from dora_cache.reasons import Reason
from dora_cache.recipes.entry import Key, enter, watch

if TYPE_CHECKING:
    from collections.abc import Callable

    from dora_cache.binding import Binding
    from dora_cache.engine import Engine
    from dora_cache.recipes.entry import Entry, Layouts, Watch

__all__ = ["Buffer", "prepare"]

_caches: weakref.WeakValueDictionary[str, Engine] = weakref.WeakValueDictionary()
_prepared: weakref.WeakKeyDictionary[Engine, dict[str, weakref.ref[Any]]] = (
    weakref.WeakKeyDictionary()
)
_ATTEMPTS = 3
_NO_GUARDS = (
    "this version of PyTorch has no guards that call a function. It derives the values itself. With "
    "compiled_check=False it reads stored ones, and you call refresh() after writes to weights"
)
_SURPRISES = 3  # below PyTorch's limit of recompilations


class _GoneError(Exception):
    """The layer has no such adapter any more, or only a part of it."""


class Buffer(Uncopyable):
    """The values of one layer and adapter that compiled code reads; empty until it is traced.

    Args:
        binding: the layer's.
        adapter: the adapter's name.
        depends_on: called with the layer; lists what the values depend on.
        derive: called with the layer; returns the values.
        parameters: called with the layer; returns those that the values depend on.

    Attributes:
        cache: what is traced passes it to :func:`prepare`: the buffer's key, in a tuple, since
            TorchDynamo guards a bare argument by its identity.
        entries: the checks of the code that reads it.
        values: what compiled code reads; None while that does not hold.
        parameters: those of the layer when it was filled.
        wanted: whether compiled code has ever asked for it.
        stale: whether an event has voided it since it was last filled.
        nbytes: the bytes of its tensors, those out of use for the moment included.
        watch: what it was filled from, while there are values.
    """

    def __init__(
        self,
        binding: Binding,
        adapter: str,
        depends_on: Callable[[Any], list[object]],
        derive: Callable[[Any], tuple[Tensor, ...]],
        parameters: Callable[[Any], tuple[Tensor | None, ...]],
    ) -> None:
        name = f"cache {binding.cache.token}"
        self.cache = (Key(name, self, checks=binding.cache.config.compiled_check),)
        self.entries: weakref.WeakSet[Entry] = weakref.WeakSet()
        self.watch: Watch | None = None
        self.values: tuple[Tensor, ...] | None = None
        self.parameters: tuple[Tensor | None, ...] = ()
        self.wanted = False
        self.stale = True
        self.nbytes = 0
        self._binding = weakref.ref(binding)
        self._adapter = adapter
        self._depends_on = depends_on
        self._derive = derive
        self._parameters = parameters
        self._tensors: tuple[Tensor, ...] = ()
        self._facts: Facts | None = None
        self._surroundings: object = None
        self._surprises = 0
        self._filling = threading.RLock()
        self._busy = False
        _caches[name] = binding.cache
        binding.cache.buffers.follow(binding, adapter, self)

    @property
    def owner(self) -> Any:
        """The layer, or None if it is gone."""
        binding = self._binding()
        return None if binding is None else binding.owner

    def void(self) -> None:
        """Keep compiled code from reading it until it is filled; the cache's lock is held."""
        self.stale = True
        self.values = self.watch = None
        self.parameters = ()
        self._tell()

    def _tell(self) -> None:
        """Have compiled code's checks look at it anew; the cache's lock is held."""
        for entry in list(self.entries):
            entry.changed()

    def drop(self) -> None:
        """Void it for good and free its tensors; the cache's lock is held."""
        self.void()
        self.wanted = False
        self.nbytes = 0
        self._tensors = ()
        self._facts = None

    def derived_from(self, storages: set[int]) -> bool:
        """Whether one of these storages holds something that the values were derived from."""
        return self._facts is not None and not storages.isdisjoint(self._facts.storages)

    def prepare(self) -> None:
        """Fill it, and keep it filled if that works.

        If time and again a trace finds that it no longer holds, each time may have been a
        recompilation (weights come and go with offloading, for example): then it is given up.
        """
        binding = self._binding()
        if binding is None or self._surprises > _SURPRISES:
            return
        wanted, self.wanted = self.wanted, True
        filled = self.fill()
        if self.values is None:
            self.wanted = wanted and self.wanted
        elif filled and wanted:
            self._surprises += 1
            if self._surprises > _SURPRISES:
                binding.cache.buffers.drop(self)

    def traced(self) -> None:
        """Take note that the key is being traced: guards get one that tells the layouts of now."""
        (key,) = self.cache
        layouts = None if self.watch is None else self.watch.layouts
        self.cache = (Key(key.cache, self, checks=key.checks, layouts=layouts),)

    def check(self, layouts: Layouts | None) -> bool:
        """Bring it up to date; return whether what compiled code has read of it still holds.

        It never raises.

        Args:
            layouts: that the parameters have, if the compiler's guards have seen to that.
        """
        values, watch = self.values, self.watch
        try:
            if values is None or (
                watch is not None
                and watch.complete
                and watch.layouts is layouts
                and watch.holds()
            ):
                return True
            self.renew()
        except Exception:  # noqa: BLE001 - what it was filled from is not there any more, or worse
            self.give_up()
        return self.values is values

    def renew(self) -> None:
        """Fill it if its values no longer hold; void it if that cannot be done now."""
        watch = self.watch
        if self.values is None or watch is None:
            return
        with suppress(Exception):  # something is not there any more: that shows below
            if watch.holds_entirely():
                return
        self.fill()
        if self.watch is watch:  # it has not even been looked at
            self.give_up()

    def give_up(self) -> None:
        """Void it: compiled code is compiled again before it reads it."""
        binding = self._binding()
        if binding is not None:
            binding.cache.buffers.void(self)

    def fill(self) -> bool:
        """Derive the values again if they no longer hold.

        Not in training mode and not while adapters are merged: there nobody reads them, and the
        event at the end of that state comes here again.

        Returns:
            Whether they were derived. If they do not hold and cannot be derived, they are void.
        """
        binding, owner = self._binding(), self.owner
        if not self.wanted or binding is None or owner is None:
            return False
        if (binding.trains and owner.training) or getattr(owner, "merged_adapters", None):
            return False
        cache = binding.cache
        with self._filling:
            if self._busy or untraceable():  # deriving has caused an event
                return False
            self._busy = True
            try:
                for _ in range(_ATTEMPTS):
                    filled = self._fill(binding, owner)
                    if filled is not None:
                        return filled
            except _GoneError:
                cache.buffers.drop(self)
                return False
            except UncheckableError:
                pass
            except Exception as error:  # noqa: BLE001 - never an inference failure: it is void
                cache.failed("filling a buffer for compiled code", error)
            finally:
                self._busy = False
            cache.buffers.void(self)
        return False

    def _fill(self, binding: Binding, owner: Any) -> bool | None:
        """Fill it once, as :meth:`fill`; None if something has happened meanwhile."""
        cache = binding.cache
        self.stale, voided = False, self.stale  # an event from now on shows
        with (
            torch.inference_mode(mode=False),
            torch.no_grad(),
            torch.autocast(owner_device(owner), enabled=False),
        ):
            dependencies = self._dependencies(owner)
            reading = read(dependencies)
            watched = watch(owner, self._adapter, dependencies, reading)
            if reading.refilled:
                msg = "compiled code cannot tell what a refilled storage holds"
                raise UncheckableError(msg, Reason.REFILLED)
            surroundings = environment(), reading.plain
            if (
                not voided
                and self.values is not None
                and self._facts is not None
                and self._facts.rows == reading.rows
                and self._surroundings == surroundings
            ):
                return False if self._publish(cache, self.values, self.parameters, watched) else None
            self._facts, self._surroundings = Facts(reading), surroundings
            derived, parameters = self._derive(owner), self._parameters(owner)
            after = read(self._dependencies(owner))
            if after.rows != reading.rows or after.plain != reading.plain:
                return None
            if _alike(self._tensors, derived):
                for tensor, value in zip(self._tensors, derived, strict=True):
                    tensor.copy_(value)
            else:
                # Storages of their own: what is counted is what is held.
                tensors = tuple(value.detach().clone() for value in derived)
                if not cache.buffers.reserve(self, storage_bytes(tensors), tensors[0].device):
                    return False
                for tensor in tensors:  # CUDA graphs read them in place
                    torch._dynamo.mark_static_address(tensor)
                self._tensors = tensors
        return True if self._publish(cache, self._tensors, parameters, watched) else None

    def _publish(
        self,
        cache: Engine,
        values: tuple[Tensor, ...],
        parameters: tuple[Tensor | None, ...],
        watched: Watch,
    ) -> bool:
        """Let compiled code read values, unless an event has come since ``watched`` was noted."""
        with cache.mutex.lock:
            if not cache.buffers.publish(self, values, parameters):
                return False
            self.watch = watched
            self._tell()
        return True

    def _dependencies(self, owner: Any) -> list[object]:
        try:
            return self._depends_on(owner)
        except KeyError:
            raise _GoneError from None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def prepare(keys: tuple[Key], adapter: str) -> bool:
    """Fill a model's buffers of an adapter; runs while a layer is traced, not in compiled code.

    Those stay empty that cannot be checked, or that there is no room for. Their layers derive the
    values in the graph. All do if the cache compares contents at each use.

    Args:
        keys: of the layer's buffer.
        adapter: the adapter's name.
    """
    (key,) = keys
    living, read_here = _caches.get(key.cache), key.buffer
    if living is None or read_here is None or living.compares_contents or untraceable():
        return False
    if key.checks and not entry_guards_work():
        living.decline("compiled code", "every layer", _NO_GUARDS)
        return False
    context = torch._guards.CompileContext.try_get()
    done = _prepared.setdefault(living, {})
    if context is None or done.get(adapter, lambda: None)() is not context:
        for buffer in living.buffers.of(adapter):
            buffer.prepare()
        if context is not None:  # every layer comes here while one model is traced
            for name in [name for name, traced in done.items() if traced() is None]:
                del done[name]
            done[adapter] = weakref.ref(context)
    if key.checks:
        read_here.traced()
        enter(living, read_here)
    return True


def owner_device(owner: Any) -> str:
    """Return the type of the device that a layer's weights are on."""
    for parameter in owner.parameters():
        kind: str = parameter.device.type
        return kind
    return "cpu"


def _alike(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> bool:
    return len(ours) == len(theirs) and all(
        a.shape == b.shape and a.dtype is b.dtype and a.device == b.device
        for a, b in zip(ours, theirs, strict=True)
    )
