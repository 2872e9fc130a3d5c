"""DoRA's elementwise arithmetic in one CUDA kernel, written in Triton; without Triton, none.

Between the matrix products, a DoRA layer multiplies and adds elementwise. As separate operations
that is six launches, and as many trips to memory. The kernel rounds after each operation as they
do, so its result is theirs to the bit.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

__all__ = ["combine", "combine_fast", "usable"]

_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
_BLOCK = 1024
_broken = False


def usable(result: Tensor, delta: Tensor) -> bool:
    """Whether the kernels take these tensors, as far as the layer's weights do not matter.

    Args:
        result: what the base layer returned, shape (..., out).
        delta: what the adapter's two factors returned, of the same shape.
    """
    return (
        result.is_cuda
        and result.dtype in _DTYPES
        and delta.dtype in _DTYPES
        and result.dim() > 1
        and result.shape == delta.shape
        and result.numel() > 0
        and result.is_contiguous()
        and delta.is_contiguous()
        and result.get_device() == torch._C._cuda_getDevice()
        and not _broken
        and _kernels() is not None
    )


def combine(
    result: Tensor,
    delta: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    scaling: float,
    dtype: torch.dtype | None = None,
) -> Tensor | None:
    """Return ``result + ((scale - 1) * (result - bias) + scale * delta * scaling)``.

    Args:
        result: shape (..., out), see :func:`usable`.
        delta: the same shape.
        scale: out elements, float32, bfloat16 or float16.
        bias: out elements of such a dtype, or None.
        scaling: a number.
        dtype: what the sum is converted to in the end; by default it is left as it comes.

    Returns:
        Equal to the bit to what the operations of PyTorch return one by one; None if the kernel
        cannot run.
    """
    if scale.dtype not in _DTYPES or not (bias is None or bias.dtype in _DTYPES):
        return None
    based = result.dtype if bias is None else torch.promote_types(result.dtype, bias.dtype)
    changed = torch.promote_types(scale.dtype, based)
    added = torch.promote_types(scale.dtype, delta.dtype)
    total = torch.promote_types(changed, added)
    final = torch.promote_types(result.dtype, total)
    dtypes = _names(scale.dtype, based, changed, added, total, final)
    output = torch.empty_like(result, dtype=dtype or final)
    return _launch("combine", output, result, delta, scale, bias, scaling, *dtypes)


def combine_fast(
    result: Tensor,
    delta: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    scaling: float,
    dtype: torch.dtype | None = None,
) -> Tensor | None:
    """Return ``scale * (result + scaling * delta) + shift``, accumulated in float32.

    Args:
        result: shape (..., out), see :func:`usable`.
        delta: the same shape.
        scale: out elements, float32.
        shift: likewise, or None.
        scaling: a number.
        dtype: of the sum; by default float32.

    Returns:
        The sum; None if the kernel cannot run.
    """
    if scale.dtype is not torch.float32:
        return None
    output = torch.empty_like(result, dtype=dtype or torch.float32)
    return _launch("combine_fast", output, result, delta, scale, shift, scaling)


def _launch(
    name: str,
    output: Tensor,
    result: Tensor,
    delta: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    scaling: float,
    *dtypes: str,
) -> Tensor | None:
    global _broken  # noqa: PLW0603 - for the whole process: the next launch would fail as well
    columns = result.shape[-1]
    try:
        getattr(_kernels(), name)[result.numel() // columns, -(-columns // _BLOCK)](
            result,
            delta,
            scale,
            result if bias is None else bias,
            output,
            columns,
            float(scaling),
            bias is not None,
            *dtypes,
            _BLOCK,
            num_warps=4,
            enable_fp_fusion=False,  # a fused multiply-add rounds once, not twice
        )
    except Exception:  # noqa: BLE001 - Triton compiles at the first launch, and needs a compiler
        _broken = True
        return None
    return output


@functools.cache
def _names(*dtypes: torch.dtype) -> tuple[str, ...]:
    short = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    return tuple(short[dtype] for dtype in dtypes)


@functools.cache
def _kernels() -> Any:
    """Import the kernels; None where Triton is not there or does not know the device."""
    try:
        if not torch.cuda.is_available() or torch.version.hip:
            return None
        from dora_cache.recipes import triton_kernels
    except Exception:  # noqa: BLE001 - whatever is wrong with Triton, PyTorch's operations do
        return None
    return triton_kernels
