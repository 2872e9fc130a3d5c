"""HRA (https://arxiv.org/abs/2405.17484): the base weight times a product of reflections.

PEFT makes a dense weight of them. Under ``numerics="fast"`` linear layers reflect the input
instead: a product of r reflections is ``I - U T U^T``, with the unit vectors as the columns of U
and a triangular T (the compact WY form, https://doi.org/10.1137/0910005).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from peft import HRAConfig
from peft.tuners.hra.layer import HRAConv2d, HRALinear
from torch import Tensor, nn
from torch.nn.functional import conv2d as convolve
from torch.nn.functional import linear

from dora_cache.core.decorator import cached
from dora_cache.recipes.bases import dense_base, require_dense
from dora_cache.recipes.examples import BOTH, TARGETS, Example, conv2d
from dora_cache.recipes.hooks import LayerRecipe, UnusualError, active_in, guard, parameter

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["RECIPE"]


def _vectors(layer: Any, adapter: str) -> tuple[object, ...]:
    state = layer.__dict__
    return (
        parameter(layer, "hra_u", adapter),
        state["hra_r"][adapter],
        state["hra_apply_GS"][adapter],
    )


def _depends_on(layer: Any, device: torch.device, *adapters: str) -> list[object]:
    del device
    found = [
        layer._modules["base_layer"]._parameters["weight"],
        layer.__dict__.get("cast_input_dtype_enabled"),
        layer.in_features,
        layer.out_features,
    ]
    for adapter in adapters:
        found += _vectors(layer, adapter)
    return found


@cached("HRA weight", adapter="adapters", depends_on=_depends_on)
def _weight(layer: Any, device: torch.device, *adapters: str) -> Tensor:
    """Derive the weight times the adapters' reflections, by PEFT's operations.

    Returns:
        It, of the base weight's shape and the adapters' dtype.
    """
    weight = layer.base_layer.weight.data
    shape, inputs = weight.shape, layer.in_features
    if weight.dim() > 2:  # noqa: PLR2004 - a convolution's
        inputs *= layer.base_layer.kernel_size[0] ** 2
        weight = weight.view(layer.out_features, inputs)
    product = torch.eye(inputs, device=device)
    for adapter in adapters:
        reflections = layer.get_delta_weight(adapter)
        product = torch.mm(product.to(reflections.dtype), reflections)
    weight = layer._cast_input_dtype(weight, product.dtype)
    return torch.mm(weight, product).view(shape)


def _usual(layer: Any, kind: type) -> Sequence[str]:
    """Return the active adapters.

    Raises:
        UnusualError: the base layer is another one, or its weight is no ordinary parameter.
    """
    if not _is_just(layer, kind):
        require_dense(layer)
        msg = f"the base layer is a {type(layer.base_layer).__name__}"
        raise UnusualError(msg)
    return active_in(layer, "hra_u")


def _is_just(layer: Any, kind: type) -> bool:
    base = layer.base_layer
    return type(base) is kind and dense_base(layer) is base


def _input(layer: Any, x: Tensor, weight: Tensor) -> Tensor:
    if layer.cast_input_dtype_enabled:
        return x.to(weight.dtype)
    return x.to(layer.base_layer.weight.dtype)


def _linear(layer: Any, x: Tensor) -> Tensor | None:
    adapters = _usual(layer, nn.Linear)
    if not adapters:
        return None
    weight = _weight(layer, x.device, *adapters)
    bias = layer._cast_input_dtype(layer.base_layer.bias, weight.dtype)
    return linear(_input(layer, x, weight), weight, bias).to(x.dtype)


def _conv(layer: Any, x: Tensor) -> Tensor | None:
    adapters = _usual(layer, nn.Conv2d)
    if not adapters:
        return None
    weight = _weight(layer, x.device, *adapters)
    base = layer.base_layer
    bias = layer._cast_input_dtype(base.bias, weight.dtype)
    inputs = _input(layer, x, weight)
    result = convolve(inputs, weight, bias, padding=base.padding[0], stride=base.stride[0])
    return result.to(x.dtype)


# numerics="fast": the reflections alone


@cached("HRA reflections", adapter="adapter", depends_on=_vectors)
def _reflections(layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
    """Derive ``R`` and ``L`` with ``I + R^T L^T`` the product of the reflections, transposed.

    Returns:
        Shapes (r, inputs) and (inputs, r), of the adapter's dtype.
    """
    vectors, rank = layer.hra_u[adapter], layer.hra_r[adapter]
    with torch.autocast(vectors.device.type, enabled=False):
        if layer.hra_apply_GS[adapter]:  # the product is I - 2 U U^T
            units = _orthonormal(vectors, rank)
            return units.T.contiguous(), -2 * units
        dtype = torch.promote_types(vectors.dtype, torch.float32)
        units = vectors[:, :rank].to(dtype)
        units = units / units.norm(dim=0)
        inverse = torch.triu(units.T @ units, 1) + torch.eye(rank).to(units) / 2
        left = torch.linalg.solve_triangular(inverse, units, upper=True, left=False)
        return units.T.contiguous().to(vectors.dtype), -left.to(vectors.dtype)


def _orthonormal(vectors: Tensor, rank: int) -> Tensor:
    """Return PEFT's Gram-Schmidt vectors, to the bit: where they are noise, they are its noise."""
    units: list[Tensor] = []
    for index in range(rank):
        vector = vectors[:, index].view(-1, 1)
        for unit in units:
            vector = vector - (unit.t() @ vector) * unit
        units.append((vector / vector.norm()).view(-1, 1))
    return torch.cat(units, dim=1)


def _fast_linear(layer: Any, x: Tensor) -> Tensor | None:
    adapters = _usual(layer, nn.Linear)
    if not (adapters and _is_narrow(layer, x.dtype, adapters)):
        return _linear(layer, x)
    inputs = x
    for adapter in reversed(adapters):  # the last of them comes first after the input
        right, left = _reflections(layer, adapter)
        inputs = inputs.to(right.dtype)
        inputs = inputs + linear(linear(inputs, right), left)
    base = layer.base_layer
    return linear(inputs.to(x.dtype), base.weight, base.bias).to(x.dtype)


def _is_narrow(layer: Any, dtype: torch.dtype, adapters: Sequence[str]) -> bool:
    """Whether PEFT's result is no more precise than a product with the base weight as it is."""
    base = layer.base_layer
    return (
        layer.cast_input_dtype_enabled
        and dtype is base.weight.dtype
        and (base.bias is None or dtype is base.bias.dtype)
        # With fewer vectors than it expects, PEFT raises an error.
        and all(
            layer.hra_r[adapter] <= parameter(layer, "hra_u", adapter).shape[1]
            for adapter in adapters
        )
    )


def _warm(layer: Any, adapter: str) -> object:
    base = layer.base_layer
    if _is_just(layer, nn.Linear) or _is_just(layer, nn.Conv2d):
        return _weight(layer, base.weight.device, adapter)
    return None


def _config(inputs: int, outputs: int, **more: Any) -> HRAConfig:
    rank = 8 if min(inputs, outputs) >= 64 else 3  # noqa: PLR2004 - the default, or a small one
    return HRAConfig(r=rank, target_modules=TARGETS, init_weights=False, **more)


_hook = guard(_linear, warm=_warm)

RECIPE = LayerRecipe(
    name="HRA",
    hooks={HRALinear: [_hook], HRAConv2d: [guard(_conv, warm=_warm)]},
    fast={HRALinear: [guard(_fast_linear, warm=_reflections)]},
    adapters="hra_u",
    relies_on={
        "peft.tuners.hra.layer:HRALinear.get_delta_weight": "a11737a25704",
        "peft.tuners.hra.layer:HRAConv2d.get_delta_weight": "a11737a25704",
        "peft.tuners.hra.layer:HRALinear.forward": "48e6807a5b41",
        "peft.tuners.hra.layer:HRAConv2d.forward": "560288c9d108",
        "peft.tuners.tuners_utils:BaseTunerLayer._cast_input_dtype": "88774c6f1321",
    },
    examples=[
        Example("HRA", _config, numerics=BOTH),
        Example(
            "HRA, Gram-Schmidt",
            lambda inputs, outputs: _config(inputs, outputs, apply_GS=True),
            numerics=BOTH,
        ),
        Example("HRA, Conv2d", _config, conv2d),
    ],
)
