"""C3A (https://arxiv.org/abs/2407.19342): the Fourier transforms of each layer's kernels.

Under ``numerics="fast"``, of their real form, laid out for the product; inputs and kernels are real
numbers, whose transforms are known by half of their coefficients.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from peft import C3AConfig
from peft.tuners.c3a.layer import C3ALinear
from torch import Tensor
from torch.fft import fft, ifft, irfft, rfft

from dora_cache.core.decorator import cached
from dora_cache.reasons import Reason
from dora_cache.recipes.examples import BOTH, TARGETS, Example
from dora_cache.recipes.hooks import LayerRecipe, UnusualError, active_in, guard, parameter

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["RECIPE"]


def _depends_on(layer: Any, adapter: str) -> tuple[object, ...]:
    return (parameter(layer, "c3a_kernel", adapter),)


@cached("C3A kernel", adapter="adapter", depends_on=_depends_on)
def _transformed(layer: Any, adapter: str) -> Tensor:
    """Derive the kernels' transform; (out / block, in / block, block), complex."""
    return fft(layer.c3a_kernel[adapter].to(torch.float32))


@cached("C3A kernel, fast", adapter="adapter", depends_on=_depends_on)
def _halved(layer: Any, adapter: str) -> Tensor:
    """Derive what multiplies the transform of a real input.

    Returns:
        (block / 2 + 1, in / block, out / block), complex; PEFT's division by the number of inputs
        is in it.
    """
    kernel = layer.c3a_kernel[adapter].to(torch.float32)
    inputs = kernel.shape[1] * kernel.shape[2]
    return (rfft(kernel).conj() / inputs).permute(2, 1, 0).contiguous().resolve_conj()


def _convolved(layer: Any, adapter: str, x: Tensor) -> Tensor:
    """Return PEFT's convolution of ``x`` (..., in), by its very operations."""
    transformed = _transformed(layer, adapter)
    _, count, block = transformed.shape
    y = x.reshape(*x.shape[:-1], count, block)
    y = torch.einsum("...nb,mnb->...mb", ifft(y), transformed)
    y = fft(y).real
    return y.reshape(*y.shape[:-2], -1) / x.size(-1)


def _fast_convolved(layer: Any, adapter: str, x: Tensor) -> Tensor:
    halved = _halved(layer, adapter)
    half, count, _ = halved.shape
    block = parameter(layer, "c3a_kernel", adapter).shape[2]
    shape = x.shape[:-1]
    y = rfft(x.reshape(*shape, count, block)).reshape(math.prod(shape), count, half)
    y = torch.bmm(y.permute(2, 0, 1), halved).permute(1, 2, 0)
    y = irfft(y, n=block)
    return y.reshape(*shape, y.shape[1] * block)


def _forward(convolve: Callable[[Any, str, Tensor], Tensor]) -> Callable[[Any, Any], Tensor | None]:
    def forward(layer: Any, x: Any) -> Tensor | None:
        if torch.is_grad_enabled() and x.requires_grad:
            msg = "PEFT has a backward of its own, which is another than autograd's"
            raise UnusualError(msg, Reason.GRADIENTS)
        adapters = active_in(layer, "c3a_kernel")
        result: Tensor = layer.base_layer(x)
        dtype = x.dtype
        x = x.to(torch.float32)
        for adapter in adapters:
            x = convolve(layer, adapter, x)  # each adapter gets what the one before it returned
            result += x.to(result.dtype)
        return result.to(dtype)

    return forward


RECIPE = LayerRecipe(
    name="C3A",
    hooks={C3ALinear: [guard(_forward(_convolved), warm=_transformed)]},
    fast={C3ALinear: [guard(_forward(_fast_convolved), warm=_halved)]},
    adapters="c3a_kernel",
    relies_on={
        "peft.tuners.c3a.layer:C3ALinear.forward": "a23d97b24ce7",
        "peft.tuners.c3a.utils:BlockCircularConvolution.forward": "93dba4d8ea5b",
    },
    examples=[
        Example(
            "C3A",
            lambda inputs, outputs: C3AConfig(
                block_size=math.gcd(inputs, outputs, 256),
                target_modules=TARGETS,
                init_weights=False,
            ),
            numerics=BOTH,
        )
    ],
)
