"""GLoRA (https://arxiv.org/abs/2306.07967): the weight and bias of each layer, all paths applied.

Under ``numerics="fast"`` the layer is one product with them; PEFT's adds them to the base layer's
output and subtracts that again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from peft import GloraConfig
from peft.tuners.glora.layer import (
    GloraEmptyPath,
    GloraLinear,
    GloraLoraPath,
    GloraScalarPath,
    GloraVectorPath,
)
from torch import Tensor, nn
from torch.nn.functional import linear

from dora_cache.core.decorator import cached
from dora_cache.recipes.bases import dense_base, replaceable
from dora_cache.recipes.examples import BOTH, TARGETS, Base, Example
from dora_cache.recipes.examples import linear as linear_base
from dora_cache.recipes.hooks import LayerRecipe, UnusualError, active_in, guard, own_parameter
from dora_cache.recipes.peft_layers import base_layer, is_hooked, weights_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["RECIPE"]

_PATHS = ("glora_A", "glora_B", "glora_C", "glora_D", "glora_E")
_WEIGHTS: dict[type, tuple[str, ...]] = {
    GloraLoraPath: ("Xd", "Xu"),
    GloraVectorPath: ("X",),
    GloraScalarPath: ("X",),
    GloraEmptyPath: (),
}


def _depends_on(layer: Any, adapter: str) -> Iterator[object]:
    base, modules = base_layer(layer), layer._modules
    yield from weights_of(base)
    yield base.bias
    for name in _PATHS:
        path = modules[name]._modules[adapter]
        for weight in _WEIGHTS[type(path)]:
            yield own_parameter(path, weight)
        if type(path) is GloraEmptyPath:
            yield path._buffers["zeros"] if "zeros" in path._buffers else path.zeros


@cached("GLoRA weight", adapter="adapter", depends_on=_depends_on)
def _weight(layer: Any, adapter: str) -> tuple[Tensor, ...]:
    """Derive ``W + W * A + B`` and, with a bias, ``b + b * D + E + W C``; in the weight's dtype."""
    base: Any = base_layer(layer)
    weight, bias = base.weight, base.bias
    a, b, c, d, e = (
        getattr(layer, name)[adapter]().to(device=weight.device, dtype=weight.dtype)
        for name in _PATHS
    )
    total = weight + weight * a + b
    if bias is None:
        return (total,)
    return total, bias + bias * d + e + torch.matmul(weight, c).squeeze(-1)


def _usable(layer: Any, adapters: Sequence[str]) -> bool:
    """Whether the base layer is dense and the paths are PEFT's own, without hooks."""
    base, modules = dense_base(layer), layer._modules
    if not isinstance(base, nn.Linear) or hasattr(base, "qweight"):
        return False
    for adapter in adapters:
        for name in _PATHS:
            path = modules[name]._modules[adapter]
            if type(path) not in _WEIGHTS or is_hooked(path):
                return False
    return True


def _forward(layer: Any, x: Tensor) -> Tensor | None:
    adapters = active_in(layer, "glora_A")
    if not _usable(layer, adapters):
        msg = "the base layer is not dense, or a path is not PEFT's own or has hooks"
        raise UnusualError(msg)
    base_result: Tensor = layer.base_layer(x)
    result = base_result
    for adapter in adapters:
        result = result + linear(x, *_weight(layer, adapter))
    if adapters:
        result = result - len(adapters) * base_result
    return result.to(base_result.dtype)


def _fast_forward(layer: Any, x: Tensor) -> Tensor | None:
    adapters = active_in(layer, "glora_A")
    if len(adapters) != 1 or not replaceable(layer) or not _usable(layer, adapters):
        return _forward(layer, x)
    return linear(x, *_weight(layer, adapters[0]))


def _warm(layer: Any, adapter: str) -> object:
    return _weight(layer, adapter) if _usable(layer, (adapter,)) else None


def _config(inputs: int, outputs: int, **more: Any) -> GloraConfig:
    rank = 8 if min(inputs, outputs) >= 64 else 2  # noqa: PLR2004 - a usual one, or a small one
    return GloraConfig(r=rank, target_modules=TARGETS, init_weights=False, **more)


def _paths(a_b: str, c: str, d_e: str) -> Any:
    return lambda inputs, outputs: _config(
        inputs, outputs, config_A_B=a_b, config_C=c, config_D_E=d_e
    )


_unbiased = Base(
    "Linear, no bias",
    lambda inputs, outputs: nn.Linear(inputs, outputs, bias=False),
    linear_base.sample,
)

RECIPE = LayerRecipe(
    name="GLoRA",
    hooks={GloraLinear: [guard(_forward, warm=_warm)]},
    fast={GloraLinear: [guard(_fast_forward, warm=_warm)]},
    adapters="glora_A",
    relies_on={
        "peft.tuners.glora.layer:GloraLinear.forward": "225863214502",
        "peft.tuners.glora.layer:GloraLinear._check_forward_args": "aaa2c6c356ed",
        "peft.tuners.glora.layer:GloraLoraPath.forward": "db017ece3498",
        "peft.tuners.glora.layer:GloraVectorPath.forward": "28af70199ddb",
        "peft.tuners.glora.layer:GloraScalarPath.forward": "adce25040d55",
        "peft.tuners.glora.layer:GloraEmptyPath.forward": "e508cf3222bf",
    },
    examples=[
        Example("GLoRA", _config, layers=1, numerics=BOTH),
        Example("GLoRA, vectors", _paths("vector", "vector", "vector"), layers=1, numerics=BOTH),
        Example("GLoRA, constants", _paths("constant", "none", "constant"), layers=1),
        Example("GLoRA, bias alone", _paths("none", "lora", "none"), layers=1),
        Example("GLoRA, no bias", _config, _unbiased, dtypes=(torch.float32,), layers=1),
    ],
)
