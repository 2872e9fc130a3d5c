"""What a cache will hold, and how often it will hit, before any weight is loaded.

::

    model = planning.without_weights(transformers.AutoConfig.from_pretrained(folder))
    model = planning.with_adapters(model, {"a": peft.PeftConfig.from_pretrained(path)})
    found = planning.plan(model)
    found.working_set, found.hit_rate("lru", "64MiB", ["a"])

The sizes are exact: the model is made on PyTorch's meta device, where tensors have shapes and
dtypes and no data, and the very recipes derive the very values there.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from dora_cache import backends
from dora_cache.attachment import attach
from dora_cache.errors import ConfigError, NothingToCacheError, PinError
from dora_cache.reasons import Declined
from dora_cache.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import nn

    from dora_cache.cache import AdapterCache
    from dora_cache.core.keys import Adapters

__all__ = ["Plan", "PlannedRow", "PlannedValue", "plan", "with_adapters", "without_weights"]

_SECONDS_PER_BYTE = 1e-9  # of deriving; only that it is the same for all matters
_ROUNDS = 12


@dataclass(frozen=True, slots=True)
class PlannedValue:
    """One value that a forward will use.

    Attributes:
        kind: name of what is derived, e.g. ``"DoRA scale"``.
        adapter: the adapter's name, or several; None for values that belong to none.
        nbytes: its size.
    """

    kind: str
    adapter: Adapters
    nbytes: int


@dataclass(frozen=True, slots=True)
class PlannedRow:
    """The values of one kind and adapter.

    Attributes:
        kind: name of what is derived.
        adapter: the adapter's name, or several; None for values that belong to none.
        entries: how many values.
        nbytes: their bytes.
    """

    kind: str
    adapter: Adapters
    entries: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What inference without gradients, outside autocast and not compiled, will derive and store.

    Attributes:
        values: in the order in which the model's layers come, adapter by adapter.
        declined: what will not be cached or cannot be planned, and why.
    """

    values: tuple[PlannedValue, ...]
    declined: tuple[Declined, ...]

    @property
    def working_set(self) -> int:
        """Bytes of all values: the cap from which on nothing is derived twice."""
        return sum(value.nbytes for value in self.values)

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters that values are of, in the order they come."""
        names = dict.fromkeys(value.adapter for value in self.values)
        return tuple(name for name in names if isinstance(name, str))

    @property
    def rows(self) -> tuple[PlannedRow, ...]:
        """The values by kind and adapter."""
        found: dict[tuple[str, Adapters], list[int]] = {}
        for value in self.values:
            found.setdefault((value.kind, value.adapter), []).append(value.nbytes)
        return tuple(
            PlannedRow(kind, adapter, len(sizes), sum(sizes))
            for (kind, adapter), sizes in found.items()
        )

    def nbytes(self, adapters: Iterable[str]) -> int:
        """Return the bytes that a forward with each of some adapters needs, one after another."""
        wanted = {None, *adapters}
        return sum(value.nbytes for value in self.values if value.adapter in wanted)

    def check_pins(self, adapters: Iterable[str], max_bytes: int) -> None:
        """Check that some adapters could be pinned under a cap.

        Raises:
            PinError: their values take more.
            ConfigError: no values are of one of them.
        """
        names = list(adapters)
        for name in names:
            if name not in self.adapters:
                known = ", ".join(map(repr, self.adapters)) or "none"
                msg = f"nothing is cached of an adapter {name!r}: pin one of {known}"
                raise ConfigError(msg)
        needed = sum(value.nbytes for value in self.values if value.adapter in names)
        if needed > max_bytes:
            msg = (
                f"the values of {', '.join(map(repr, names))} take {format_bytes(needed)}, more "
                f"than a cap of {format_bytes(max_bytes)}: pin fewer, or raise the cap"
            )
            raise PinError(msg)

    def whole(self, max_bytes: int) -> int:
        """Return how many adapters fit under a cap with all their values, the smallest first."""
        left = max_bytes - self.nbytes([])
        count = 0
        for size in sorted(self.nbytes([name]) - self.nbytes([]) for name in self.adapters):
            left -= size
            if left < 0:
                break
            count += 1
        return count

    def hit_rate(
        self,
        backend: str,
        max_bytes: int,
        adapters: Sequence[str],
        *,
        tokens: int = 1,
        pinned: Iterable[str] = (),
    ) -> float:
        """Return the share of lookups that will hit, once traffic has settled.

        The model: the adapters take turns, always in the same order; each turn is a number of
        forwards (as a decoded token is), and each forward looks up the adapter's values in the
        order of the layers. The backend itself is given this traffic, with empty tensors of the
        planned sizes, until a round hits as often as the one before, or 12 rounds. Every value is
        taken to cost the same time per byte to derive: what ``budget`` keeps depends on costs that
        only a run can measure, so that its rate in bytes is about right and its rate in lookups
        may be higher. Buffers of compiled code and values that become invalid are left out.

        Args:
            backend: ``"lru"``, ``"budget"``, or another that takes ``max_bytes``.
            max_bytes: its cap.
            adapters: those that take turns; one alone is single-adapter traffic.
            tokens: forwards in each turn.
            pinned: those of all adapters that are pinned, and warm from the start; for backends
                that can pin.

        Returns:
            From 0 to 1; 1 where there is nothing to look up.
        """
        traffic = [
            [
                (index, value)
                for index, value in enumerate(self.values)
                if value.adapter in (None, name)
            ]
            for name in adapters
        ]
        if not any(traffic):
            return 1.0
        store = backends.create(backend, max_bytes=max_bytes)
        store.on_evict(lambda _: None)
        if isinstance(store, backends.Pinning):
            pins = set(pinned)
            for index, value in enumerate(self.values):
                if value.adapter in pins:
                    store.pin(index)
                    store.put(index, _stand_in(value.nbytes))
        before = -1
        for _ in range(_ROUNDS):
            hits = lookups = 0
            for turn in traffic:
                for _ in range(tokens):
                    for index, value in turn:
                        lookups += 1
                        if store.get(index) is not None:
                            hits += 1
                        else:
                            store.put(index, _stand_in(value.nbytes))
            if hits == before:
                break
            before = hits
        store.close()
        return hits / lookups


def without_weights(config: Any, *, dtype: torch.dtype | None = None) -> Any:
    """Make a causal language model of a Transformers configuration, on the meta device.

    Args:
        config: the configuration, as ``AutoConfig.from_pretrained(folder)`` reads it.
        dtype: of the weights; by default what the configuration says, or float32.
    """
    from transformers import AutoModelForCausalLM

    dtype = dtype or getattr(config, "dtype", None) or torch.float32
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


def with_adapters(model: nn.Module, adapters: Mapping[str, Any]) -> Any:
    """Put adapters into a model on the meta device, as loading them into it would.

    Args:
        model: its modules are wrapped in place.
        adapters: PEFT configurations by the adapters' names, at least one.

    Returns:
        The PEFT model, in eval mode.
    """
    from peft import get_peft_model

    wrapped: Any = None
    for name, config in adapters.items():
        config.inference_mode = True
        if hasattr(config, "init_lora_weights"):
            config.init_lora_weights = False  # others may compute with weights, or look for data
        if wrapped is None:
            wrapped = get_peft_model(model, config, adapter_name=name, low_cpu_mem_usage=True)
        else:
            wrapped.add_adapter(name, config, low_cpu_mem_usage=True)
    return wrapped.eval()


def plan(model: nn.Module, *, numerics: str = "peft") -> Plan:
    """Say what a cache of this model will hold.

    The model is best one without weights (see :func:`without_weights`); for one with weights every
    value is derived, and dropped.

    Args:
        model: as it would be attached.
        numerics: as in :class:`~dora_cache.CacheConfig`.

    Raises:
        AlreadyAttachedError: it is attached.
        ValueError: it is in training mode.
    """
    if model.training:
        raise ValueError("nothing is cached in training mode: call model.eval() before plan()")
    declined: list[Declined] = []
    try:
        with attach(model, backend="dict", numerics=numerics) as cache:
            values = _derive(cache, declined)
            declined += cache.declined
    except NothingToCacheError:
        values = []
    declined += _without_values(model, values)
    quantized = getattr(getattr(model, "config", None), "quantization_config", None)
    if quantized is not None and next(model.parameters()).is_meta:
        reason = "the model is quantized when loaded, and is planned as if it were not"
        declined.append(Declined("base weights", None, "all layers", reason))
    return Plan(tuple(values), tuple(declined))


def _derive(cache: AdapterCache, declined: list[Declined]) -> list[PlannedValue]:
    _, jobs, _ = cache._engine.jobs(None)
    failed: dict[str, int] = {}
    with torch.no_grad():
        for job in jobs:
            try:
                job()
            except Exception as error:  # noqa: BLE001 - whatever needs data that is not there
                text = " ".join(f"{type(error).__name__}: {error}".split())
                failed[text] = failed.get(text, 0) + 1
    for text, count in failed.items():
        reason = f"its size cannot be told without weights ({text})"
        declined.append(Declined("value", None, f"{count} layers", reason))
    values = [PlannedValue(cell.kind, cell.adapter, cell.nbytes) for cell in cache._engine.seen()]
    order = {name: place for place, name in enumerate(dict.fromkeys(v.adapter for v in values))}
    return sorted(values, key=lambda value: order[value.adapter])


def _without_values(model: nn.Module, values: Iterable[PlannedValue]) -> list[Declined]:
    """Name the adapters that nothing is cached of."""
    covered: set[str | None] = set()
    for value in values:
        covered.update(value.adapter if isinstance(value.adapter, tuple) else [value.adapter])
    found = []
    configs = getattr(model, "peft_config", None) if "peft" in sys.modules else None
    for name, config in (configs or {}).items():
        if name in covered:
            continue
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if kind == "LORA" and not getattr(config, "use_dora", False):
            reason = "plain LoRA derives nothing from its weights, so that there is nothing to keep"
        else:
            reason = "no recipe caches it"
        found.append(Declined(kind, name, "all layers", reason))
    return found


def _stand_in(nbytes: int) -> backends.Entry:
    tensor = torch.empty(nbytes, dtype=torch.uint8, device="meta")
    return backends.Entry(tensor, cost=_SECONDS_PER_BYTE * nbytes)
