"""The public handle of a cache, which ``attach()`` returns."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Self

import torch

from dora_cache.config import CacheConfig
from dora_cache.core.decorator import owners_in
from dora_cache.core.engine import Engine, NotCachedError, bypassed_here, warming_here
from dora_cache.core.keys import concerns
from dora_cache.errors import AdapterNotFoundError, DetachedError
from dora_cache.progress import counted
from dora_cache.report import CacheReport, ReasonRow, layers_of, rows_of, seen_of
from dora_cache.stats import CacheStats

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch import nn

    from dora_cache.core.baked import Baked
    from dora_cache.core.binding import Binding
    from dora_cache.reasons import Declined, Reason

__all__ = ["AdapterCache"]


class AdapterCache:
    """The cache of one model: its derived values, checked before each use.

    Made by :func:`dora_cache.attach`. Every method may be called from any thread.

    A copy or pickle of it, or of an object that holds it, gives a detached cache with the same
    ``config``: it is empty, its counters are zero, and methods that need an attached cache raise
    :class:`DetachedError`. The copied model is a plain one; attach another cache to it.

    Args:
        engine: holds the values.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._is_copy = False

    @property
    def config(self) -> CacheConfig:
        """The settings."""
        return self._engine.config

    def stats(self) -> CacheStats:
        """Return a snapshot of the counters."""
        engine = self._engine
        with engine.mutex.held():
            backend = engine.memory.backend
            reasons = {reason.value: count for reason, count in engine.reasons.items()}
            entries = engine.mutex.attempt("len", lambda: len(backend), len(engine.cells.held()))
            nbytes = engine.mutex.attempt("nbytes", lambda: backend.nbytes, 0)
            max_bytes = engine.mutex.attempt("max_bytes", lambda: engine.memory.max_bytes, None)
            counts = dict(engine.counts)
            reserved = engine.memory.reserved
            hits, misses = engine.cells.count()
            nbytes += reserved
            engine.holdings.history.add(hits, misses, counts.get("evictions", 0), nbytes)
            seconds = engine.holdings.seconds
        return CacheStats(
            hits=hits,
            misses=misses,
            entries=entries,
            nbytes=nbytes,
            max_bytes=max_bytes,
            derive_seconds=seconds,
            reasons=reasons,
            **counts,
        )

    def invalidate(self, adapter: str | None = None, *, module: nn.Module | None = None) -> int:
        """Drop entries. Values that are being derived now are not stored.

        Args:
            adapter: only this adapter's; by default every adapter's.
            module: only those of this module, its submodules, and objects that these hold.

        Returns:
            The number of entries dropped.
        """
        owners = None
        if module is not None:
            parts = list(module.modules())
            inside = (owner for part in parts for owner in owners_in(part))
            owners = {id(owner) for owner in (*parts, *inside)}
        return self._engine.invalidate(adapter, owners)

    def refresh(self) -> int:
        """Bring what compiled code reads up to date with the weights.

        With ``compiled_check=False``, call it between a change that raises no event and the next
        use of a compiled model: a write to a weight in place, a new tensor in a weight's place, a
        scaling set by hand. With the check, compiled code notices these where it is entered.
        Writes that PyTorch does not count (through ``p.data``) need :meth:`invalidate` instead,
        compiled or not.

        Returns:
            For how many layers and adapters the values were derived again, at the same addresses
            and without a recompilation.

        Raises:
            DetachedError: the cache is detached.
        """
        self._check_open()
        return sum(holder.refresh() for holder in self._engine.buffers.holders())

    @contextmanager
    def bypass(self) -> Iterator[None]:
        """Disable the cache within the block, for this thread or task only; entries are kept."""
        token = self._engine.token
        bypassed_here.set((*bypassed_here.get(), token))
        try:
            yield
        finally:  # no reset to what was before: generators may end in another order
            rest = list(bypassed_here.get())
            with suppress(ValueError):
                rest.remove(token)
            bypassed_here.set(tuple(rest))

    def warm(self, adapters: Iterable[str] | None = None, *, progress: bool = False) -> int:
        """Derive values before their first use, in the current autocast state.

        Layers are derived one after the other, so the extra memory is that of the largest one.

        Args:
            adapters: names of the adapters to derive for; by default all that the model has.
            progress: show a count of derived values on stderr.

        Returns:
            The number of values derived; values that existed already do not count.

        Values that cannot be stored at present are not derived: the reason is in the report and in
        one warning.

        Raises:
            AdapterNotFoundError: no cached layer has such an adapter.
            ValueError: the model is in training mode, where nothing is cached.
        """
        self._check_open()
        if isinstance(adapters, str):
            adapters = [adapters]
        wanted = None if adapters is None else list(dict.fromkeys(adapters))
        with torch.no_grad():
            known, jobs, training = self._engine.jobs(wanted)
        missing = [name for name in wanted or () if name not in known]
        if missing:
            raise AdapterNotFoundError(_unknown(missing[0], known))
        if training:
            msg = "nothing is cached in training mode: call model.eval() before warm()"
            raise ValueError(msg)
        before = self.stats().misses
        steps: Iterable[Callable[[], object]] = jobs
        if progress:
            steps = counted(jobs, "deriving values")
        warming = warming_here.set(True)
        try:
            with torch.no_grad():
                for job in steps:
                    try:
                        job()
                    except NotCachedError as error:
                        self._engine.decline(error.name, "warm()", error.reason.value)
        finally:
            warming_here.reset(warming)
        return self.stats().misses - before

    @contextmanager
    def baked(self, *, weights: bool = False) -> Iterator[Baked]:
        """Export with stored values as constants, for adapters that will not change.

        Programs that are exported from the model within the block do not derive what the cache
        would store for the active adapters::

            with cache.baked() as baked:
                program = torch.export.export(model, (x,))
            print(baked)  # how many bytes the constants take, and which layers have them

        Copies of the adapter layers, with weights of their own, are in the model for as long as the
        block lasts, so the program keeps none of theirs and does not follow their changes. Do not
        run the model in other threads meanwhile. The outputs are those of the eager model up to
        rounding.

        Args:
            weights: add the adapters to copies of the base layers' weights. The program is that
                of a merged model, with its speed, its size and, in low precision, its rounding.
                Without it, the adapters' factors stay, and a program with DoRA runs as one with
                plain LoRA does. A quantized layer, or one whose outputs PEFT's ``merge()`` would
                change, keeps its factors in any case.

        Yields:
            What is constant: layers, bytes, and the layers that derive in the program, with the
            reason.

        Raises:
            BakedError: the model is in training mode, adapters are merged or disabled, or nothing
                can be baked; something changes the model within the block: then what was exported
                in it is to be thrown away.
            DetachedError: the cache is detached.
        """
        self._check_open()
        with self._engine.bake(weights=weights) as baked:
            yield baked

    def resize(self, max_bytes: int | str) -> None:
        """Change the cap; entries that no longer fit are evicted at once.

        The buffers of compiled code count towards the cap. If they do not fit, they are dropped;
        the code is then compiled again at its next use and derives the values itself.

        Args:
            max_bytes: bytes like 268435456, or ``"256MiB"``, ``"1.5GB"``, ``"10%"`` (of the memory
                that is free now). A model on several devices gets such a cap on each.

        Raises:
            ConfigError: not a size, or the backend has no cap that can be changed.
            PinError: the pinned adapters' values seen so far take more; nothing is changed.
            DetachedError: the cache is detached.
        """
        self._check_open()
        engine = self._engine
        with engine.ours():
            buffers = engine.buffers
            engine.memory.resize(max_bytes, buffers.all(), buffers.drop, engine.seen())

    def pin(self, adapter: str) -> int:
        """Keep an adapter's values: they are not evicted, and room is made for new ones.

        Values that are held are pinned now, and others when they are derived. Values that become
        invalid are dropped all the same; the pin then applies to the values derived next. A value
        that does not fit together with the other pinned values is derived at every use.

        Args:
            adapter: its name.

        Returns:
            The number of entries held and pinned; :meth:`warm` derives the missing ones.

        Raises:
            AdapterNotFoundError: no cached layer has such an adapter.
            ConfigError: the backend cannot pin.
            PinError: the pinned adapters' values seen so far, held or not, take more than the cap.
            DetachedError: the cache is detached.
        """
        self._check_open()
        engine = self._engine
        known, _, _ = engine.jobs([adapter])
        with engine.ours():
            cells = engine.seen()
            seen = any(concerns(adapter, cell.adapter) for cell in cells)
            if known and adapter not in known and not seen:
                raise AdapterNotFoundError(_unknown(adapter, known))
            return engine.memory.pin(adapter, cells)

    def unpin(self, adapter: str) -> None:
        """Allow an adapter's entries to be evicted again; no error if it is not pinned.

        Raises:
            DetachedError: the cache is detached.
        """
        self._check_open()
        with self._engine.ours():
            self._engine.unpin(adapter)

    @property
    def pins(self) -> tuple[str, ...]:
        """Names of the pinned adapters, sorted."""
        return tuple(sorted(self._engine.memory.pins))

    def report(self) -> CacheReport:
        """Return what is held and the time saved, by kind, adapter and layer."""
        engine = self._engine
        stats = self.stats()
        layers = engine.layers()
        with engine.mutex.held():
            memory = engine.memory
            adapters = {cell.adapter for cell in engine.cells}
            seen = seen_of(engine.seen())
            return CacheReport(
                backend=self.config.backend,
                rows=rows_of(engine.cells, [one for one in adapters if memory.pins_hold(one)]),
                layers=layers_of(engine.cells, layers),
                stats=stats,
                working_set=sum(one.nbytes for one in seen),
                buffers=memory.reserved,
                caps=engine.mutex.attempt("nbytes", memory.caps, ()),
                pins=self.pins,
                declined=tuple(engine.declined),
                reasons=tuple(
                    ReasonRow(reason, count, _counted(reason, layers))
                    for reason, count in engine.reasons.most_common()
                ),
                uncounted=0 if engine.auditor is None else engine.auditor.found,
                history=engine.holdings.history.samples(),
                seen=seen,
            )

    @property
    def declined(self) -> list[Declined]:
        """Layers that could be cached but are not: kind, adapter or None, where, and why."""
        return list(self._engine.declined)

    def detach(self) -> None:
        """Free all entries and restore the model; a second call does nothing."""
        self._engine.close()

    def __enter__(self) -> Self:
        """Return the cache itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Detach."""
        self.detach()

    def __repr__(self) -> str:
        """Return the backend, its contents, and the hits so far."""
        if self._engine.closed:
            return f"<AdapterCache, detached{' copy' if self._is_copy else ''}>"
        stats = self.stats()
        return (
            f"<AdapterCache backend={self.config.backend!r} entries={stats.entries} "
            f"nbytes={stats.nbytes} hit_rate={stats.hit_rate:.2f}>"
        )

    def __reduce__(self) -> tuple[Callable[[CacheConfig], AdapterCache], tuple[CacheConfig]]:
        """Copy and pickle as a detached cache of the same settings."""
        return _detached_copy, (self.config,)

    def _check_open(self) -> None:
        if self._is_copy:
            msg = "this cache is a detached copy: attach to the copied model for one of its own"
            raise DetachedError(msg)
        self._engine.check_open()


def _detached_copy(config: CacheConfig) -> AdapterCache:
    # Of the null backend: the setting's own may have a cost, or be unknown where this is unpickled.
    engine = Engine(CacheConfig.model_construct(backend="null"))
    engine.config = config
    engine.closed = True
    copy = AdapterCache(engine)
    copy._is_copy = True
    return copy


def _counted(reason: Reason, layers: Iterable[tuple[str, Binding]]) -> dict[str, int]:
    """Return how often a reason applied in each layer in which it did."""
    found: Counter[str] = Counter()
    for name, binding in layers:
        if reason in binding.reasons:
            found[name] += binding.reasons[reason]
    return dict(found)


def _unknown(adapter: str, known: Iterable[str]) -> str:
    names = ", ".join(map(repr, sorted(known))) or "none"
    return f"no cached layer has an adapter {adapter!r}; adapters are: {names}"
