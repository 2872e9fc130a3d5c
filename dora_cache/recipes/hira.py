"""HiRA (https://openreview.net/forum?id=TwJrTz9cRS): the dense ``W * (B A)`` of each layer.

Under ``numerics="fast"``, ``W + W * (B A)`` in its stead, where that loses no precision: then one
product is enough. Embeddings need no dense value: they multiply the rows that they look up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from peft import HiraConfig
from peft.tuners.hira.layer import Conv1d, Conv2d, Conv3d, Embedding, Linear
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - as everywhere

from dora_cache.core.decorator import cached
from dora_cache.reasons import Reason
from dora_cache.recipes.bases import ON_QUANTIZED, foldable, require_dense, when_dense
from dora_cache.recipes.examples import BOTH, TARGETS, Base, Example, conv2d, embedding
from dora_cache.recipes.hooks import LayerRecipe, UnusualError, active_in, guard, parameter
from dora_cache.recipes.peft_layers import base_layer, drops, is_hooked, weights_of

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["RECIPE"]


def _depends_on(layer: Any, adapter: str) -> Iterator[object]:
    yield parameter(layer, "hira_A", adapter)
    yield parameter(layer, "hira_B", adapter)
    yield from weights_of(base_layer(layer))


# Linear layers


def _linear_depends_on(layer: Any, adapter: str) -> Iterator[object]:
    yield layer.fan_in_fan_out
    yield from _depends_on(layer, adapter)


@cached("HiRA weight", adapter="adapter", depends_on=_linear_depends_on)
def _linear_weight(layer: Any, adapter: str) -> Tensor:
    """Derive what the adapter adds to W; (out, in)."""
    base: Any = base_layer(layer)
    weight: Tensor = base.weight.T if layer.fan_in_fan_out else base.weight
    product = torch.mm(layer.hira_A[adapter].T, layer.hira_B[adapter].T)
    return weight * product.T


@cached("HiRA weight, folded", adapter="adapter", depends_on=_depends_on)
def _linear_total(layer: Any, adapter: str) -> Tensor:
    """Derive W and what the adapter adds to it; (out, in)."""
    base: Any = base_layer(layer)
    weight: Tensor = base.weight
    return (layer.hira_B[adapter] @ layer.hira_A[adapter]).add_(1).mul_(weight)


def _linear(layer: Any, x: Tensor) -> Tensor:
    # PEFT makes a new parameter of a transposed weight, and so its output requires gradients.
    require_dense(layer)
    if layer.fan_in_fan_out and torch.is_grad_enabled():
        msg = "the output requires gradients"
        raise UnusualError(msg, Reason.GRADIENTS)
    adapters = active_in(layer, "hira_A")
    result = layer.base_layer(x)
    dtype = result.dtype
    for adapter in adapters:
        weight = _linear_weight(layer, adapter)
        x = layer._cast_input_dtype(x, parameter(layer, "hira_A", adapter).dtype)
        result = result + F.linear(_dropped(layer, adapter, x), weight)
    return result.to(dtype)


def _fast_linear(layer: Any, x: Tensor) -> Tensor:
    adapters = active_in(layer, "hira_A")
    if len(adapters) != 1 or layer.fan_in_fan_out or not _folds(layer, adapters[0], x):
        return _linear(layer, x)
    total = _linear_total(layer, adapters[0])
    return F.linear(x, total, base_layer(layer).bias)  # type: ignore[arg-type]


def _dropped(layer: Any, adapter: str, x: Tensor) -> Tensor:
    dropped: Tensor = layer._modules["hira_dropout"]._modules[adapter](x)
    return dropped


def _folds(layer: Any, adapter: str, x: Tensor | None = None) -> bool:
    a, b = parameter(layer, "hira_A", adapter), parameter(layer, "hira_B", adapter)
    dropout = layer._modules["hira_dropout"]._modules[adapter]
    return not drops(dropout) and not is_hooked(dropout) and foldable(layer, x, a, b)


def _warm_linear(layer: Any, adapter: str) -> object:
    fold = not layer.fan_in_fan_out and _folds(layer, adapter)
    return _linear_total(layer, adapter) if fold else _linear_weight(layer, adapter)


# Convolutions


@cached("HiRA weight", adapter="adapter", depends_on=_depends_on)
def _conv_weight(layer: Any, adapter: str) -> Tensor:
    """Derive what the adapter adds to W; (out, in, ...).

    What PEFT's ``get_delta_weight`` returns, without its setting the parameters to copies of
    themselves (in half precision on CPUs).
    """
    a, b = layer.hira_A[adapter], layer.hira_B[adapter]
    dtype = a.dtype
    widened = b.device.type == "cpu" and dtype in {torch.float16, torch.bfloat16}
    if widened:
        a, b = a.float(), b.float()
    base: Any = base_layer(layer)
    weight: Tensor = base.weight
    if weight.size()[2:4] == (1, 1):
        product = (b.squeeze(3).squeeze(2) @ a.squeeze(3).squeeze(2)).unsqueeze(2).unsqueeze(3)
    else:
        product = layer.conv_fn(a.transpose(0, 1), b).transpose(0, 1)
    if widened:
        product = product.to(dtype=dtype)
    return weight * product


@cached("HiRA weight, folded", adapter="adapter", depends_on=_depends_on)
def _conv_total(layer: Any, adapter: str) -> Tensor:
    """Derive W and what the adapter adds to it; (out, in, ...)."""
    base: Any = base_layer(layer)
    weight: Tensor = base.weight
    return weight + _conv_weight.__wrapped__(layer, adapter)


_CONVOLUTIONS = ((nn.Conv1d, F.conv1d), (nn.Conv2d, F.conv2d), (nn.Conv3d, F.conv3d))


def _conv(layer: Any, x: Tensor) -> Tensor:
    base = require_dense(layer)
    convolve = next((function for kind, function in _CONVOLUTIONS if isinstance(base, kind)), None)
    if convolve is None:
        msg = f"a {type(base).__name__} is no convolution"
        raise UnusualError(msg)
    adapters = active_in(layer, "hira_A")
    result = layer.base_layer(x)
    dtype = result.dtype
    for adapter in adapters:
        x = layer._cast_input_dtype(x, parameter(layer, "hira_A", adapter).dtype)
        dropped = _dropped(layer, adapter, x)
        result = result + convolve(
            dropped,
            _conv_weight(layer, adapter),
            bias=None,
            stride=base.stride,
            padding=base.padding,
            dilation=base.dilation,
            groups=base.groups,
        )
    return result.to(dtype)


def _fast_conv(layer: Any, x: Tensor) -> Tensor:
    adapters = active_in(layer, "hira_A")
    if len(adapters) != 1 or not _folds(layer, adapters[0], x):
        return _conv(layer, x)
    base: Any = base_layer(layer)
    y: Tensor = base._conv_forward(x, _conv_total(layer, adapters[0]), base.bias)
    return y


def _warm_conv(layer: Any, adapter: str) -> object:
    fold = _folds(layer, adapter)
    return _conv_total(layer, adapter) if fold else _conv_weight(layer, adapter)


# Embeddings


def _embedding_depends_on(layer: Any, adapter: str) -> Iterator[object]:
    yield parameter(layer, "hira_embedding_A", adapter)
    yield parameter(layer, "hira_embedding_B", adapter)
    yield from weights_of(base_layer(layer))


@cached("HiRA weight", adapter="adapter", depends_on=_embedding_depends_on)
def _embedding_weight(layer: Any, adapter: str) -> Tensor:
    """Derive what the adapter adds to W; (embeddings, features)."""
    product = torch.mm(layer.hira_embedding_B[adapter], layer.hira_embedding_A[adapter])
    base: Any = base_layer(layer)
    weight: Tensor = base.weight
    return weight * product.T


def _embedding(layer: Any, x: Tensor) -> Tensor:
    require_dense(layer)
    adapters = active_in(layer, "hira_embedding_A")
    result = layer.base_layer(x)
    dtype = result.dtype
    for adapter in adapters:
        result = result + F.embedding(x, _embedding_weight(layer, adapter))
    return result.to(dtype)


@cached(
    "HiRA rows",
    adapter="adapter",
    depends_on=lambda layer, adapter: (parameter(layer, "hira_embedding_A", adapter),),
)
def _rows(layer: Any, adapter: str) -> Tensor:
    """Derive ``A`` with a row for each embedding; (embeddings, r). Columns are slow to look up."""
    a: Tensor = layer.hira_embedding_A[adapter]
    return a.T.contiguous()


def _fast_embedding(layer: Any, x: Tensor) -> Tensor:
    base = require_dense(layer)
    adapters = active_in(layer, "hira_embedding_A")
    factors = [parameter(layer, "hira_embedding_B", adapter) for adapter in adapters]
    result = layer.base_layer(x)
    dtype = result.dtype
    weight = base._parameters["weight"]
    for adapter, b in zip(adapters, factors, strict=True):
        factor = F.linear(F.embedding(x, _rows(layer, adapter)), b)
        result = result + F.embedding(x, weight) * factor
    return result.to(dtype)


def _config(inputs: int, outputs: int, **more: Any) -> HiraConfig:
    rank = 8 if min(inputs, outputs) >= 64 else 2  # noqa: PLR2004 - a usual one, or a small one
    return HiraConfig(r=rank, target_modules=TARGETS, init_weights=False, **more)


_conv1d = Base(
    "Conv1d",
    lambda inputs, outputs: nn.Conv1d(inputs, outputs, 3, padding=1),
    lambda inputs, tokens: torch.randn(1, inputs, tokens),
)
_pointwise = Base(
    "Conv2d, 1 x 1",
    lambda inputs, outputs: nn.Conv2d(inputs, outputs, 1, padding_mode="circular", padding=1),
    conv2d.sample,
)

_conv_hooks = [guard(_conv, warm=when_dense(_conv_weight))]
_fast_conv_hooks = [guard(_fast_conv, warm=when_dense(_warm_conv))]

RECIPE = LayerRecipe(
    name="HiRA",
    hooks={
        Linear: [guard(_linear, warm=when_dense(_linear_weight))],
        Embedding: [guard(_embedding, warm=when_dense(_embedding_weight))],
        Conv1d: _conv_hooks,
        Conv2d: _conv_hooks,
        Conv3d: _conv_hooks,
    },
    fast={
        Linear: [guard(_fast_linear, warm=when_dense(_warm_linear))],
        Embedding: [guard(_fast_embedding, warm=when_dense(_rows))],
        Conv1d: _fast_conv_hooks,
        Conv2d: _fast_conv_hooks,
        Conv3d: _fast_conv_hooks,
    },
    quantized={
        f"peft.tuners.hira.bnb:{name}": ON_QUANTIZED for name in ("Linear4bit", "Linear8bitLt")
    },
    adapters="r",
    relies_on={
        "peft.tuners.hira.layer:Linear.forward": "713765a6cc0f",
        "peft.tuners.hira.layer:Embedding.forward": "49d4eac5abc5",
        "peft.tuners.hira.layer:_ConvNd.forward": "f9142e921be7",
        "peft.tuners.hira.layer:_ConvNd.get_delta_weight": "dab34603ea3f",
    },
    examples=[
        Example("HiRA", _config, numerics=BOTH),
        Example("HiRA, Embedding", _config, embedding, numerics=BOTH),
        Example("HiRA, Conv2d", _config, conv2d, numerics=BOTH),
        Example("HiRA, Conv2d, 1 x 1", _config, _pointwise),
        Example("HiRA, Conv1d", _config, _conv1d),
    ],
)
