"""LoHa (https://arxiv.org/abs/2108.06098): the dense ``(A1 B1) * (A2 B2)`` of each layer."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from peft.tuners.loha.layer import LoHaLayer

from dora_cache.recipes.peft_layers import follow_layer, memoised

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor, nn

    from dora_cache.cache import AdapterCache

__all__ = ["RECIPE"]

_FACTORS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")


class _LoHa:
    name = "LoHa"

    def applies(self, layer: nn.Module) -> bool:
        return isinstance(layer, LoHaLayer)

    def apply(self, cache: AdapterCache, layer: Any) -> bool:
        if not layer.hada_w1_a:
            return False
        binding = follow_layer(cache, layer, self, {"get_delta_weight": _get_delta_weight})
        binding.warmers = _warmers
        return True


RECIPE = _LoHa()


def _depends_on(layer: Any, adapter_name: str, **_: object) -> Iterator[object]:
    yield layer.scaling[adapter_name]
    for name in _FACTORS:
        factors = getattr(layer, name)
        if adapter_name in factors:
            yield factors[adapter_name]
    yield layer.get_base_layer().weight.shape


def _derive(self: Any, adapter_name: str, *, apply_rank_dropout: bool = False) -> Tensor:
    delta: Tensor = LoHaLayer.get_delta_weight(
        self, adapter_name, apply_rank_dropout=apply_rank_dropout
    )
    return delta


_get_delta_weight = memoised(_derive, "LoHa delta", adapter="adapter_name", depends_on=_depends_on)


def _warmers(layer: Any, _: object) -> Iterator[tuple[str, Callable[[], object]]]:
    for adapter in layer.hada_w1_a:
        # Exactly as forward calls it, for the same key.
        yield adapter, partial(layer.get_delta_weight, adapter, apply_rank_dropout=False)
