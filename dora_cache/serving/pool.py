"""Many adapters on one model: any mix of them in one batch, under one cap."""

from __future__ import annotations

import difflib
import functools
import itertools
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dora_cache.attachment import attach
from dora_cache.attributes import POOL, POOLED
from dora_cache.backends import Resizable, check_options, create
from dora_cache.config import parse_size, resolve_size
from dora_cache.copying import Uncopyable
from dora_cache.errors import (
    AdapterFileError,
    AdapterNotFoundError,
    ConfigError,
    DetachedError,
    warn_once,
)
from dora_cache.lifecycle import Observer, observe
from dora_cache.serving import routing
from dora_cache.serving.files import open_adapter
from dora_cache.serving.kernels import LARGEST_RANK, failures
from dora_cache.serving.layers import PooledLayer, pooled_forward
from dora_cache.serving.report import (
    AdapterRow,
    PoolReport,
    kernel_reasons,
    layer_rows,
    named_reasons,
)
from dora_cache.serving.residents import Layout
from dora_cache.serving.routing import Batch, Route
from dora_cache.serving.tiers import Adapter, Tiers
from dora_cache.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from types import EllipsisType
    from typing import Self

    from dora_cache.cache import AdapterCache
    from dora_cache.serving.files import AdapterFiles

__all__ = ["AdapterPool", "PoolStats"]

_numbers = itertools.count(1)
_INPUTS = ("input_ids", "inputs_embeds", "decoder_input_ids", "pixel_values", "sample")


@dataclass(frozen=True, slots=True)
class PoolStats:
    """A snapshot of a pool.

    A lookup is one adapter that a ``use`` names, however many rows have it.

    Attributes:
        hits: lookups of adapters that were on the device.
        misses: lookups of adapters that had to be brought there, or were on their way.
        loads: how often an adapter was brought to the device, prefetching included.
        load_seconds: what that took, all together, by the host's clock: on a GPU copies are
            launched and not waited for.
        load_times: loads by the first of ``serving.tiers.LOAD_SECONDS`` that they did not exceed;
            the last number is of those that exceeded all.
        failures: how often an adapter could not be brought there.
        reads: how often it was read from its files for that.
        evictions: how often an adapter left the device for others.
        device_bytes: bytes of the device held now: factors, scales and tables.
        host_bytes: bytes of the host held now.
        nbytes: both.
        max_device_bytes: the cap of the device; None if unbounded.
        max_host_bytes: the cap of the host; None if unbounded.
        on_device: adapters on the device.
        on_host: adapters on the host and not on the device.
        on_disk: the others.
        reasons: how often a layer's scale was derived for one forward alone, by the reason; see
            :class:`dora_cache.reasons.Reason`.
    """

    hits: int
    misses: int
    loads: int
    reads: int
    evictions: int
    device_bytes: int
    host_bytes: int
    nbytes: int
    max_device_bytes: int | None
    max_host_bytes: int | None
    on_device: int
    on_host: int
    on_disk: int
    load_seconds: float
    load_times: tuple[int, ...]
    failures: int
    reasons: Mapping[str, int]

    @property
    def lookups(self) -> int:
        """Adapters that were asked for."""
        return self.hits + self.misses

    @property
    def hit_rate(self) -> float:
        """Hits per lookup, from 0 to 1; 0 before the first lookup."""
        return self.hits / self.lookups if self.lookups else 0.0


class AdapterPool(Uncopyable):
    """Adapters of one model, each row of a batch with its own, in bounded memory.

    ::

        pool = AdapterPool(model, device_bytes="2GiB", max_bytes="32GiB")
        pool.add("sonnets", "path/to/adapter")
        with pool.use(["sonnets", None]):
            model.generate(**batch)

    Adapters are LoRA and its relatives that PEFT saves: rsLoRA, DoRA, ranks and scalings by layer,
    on linear, embedding and convolution layers, biases, and modules to save. An adapter that is
    asked for is brought from its files to the device, and the one used least recently leaves.

    Where the model is on a CUDA device, adapters are also kept in the host's memory, pinned. Where
    it is on the CPU, that is one and the same memory, and only ``max_bytes`` asks for a copy there.

    Args:
        model: any model; it needs no PEFT layers. Within :meth:`use` a model that PEFT has wrapped
            runs without its active adapters.
        device_bytes: cap on the device's bytes, such as ``"2GiB"`` or ``"10%"`` of what is free;
            None for none.
        max_bytes: cap on the host's bytes; None for none.
        backend: keeps adapters on the host: ``"cpu"``, ``"lru"``, ``"budget"``, ``"null"`` for
            none, or a registered one.
        options: further settings of that backend.
        policy: what leaves the device first: ``"lru"``, or ``"budget"``, by time to load per byte.
        max_rank: the largest rank that an adapter may have; CUDA graphs keep room for it.

    Raises:
        ConfigError: a setting is wrong.
        UnknownBackendError: there is no such backend.
    """

    INSTEAD = "it belongs to one model; make a pool of the copy"

    def __init__(
        self,
        model: nn.Module,
        *,
        device_bytes: int | str | None = None,
        max_bytes: int | str | None = None,
        backend: str = "cpu",
        options: Mapping[str, Any] | None = None,
        policy: str = "lru",
        max_rank: int = LARGEST_RANK,
    ) -> None:
        if not isinstance(model, nn.Module):
            msg = f"the model is a {type(model).__name__}: give a torch.nn.Module"
            raise ConfigError(msg)
        if policy not in {"lru", "budget"}:
            msg = f"policy is {policy!r}: give 'lru' or 'budget'"
            raise ConfigError(msg)
        if not isinstance(max_rank, int) or not 1 <= max_rank <= LARGEST_RANK:
            msg = f"max_rank is {max_rank!r}: give a whole number from 1 to {LARGEST_RANK}"
            raise ConfigError(msg)
        self.number = next(_numbers)
        self.max_rank = max_rank
        self._model = model
        self._device = next((p.device for p in model.parameters()), torch.device("cpu"))
        on_cuda = self._device.type == "cuda"
        host_bytes = _bytes("max_bytes", max_bytes, torch.device("cpu"))
        settings = dict(options or {})
        if host_bytes is not None and backend != "null":
            settings["max_bytes"] = host_bytes
        check_options(backend, settings)
        hosted = on_cuda or max_bytes is not None
        host = create(backend, **settings) if hosted else None
        self._max_host = host_bytes
        cap = _bytes("device_bytes", device_bytes, self._device)
        self._tiers = Tiers(cap, policy, host, pinned=on_cuda)
        self._names: dict[str, Adapter] = {}
        self._layers: dict[str, PooledLayer] = {}
        self._by_index: list[PooledLayer] = []
        self._bases = nn.ModuleList()
        self._marks: AdapterCache | None = None
        self._static: dict[torch.device, Tensor] = {}
        self._captured = 0  # bit i is set if layer i is in a CUDA graph
        self._nobody: dict[torch.device, Tensor] = {}
        self._executor: ThreadPoolExecutor | None = None
        self._undo = ExitStack()
        self._closed = False
        self._stale = False  # whether layers are elsewhere than the adapters
        # The most layers that tables have a row for: they are as long for all adapters.
        self._count = sum(1 for _ in model.modules())
        self._follow(model)
        routing.pools[self.number] = self

    # Adapters

    def add(self, name: str, path: str | Path) -> None:
        """Add an adapter, in place of any other of that name.

        Its configuration and the names and shapes of its tensors are read and checked; the tensors
        themselves are read when they are first needed. A batch that runs keeps the adapter that it
        began with.

        Args:
            name: what :meth:`use` calls it.
            path: the folder that PEFT's ``save_pretrained`` wrote.

        Raises:
            AdapterFileError: the files are missing or broken, are for another model, or are of a
                kind that a pool does not serve. The pool is as it was.
        """
        self._check_open()
        if not isinstance(name, str) or not name:
            msg = f"an adapter's name is {name!r}: give a text that is not empty"
            raise ConfigError(msg)
        model = self._model
        files = open_adapter(name, path, model)
        try:
            rank = max((part.rank for part in files.parts), default=0)
            if rank > self.max_rank:
                msg = (
                    f"adapter {name!r} has rank {rank}, and the pool takes ranks up to max_rank="
                    f"{self.max_rank}: make the pool with a larger one (up to {LARGEST_RANK})"
                )
                raise AdapterFileError(msg)
            adapter = Adapter(files, self._layouts(model, files), self._count)
        except BaseException:
            files.close()
            raise
        with self._tiers.lock:
            before = self._names.get(name)
            self._names[name] = adapter
        if before is not None:
            self._tiers.retire(before)

    def add_folder(self, path: str | Path) -> list[str]:
        """Add every adapter in a folder, each by the name of its own folder.

        Returns:
            The names, sorted.

        Raises:
            AdapterFileError: there is none, or one cannot be added; those before it are.
        """
        folder = Path(path)
        found = sorted(one.parent for one in folder.glob("*/adapter_config.json"))
        if not found:
            msg = (
                f"{folder} has no adapters: give a folder whose folders are what PEFT's "
                "save_pretrained wrote, or pool.add(name, path) for a single one"
            )
            raise AdapterFileError(msg)
        for one in found:
            self.add(one.name, one)
        return [one.name for one in found]

    def remove(self, name: str) -> None:
        """Remove an adapter; its memory is free once no batch uses it.

        Raises:
            AdapterNotFoundError: there is none of that name.
        """
        with self._tiers.lock:
            adapter = self._known(name)
            del self._names[name]
        self._tiers.retire(adapter)

    @property
    def names(self) -> list[str]:
        """The names of all adapters, in the order in which they were added."""
        return list(self._names)

    def size(self, name: str) -> int:
        """Return the bytes that an adapter takes on the device, whether it is there or not.

        Raises:
            AdapterNotFoundError: there is none of that name.
        """
        return self._known(name).nbytes

    def tier(self, name: str) -> str:
        """Return the fastest tier that has an adapter: ``"device"``, ``"host"`` or ``"files"``.

        Raises:
            AdapterNotFoundError: there is none of that name.
        """
        return self._tiers.tier(self._known(name))

    def _known(self, name: str) -> Adapter:
        adapter = self._names.get(name) if isinstance(name, str) else None
        if adapter is None:
            near = difflib.get_close_matches(str(name), self._names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {len(self._names)} others"
            msg = f"the pool has no adapter {name!r}: {hint}"
            raise AdapterNotFoundError(msg)
        return adapter

    # Layers

    def _layouts(self, model: nn.Module, files: AdapterFiles) -> list[Layout]:
        modules = dict(model.named_modules())
        by_device: dict[torch.device, list[Any]] = {}
        with self._tiers.lock:
            for part in files.parts:
                layer = self._layers.get(part.module)
                if layer is None:
                    layer = self._add_layer(modules[part.module], part.module)
                by_device.setdefault(layer.device, []).append((layer, part))
        return [Layout(device, parts, self._count) for device, parts in by_device.items()]

    def _add_layer(self, module: nn.Module, name: str) -> PooledLayer:
        if POOLED in module.__dict__:
            msg = f"{name} belongs to another pool: close that one first"
            raise ConfigError(msg)
        names = name.split(".")
        nested = sum(part.isdigit() for part in names) > 1
        layer = PooledLayer(self, len(self._by_index), module, name, nested=nested)
        self._bases.append(layer.base)
        if self._marks is None:  # later ones are attached as they come
            self._marks = attach(self._bases, backend="dict", max_bytes=None)
            self._undo.callback(self._marks.detach)
        module.__dict__[POOLED] = layer
        kind: Any = type(module)
        forward = pooled_forward(kind)
        self._undo.callback(module.__dict__.pop, POOLED, None)
        # A switch may come with writes that nobody counts: the weights are looked at again.
        observer = Observer(mode_switched=self._switched, moved=self._moved)
        self._undo.callback(observe(module, observer, overrides={"forward": forward}))
        self.static_rows(layer.device)  # a CUDA graph that is captured cannot make them
        self._layers[name] = layer
        self._by_index.append(layer)
        return layer

    def _follow(self, model: nn.Module) -> None:
        """Note what the model is called with, so that rows can be told from anything else."""
        if POOL in model.__dict__:
            msg = "the model has a pool: close that one first"
            raise ConfigError(msg)
        model.__dict__[POOL] = self
        self._undo.callback(model.__dict__.pop, POOL, None)
        kind: Any = type(model)
        overrides: dict[str, Callable[..., Any]] = {"forward": _noting_batch(kind)}
        if callable(getattr(kind, "generate", None)):
            overrides["generate"] = _expanding(kind)
        self._undo.callback(observe(model, Observer(), overrides=overrides))

    def _switched(self, _: nn.Module) -> None:
        """Have the weights be looked at again."""
        if self._marks is not None:
            self._marks.invalidate()

    def _moved(self, module: nn.Module) -> None:
        """Have adapters follow a layer that has gone to another device or dtype."""
        layer = module.__dict__.get(POOLED)
        if layer is not None and layer.look():
            self._stale = True

    def _follow_moves(self) -> None:
        with self._tiers.lock:
            if not self._stale:
                return
            self._stale = False
            before = dict(self._names)
            for name, one in before.items():
                layouts = self._layouts(self._model, one.files)
                after = self._names[name] = Adapter(one.files, layouts, self._count)
                after.hits, after.misses = one.hits, one.misses
                if one.pinned:
                    self._tiers.retire(one)
                    self._tiers.pin(after, pinned=True)
                else:
                    self._tiers.retire(one)

    # Batches

    @contextmanager
    def use(self, names: str | Sequence[str | None] | None) -> Iterator[None]:
        """Run the model with adapters, in this thread or task, within the block.

        Adapters that are not on the device are brought there first; they stay until the end. Enter
        it on the CUDA stream on which the model runs. Of nested blocks the inner one counts. A
        thread that is begun within a block is outside it.

        Args:
            names: one for all rows, or one for each row of the batch; None for the base model. For
                ``generate``, one for each prompt: beams and returned sequences have that of their
                prompt. Of a batch of flat tokens, one for each token.

        Raises:
            AdapterNotFoundError: there is no adapter of that name.
            CapError: the batch needs more than ``device_bytes``.
            AdapterFileError: an adapter cannot be read.
            ConfigError: ``names`` is none of these.
        """
        self._check_open()
        each = _listed(names)
        outer = routing.current.get()
        if self._stale:
            self._follow_moves()
        with self._tiers.lock:
            distinct = {name: self._known(name) for name in each if name is not None}
        wanted = list(distinct.values())
        thread = self._tiers.acquire(wanted)
        try:
            residents = {name: one.resident for name, one in distinct.items()}
            for resident in residents.values():
                resident.join()  # type: ignore[union-attr]
            chosen = tuple(None if name is None else residents[name] for name in each)
            route = Route(self, chosen, outer)
            token = routing.current.set(route)
            try:
                self._show(route)
                yield
            finally:
                routing.current.reset(token)
                self._show(routing.find(self))
        finally:
            self._tiers.release(wanted, thread)

    def prefetch(self, names: str | Iterable[str]) -> Future[None]:
        """Begin to bring adapters to the device, if there is room beside what is in use.

        Args:
            names: one, or several.

        Returns:
            What is done once they are there, or could not be brought. Nothing is raised there: an
            adapter that cannot be read is reported when it is used.

        Raises:
            AdapterNotFoundError: there is no adapter of that name.
        """
        self._check_open()
        chosen = [names] if isinstance(names, str) else list(names)
        with self._tiers.lock:
            wanted = [self._known(name) for name in chosen]
            if self._executor is None:
                self._executor = ThreadPoolExecutor(1, thread_name_prefix="dora-cache-prefetch")
        return self._executor.submit(self._prefetch, wanted)

    def _prefetch(self, wanted: Sequence[Adapter]) -> None:
        self._tiers.expect(wanted)  # else they would make room for one another
        for one in wanted:
            try:
                self._tiers.prefetch(one)
            except Exception as error:  # noqa: BLE001 - whoever uses it is told
                kind = type(error).__name__
                warn_once(f"adapter {one.name!r} was not brought ahead: {kind}: {error}")

    # Compiled code

    def static_rows(self, device: torch.device) -> Tensor:
        """Return what compiled code gets in place of a route's rows: they are at one address."""
        rows = self._static.get(device)
        if rows is None:
            with torch.inference_mode(mode=False):  # it is written to outside of it as well
                rows = torch.zeros(1 + _MOST_ROWS, dtype=torch.int64, device=device)
                rows[0] = 1
            self._static[device] = rows
        return rows

    def adapt_(self, output: Tensor, x: Tensor, rows: Tensor, layer: int) -> None:
        """Add what adapters add to a layer's output, in compiled code when it runs."""
        pooled = self._by_index[layer]
        if output.is_cuda and torch.cuda.is_current_stream_capturing():
            if pooled.adapt_captured(output, x, rows, self.max_rank):
                self._captured |= 1 << layer
            return
        route = routing.find(self)
        if route is not None and route.touched >> layer & 1:
            changed = pooled.adapt(output, x, route)
            if changed.data_ptr() != output.data_ptr():
                output.copy_(changed)

    def _show(self, route: Route | None) -> None:
        """Put a route, or the base model, where CUDA graphs read it.

        Raises:
            ConfigError: the graphs that there are cannot serve it.
        """
        if route is not None and self._captured:
            self._check_graphs(route)
            for layer in self._by_index:
                if route.derived >> layer.index & 1:
                    layer.refresh(route)
        for device, rows in self._static.items():
            if device.type != "cuda":
                continue
            with torch.inference_mode(mode=False):
                if route is None:
                    rows[:2].copy_(self._base_rows(device), non_blocking=True)
                elif len(route.residents) < len(rows):
                    shown = route.rows(device)
                    rows[: len(shown)].copy_(shown, non_blocking=True)

    def _base_rows(self, device: torch.device) -> Tensor:
        """Return what says that all rows are the base model's."""
        if device not in self._nobody:
            self._nobody[device] = torch.tensor([1, 0], device=device)
        return self._nobody[device]

    def _check_graphs(self, route: Route) -> None:
        others = self._tiers.threads() - {threading.get_ident()}
        missing = (route.touched & ~self._captured) | route.replaced
        if others:
            msg = (
                "a CUDA graph of this pool was captured, and graphs have one place to read from: "
                "use it in one thread at a time"
            )
        elif len(route.residents) > _MOST_ROWS:
            msg = f"CUDA graphs take up to {_MOST_ROWS} names; {len(route.residents)} given"
        elif missing:
            layer = self._by_index[(missing & -missing).bit_length() - 1]
            msg = (
                f"a CUDA graph of this pool was captured without adapters on {layer.name}, which "
                "one in this batch has: add adapters before capturing; convolutions, embeddings "
                "and modules to save cannot be in a graph, so serve those from another pool"
            )
        else:
            return
        raise ConfigError(msg)

    # The rest

    def pin(self, name: str) -> None:
        """Bring an adapter to the device, and keep it there.

        Raises:
            AdapterNotFoundError: there is none of that name.
            AdapterFileError: it cannot be read.
            PinError: it does not fit beside what is pinned.
            CapError: it does not fit beside what is in use.
        """
        self._check_open()
        adapter = self._known(name)
        self._tiers.pin(adapter, pinned=True)
        try:
            with self.use(name):
                pass
        except BaseException:
            self._tiers.pin(adapter, pinned=False)
            raise

    def unpin(self, name: str) -> None:
        """Let an adapter leave the device again.

        Raises:
            AdapterNotFoundError: there is none of that name.
        """
        self._tiers.pin(self._known(name), pinned=False)

    def resize(
        self,
        *,
        device_bytes: int | str | EllipsisType | None = ...,
        max_bytes: int | str | EllipsisType = ...,
    ) -> None:
        """Change the caps that are given; what is above them leaves at once.

        Args:
            device_bytes: the device's; None for none.
            max_bytes: the host's.

        Raises:
            CapError: what is in use or pinned takes more; nothing has changed.
            ConfigError: a size is wrong, or the host's backend cannot be resized.
        """
        self._check_open()
        tiers = self._tiers
        device, host = tiers.device_bytes, None
        if device_bytes is not ...:
            device = _bytes("device_bytes", device_bytes, self._device)
        if max_bytes is not ...:
            host = _bytes("max_bytes", max_bytes, torch.device("cpu"))
        with tiers.lock:
            if host is not None and not isinstance(tiers.host, Resizable):
                msg = "the host's backend has no cap that can be changed: make the pool with one"
                raise ConfigError(msg)
            tiers.resize(device)
            if host is not None:
                tiers.host.resize(host)
                self._max_host = host
        tiers.log()

    def stats(self) -> PoolStats:
        """Return what the pool has done so far, and what it holds."""
        tiers = self._tiers
        reasons = {} if self._marks is None else self._marks.stats().reasons
        with tiers.lock:
            adapters = list(self._names.values())
            there = {one.number for one in adapters if one.resident is not None}
            hosted = set() if tiers.host is None else set(tiers.host.keys())
            on_host = sum(one.number in hosted and one.number not in there for one in adapters)
            device, host = tiers.device_nbytes, tiers.host_nbytes
            tiers.sample()
            return PoolStats(
                hits=tiers.hits,
                misses=tiers.misses,
                loads=tiers.loads,
                reads=tiers.reads,
                evictions=tiers.evictions,
                device_bytes=device,
                host_bytes=host,
                nbytes=device + host,
                max_device_bytes=tiers.device_bytes,
                max_host_bytes=self._max_host,
                on_device=len(there),
                on_host=on_host,
                on_disk=len(adapters) - len(there) - on_host,
                load_seconds=tiers.load_seconds,
                load_times=tuple(tiers.load_times),
                failures=tiers.failures,
                reasons=reasons,
            )

    def report(self) -> PoolReport:
        """Say what the pool holds and has done, by adapter and layer."""
        stats = self.stats()
        tiers = self._tiers
        with tiers.lock:
            named = list(self._names.items())
            layers = list(self._by_index)
            there = {one for _, one in named if one.resident is not None}
            hosted = set() if tiers.host is None else set(tiers.host.keys())
            rows = tuple(
                AdapterRow(
                    name=name,
                    where="device" if one in there else "host" if one.number in hosted else "files",
                    pinned=one.pinned,
                    nbytes=one.nbytes,
                    hits=one.hits,
                    misses=one.misses,
                )
                for name, one in named
            )
            history = tiers.history.samples()
        reasons = () if self._marks is None else self._marks.report().reasons
        return PoolReport(
            stats=stats,
            device=str(self._device),
            adapters=rows,
            layers=layer_rows(layers, there),
            kinds=Counter(layer.kind for layer in layers),
            reasons=named_reasons(reasons, layers),
            kernels=kernel_reasons(layers),
            failures=failures() if self._device.type == "cuda" else (),
            history=history,
        )

    def close(self) -> None:
        """Give the model back as it was, and free all memory; a no-op if it was done.

        Raises:
            ConfigError: a batch runs.
        """
        if self._closed:
            return
        with self._tiers.lock:
            if self._tiers.in_use:
                msg = "the pool is in use: leave all `use` blocks first"
                raise ConfigError(msg)
            self._closed = True
        if self._executor is not None:
            self._executor.shutdown()
        self._undo.close()
        self._tiers.close()
        for adapter in self._names.values():
            adapter.files.close()
        self._names.clear()
        self._layers.clear()
        self._by_index.clear()

    def _check_open(self) -> None:
        if self._closed:
            msg = "the pool is closed: make another one"
            raise DetachedError(msg)

    def __enter__(self) -> Self:
        """Return the pool; it is closed at the end."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def __repr__(self) -> str:
        """Return how many adapters there are, and where."""
        now = self.stats()
        return (
            f"AdapterPool({len(self._names)} adapters, {now.on_device} on the device, "
            f"{format_bytes(now.device_bytes)})"
        )


_MOST_ROWS = 4096
"""Names that CUDA graphs may have."""


def _bytes(name: str, size: int | str | None, device: torch.device) -> int | None:
    try:
        return resolve_size(None if size is None else parse_size(size), device)
    except ValueError as error:
        msg = f"{name}: {error}"
        raise ConfigError(msg) from None


def _listed(names: str | Sequence[str | None] | None) -> tuple[str | None, ...]:
    if names is None or isinstance(names, str):
        return (names,)
    each = tuple(names) if isinstance(names, Sequence) else ()
    if not each or not all(one is None or isinstance(one, str) for one in each):
        msg = f"use({names!r}): give a name, None, or a list of these with one for each row"
        raise ConfigError(msg)
    return each


@functools.cache
def _noting_batch(kind: Any) -> Callable[..., Any]:
    original = kind.forward

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return original(self, *args, **kwargs)
        pool = self.__dict__.get(POOL)
        route = None if pool is None else routing.find(pool)
        if route is None:
            return original(self, *args, **kwargs)
        found = _batch_of(args, kwargs)
        names = len(route.residents)
        repeated = found is not None and routing.expanded.get() and found.rows % names == 0
        if found is not None and names > 1 and names not in found and not repeated:
            msg = (
                f"{names} names for a batch of {found.rows}: give one name for all rows, or "
                "one for each"
            )
            raise ConfigError(msg)
        token = routing.batch.set(found)
        try:
            return original(self, *args, **kwargs)
        finally:
            routing.batch.reset(token)

    return forward


@functools.cache
def _expanding(kind: Any) -> Callable[..., Any]:
    original = kind.generate

    @functools.wraps(original)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        token = routing.expanded.set(True)
        try:
            return original(self, *args, **kwargs)
        finally:
            routing.expanded.reset(token)

    return generate


def _batch_of(args: Sequence[object], kwargs: Mapping[str, object]) -> Batch | None:
    named = [kwargs[name] for name in _INPUTS if isinstance(kwargs.get(name), Tensor)]
    tensors = [one for one in (*named, *args, *kwargs.values()) if isinstance(one, Tensor)]
    if not tensors or not tensors[0].dim():
        return None
    shape = tensors[0].shape
    tokens = shape[0] * shape[1] if len(shape) in {2, 3} else None
    return Batch(shape[0], tokens)
