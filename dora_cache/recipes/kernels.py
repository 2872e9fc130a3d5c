"""DoRA's elementwise arithmetic in one CUDA kernel, written in Triton; without Triton, none.

Between the matrix products, a DoRA layer multiplies and adds elementwise. As separate operations
that is six launches, and as many trips to memory. The kernel rounds after each operation as they
do, so its result is theirs to the bit.
"""

from __future__ import annotations

import functools
import warnings
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from dora_cache.errors import CacheWarning

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
    plan = _plan(result.dtype, delta.dtype, scale.dtype, None if bias is None else bias.dtype)
    if plan is None:
        return None
    final, names = plan
    output = torch.empty_like(result, dtype=dtype or final)
    return _launch("combine", output, result, delta, scale, bias, scaling, names)


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
    return _launch("combine_fast", output, result, delta, scale, shift, scaling, ())


def _launch(
    name: str,
    output: Tensor,
    result: Tensor,
    delta: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    scaling: float,
    names: tuple[str, ...],
) -> Tensor | None:
    """Launch a kernel; at a tenth of Triton's own cost where one like it has been launched before.

    Triton compiles a kernel for each combination of dtypes, of what integers are divisible by, and
    of how pointers are aligned, and finds that out anew at each launch.
    """
    global _broken  # noqa: PLW0603 - for the whole process: the next launch would fail as well
    columns = result.shape[-1]
    grid = (result.numel() // columns, -(-columns // _BLOCK), 1)
    has_bias = bias is not None
    other = bias if bias is not None else result
    arguments = (result, delta, scale, other, output, columns, float(scaling), has_bias, *names)
    pointers = result.data_ptr() | delta.data_ptr() | scale.data_ptr() | other.data_ptr()
    key = None
    if not (pointers | output.data_ptr()) % 16:
        device, dtypes = result.get_device(), (result.dtype, delta.dtype, scale.dtype, other.dtype)
        key = (name, device, columns, dtypes, output.dtype, has_bias, names)
    try:
        known = _compiled.get(key)
        if known is not None:
            known[grid](*arguments, _BLOCK)
            return output
        compiled = getattr(_kernels(), name)[grid](
            *arguments,
            _BLOCK,
            num_warps=4,
            enable_fp_fusion=False,  # a fused multiply-add rounds once, not twice
        )
    except Exception as error:  # noqa: BLE001 - it compiles at the first launch, with a compiler
        _broken = True
        text = (
            f"a Triton kernel failed, so PyTorch's operations run: {type(error).__name__}: {error}"
        )
        with suppress(CacheWarning):  # never an error, whatever the filters
            warnings.warn(text, CacheWarning, stacklevel=2)
        return None
    if key is not None:
        _compiled[key] = compiled
    return output


_compiled: dict[Any, Any] = {}


@functools.cache
def _plan(
    result: torch.dtype, delta: torch.dtype, scale: torch.dtype, bias: torch.dtype | None
) -> tuple[torch.dtype, tuple[str, ...]] | None:
    """Return the dtype of the sum, and where the operations round to; None for other dtypes."""
    if scale not in _DTYPES or not (bias is None or bias in _DTYPES):
        return None
    based = result if bias is None else torch.promote_types(result, bias)
    changed = torch.promote_types(scale, based)
    added = torch.promote_types(scale, delta)
    total = torch.promote_types(changed, added)
    final = torch.promote_types(result, total)
    return final, _names(scale, based, changed, added, total, final)


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
