"""DoRA (https://arxiv.org/abs/2402.09353), on linear, embedding and convolution layers.

A layer computes ``y = s * (W x + g B A x) + bias`` with ``s = m / ||W + g B A||``, one number for
each output. ``s`` depends on weights alone. It is what is stored; neither ``W`` nor ``B A`` is
touched again until one of them changes.

- ``values.py``: deriving ``s``.
- ``outputs.py``: the arithmetic of a forward; ``kernels.py``: its CUDA kernels.
- ``variants.py``: what takes the place of PEFT's variants.
- ``linear.py``: the forward of linear layers as a whole; ``bound.py``: the short way through it.
- ``mixed.py``: batches that mix adapters (``adapter_names``).
"""

from __future__ import annotations

import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

from peft import LoraConfig
from peft.tuners.lora.layer import LoraLayer

from dora_cache.lifecycle import plain_class
from dora_cache.recipes.compiled import viewed
from dora_cache.recipes.dora.linear import forward_for, remark
from dora_cache.recipes.dora.mixed import mixed_for
from dora_cache.recipes.dora.values import (
    fast_scale,
    has_offloaded,
    offloaded_fast_scale,
    offloaded_scale,
    stored_scale,
)
from dora_cache.recipes.dora.variants import (
    CachedVariant,
    bake_variant,
    cached_variant,
    kind_of,
)
from dora_cache.recipes.examples import BOTH, TARGETS, Example, conv2d, embedding
from dora_cache.recipes.peft_layers import derive_ahead, follow_layer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import nn

    from dora_cache.core.engine import Engine

__all__ = ["RECIPE"]


def _config(*_: int) -> LoraConfig:
    return LoraConfig(
        use_dora=True, r=8, lora_alpha=9, init_lora_weights=False, target_modules=TARGETS
    )


class _Dora:
    name = "DoRA"
    relies_on = {  # noqa: RUF012
        "peft.tuners.lora.layer:Linear.forward": "f3f969ac2a1b",
        "peft.tuners.lora.layer:Embedding.forward": "2188d6137662",
        "peft.tuners.lora.layer:_ConvNd.forward": "b00b0df02b43",
        "peft.tuners.lora.variants:DoraLinearVariant.forward": "b265a95426ad",
        "peft.tuners.lora.variants:DoraEmbeddingVariant.forward": "0eaa6f3ee09d",
        "peft.tuners.lora.variants:_DoraConvNdVariant.forward": "d5f618c5646e",
        "peft.tuners.lora.dora:DoraLinearLayer.get_lora_weight": "4b3ce9b3b3f5",
        "peft.tuners.lora.dora:DoraLinearLayer.get_weight_norm": "5263d6dbbd1d",
        "peft.tuners.lora.dora:DoraLinearLayer.forward": "e80db4e33df6",
        "peft.tuners.lora.dora:DoraEmbeddingLayer.get_lora_weight": "f1cfd267af6d",
        "peft.tuners.lora.dora:DoraEmbeddingLayer.forward": "d984279e3e09",
        "peft.tuners.lora.dora:_DoraConvNdLayer.get_lora_weight": "7c4e65ce5733",
        "peft.tuners.lora.dora:_DoraConvNdLayer.get_weight_norm": "954cd87c97e1",
        "peft.tuners.lora.dora:_DoraConvNdLayer.forward": "916cc471779a",
        "peft.utils.integrations:dequantize_module_weight": "85822f40b80e",
        "peft.utils.integrations:dequantize_bnb_weight": "0f9d9c05bee7",
    }
    examples = (
        Example("DoRA", _config, numerics=BOTH),
        Example("DoRA, Embedding", _config, embedding, numerics=BOTH),
        Example("DoRA, Conv2d", _config, conv2d, numerics=BOTH),
    )

    def applies(self, layer: nn.Module) -> bool:
        return isinstance(layer, LoraLayer)

    def apply(self, cache: Engine, layer: Any) -> bool:
        known = {
            adapter: variant
            for adapter, variant in layer.lora_variant.items()
            if isinstance(variant, CachedVariant) or kind_of(type(variant))
        }
        plain_kind = plain_class(type(layer))
        forward = forward_for(plain_kind, cache.config.numerics)
        overrides = mixed_for(plain_kind) | ({"forward": forward} if forward else {})
        if not (known or overrides):
            return False
        overrides.setdefault("forward", viewed(plain_kind.forward))  # type: ignore[attr-defined]
        binding = follow_layer(cache, layer, self, overrides)
        if binding.warmers is None:
            binding.warmers = _warmers
            binding.bake = bake_variant
            binding.undo.callback(_restore, weakref.ref(layer))
            if forward is not None:
                holder: Any = binding.holder
                holder.remark = remark
        for adapter, variant in known.items():
            if not isinstance(variant, CachedVariant):
                plain: Any = type(variant)
                stand_in = cached_variant(plain, cache.config.numerics)
                layer.lora_variant[adapter] = stand_in(variant)
        return bool(known)


RECIPE = _Dora()


def _restore(layer: weakref.ref[Any]) -> None:
    living = layer()
    variants = {} if living is None else living.lora_variant
    for adapter, variant in variants.items():
        if isinstance(variant, CachedVariant):
            variants[adapter] = variant.original


def _warmers(layer: Any, _: object) -> Iterator[tuple[str, Callable[[], object]]]:
    for adapter, variant in layer.lora_variant.items():
        if isinstance(variant, CachedVariant):
            yield adapter, partial(derive_ahead, _derive, layer, adapter)


def _derive(layer: Any, adapter: str) -> None:
    """Derive what an inference without gradients will use."""
    variant = layer.lora_variant[adapter]
    offloaded = has_offloaded(layer, adapter)
    if variant.numerics == "fast":
        (offloaded_fast_scale if offloaded else fast_scale)(layer, adapter)
        return
    derive = offloaded_scale if offloaded else stored_scale
    if variant.kind == "linear":
        derive(layer, adapter, layer.lora_A[adapter].weight.dtype)
    else:
        derive(layer, adapter)
