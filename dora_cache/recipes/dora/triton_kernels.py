"""The kernels themselves; imports Triton. See ``kernels.py`` for what they compute."""
# ruff: noqa: ANN001, ANN201, ANN202 - Triton reads annotations as its own

import triton
import triton.language as tl

__all__ = ["combine", "combine_fast", "expand", "norms", "project"]


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


@triton.jit
def project(
    x_pointer,
    factor_pointer,
    output_pointer,
    width,
    rank,
    block: tl.constexpr,
):
    """One number: a row of the input times a row of the first factor."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([block], dtype=tl.float32)
    for start in range(0, width, block):
        place = start + tl.arange(0, block)
        inside = place < width
        x = tl.load(x_pointer + row * width + place, inside, other=0.0).to(tl.float32)
        factor = tl.load(factor_pointer + tl.program_id(1) * width + place, inside, other=0.0)
        total += x * factor.to(tl.float32)
    tl.store(output_pointer + row * rank + tl.program_id(1), tl.sum(total, 0))


@triton.jit
def expand(
    result_pointer,
    projected_pointer,
    factor_pointer,
    scale_pointer,
    shift_pointer,
    output_pointer,
    columns,
    rank,
    scaling,
    has_shift: tl.constexpr,
    ranks: tl.constexpr,
    block: tl.constexpr,
):
    """One block of one row; ``ranks`` is the rank, rounded up to a power of two."""
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = column < columns
    row = tl.program_id(0).to(tl.int64)
    place = row * columns + column
    number = tl.arange(0, ranks)
    known = number < rank
    projected = tl.load(projected_pointer + row * rank + number, known, other=0.0)
    where = column.to(tl.int64)[:, None] * rank + number[None, :]
    factor = tl.load(factor_pointer + where, inside[:, None] & known[None, :], other=0.0)
    delta = tl.sum(factor.to(tl.float32) * projected[None, :], 1)
    result = tl.load(result_pointer + place, inside).to(tl.float32)
    output = tl.load(scale_pointer + column, inside) * (result + scaling * delta)
    if has_shift:
        output += tl.load(shift_pointer + column, inside)
    tl.store(output_pointer + place, output.to(output_pointer.dtype.element_ty), inside)


@triton.jit
def norms(
    weight_pointer,
    first_pointer,
    last_pointer,
    output_pointer,
    rows,
    columns,
    rank,
    scaling,
    ranks: tl.constexpr,
    block_rows: tl.constexpr,
    block: tl.constexpr,
):
    """A block of rows, some columns at a time; nothing but the norms goes to memory."""
    row = (tl.program_id(0) * block_rows + tl.arange(0, block_rows)).to(tl.int64)
    inside = row < rows
    number = tl.arange(0, ranks)
    known = number < rank
    where = row[:, None] * rank + number[None, :]
    last = tl.load(last_pointer + where, inside[:, None] & known[None, :], other=0.0)
    last = last.to(tl.float32) * scaling
    squares = tl.zeros([block_rows, block], dtype=tl.float32)
    for start in range(0, columns, block):
        column = start + tl.arange(0, block)
        here = column < columns
        of_first = number.to(tl.int64)[:, None] * columns + column[None, :]
        first = tl.load(first_pointer + of_first, known[:, None] & here[None, :], other=0.0)
        of_weight = row[:, None] * columns + column[None, :]
        weight = tl.load(weight_pointer + of_weight, inside[:, None] & here[None, :], other=0.0)
        weight = weight.to(tl.float32)
        value = tl.dot(last, first.to(tl.float32), weight, input_precision="ieee")
        squares += value * value
    tl.store(output_pointer + row, tl.sqrt(tl.sum(squares, 1)), inside)
