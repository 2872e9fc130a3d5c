"""Ways of running a model's adapters: plain LoRA, PEFT, PEFT's own cache, and dora-cache."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from dora_cache.attachment import attach
from dora_cache.config import CacheConfig
from dora_cache.lab.models import plain_lora, twin

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from peft import PeftModel
    from torch import nn

    from dora_cache.stats import CacheStats

__all__ = [
    "BASE",
    "LORA",
    "MERGED",
    "PEFT",
    "PEFT_CACHING",
    "Running",
    "Way",
    "dora_caching_bytes",
    "groups",
    "rotated",
    "standard_ways",
    "with_cache",
]


def _nothing() -> None:
    return None


@dataclass(frozen=True, slots=True)
class Running:
    """A model set up to run one way.

    Attributes:
        model: called like the causal language model that it is or wraps.
        select: makes the adapter of a name the active one.
        turn: a context to run in; another way's turn may come between two of them.
        held: bytes that are held at the moment so as not to derive them again; None where nothing
            is meant to be.
        stats: the cache's counters; None where there is none to ask.
        forget: drops what has been derived for an adapter; None where nothing is.
        warm: derives everything for an adapter; None where only forwards do.
    """

    model: Any
    select: Callable[[str], object]
    turn: Callable[[], AbstractContextManager[object]] = nullcontext
    held: Callable[[], int | None] = _nothing
    stats: Callable[[], CacheStats | None] = _nothing
    forget: Callable[[str], object] | None = None
    warm: Callable[[str], object] | None = None


@dataclass(frozen=True, slots=True)
class Way:
    """One way of running adapters.

    Attributes:
        name: identifies the way, e.g. in JSON.
        label: names it for people.
        open: sets a model up to run this way, given a PEFT model and the names of its adapters,
            and tears it down again. The PEFT model itself stays as it is; weights are shared.
        comparable: whether the outputs are those of uncached PEFT, at least up to rounding;
            otherwise the way computes something else and serves as a yardstick.
        in_place: whether it writes to the shared weights, and gives them back up to rounding. Such
            a way cannot run beside others: it takes its turns after them, beside plain LoRA alone.
    """

    name: str
    label: str
    open: Callable[[PeftModel, Sequence[str]], AbstractContextManager[Running]]
    comparable: bool = True
    in_place: bool = False


@contextmanager
def _base(model: PeftModel, _: Sequence[str]) -> Iterator[Running]:
    yield Running(twin(model).unload(), select=lambda _: None)


@contextmanager
def _lora(model: PeftModel, adapters: Sequence[str]) -> Iterator[Running]:
    plain = plain_lora(model, adapters)
    yield Running(plain, _selector(plain))


@contextmanager
def _peft(model: PeftModel, _: Sequence[str]) -> Iterator[Running]:
    own = twin(model)
    yield Running(own, _selector(own))


@contextmanager
def _peft_caching(model: PeftModel, _: Sequence[str]) -> Iterator[Running]:
    from peft.helpers import DoraCaching

    own = twin(model)

    def forget(_: str | None = None) -> None:
        for layer in _dora_layers(own):
            layer._cache_clear()

    try:
        yield Running(
            own,
            _selector(own),
            turn=DoraCaching,
            held=lambda: dora_caching_bytes(own),
            forget=forget,
        )
    finally:
        # Its entries outlive DoraCaching; the model may live on with whoever still refers to it.
        forget()


@contextmanager
def _merged(model: PeftModel, _: Sequence[str]) -> Iterator[Running]:
    own = twin(model)

    def unmerge() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # where nothing is merged
            own.unmerge_adapter()

    def select(adapter: str) -> None:
        unmerge()
        own.set_adapter(adapter, inference_mode=True)
        own.merge_adapter()

    try:
        yield Running(own, select)
    finally:
        unmerge()


BASE = Way("base", "no adapter", _base, comparable=False)
LORA = Way("lora", "plain LoRA", _lora, comparable=False)
MERGED = Way("merged", "DoRA merged", _merged, in_place=True)
PEFT = Way("peft", "PEFT uncached", _peft)
PEFT_CACHING = Way("peft-caching", "PEFT DoraCaching", _peft_caching)


def with_cache(config: CacheConfig, *, label: str | None = None) -> Way:
    """Return the way that attaches dora-cache with these settings.

    Its name is ``dora-cache:`` and the backend's, with ``-fast`` after it where that is the
    numerics; one comparison takes each name once.
    """
    suffix = "" if config.numerics == "peft" else f"-{config.numerics}"

    @contextmanager
    def run(model: PeftModel, _: Sequence[str]) -> Iterator[Running]:
        own = twin(model)
        with attach(own, config) as cache:
            yield Running(
                own,
                _selector(own),
                held=lambda: cache.stats().nbytes,
                stats=cache.stats,
                forget=cache.invalidate,
                warm=lambda adapter: cache.warm([adapter]),
            )

    name = f"{config.backend}{suffix}"
    return Way(f"dora-cache:{name}", label or f"dora-cache {name}", run)


def standard_ways(max_bytes: int | str | None = None) -> tuple[Way, ...]:
    """Return the yardsticks, PEFT with and without its cache, and dora-cache's backends.

    Args:
        max_bytes: cap of the ``lru`` backend, which is left out if there is none.
    """
    configs = [CacheConfig(backend="dict"), CacheConfig(backend="cpu")]
    if max_bytes is not None:
        configs.insert(1, CacheConfig(backend="lru", max_bytes=max_bytes))
    return BASE, LORA, PEFT, PEFT_CACHING, *map(with_cache, configs)


def groups(ways: Sequence[Way]) -> list[tuple[Way, ...]]:
    """Return the ways that can take turns, together; ways that work in place, with LoRA each."""
    together = tuple(way for way in ways if not way.in_place)
    alone: list[tuple[Way, ...]] = [(LORA, way) for way in ways if way.in_place]
    return [together, *alone] if together else alone


def rotated(ways: Sequence[Way], turn: int) -> list[Way]:
    """Return the ways in the order of a turn: each comes first, and each last, equally often."""
    start = turn % len(ways)
    return [*ways[start:], *ways[:start]]


def dora_caching_bytes(model: nn.Module) -> int:
    """Return the bytes that PEFT's ``DoraCaching`` holds in a model, each storage once."""
    storages = {}
    for layer in _dora_layers(model):
        for value in layer._dora_cache.values():
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _dora_layers(model: nn.Module) -> Iterator[Any]:
    return (module for module in model.modules() if hasattr(module, "_dora_cache"))


def _selector(model: PeftModel) -> Callable[[str], None]:
    def select(adapter: str) -> None:
        model.set_adapter(adapter, inference_mode=True)

    return select
