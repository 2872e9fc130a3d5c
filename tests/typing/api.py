"""What the type checker must accept, and what it must infer; checked by `make types`, not run."""

from collections.abc import Callable, Hashable
from typing import assert_type

import torch
from torch import Tensor, nn

import dora_cache
from dora_cache import AdapterCache, CacheConfig, CacheStats, backends, cached


class Rotation(nn.Module):
    weight: nn.ParameterDict

    @cached(
        "rotation",
        adapter="adapter_name",
        depends_on=lambda self, adapter_name, power=1: [self.weight[adapter_name], power],
    )
    def rotation(self, adapter_name: str, power: int = 1) -> Tensor:
        return torch.matrix_power(self.weight[adapter_name], power)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.rotation("a", power=2)


@cached("pair", depends_on=lambda weight: [weight])
def pair(weight: Tensor) -> tuple[Tensor, Tensor]:
    return weight, weight.T


class Backend:
    """A third party's backend needs no base class."""

    max_bytes: int | None = None
    nbytes: int = 0

    def on_evict(self, evicted: Callable[[Hashable], object]) -> None: ...
    def get(self, key: object) -> backends.Entry | None:
        return None

    def put(self, key: object, entry: backends.Entry) -> bool:
        return False

    def delete(self, key: object) -> bool:
        return False

    def clear(self) -> None: ...
    def keys(self) -> tuple[object, ...]:
        return ()

    def __len__(self) -> int:
        return 0

    def close(self) -> None: ...


def use(model: nn.Module) -> None:
    assert_type(Rotation().rotation("a"), Tensor)
    assert_type(Rotation.rotation(Rotation(), "a", power=3), Tensor)
    assert_type(pair(torch.ones(1)), tuple[Tensor, Tensor])
    assert_type(pair.cache_info().hits, int)
    pair.cache_clear()
    pair(1)  # type: ignore[arg-type]
    pair(torch.ones(1), 2)  # type: ignore[call-arg]

    assert_type(dora_cache.attach(model), AdapterCache)
    config = CacheConfig(backend="lru", max_bytes="256MiB")
    assert_type(CacheConfig.from_file("cache.toml"), CacheConfig)
    with dora_cache.attach(model, config) as cache:
        assert_type(cache, AdapterCache)
        assert_type(cache.stats(), CacheStats)
        assert_type(cache.stats().hit_rate, float)
        assert_type(cache.warm(adapters=["a"], progress=True), int)
        assert_type(cache.invalidate(adapter="a"), int)
        with cache.bypass():
            model(torch.ones(1))

    held: backends.Backend = Backend()
    assert_type(held.get("key"), backends.Entry | None)
    backends.register("mine", Backend)
