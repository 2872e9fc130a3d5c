"""Ways of running a model's adapters: plain LoRA, PEFT, PEFT's own cache, and dora-cache."""

from __future__ import annotations

from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from dora_cache.attachment import attach
from dora_cache.bench.models import plain_lora, twin
from dora_cache.config import CacheConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from peft import PeftModel
    from torch import nn

    from dora_cache.stats import CacheStats

__all__ = [
    "BASE",
    "LORA",
    "PEFT",
    "PEFT_CACHING",
    "Running",
    "Way",
    "dora_caching_bytes",
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
    """

    model: Any
    select: Callable[[str], object]
    turn: Callable[[], AbstractContextManager[object]] = nullcontext
    held: Callable[[], int | None] = _nothing
    stats: Callable[[], CacheStats | None] = _nothing


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
    """

    name: str
    label: str
    open: Callable[[PeftModel, Sequence[str]], AbstractContextManager[Running]]
    comparable: bool = True


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
    try:
        yield Running(own, _selector(own), turn=DoraCaching, held=lambda: dora_caching_bytes(own))
    finally:
        # Its entries outlive DoraCaching; the model may live on with whoever still refers to it.
        for layer in _dora_layers(own):
            layer._cache_clear()


BASE = Way("base", "no adapter", _base, comparable=False)
LORA = Way("lora", "plain LoRA", _lora, comparable=False)
PEFT = Way("peft", "PEFT uncached", _peft)
PEFT_CACHING = Way("peft-caching", "PEFT DoraCaching", _peft_caching)


def with_cache(config: CacheConfig, *, label: str | None = None) -> Way:
    """Return the way that attaches dora-cache with these settings.

    Its name is ``dora-cache:`` and the backend's; one comparison takes each name once.
    """

    @contextmanager
    def run(model: PeftModel, _: Sequence[str]) -> Iterator[Running]:
        own = twin(model)
        with attach(own, config) as cache:
            yield Running(own, _selector(own), held=lambda: cache.stats().nbytes, stats=cache.stats)

    return Way(f"dora-cache:{config.backend}", label or f"dora-cache {config.backend}", run)


def standard_ways(max_bytes: int | str | None = None) -> tuple[Way, ...]:
    """Return the yardsticks, PEFT with and without its cache, and dora-cache's backends.

    Args:
        max_bytes: cap of the ``lru`` backend, which is left out if there is none.
    """
    configs = [CacheConfig(backend="dict"), CacheConfig(backend="cpu")]
    if max_bytes is not None:
        configs.insert(1, CacheConfig(backend="lru", max_bytes=max_bytes))
    return BASE, LORA, PEFT, PEFT_CACHING, *map(with_cache, configs)


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
