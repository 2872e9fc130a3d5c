"""What DoRA does beside the base layer, in CUDA kernels written in Triton; without Triton, none.

Between the matrix products, a DoRA layer multiplies and adds elementwise. As separate operations
that is six launches, and as many trips to memory. One kernel rounds after each operation as they
do, so its result is theirs to the bit. Others are for ``numerics="fast"``.
"""

from __future__ import annotations

import functools
import operator
import warnings
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from dora_cache.errors import CacheWarning
from dora_cache.triton_launch import launch

__all__ = ["adapted", "combine", "combine_fast", "norms", "usable"]

_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
_BLOCK = 1024
_FEW_ROWS = 32
_LARGEST_RANK = 256
_LARGEST_RANK_OF_NORMS = 64
_ROWS_AT_ONCE = 16
_broken: set[str] = set()


def usable(result: Tensor, other: Tensor) -> bool:
    """Whether the kernels take these tensors, as far as the layer's weights do not matter.

    Args:
        result: what the base layer returned, shape (..., out).
        other: what the adapter's two factors returned, of as many elements; or their input.
    """
    return (
        result.is_cuda
        # Whoever records operations does not see a launch.
        and torch._C._get_tracing_state() is None
        and not torch._C._len_torch_dispatch_stack()
        and type(result) in {Tensor, nn.Parameter}
        and result.dtype in _DTYPES
        and other.dtype in _DTYPES
        and result.dim() > 1
        and result.numel() > 0
        and result.is_contiguous()
        and other.is_contiguous()
        and result.get_device() == torch._C._cuda_getDevice()
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
        delta: the same shape, or (rows, out).
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
    return _combined("combine", output, result, delta, scale, bias, scaling, names)


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
        delta: the same shape, or (rows, out).
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
    return _combined("combine_fast", output, result, delta, scale, shift, scaling, ())


def adapted(
    x: Tensor,
    result: Tensor,
    first: Tensor,
    last: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    scaling: float,
) -> Tensor | None:
    """Return ``scale * (result + scaling * (x @ first.T @ last.T)) + shift`` for a few rows.

    So few that reading the factors is all the work: as in the decoding of some sequences. All is
    accumulated in float32.

    Args:
        x: shape (..., in), float32, bfloat16 or float16.
        result: shape (..., out), see :func:`usable`.
        first: shape (rank, in), of such a dtype.
        last: shape (out, rank), likewise.
        scale: out elements, float32.
        shift: likewise, or None.
        scaling: a number.

    Returns:
        The sum in the dtype of ``result``; None where the kernels cannot run or would not pay.
    """
    columns, (rank, width) = result.shape[-1], first.shape
    rows = result.numel() // columns
    if not (
        rows <= _FEW_ROWS
        and rank <= _LARGEST_RANK
        and x.dtype in _DTYPES
        and first.dtype in _DTYPES
        and last.dtype in _DTYPES
        and scale.dtype is torch.float32
        and x.numel() == rows * width
        and last.shape == (columns, rank)
        and x.is_contiguous()
        and first.is_contiguous()
        and last.is_contiguous()
        and x.get_device() == first.get_device() == result.get_device()
    ):
        return None
    projected = torch.empty(rows, rank, dtype=torch.float32, device=x.device)
    if not _launch("project", (rows, rank), (x, first, projected), (width, rank), (), (_BLOCK,)):
        return None
    output = torch.empty_like(result)
    ranks = 1 << (rank - 1).bit_length()
    block = max(16, 4096 // ranks)
    done = _launch(
        "expand",
        (rows, -(-columns // block)),
        (result, projected, last, scale, result if shift is None else shift, output),
        (columns, rank),
        (float(scaling),),
        (shift is not None, ranks, block),
    )
    return output if done else None


def norms(weight: Tensor, first: Tensor, last: Tensor, scaling: float) -> Tensor | None:
    """Return the norms of the rows of ``weight + scaling * (last @ first)``, in one pass over them.

    The sum itself is never in memory. It is accumulated in float32, as its squares are.

    Args:
        weight: shape (out, in), float32, bfloat16 or float16.
        first: shape (rank, in), of such a dtype.
        last: shape (out, rank), likewise.
        scaling: a number.

    Returns:
        Shape (out,), float32; None where the kernel cannot run.
    """
    (rows, columns), rank = weight.shape, first.shape[0]
    if not (
        usable(weight, first)
        and last.dtype in _DTYPES
        and last.is_contiguous()
        and weight.get_device() == first.get_device() == last.get_device()
        and first.shape == (rank, columns)
        and last.shape == (rows, rank)
        and 0 < rank <= _LARGEST_RANK_OF_NORMS
    ):
        return None
    output = torch.empty(rows, dtype=torch.float32, device=weight.device)
    ranks = max(16, 1 << (rank - 1).bit_length())
    done = _launch(
        "norms",
        (-(-rows // _ROWS_AT_ONCE), 1),
        (weight, first, last, output),
        (rows, columns, rank),
        (float(scaling),),
        (ranks, _ROWS_AT_ONCE, 4096 // ranks),
    )
    return output if done else None


def _combined(
    name: str,
    output: Tensor,
    result: Tensor,
    delta: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    scaling: float,
    names: tuple[str, ...],
) -> Tensor | None:
    if delta.numel() != result.numel():  # the kernels do not broadcast
        return None
    columns = result.shape[-1]
    done = _launch(
        name,
        (result.numel() // columns, -(-columns // _BLOCK)),
        (result, delta, scale, result if bias is None else bias, output),
        (columns,),
        (float(scaling),),
        (bias is not None, *names, _BLOCK),
    )
    return output if done else None


def _launch(
    name: str,
    grid: tuple[int, int],
    tensors: tuple[Tensor, ...],
    sizes: tuple[int, ...],
    scalings: tuple[float, ...],
    constants: tuple[object, ...],
) -> bool:
    """Launch a kernel; return whether it was, else it will not be any more."""
    if name in _broken:
        return False
    key, device = None, tensors[0].get_device()
    if not functools.reduce(operator.or_, [tensor.data_ptr() for tensor in tensors]) % 16:
        key = (name, device, sizes, constants, *[one.dtype for one in tensors])
    try:
        kernel = getattr(_kernels(), name)
        launch(kernel, grid, tensors, (*sizes, *scalings), constants, key=key, device=device)
    except Exception as error:  # noqa: BLE001 - it compiles at the first launch, with a compiler
        _broken.add(name)  # for the whole process: the next launch would fail as well
        kind = type(error).__name__
        text = f"Triton kernel {name!r} failed, so PyTorch's operations run: {kind}: {error}"
        with suppress(CacheWarning):  # never an error, whatever the filters
            warnings.warn(text, CacheWarning, stacklevel=2)
        return False
    return True


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
        from dora_cache.recipes.dora import triton_kernels
    except Exception:  # noqa: BLE001 - whatever is wrong with Triton, PyTorch's operations do
        return None
    return triton_kernels
