"""Launching Triton kernels: what has been compiled, past the search for it."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from torch import Tensor

__all__ = ["launch"]

_compiled: dict[Any, Any] = {}


def launch(
    kernel: Any,
    grid: tuple[int, int],
    pointers: Sequence[Tensor],
    values: Sequence[float],
    constants: Sequence[object],
    *,
    key: Hashable,
    device: int,
) -> None:
    """Launch a kernel on the current stream of the current device.

    Triton compiles a kernel for each combination of dtypes, of what integers are divisible by, and
    of how pointers are aligned, and finds that out anew at each launch. So what has been compiled
    is launched past that, at a tenth of the cost.

    Args:
        kernel: a function decorated with ``triton.jit``; its arguments are the next three.
        grid: programs, in two dimensions.
        pointers: tensors.
        values: numbers.
        constants: values of its ``tl.constexpr`` parameters.
        key: equal exactly where the same compiled code will do; None if that is not known.
        device: index of the current device.

    Raises:
        Exception: whatever Triton raises.
    """
    known = None if key is None else _compiled.get(key)
    if known is not None:
        run, function, metadata = known
        stream = torch._C._cuda_getCurrentRawStream(device)
        addresses = [tensor.data_ptr() for tensor in pointers]
        rest = (None, None, None, *addresses, *values, *constants)
        try:
            run(*grid, 1, stream, function, metadata, *rest)
        except Exception:  # noqa: BLE001 - no public interface: the public one may do
            _compiled[key] = None
        else:
            return
    compiled = kernel[(*grid, 1)](
        *pointers,
        *values,
        *constants,
        num_warps=4,
        enable_fp_fusion=False,  # a fused multiply-add rounds once, not twice
    )
    if key is not None and key not in _compiled:
        with suppress(AttributeError):
            _compiled[key] = compiled.run, compiled.function, compiled.packed_metadata
