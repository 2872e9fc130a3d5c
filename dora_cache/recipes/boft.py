"""BOFT (https://arxiv.org/abs/2311.06243): each layer's rotation, by butterflies of blocks.

PEFT makes of it a dense matrix of the inputs' size. Under ``numerics="fast"`` linear layers store
its blocks instead, where it is block-diagonal: that is with one factor, which is all there is
without PEFT's CUDA extension. Convolutions store the rotated weight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from peft import BOFTConfig
from peft.tuners.boft.layer import Conv2d, FastBlockDiag, Linear
from torch import Tensor, nn

from dora_cache.core.decorator import cached
from dora_cache.reasons import Reason
from dora_cache.recipes.bases import dense_base, require_dense
from dora_cache.recipes.blocks import rotate
from dora_cache.recipes.examples import BOTH, TARGETS, Example, conv2d
from dora_cache.recipes.hooks import (
    LayerRecipe,
    UnusualError,
    active_in,
    check_unhooked,
    guard,
    parameter,
)
from dora_cache.recipes.peft_layers import base_layer, drops, weights_of

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["RECIPE"]


def _depends_on(
    layer: Any, dtype: torch.dtype, device: torch.device, *adapters: str
) -> list[object]:
    del dtype, device
    state = layer.__dict__
    found = [
        state["_buffers"]["boft_P"],
        state["fbd_cuda_available"],
        state["in_features"],
        state["out_features"],
    ]
    for adapter in adapters:
        found.append(parameter(layer, "boft_R", adapter))
        found.append(parameter(layer, "boft_s", adapter))
    return found


def _usual(layer: Any) -> Sequence[str]:
    """Return the active adapters.

    Raises:
        UnusualError: one of them drops blocks, or has a hook where it might.
    """
    adapters = active_in(layer, "boft_R")
    dropouts = layer._modules["boft_dropout"]._modules
    for adapter in adapters:
        check_unhooked(dropouts[adapter])
        if drops(dropouts[adapter]):
            msg = "a dropout drops"
            raise UnusualError(msg, Reason.DROPOUT)
    return adapters


# PEFT's values, by its operations


def _matrix(layer: Any, adapter: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Derive one adapter's rotation; shape (n, n), with n = inputs * kernel size."""
    factors, count, size, _ = layer.boft_R[adapter].shape
    blocks = layer.cayley_batch(layer.boft_R[adapter].view(factors * count, size, size))
    blocks = layer.boft_dropout[adapter](blocks.view(factors, count, size, size))
    if layer.fbd_cuda_available:
        diagonal = FastBlockDiag.apply(blocks)
    else:
        parts = torch.unbind(blocks.squeeze(0))
        diagonal = torch.block_diag(*parts).unsqueeze(0)  # type: ignore[no-untyped-call]
    permutation = layer.boft_P.to(device, dtype)
    products = torch.bmm(diagonal.to(device, dtype), permutation.permute(0, 2, 1))
    products = torch.bmm(permutation, products)
    matrix: Tensor = products[0]
    for index in range(1, products.shape[0]):
        matrix = products[index] @ matrix
    return matrix


def _product(
    layer: Any, inputs: int, dtype: torch.dtype, device: torch.device, adapters: Sequence[str]
) -> Tensor:
    """Derive the rotation of several adapters, one after the other; shape (inputs, inputs)."""
    rotation = torch.eye(inputs, device=device, dtype=dtype)
    for adapter in adapters:
        rotation = _matrix(layer, adapter, dtype, device) @ rotation
    return rotation


def _scales(
    layer: Any, dtype: torch.dtype, device: torch.device, adapters: Sequence[str]
) -> Tensor:
    """Derive the product of the adapters' scales; shape (outputs, 1)."""
    scale = torch.ones((int(layer.out_features), 1), device=device, dtype=dtype)
    for adapter in adapters:
        scale = layer.boft_s[adapter].reshape(-1, 1) * scale
    return scale


@cached("BOFT rotation", adapter="adapters", depends_on=_depends_on)
def _rotation(
    layer: Any, dtype: torch.dtype, device: torch.device, *adapters: str
) -> tuple[Tensor, Tensor]:
    """Derive the rotation and the scale of a linear layer; (inputs, inputs) and (outputs,)."""
    rotation = _product(layer, layer.in_features, dtype, device, adapters)
    return rotation.to(dtype), _scales(layer, dtype, device, adapters).squeeze(-1)


def _linear(layer: Any, x: Tensor) -> Tensor | None:
    adapters = _usual(layer)
    if not adapters:
        return None
    rotation, scale = _rotation(layer, x.dtype, x.device, *adapters)
    result = layer.base_layer(x @ rotation)
    bias = layer.base_layer.bias
    if bias is not None:
        result = result - bias
    result = result * scale
    if bias is not None:
        result = result + bias
    return result.to(x.dtype)


def _weight_depends_on(
    layer: Any, dtype: torch.dtype, device: torch.device, *adapters: str
) -> list[object]:
    found = _depends_on(layer, dtype, device, *adapters)
    found += weights_of(base_layer(layer))
    return found


@cached("BOFT weight", adapter="adapters", depends_on=_weight_depends_on)
def _weight(layer: Any, dtype: torch.dtype, device: torch.device, *adapters: str) -> Tensor:
    """Derive a convolution's rotated and scaled weight, of the base weight's shape."""
    base = layer.base_layer
    size: int = base.kernel_size[0]
    flat = layer.in_features * size * size
    rotation = _product(layer, flat, dtype, device, adapters)
    weight = base.weight.data.view(layer.out_features, flat)
    weight = torch.mm(rotation, weight.transpose(0, 1)).transpose(0, 1)
    weight = weight * _scales(layer, dtype, device, adapters)
    return weight.view(layer.out_features, layer.in_features, size, size)


def _conv(layer: Any, x: Tensor) -> Tensor | None:
    adapters = _usual(layer)
    if not adapters:
        return None
    base = layer.base_layer
    if not _is_just(layer, nn.Conv2d):
        require_dense(layer)
        msg = f"the base layer is a {type(base).__name__}"
        raise UnusualError(msg)
    if x.dtype is not base.weight.dtype:
        msg = f"an input of {x.dtype}"
        raise UnusualError(msg, Reason.UNUSUAL_INPUT)
    weight = _weight(layer, x.dtype, x.device, *adapters)
    result = nn.functional.conv2d(
        layer._cast_input_dtype(x, weight.dtype),
        weight,
        layer._cast_input_dtype(base.bias, weight.dtype),
        padding=base.padding[0],
        stride=base.stride[0],
    )
    return result.to(x.dtype)


def _is_just(layer: Any, kind: type) -> bool:
    base = layer.base_layer
    return type(base) is kind and dense_base(layer) is base


# numerics="fast": the blocks alone


def _fast_depends_on(
    layer: Any, dtype: torch.dtype, device: torch.device, *adapters: str
) -> list[object]:
    found = _depends_on(layer, dtype, device, *adapters)
    found.append(layer._modules["base_layer"].bias)
    return found


@cached("BOFT blocks", adapter="adapters", depends_on=_fast_depends_on)
def _blocks(
    layer: Any, dtype: torch.dtype, device: torch.device, *adapters: str
) -> tuple[Tensor, ...]:
    """Derive each adapter's rotation, their scale ``s`` and, with a bias, ``(1 - s) * bias``.

    Returns:
        For each adapter blocks (count, size, size), or a matrix (inputs, inputs) where it is not
        block-diagonal; then ``s``, (outputs,); and ``(1 - s) * bias``, if there is a bias.
    """
    with torch.autocast(device.type, enabled=False):
        rotations = [_rotation_of(layer, adapter, dtype, device) for adapter in adapters]
        scale = _scales(layer, dtype, device, adapters).squeeze(-1)
        bias = layer.base_layer.bias
        shift = () if bias is None else ((1 - scale) * bias,)
        return (*rotations, scale, *shift)


def _rotation_of(layer: Any, adapter: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    raw, permutation = layer.boft_R[adapter], layer.boft_P
    identity = torch.eye(layer.in_features, dtype=permutation.dtype, device=permutation.device)
    if raw.shape[0] == len(permutation) == 1 and torch.equal(permutation[0], identity):
        blocks: Tensor = layer.cayley_batch(raw[0]).to(device, dtype)
        return blocks
    return _matrix(layer, adapter, dtype, device)


def _fast_linear(layer: Any, x: Tensor) -> Tensor | None:
    adapters = _usual(layer)
    if not adapters:
        return None
    values = _blocks(layer, x.dtype, x.device, *adapters)
    count = len(adapters)
    rotated = x
    for rotation in reversed(values[:count]):  # the last of them comes first after the input
        if rotation.dim() == 3:  # noqa: PLR2004
            rotated = rotate(rotated, rotation, rotation.shape[0])
        else:
            rotated = rotated @ rotation
    result = layer.base_layer(rotated)
    scale, *shift = values[count:]
    result = torch.addcmul(shift[0], result, scale) if shift else result * scale
    return result.to(x.dtype)


def _like_base(layer: Any) -> tuple[torch.dtype, torch.device]:
    """Return the dtype and device that inputs most often have."""
    weight = next(base_layer(layer).parameters())
    return weight.dtype, weight.device


_hook = guard(_linear, warm=lambda layer, adapter: _rotation(layer, *_like_base(layer), adapter))
_fast_hook = guard(
    _fast_linear, warm=lambda layer, adapter: _blocks(layer, *_like_base(layer), adapter)
)


def _warm_conv(layer: Any, adapter: str) -> object:
    if _is_just(layer, nn.Conv2d):
        return _weight(layer, *_like_base(layer), adapter)
    return None


def _config(size: int, **more: Any) -> BOFTConfig:
    return BOFTConfig(
        boft_block_size=8 if size % 8 == 0 else 4,
        init_weights=False,
        target_modules=TARGETS,
        **more,
    )


RECIPE = LayerRecipe(
    name="BOFT",
    hooks={Linear: [_hook], Conv2d: [guard(_conv, warm=_warm_conv)]},
    fast={Linear: [_fast_hook]},
    adapters="boft_R",
    relies_on={
        "peft.tuners.boft.layer:Linear.forward": "9eeb2e5f8c8a",
        "peft.tuners.boft.layer:Conv2d.forward": "7404c3b1d1f4",
        "peft.tuners.boft.layer:BOFTLayer.cayley_batch": "7fb56ea95947",
        "peft.tuners.boft.layer:FastBlockDiag.forward": "0cfd20e0e8c8",
        "peft.tuners.boft.layer:MultiplicativeDropoutLayer.forward": "fb0ccc26c0e9",
        "peft.tuners.tuners_utils:BaseTunerLayer._cast_input_dtype": "88774c6f1321",
    },
    examples=[
        Example("BOFT", lambda inputs, _: _config(inputs, boft_dropout=0.1), numerics=BOTH),
        Example("BOFT, Conv2d", lambda inputs, _: _config(inputs), conv2d),
    ],
)
