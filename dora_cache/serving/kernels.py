"""Adds each row's own adapter to a linear layer's output, by two CUDA kernels written in Triton.

Which adapter a row has, where its factors are and what rank they have, the kernels read from
memory, so one CUDA graph serves every mix. The first kernel multiplies rows by their adapters'
first factors, the second one by the last factors, and scales and adds. Both have two forms. For few
rows, as in decoding, there is a program for each row, so distinct adapters are read at the same
time; for many, as in prefill, a program for each tile of rows, which does its adapters in turn.
"""

from __future__ import annotations

import functools
from threading import get_ident
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from dora_cache.ambient import current_device, raw_stream
from dora_cache.reasons import Advised
from dora_cache.triton_launch import Launcher, broken

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "LARGEST_RANK",
    "Launches",
    "WithoutKernel",
    "adapt_",
    "available",
    "failures",
    "launches",
    "why_not",
]

LARGEST_RANK = 256

_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
_FEW_ROWS = 128  # the most that have a program each
_MOST_SPLITS = 16
_PRECISION = {torch.float32: "ieee", torch.bfloat16: "tf32", torch.float16: "tf32x3"}
"""Of the second product: of float32 numbers with factors of these dtypes."""


class WithoutKernel(Advised):
    """Why PyTorch's operations computed a linear layer's adapters on CUDA, adapter by adapter."""

    AUTOCAST = (
        "autocast",
        "load the model in the dtype to compute in, such as torch.bfloat16, and leave autocast",
    )
    OTHER_DTYPE = (
        "input or output of another dtype than the weight",
        "call the layer with inputs of its weight's dtype",
    )
    GRADIENTS = "gradients wanted", "run inference under torch.no_grad() or inference_mode()"
    DTYPE = "dtype without kernels", "load the model in bfloat16, float16 or float32"
    ROCM = "ROCm", "nothing: the kernels are for NVIDIA's GPUs"
    NO_TRITON = "no Triton", "install Triton in the version that PyTorch asks for"
    FAILED = (
        "a kernel failed",
        "see the error; Triton needs a C compiler and Python's headers, and a folder to write to",
    )


class Plan(NamedTuple):
    """How the work of one layer is divided. All sizes are powers of two.

    Args:
        tile: rows of a program: 1, or 16 or more.
        splits: ranges of the inputs that are summed apart.
        shrink: inputs at once.
        expand: outputs of a program.
        piece: of a tile, outputs at once.
        warps: of a program.
        early: for single rows, whether the second kernel starts before the first has ended (from
            compute capability 9.0 on).
    """

    tile: int
    splits: int
    shrink: int
    expand: int
    piece: int = 64
    warps: int = 4
    early: bool = False


def plan(count: int, width: int, columns: int, dtype: torch.dtype, *, early: bool) -> Plan:
    """Divide the work of a layer of ``width`` inputs and ``columns`` outputs on ``count`` rows."""
    splits = min(_most_splits(count, width), 1 << max(0, (width // 256).bit_length() - 1))
    if count <= _FEW_ROWS:
        # Programs are many enough for all multiprocessors, and few enough to run at once.
        each = count * columns // 256
        expand = 128 if each <= 128 else 256 if each <= 512 else 512  # noqa: PLR2004
        return Plan(1, splits, 256, expand, early=early)
    narrow = 1 if dtype.itemsize < 4 else 4  # noqa: PLR2004 - float32: no tensor cores
    tile = 16 if count <= 1024 else 64  # noqa: PLR2004
    return Plan(tile, splits, 128 // narrow, 128 // narrow, 128 // narrow)


def available(device: torch.device, *dtypes: torch.dtype) -> bool:
    """Whether there are kernels for a device and these dtypes."""
    return device.type == "cuda" and _DTYPES.issuperset(dtypes) and _kernels() is not None


def why_not(output: Tensor, x: Tensor, dtype: torch.dtype) -> WithoutKernel:
    """Return why no kernel changed a linear layer's output on CUDA.

    Args:
        output: of the base layer.
        x: its input.
        dtype: of its weight.
    """
    if output.requires_grad:
        return WithoutKernel.GRADIENTS
    if not x.dtype is output.dtype is dtype:
        autocast = torch.is_autocast_enabled(output.device.type)
        return WithoutKernel.AUTOCAST if autocast else WithoutKernel.OTHER_DTYPE
    if dtype not in _DTYPES:
        return WithoutKernel.DTYPE
    if torch.version.hip:
        return WithoutKernel.ROCM
    return WithoutKernel.NO_TRITON if _kernels() is None else WithoutKernel.FAILED


def failures() -> tuple[str, ...]:
    """Return what importing Triton, or the pool's kernels, failed with in this process."""
    ours = (f"{name}: {error}" for name, error in broken.items() if name.startswith("pool_"))
    return (*_unimported, *ours)


def adapt_(y: Tensor, x: Tensor, rows: Tensor, layer: int, max_rank: int) -> bool:
    """Write ``s * (y + g * (x @ A.T @ B.T)) + t`` to ``y``, with each row's own adapter.

    An adapter's table is int64, shape (layers, 8), contiguous. Its row is the addresses of ``A``
    (rank, in), ``B`` (out, rank), ``s`` (out,) and ``t`` (out,), the rank, ``g`` as the bits of a
    float64, and two zeros. ``A`` and ``B`` are contiguous, of the dtype of ``x``; ``s`` and ``t``
    are float32, or their address is 0, for 1 and 0. All are aligned to 16 bytes. Where the rank is
    0, ``A`` and ``B`` are not read.

    Sums are accumulated in float32. The order in which they are depends on the shapes alone. A row
    that no adapter changes stays as it is, to the bit.

    Args:
        y: shape (M, out), contiguous; float32, bfloat16 or float16, on a CUDA device.
        x: shape (M, in), contiguous, likewise. Neither may be a negative view.
        rows: int64, contiguous: ``n``, and the addresses of the tables of ``n`` adapters, 0 for no
            adapter. Row ``m`` of ``M`` has adapter ``m * n // M``. ``n`` is positive and divides
            ``M``; this is not checked.
        layer: which row of the tables.
        max_rank: the most that the ranks may be, at most :data:`LARGEST_RANK`; not checked.

    Returns:
        Whether it was done. Else a kernel failed, which is warned about once; ``y`` is unchanged.
    """
    count, width = x.shape
    device = y.get_device()
    if device != current_device():
        with torch.cuda.device(device):
            return adapt_(y, x, rows, layer, max_rank)
    if not count:
        return True
    return launches(device, x.dtype, count, width, y.shape[1], max_rank)(y, x, rows, layer)


class Launches(NamedTuple):
    """The two kernels for layers of one shape on some rows; see :func:`adapt_`."""

    shrink: Launcher
    expand: Launcher
    device: int
    rows: int
    down: int
    size: int  # of the workspace, in float32 numbers

    def __call__(self, y: Tensor, x: Tensor, rows: Tensor, layer: int) -> bool:
        """Launch both, as :func:`adapt_`; the device is the current one."""
        space = torch.empty(self.size, dtype=torch.float32, device=y.device)
        numbers = self.rows, layer
        return self.shrink(self.down, (x, rows, space), numbers) and self.expand(
            self.down, (y, rows, space), numbers
        )

    def again(
        self,
        y: Tensor,
        x: Tensor,
        rows: Tensor,
        layer: int,
        spaces: dict[tuple[int, int, int], Tensor],
    ) -> bool:
        """Launch both if that has been done before, in the least time; return whether it was.

        Args:
            y: as for :func:`adapt_`, like the following ones.
            x: likewise.
            rows: likewise.
            layer: likewise.
            spaces: workspaces by device, thread and stream, which layers use one after another.
        """
        numbers = self.rows, layer
        stream = raw_stream(self.device)
        own = self.device, get_ident(), stream
        space = spaces.get(own)
        if space is None or space.numel() < self.size:
            space = spaces[own] = torch.empty(self.size, dtype=torch.float32, device=y.device)
        read, between = rows.data_ptr(), space.data_ptr()
        return self.shrink.relaunch(
            self.down, (x.data_ptr(), read, between), numbers, stream
        ) and self.expand.relaunch(self.down, (y.data_ptr(), read, between), numbers, stream)


@functools.lru_cache(maxsize=4096)
def launches(
    device: int, dtype: torch.dtype, count: int, width: int, columns: int, max_rank: int
) -> Launches:
    """Return the kernels for a layer of ``width`` inputs and ``columns`` outputs."""
    how = plan(count, width, columns, dtype, early=_can_start_early(device))
    shrink, expand = _launchers(device, dtype, width, columns, max_rank, how)
    size = how.splits * count * max_rank
    return Launches(shrink, expand, device, count, -(-count // how.tile), size)


@functools.cache
def _launchers(
    device: int, dtype: torch.dtype, width: int, columns: int, max_rank: int, how: Plan
) -> tuple[Launcher, Launcher]:
    kernels = _kernels()
    options: dict[str, Any] = {"num_warps": how.warps, "enable_fp_fusion": True}
    across = how.splits, -(-columns // how.expand)
    if how.tile == 1:
        first, last = kernels.pool_shrink_row, kernels.pool_expand_row
        of_first: tuple[object, ...] = (how.splits, how.shrink, how.early)
        of_last: tuple[object, ...] = (how.splits, how.expand, how.early)
    else:
        first, last = kernels.pool_shrink, kernels.pool_expand
        wide = 16 if max_rank <= 16 else 32 if max_rank <= 32 else 64  # noqa: PLR2004
        of_first = (how.tile, how.splits, how.shrink, wide, "ieee")
        of_last = how.tile, how.splits, how.expand, how.piece, min(wide, 32), _PRECISION[dtype]
    shrink = Launcher(
        first, device, across[0], (width, max_rank), of_first, **options, num_stages=3
    )
    expand = Launcher(
        last,
        device,
        across[1],
        (columns, max_rank),
        of_last,
        **options,
        num_stages=1,
        launch_pdl=how.early,
    )
    return shrink, expand


def _most_splits(count: int, width: int) -> int:
    """Return enough ranges for all multiprocessors to have work."""
    if count <= 4:  # noqa: PLR2004
        return _MOST_SPLITS
    if count <= 16:  # noqa: PLR2004
        return 8 if width <= 8192 else _MOST_SPLITS  # noqa: PLR2004
    if count <= _FEW_ROWS:
        return 4
    return 8 if count <= 4096 else 4 if count <= 16384 else 1  # noqa: PLR2004


def _can_start_early(device: int) -> bool:
    """Whether a kernel can start before the one ahead of it has ended."""
    return torch.cuda.get_device_capability(device) >= (9, 0)


@functools.cache
def _kernels() -> Any:
    """Import the kernels; None where Triton is not there or does not know the device."""
    try:
        if not torch.cuda.is_available() or torch.version.hip:
            return None
        from dora_cache.serving import triton_kernels
    except Exception as error:  # noqa: BLE001 - whatever is wrong, PyTorch's operations do
        _unimported.append(f"{type(error).__name__}: {error}")
        return None
    return triton_kernels


_unimported: list[str] = []
