"""RandLoRA (https://arxiv.org/abs/2502.00987): random bases, scaled for each layer.

The bases are shared by all layers and adapters. Of the two, PEFT scales the one that is laid along
the layer's smaller side; the other it takes from the shared one as it is, or copied where a layer
needs a part of it. Stored is what PEFT makes: the scaled one, and the copy if there is one.

Under ``numerics="fast"`` it is their product, which is dense and of full rank: added to the weight
where that is as exact.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from peft import RandLoraConfig
from peft.tuners.randlora.layer import Linear
from torch import is_autocast_enabled
from torch.nn.functional import linear

from dora_cache.core.decorator import cached
from dora_cache.lifecycle import plain_class
from dora_cache.recipes.examples import BOTH, TARGETS, Example
from dora_cache.recipes.folding import fold
from dora_cache.recipes.hooks import LayerRecipe, active_in, guard, parameter
from dora_cache.recipes.peft_layers import base_layer, drops, is_hooked

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from torch import Tensor, nn

__all__ = ["RECIPE"]


def _depends_on(layer: Any, adapter: str, *_: object) -> Iterator[object]:
    yield from _weights(layer, adapter)
    yield layer.num_bases
    yield layer.in_features
    yield layer.out_features


def _weights(layer: Any, adapter: str) -> tuple[Tensor, ...]:
    modules = layer._modules
    return (
        modules["randlora_A"]._buffers[adapter],
        modules["randlora_B"]._buffers[adapter],
        parameter(layer, "randlora_lambda", adapter),
        parameter(layer, "randlora_gamma", adapter),
    )


@cached("RandLoRA bases", adapter="adapter", depends_on=_depends_on)
def _scaled(layer: Any, adapter: str, device: torch.device) -> tuple[Tensor, ...]:
    """Derive the scaled base, and the other one if it is not a view of the shared one."""
    first, second = _derive(layer, adapter, device)
    scaled, other = (first, second) if _is_first(layer) else (second.T, first.T)
    shared = layer.randlora_B[adapter]
    return (scaled,) if other.data_ptr() == shared.data_ptr() else (scaled, other)


def _derive(layer: Any, adapter: str, device: torch.device) -> tuple[Tensor, Tensor]:
    bases: tuple[Tensor, Tensor] = plain_class(type(layer)).get_scaled_bases(  # type: ignore[attr-defined]
        layer, adapter, device=device
    )
    return bases


def _device(layer: Any) -> torch.device:
    base: Any = base_layer(layer)
    device: torch.device = base.weight.device
    return device


def _is_first(layer: Any) -> bool:
    """Whether the scaled base is the one that the input meets first."""
    smaller: bool = layer.in_features <= layer.out_features
    return smaller


def _bases(layer: Any, adapter: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return what PEFT multiplies the input with, one after the other."""
    scaled, *rest = _scaled(layer, adapter, device)
    if rest:
        other = rest[0]
    else:
        shared = layer._modules["randlora_B"]._buffers[adapter]
        longer = max(layer.in_features, layer.out_features)
        other = shared[:longer, : layer.num_bases].flatten(start_dim=1)
    return (scaled, other) if _is_first(layer) else (other.T, scaled.T)


def _forward(layer: Any, x: Tensor) -> Tensor:
    adapters = active_in(layer, "randlora_lambda")
    dtype = x.dtype
    result: Tensor = layer.base_layer(x)
    for adapter in adapters:
        first, second = _bases(layer, adapter, x.device)
        x = x.to(second.dtype)
        dropout = layer._modules["randlora_dropout"]._modules[adapter]
        change = linear(linear(dropout(x), first), second)
        result = result + change * layer.scaling[adapter]
    return result.to(dtype)


def _on_bitsandbytes(layer: Any, x: Tensor) -> Tensor:
    adapters = active_in(layer, "randlora_lambda")
    result: Tensor = layer.base_layer(x)
    converts = not is_autocast_enabled()
    for adapter in adapters:
        first, second = _bases(layer, adapter, x.device)
        dtype = result.dtype
        if converts:
            x = x.to(second.dtype)
        dropout = layer._modules["randlora_dropout"]._modules[adapter]
        change = linear(linear(dropout(x.to(second.dtype)), first), second)
        if converts:
            change = change.to(dtype)
        result = result + change * layer.scaling[adapter]
    return result.to(x.dtype)


_BITSANDBYTES = tuple(f"peft.tuners.randlora.bnb:{name}" for name in ("Linear4bit", "Linear8bitLt"))


def _warm(layer: Any, adapter: str) -> object:
    return _scaled(layer, adapter, _device(layer))


def _delta_depends_on(layer: Any, adapter: str, *_: object) -> Iterator[object]:
    yield from _depends_on(layer, adapter)
    yield layer.scaling[adapter]


def _product(layer: Any, adapter: str, device: torch.device) -> Tensor:
    first, second = _derive(layer, adapter, device)
    return (second @ first) * layer.scaling[adapter]


_delta = cached("RandLoRA delta", adapter="adapter", depends_on=_delta_depends_on)(_product)


def _dense(layer: Any, x: Tensor) -> Tensor:
    adapters = active_in(layer, "randlora_lambda")
    dtype = x.dtype
    result: Tensor = layer.base_layer(x)
    for adapter in adapters:
        delta = _delta(layer, adapter, x.device)
        x = x.to(delta.dtype)
        dropout = layer._modules["randlora_dropout"]._modules[adapter]
        result = result + linear(dropout(x), delta)
    return result.to(dtype)


def _drops(dropout: nn.Module) -> bool:
    return drops(dropout) or is_hooked(dropout)


_folded = fold(
    "RandLoRA weight",
    active=partial(active_in, attribute="randlora_lambda"),
    delta=lambda layer, adapter: _product(layer, adapter, _device(layer)),
    depends_on=_delta_depends_on,
    weights=_weights,
    unless=lambda layer, adapter: _drops(layer.randlora_dropout[adapter]),
    otherwise=_dense,
    warm_otherwise=lambda layer, adapter: _delta(layer, adapter, _device(layer)),
    stored=False,
)


def _config(inputs: int, outputs: int, **more: Any) -> RandLoraConfig:
    rank = 32 if min(inputs, outputs) >= 256 else 4  # noqa: PLR2004 - the default, or a small one
    return RandLoraConfig(
        r=rank, randlora_alpha=2 * rank, init_weights=False, target_modules=TARGETS, **more
    )


RECIPE = LayerRecipe(
    name="RandLoRA",
    hooks={Linear: [guard(_forward, warm=_warm)]},
    fast={Linear: [_folded]},
    quantized={path: [guard(_on_bitsandbytes, warm=_warm)] for path in _BITSANDBYTES},
    quantized_methods={
        f"{_BITSANDBYTES[0]}.get_scaled_bases": "76717238958f",
        f"{_BITSANDBYTES[0]}.forward": "00e7740fb54e",
        f"{_BITSANDBYTES[1]}.get_scaled_bases": "76717238958f",
        f"{_BITSANDBYTES[1]}.forward": "203a280a4fb4",
    },
    adapters="randlora_lambda",
    relies_on={
        "peft.tuners.randlora.layer:Linear.get_scaled_bases": "d2844631a942",
        "peft.tuners.randlora.layer:Linear.forward": "ea00783d4b1b",
        "peft.tuners.randlora.layer:UniqueBaseGrad.forward": "98badb7544a9",
    },
    examples=[
        Example("RandLoRA", _config, numerics=BOTH),
        Example(
            "RandLoRA, dropout",
            lambda inputs, outputs: _config(inputs, outputs, randlora_dropout=0.1),
        ),
    ],
)
