"""The kernels themselves; imports Triton. See ``kernels.py`` for what they compute."""
# ruff: noqa: ANN001, ANN201, ANN202 - Triton reads annotations as its own

import triton
import triton.language as tl

__all__ = ["combine", "combine_fast"]


@triton.jit
def _rounded(value, dtype: tl.constexpr):
    """Round a float32 to another dtype's precision, to nearest, ties to even."""
    if dtype == "bf16":
        return value.to(tl.bfloat16).to(tl.float32)
    elif dtype == "fp16":  # noqa: RET505 - Triton compiles one branch only if both are there
        return value.to(tl.float16).to(tl.float32)
    else:
        return value


@triton.jit
def combine(
    result_pointer,
    delta_pointer,
    scale_pointer,
    bias_pointer,
    output_pointer,
    columns,
    scaling,
    has_bias: tl.constexpr,
    scaled: tl.constexpr,
    based: tl.constexpr,
    changed: tl.constexpr,
    added: tl.constexpr,
    total: tl.constexpr,
    final: tl.constexpr,
    block: tl.constexpr,
):
    """One block of one row; the names of dtypes say where PyTorch's operations round."""
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = column < columns
    place = tl.program_id(0).to(tl.int64) * columns + column
    result = tl.load(result_pointer + place, inside).to(tl.float32)
    delta = tl.load(delta_pointer + place, inside).to(tl.float32)
    scale = tl.load(scale_pointer + column, inside).to(tl.float32)
    base = result
    if has_bias:
        base = _rounded(result - tl.load(bias_pointer + column, inside).to(tl.float32), based)
    change = _rounded(_rounded(scale - 1.0, scaled) * base, changed)
    add = _rounded(_rounded(scale * delta, added) * scaling, added)
    output = _rounded(result + _rounded(change + add, total), final)
    tl.store(output_pointer + place, output.to(output_pointer.dtype.element_ty), inside)


@triton.jit
def combine_fast(
    result_pointer,
    delta_pointer,
    scale_pointer,
    shift_pointer,
    output_pointer,
    columns,
    scaling,
    has_shift: tl.constexpr,
    block: tl.constexpr,
):
    """One block of one row."""
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = column < columns
    place = tl.program_id(0).to(tl.int64) * columns + column
    result = tl.load(result_pointer + place, inside).to(tl.float32)
    delta = tl.load(delta_pointer + place, inside).to(tl.float32)
    scale = tl.load(scale_pointer + column, inside)
    output = scale * (result + scaling * delta)
    if has_shift:
        output += tl.load(shift_pointer + column, inside)
    tl.store(output_pointer + place, output.to(output_pointer.dtype.element_ty), inside)
