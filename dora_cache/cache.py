"""The cache that users hold: what they, the recipes and the lifecycle call."""

from __future__ import annotations

import weakref
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from dora_cache.binding import Binding
from dora_cache.config import CacheConfig
from dora_cache.decorator import SLOT, owners_in
from dora_cache.errors import (
    AdapterNotFoundError,
    AlreadyAttachedError,
    ConfigError,
    DetachedError,
)
from dora_cache.keys import ALL_ADAPTERS, concerns
from dora_cache.lookup import Lookup, NotCachedError, bypassed_here, warming_here
from dora_cache.report import CacheReport, Declined, rows_of, seen_of
from dora_cache.stats import CacheStats
from dora_cache.store import exclusive

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Iterator

    from dora_cache.binding import Buffer
    from dora_cache.decorator import Derivation
    from dora_cache.usage import Usage

__all__ = ["AdapterCache"]


class AdapterCache(Lookup):
    """Holds the derived values of one model, and knows when each may be used.

    Made by :func:`dora_cache.attach`. Every method may be called from any thread.

    A copy or pickle of it, or of an object that holds it, gives a detached cache with the same
    ``config``: it holds nothing, its counters are zero, and what needs an attached cache raises
    :class:`DetachedError`. The copied model is a plain one; attach to it for a cache of its own.

    Args:
        config: the settings.
        devices: where the model is; each has a cap of its own, and its free memory is what a share
            like ``"10%"`` means.
    """

    _is_copy = False

    # What users call

    def stats(self) -> CacheStats:
        """Return the counters as they are now."""
        with self._locked():
            reasons = {reason.value: count for reason, count in self._reasons.items()}
            entries = self._try("len", lambda: len(self._backend), len(self._records))
            nbytes = self._try("nbytes", lambda: self._backend.nbytes, 0)
            max_bytes = self._try("max_bytes", lambda: self._memory.max_bytes, None)
            counts = dict(self._counts)
            usages = self._usages.values()
            reserved = self._memory.reserved
        hits, misses = self._usages.count(usages)
        return CacheStats(
            hits=hits,
            misses=misses,
            entries=entries,
            nbytes=nbytes + reserved,
            max_bytes=max_bytes,
            reasons=reasons,
            **counts,
        )

    @exclusive
    def invalidate(self, adapter: str | None = None, *, module: nn.Module | None = None) -> int:
        """Drop entries, and void values that are being derived now.

        Args:
            adapter: only this adapter's; by default every adapter's.
            module: only those of this module, its submodules, and objects that these hold.

        Returns:
            How many entries went.
        """
        wanted = None
        if module is not None:
            parts = list(module.modules())
            inside = (owner for part in parts for owner in owners_in(part))
            wanted = {id(owner) for owner in (*parts, *inside)}
        bindings = list(self._bindings.values())
        self._refill_later(bindings)
        return sum(
            self._void(binding, adapter)
            for binding in bindings
            if wanted is None or id(binding.owner) in wanted
        )

    def refresh(self) -> int:
        """Bring what compiled code reads up to date with the weights.

        Call it between a change that nothing reports and the next use of a compiled model: a write
        to a weight in place, a new tensor in a weight's place, a scaling set by hand. Of optimizer
        steps, loading, scaling by PEFT's methods, hotswaps, merges and moves the cache knows by
        itself, and code that is not compiled notices all of these. Writes that PyTorch does not
        count (through ``p.data``) need :meth:`invalidate` instead, compiled or not.

        Returns:
            For how many layers and adapters the values were derived again, at the same addresses
            and without a recompilation.

        Raises:
            DetachedError: the cache is detached.
        """
        self._check_open()
        return sum(
            buffer.fill()
            for binding in list(self._bindings.values())
            for buffer in list(binding.buffers.values())
        )

    @contextmanager
    def bypass(self) -> Iterator[None]:
        """Go past the cache for a while, in this thread (or task) only; entries are kept."""
        bypassed_here.set((*bypassed_here.get(), self.token))
        try:
            yield
        finally:  # no reset to what was before: generators may end in another order
            rest = list(bypassed_here.get())
            with suppress(ValueError):
                rest.remove(self.token)
            bypassed_here.set(tuple(rest))

    def warm(self, adapters: Iterable[str] | None = None, *, progress: bool = False) -> int:
        """Derive values ahead of their first use, in the present autocast state.

        Layer by layer, so that it takes no more memory than the largest one's derivation.

        Args:
            adapters: names of the adapters to derive for; by default all that the model has.
            progress: show a progress bar on the terminal.

        Returns:
            How many values were derived; those that were there already do not count.

        Values that cannot be stored at present are not derived: the reason is in the report, and
        is said once by a warning.

        Raises:
            AdapterNotFoundError: no cached layer has such an adapter.
            ValueError: the model is in training mode, where nothing is cached.
        """
        self._check_open()
        if isinstance(adapters, str):
            adapters = [adapters]
        wanted = None if adapters is None else list(dict.fromkeys(adapters))
        known, jobs, training = self._jobs(wanted)
        missing = [name for name in wanted or () if name not in known]
        if missing:
            raise AdapterNotFoundError(_unknown(missing[0], known))
        if training:
            msg = "nothing is cached in training mode: call model.eval() before warm()"
            raise ValueError(msg)
        before = self.stats().misses
        steps: Iterable[Callable[[], object]] = jobs
        if progress:
            from rich.progress import track  # slow to import

            steps = track(jobs, "deriving values")
        warming = warming_here.set(True)
        try:
            with torch.no_grad():
                for job in steps:
                    try:
                        job()
                    except NotCachedError as error:
                        self.decline(error.name, "warm()", error.reason.value)
        finally:
            warming_here.reset(warming)
        return self.stats().misses - before

    def _jobs(self, wanted: list[str] | None) -> tuple[set[str], list[Callable[[], object]], bool]:
        """Return the adapters there are, what derives the wanted ones' values, and if any trains.

        Args:
            wanted: names of adapters; None for all.
        """
        known: set[str] = set()
        jobs: list[Callable[[], object]] = []
        training = False
        for binding in list(self._bindings.values()):
            owner = binding.owner
            if binding.warmers is None or owner is None:
                continue
            for adapter, job in binding.warmers(owner, wanted):
                if adapter is not None:
                    known.add(adapter)
                if wanted is None or adapter is None or adapter in wanted:
                    jobs.append(job)
                    training = training or getattr(owner, "training", False)
        return known, jobs, training

    def resize(self, max_bytes: int | str) -> None:
        """Change the cap; what does not fit any more is evicted at once.

        What compiled code reads counts towards the cap. It is dropped where even that does not
        fit, and the code is then compiled again at its next use and derives the values itself.

        Args:
            max_bytes: bytes like 268435456, or ``"256MiB"``, ``"1.5GB"``, ``"10%"`` (of the memory
                that is free now). Each device of a model that spans several gets such a cap.

        Raises:
            ConfigError: not a size, or the backend has no cap that can be changed.
            PinError: the pinned adapters' values seen so far take more; nothing is changed.
            DetachedError: the cache is detached.
        """
        with self._ours():
            buffers = [pair for one in self._bindings.values() for pair in one.buffers.items()]
            usages = [usage for _, usage in self._seen()]
            self._memory.resize(max_bytes, buffers, self._drop_buffer, usages)

    def pin(self, adapter: str) -> int:
        """Keep an adapter's values: they are not evicted, and new ones find room.

        Those held are pinned now, those derived later as they come. Events still drop what no
        longer holds; the pin stays, for what is derived after that. A value that does not fit
        beside what else is pinned is derived at every use, as any that does not fit.

        Args:
            adapter: its name.

        Returns:
            How many entries are held and pinned; :meth:`warm` derives those that are missing.

        Raises:
            AdapterNotFoundError: no cached layer has such an adapter.
            ConfigError: the backend cannot pin.
            PinError: the pinned adapters' values seen so far, held or not, take more than the cap.
            DetachedError: the cache is detached.
        """
        known, _, _ = self._jobs([adapter])
        with self._ours():
            usages = self._seen()
            seen = any(concerns(adapter, usage.adapter) for _, usage in usages)
            if known and adapter not in known and not seen:
                raise AdapterNotFoundError(_unknown(adapter, known))
            return self._memory.pin(adapter, usages, self._records)

    def unpin(self, adapter: str) -> None:
        """Let an adapter's entries be evicted again; one that is not pinned is fine.

        Raises:
            DetachedError: the cache is detached.
        """
        with self._ours():
            self._memory.unpin(adapter, self._adapter_of)

    def adapter_deleted(self, binding: Binding, adapter: str) -> int:
        """Drop all that there is of an adapter that a layer has no more, its names included.

        Returns:
            How many entries went.
        """
        gone = self._adapter_deleted(binding, adapter)
        if adapter in self._memory.pins:
            known, _, _ = self._jobs([adapter])
            if adapter not in known:
                self.unpin(adapter)
        return gone

    @property
    def pins(self) -> tuple[str, ...]:
        """Names of the pinned adapters, sorted."""
        return tuple(sorted(self._memory.pins))

    def report(self) -> CacheReport:
        """Say what is held, by kind and adapter, and what it has saved."""
        stats = self.stats()
        with self._locked():
            adapters = {usage.adapter for usage in self._usages.values()}
            pinned = [adapter for adapter in adapters if self._memory.pins_hold(adapter)]
            seen = seen_of(usage for _, usage in self._seen())
            caps = self._try("nbytes", self._memory.caps, ())
            return CacheReport(
                backend=self.config.backend,
                rows=rows_of(self._usages, self._records, pinned),
                stats=stats,
                working_set=sum(one.nbytes for one in seen),
                buffers=self._memory.reserved,
                caps=caps,
                pins=self.pins,
                declined=tuple(self._declined),
                reasons=tuple(self._reasons.most_common()),
                uncounted=0 if self._auditor is None else self._auditor.found,
                seen=seen,
            )

    def _seen(self) -> list[tuple[Hashable, Usage]]:
        """Return the usages of the values that no event has voided, held or not."""
        found = []
        for key, usage in self._usages.items():
            binding = self._bindings.get(usage.owner)
            if binding is not None and usage.born > binding.voided(usage.adapter):
                found.append((key, usage))
        return found

    @property
    def declined(self) -> list[Declined]:
        """What could have been cached and is not: kind, adapter or None, where, and why."""
        return list(self._declined)

    def detach(self) -> None:
        """Free every entry and give the model back as it was; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        self._undo.close()
        for binding in list(self._bindings.values()):
            binding.undo.close()
        self._free()

    @exclusive
    def _free(self) -> int:
        gone = 0
        for binding in list(self._bindings.values()):
            gone += self._void(binding, ALL_ADAPTERS)
            self._drop_buffers(binding)
        self._bindings.clear()
        gone += sum(self._discard(key) for key in list(self._records))
        self._try("close", self._backend.close, None)
        self._records.clear()
        self._by_storage.clear()
        if self._auditor is not None:
            self._auditor.close()
        return gone

    def __enter__(self) -> Self:
        """Return the cache itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Detach."""
        self.detach()

    def __repr__(self) -> str:
        """Return the backend, its contents, and the hits so far."""
        if self._closed:
            return f"<AdapterCache, detached{' copy' if self._is_copy else ''}>"
        stats = self.stats()
        return (
            f"<AdapterCache backend={self.config.backend!r} entries={stats.entries} "
            f"nbytes={stats.nbytes} hit_rate={stats.hit_rate:.2f}>"
        )

    def __reduce__(self) -> tuple[Callable[[CacheConfig], AdapterCache], tuple[CacheConfig]]:
        """Copy and pickle as a detached cache of the same settings."""
        return _detached_copy, (self.config,)

    # What recipes and lifecycle call

    def bind(self, owner: object, *, adapter: str | None = None) -> Binding:
        """Take on an owner; its decorated methods use this cache from now on.

        Args:
            owner: an object with a ``__dict__`` that can be weakly referenced.
            adapter: the adapter that all its values belong to, where no parameter says.

        Raises:
            AlreadyAttachedError: the owner belongs to a cache already.
            ConfigError: the owner has no ``__dict__``, or cannot be weakly referenced.
        """
        self._check_open()
        _check_owner(owner)
        if owner.__dict__.get(SLOT) is not None:
            raise AlreadyAttachedError(_twice(owner))
        binding = self._add(Binding(self, owner, adapter))
        owner.__dict__[SLOT] = binding
        binding.undo.callback(_unbind, weakref.ref(owner), binding.token)
        return binding

    def bind_function(self, derivation: Derivation) -> Binding:
        """Take on a plain decorated function.

        Raises:
            AlreadyAttachedError: the function belongs to a cache already.
        """
        self._check_open()
        if derivation.binding is not None:
            raise AlreadyAttachedError(_twice(derivation.function))
        derivation.binding = self._add(Binding(self, None, None))
        derivation.binding.undo.callback(setattr, derivation, "binding", None)
        return derivation.binding

    def on_detach(self, undo: Callable[[], object]) -> None:
        """Call ``undo`` on detach, last added first."""
        self._undo.callback(undo)

    def decline(self, kind: str, where: str, reason: str, *, adapter: str | None = None) -> None:
        """Note that something is not cached, and warn, once per kind and reason.

        Args:
            kind: the adapter kind, e.g. ``"OFT"``.
            where: the layer's name, or what else says where.
            reason: why not, as it goes on after a colon.
            adapter: the adapter's name, where it is one adapter's matter.
        """
        with self._locked():
            self._declined.setdefault(Declined(kind, adapter, where, reason))
            text = f"{kind} is not cached everywhere, as in {where}: {reason}"
            self._warn_once((kind, reason), text)

    def follow_buffer(self, binding: Binding, adapter: str, buffer: Buffer) -> None:
        """Take on what compiled code reads of an owner and adapter, in place of any older one."""
        with self._locked():
            self._drop_buffer(binding.buffers.get(adapter))
            binding.buffers[adapter] = buffer

    def buffers(self, adapter: str) -> list[Buffer]:
        """Return what compiled code may read of an adapter, layer by layer."""
        bindings = list(self._bindings.values())
        found = [binding.buffers.get(adapter) for binding in bindings]
        return [buffer for buffer in found if buffer is not None]

    def reserve(self, buffer: Buffer, nbytes: int, device: torch.device) -> bool:
        """Set bytes of a device's cap aside for a buffer.

        Entries that are not pinned make room, other buffers do not.

        Returns:
            Whether there is room; if not, the buffer holds nothing any more.
        """
        with self._locked():
            self._try("resize", lambda: self._memory.release(buffer), None)
            buffer.nbytes = 0
            reserve = partial(self._memory.reserve, buffer, nbytes, device)
            if self._closed or not self._try("max_bytes", reserve, False):  # noqa: FBT003
                self._drop_buffer(buffer)
                return False
            buffer.nbytes = nbytes
            return True

    def publish(
        self,
        buffer: Buffer,
        values: tuple[Tensor, ...],
        parameters: tuple[Tensor | None, ...],
    ) -> bool:
        """Let compiled code read a buffer, unless an event has come since it was derived."""
        with self._locked():
            if buffer.stale or self._closed or not buffer.nbytes:
                return False
            buffer.values, buffer.parameters = values, parameters
            return True

    def drop_buffer(self, buffer: Buffer) -> None:
        """Free a buffer's memory; it stays empty until it is prepared."""
        with self._locked():
            self._drop_buffer(buffer)

    def void_buffer(self, buffer: Buffer) -> None:
        """Keep compiled code from reading a buffer until it is filled."""
        with self._locked():
            buffer.void()

    @property
    def compares_contents(self) -> bool:
        """Whether every use has to compare the contents of what a value was derived from."""
        return self._guards_content

    @contextmanager
    def _ours(self) -> Iterator[None]:
        """Hold the lock of an open cache, for what may raise.

        Raises:
            DetachedError: the cache is detached.
            RuntimeError: the caller runs inside the cache, as a ``__del__`` may.
        """
        if self._lock._is_owned():
            msg = "called from within the cache: call it from outside, not in a backend or __del__"
            raise RuntimeError(msg)
        with self._locked():
            self._check_open()
            yield

    def _check_open(self) -> None:
        if self._closed:
            msg = "this cache is detached: call dora_cache.attach(model) for a new one"
            if self._is_copy:
                msg = "this cache is a detached copy: attach to the copied model for one of its own"
            raise DetachedError(msg)


def _detached_copy(config: CacheConfig) -> AdapterCache:
    # Of the null backend: the setting's own may have a cost, or be unknown where this is unpickled.
    copy = AdapterCache(CacheConfig.model_construct(backend="null"))
    copy.config = config
    copy._is_copy = copy._closed = True
    return copy


def _unbind(reference: weakref.ref[Any], token: int) -> None:
    owner = reference()
    binding = None if owner is None else owner.__dict__.get(SLOT)
    if isinstance(binding, Binding) and binding.token == token:
        del owner.__dict__[SLOT]


def _unknown(adapter: str, known: Iterable[str]) -> str:
    names = ", ".join(map(repr, sorted(known))) or "none"
    return f"no cached layer has an adapter {adapter!r}; adapters are: {names}"


def _check_owner(owner: object) -> None:
    missing = []
    if not isinstance(getattr(owner, "__dict__", None), dict):
        missing.append("__dict__")
    if not type(owner).__weakrefoffset__:
        missing.append("__weakref__")
    if missing:
        quoted = " and ".join(f'"{name}"' for name in missing)
        msg = (
            f"{type(owner).__name__} has no {' and no '.join(missing)}, which a cache needs: "
            f"add {quoted} to its __slots__, leave __slots__ (or slots=True) out, "
            "or keep its data in an ordinary class"
        )
        raise ConfigError(msg)


def _twice(owner: object) -> str:
    name = getattr(owner, "__qualname__", None) or type(owner).__name__
    return (
        f"{name} belongs to a cache already: use that one, or call its detach() before attaching "
        "again (one cache may cover the whole model)"
    )
