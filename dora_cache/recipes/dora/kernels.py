"""What DoRA does beside the base layer, in CUDA kernels written in Triton; without Triton, none.

Between the matrix products, a DoRA layer multiplies and adds elementwise. As separate operations
that is six launches, and as many trips to memory. One kernel rounds after each operation as they
do, so its result is theirs to the bit. Others are for ``numerics="fast"``.

What does not change from one launch of a layer to the next (constants, sizes, the compiled code) is
a :class:`Launch`, which a bound layer keeps.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from dora_cache.ambient import cuda_device, dispatch_modes, tracing_state
from dora_cache.triton_launch import Launcher

__all__ = [
    "FEW_ROWS",
    "FewRows",
    "Launch",
    "available",
    "combine",
    "combine_fast",
    "combiner",
    "fast_combiner",
    "few_rows",
    "norms",
    "usable",
]

FEW_ROWS = 32
"""The most rows for which :class:`FewRows` pays: reading the factors is all the work then."""

_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
_BLOCK = 1024
_LARGEST_RANK = 256
_LARGEST_RANK_OF_NORMS = 64
_ROWS_AT_ONCE = 16


class Launch(Launcher):
    """One kernel, for tensors of certain dtypes and sizes on one device.

    Args:
        name: of the kernel.
        device: index of the device.
        across: programs in the second dimension of the grid.
        sizes: integers.
        constants: values of its ``tl.constexpr`` parameters.
    """

    __slots__ = ()

    def __init__(
        self,
        name: str,
        device: int,
        across: int,
        sizes: tuple[int, ...],
        constants: tuple[object, ...],
    ) -> None:
        super().__init__(getattr(_kernels(), name), device, across, sizes, constants)


def available(device: torch.device, *dtypes: torch.dtype) -> bool:
    """Whether there are kernels for a device and these dtypes."""
    return device.type == "cuda" and _DTYPES.issuperset(dtypes) and _kernels() is not None


def usable(result: Tensor, other: Tensor) -> bool:
    """Whether the kernels take these tensors, as far as the layer's weights do not matter.

    Args:
        result: what the base layer returned, shape (..., out).
        other: what the adapter's two factors returned, of as many elements; or their input.
    """
    return (
        result.is_cuda
        # Whoever records operations does not see a launch.
        and tracing_state() is None
        and not dispatch_modes()
        and type(result) in {Tensor, nn.Parameter}
        and result.dtype in _DTYPES
        and other.dtype in _DTYPES
        and result.dim() > 1
        and result.numel() > 0
        and result.is_contiguous()
        and other.is_contiguous()
        and not (result.is_neg() or other.is_neg())  # kernels read memory as it is
        and result.get_device() == cuda_device()
        and _kernels() is not None
    )


def combine(
    result: Tensor, delta: Tensor, scale: Tensor, bias: Tensor | None, scaling: float
) -> Tensor | None:
    """Return ``result + ((scale - 1) * (result - bias) + scale * delta * scaling)``.

    Args:
        result: shape (..., out), see :func:`usable`.
        delta: the same shape, or (rows, out).
        scale: out elements, float32, bfloat16 or float16.
        bias: out elements of such a dtype, or None.
        scaling: a number.

    Returns:
        Equal to the bit to what the operations of PyTorch return one by one; None if the kernel
        cannot run.
    """
    columns = result.shape[-1]
    found = combiner(
        result.get_device(),
        columns,
        result.dtype,
        delta.dtype,
        scale.dtype,
        None if bias is None else bias.dtype,
    )
    if found is None:
        return None
    launch, dtype = found
    return _combined(launch, result, delta, scale, bias, scaling, dtype)


def combine_fast(
    result: Tensor, delta: Tensor, scale: Tensor, shift: Tensor | None, scaling: float
) -> Tensor | None:
    """Return ``scale * (result + scaling * delta) + shift``, accumulated in float32.

    Args:
        result: shape (..., out), see :func:`usable`.
        delta: the same shape, or (rows, out).
        scale: out elements, float32.
        shift: likewise, or None.
        scaling: a number.

    Returns:
        The sum, float32; None if the kernel cannot run.
    """
    if scale.dtype is not torch.float32:
        return None
    device, columns = result.get_device(), result.shape[-1]
    launch = fast_combiner(
        device, columns, result.dtype, delta.dtype, torch.float32, shift=shift is not None
    )
    return _combined(launch, result, delta, scale, shift, scaling, torch.float32)


def _combined(
    launch: Launch,
    result: Tensor,
    delta: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    scaling: float,
    dtype: torch.dtype,
) -> Tensor | None:
    columns = result.shape[-1]
    if delta.numel() != result.numel() or scale.numel() != columns:
        return None  # the kernels do not broadcast
    if bias is None:
        bias = result  # not read
    elif bias.numel() != columns or not bias.is_contiguous() or bias.is_neg():
        return None
    output = torch.empty_like(result, dtype=dtype)
    tensors = (result, delta, scale, bias, output)
    rows = result.numel() // columns
    return output if launch(rows, tensors, (float(scaling),)) else None


@functools.cache
def combiner(
    device: int,
    columns: int,
    result: torch.dtype,
    delta: torch.dtype,
    scale: torch.dtype,
    bias: torch.dtype | None,
    output: torch.dtype | None = None,
) -> tuple[Launch, torch.dtype] | None:
    """Return how to launch the kernel of :func:`combine`; None for dtypes that it does not take.

    Args:
        device: index of the device.
        columns: out.
        result: dtype; likewise the next three.
        delta: see :func:`combine`.
        scale: see :func:`combine`.
        bias: None: there is none.
        output: dtype of the sum; by default that of the operations' sum.

    Returns:
        The launch, with a row in each program of the first dimension, tensors ``result, delta,
        scale, bias, output`` (``result`` again where there is no bias; ``output`` may be
        ``result``), and the scaling as the one number; and the dtype of the output.
    """
    if scale not in _DTYPES or not (bias is None or bias in _DTYPES):
        return None
    based = result if bias is None else torch.promote_types(result, bias)
    changed = torch.promote_types(scale, based)
    added = torch.promote_types(scale, delta)
    total = torch.promote_types(changed, added)
    final = torch.promote_types(result, total)
    rounded = [_SHORT[dtype] for dtype in (scale, based, changed, added, total, final)]
    constants = (bias is not None, *rounded, _BLOCK)
    across = -(-columns // _BLOCK)
    return Launch("combine", device, across, (columns,), constants), output or final


@functools.cache
def fast_combiner(
    device: int,
    columns: int,
    result: torch.dtype,  # noqa: ARG001 - the dtypes are part of the key
    delta: torch.dtype,  # noqa: ARG001
    output: torch.dtype,  # noqa: ARG001
    *,
    shift: bool,
) -> Launch:
    """Return how to launch the kernel of :func:`combine_fast`; as :func:`combiner`."""
    across = -(-columns // _BLOCK)
    return Launch("combine_fast", device, across, (columns,), (shift, _BLOCK))


class FewRows:
    """Computes ``scale * (result + scaling * (x @ first.T @ last.T)) + shift`` by two kernels.

    For up to :data:`FEW_ROWS` rows: as in the decoding of some sequences. All is accumulated in
    float32.
    """

    __slots__ = ("_expand", "_project")

    def __init__(self, project: Launch, expand: Launch) -> None:
        self._project = project
        self._expand = expand

    def __call__(
        self,
        x: Tensor,
        result: Tensor,
        first: Tensor,
        last: Tensor,
        scale: Tensor,
        shift: Tensor | None,
        scaling: float,
        output: Tensor,
    ) -> bool:
        """Launch the kernels; return whether that was done.

        Args:
            x: shape (rows, in), contiguous; no negative view, which kernels do not see.
            result: shape (rows, out), contiguous, of the dtype given to :func:`few_rows`.
            first: likewise as given there, and the next three.
            last: shape (out, rank).
            scale: out elements.
            shift: out elements, contiguous, or None.
            scaling: a number.
            output: where the sum goes: of the dtype of ``result``, or ``result`` itself.
        """
        project, rows = self._project, x.shape[0]
        projected = torch.empty(rows, project.across, dtype=torch.float32, device=x.device)
        added = result if shift is None else shift  # not read if there is none
        return project(rows, (x, first, projected)) and self._expand(
            rows, (result, projected, last, scale, added, output), (float(scaling),)
        )


def few_rows(
    x: Tensor,
    result: torch.dtype,
    first: Tensor,
    last: Tensor,
    scale: Tensor,
    shift: Tensor | None,
) -> FewRows | None:
    """Return how to compute a layer's output for a few rows; None if no kernel takes the weights.

    Args:
        x: its dtype and device matter alone.
        result: dtype.
        first: shape (rank, in).
        last: shape (out, rank).
        scale: out elements.
        shift: likewise, or None.
    """
    (rank, width), columns = first.shape, last.shape[0]
    if not (
        rank <= _LARGEST_RANK
        and {x.dtype, result, first.dtype, last.dtype} <= _DTYPES
        and scale.dtype is torch.float32
        and last.shape == (columns, rank)
        and first.is_contiguous()
        and last.is_contiguous()
        and not (first.is_neg() or last.is_neg())
        and x.get_device() == first.get_device() == last.get_device()
    ):
        return None
    dtypes = (x.dtype, result, first.dtype, last.dtype)
    return _few_rows(x.get_device(), columns, width, rank, dtypes, shift=shift is not None)


@functools.cache
def _few_rows(
    device: int,
    columns: int,
    width: int,
    rank: int,
    dtypes: tuple[torch.dtype, ...],  # noqa: ARG001 - part of the key
    *,
    shift: bool,
) -> FewRows:
    ranks = 1 << (rank - 1).bit_length()
    block = max(16, 4096 // ranks)
    return FewRows(
        Launch("project", device, rank, (width, rank), (_BLOCK,)),
        Launch("expand", device, -(-columns // block), (columns, rank), (shift, ranks, block)),
    )


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
        and not last.is_neg()
        and weight.get_device() == first.get_device() == last.get_device()
        and first.shape == (rank, columns)
        and last.shape == (rows, rank)
        and 0 < rank <= _LARGEST_RANK_OF_NORMS
    ):
        return None
    output = torch.empty(rows, dtype=torch.float32, device=weight.device)
    dtypes = (weight.dtype, first.dtype, last.dtype)
    launch = _norms(weight.get_device(), rows, columns, rank, dtypes)
    blocks = -(-rows // _ROWS_AT_ONCE)
    return output if launch(blocks, (weight, first, last, output), (float(scaling),)) else None


@functools.cache
def _norms(
    device: int,
    rows: int,
    columns: int,
    rank: int,
    dtypes: tuple[torch.dtype, ...],  # noqa: ARG001 - part of the key
) -> Launch:
    ranks = max(16, 1 << (rank - 1).bit_length())
    constants = (ranks, _ROWS_AT_ONCE, 4096 // ranks)
    return Launch("norms", device, 1, (rows, columns, rank), constants)


_SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


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
