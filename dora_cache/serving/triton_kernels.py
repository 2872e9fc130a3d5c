"""The kernels themselves; imports Triton. See ``kernels.py`` for what they compute."""
# ruff: noqa: ANN001, ANN201, ANN202 - Triton reads annotations as its own

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = ["pool_expand", "pool_expand_row", "pool_shrink", "pool_shrink_row"]

_NONE = tl.constexpr(0x7FFFFFFFFFFFFFFF)  # no table is at this address
_FEW_RANKS = tl.constexpr(16)  # tl.dot takes no less


@triton.jit
def _tables(rows_pointer, count, tile: tl.constexpr):
    """Return a tile's rows and the addresses of their adapters' tables, ``_NONE`` for none."""
    row = tl.program_id(0) * tile + tl.arange(0, tile)
    names = tl.load(rows_pointer).to(tl.int32)
    name = row // tl.maximum(count // names, 1)
    table = tl.load(rows_pointer + 1 + name, row < count, other=0)
    return row, tl.where(table == 0, _NONE, table)


@triton.jit
def _project(
    x_pointer,
    first,
    space_pointer,
    row,
    here,
    start,
    rank,
    begin,
    end,
    width,
    max_rank,
    precision: tl.constexpr,
    tile: tl.constexpr,
    ranks: tl.constexpr,
    block: tl.constexpr,
):
    """Some ranks: rows of the input times rows of the first factor, over a range of columns."""
    number = start + tl.arange(0, ranks)
    known = number < rank
    x_row = x_pointer + row.to(tl.int64)[:, None] * width
    first_row = first + number.to(tl.int64)[:, None] * width
    total = tl.zeros([tile, ranks], dtype=tl.float32)
    for place in range(begin, end, block):
        column = place + tl.arange(0, block)
        inside = column < width
        x = tl.load(x_row + column[None, :], here[:, None] & inside[None, :], other=0.0)
        factor = tl.load(first_row + column[None, :], known[:, None] & inside[None, :], other=0.0)
        total = tl.dot(x, tl.trans(factor), total, input_precision=precision)
    where = row.to(tl.int64)[:, None] * max_rank + number[None, :]
    tl.store(space_pointer + where, total, here[:, None] & known[None, :])


@triton.jit(do_not_specialize=["count", "layer"])
def pool_shrink(
    x_pointer,
    rows_pointer,
    space_pointer,
    width,
    max_rank,
    count,
    layer,
    tile: tl.constexpr,
    splits: tl.constexpr,
    block: tl.constexpr,
    wide: tl.constexpr,
    precision: tl.constexpr,
):
    """The products of a tile's rows with their first factors, over one of ``splits`` ranges."""
    row, left = _tables(rows_pointer, count, tile)
    split = tl.program_id(1)
    share = tl.cdiv(tl.cdiv(width, splits), block) * block
    begin = split * share
    end = tl.minimum(begin + share, width)
    space_pointer += split.to(tl.int64) * count * max_rank
    table = tl.min(left, 0)
    while table != _NONE:
        here = left == table
        entry = (table + layer * 64).to(tl.pointer_type(tl.int64))
        first = tl.load(entry).to(tl.pointer_type(x_pointer.dtype.element_ty))
        first = tl.multiple_of(first, 16)
        rank = tl.load(entry + 4).to(tl.int32)
        for start in range(0, rank, wide):
            if wide == _FEW_RANKS:
                _project(
                    x_pointer, first, space_pointer, row, here, start, rank, begin, end, width,
                    max_rank, precision, tile, _FEW_RANKS, block,
                )  # fmt: skip
            elif rank - start > _FEW_RANKS:
                _project(
                    x_pointer, first, space_pointer, row, here, start, rank, begin, end, width,
                    max_rank, precision, tile, wide, block,
                )  # fmt: skip
            else:
                _project(
                    x_pointer, first, space_pointer, row, here, start, rank, begin, end, width,
                    max_rank, precision, tile, _FEW_RANKS, block,
                )  # fmt: skip
        left = tl.where(here, _NONE, left)
        table = tl.min(left, 0)


@triton.jit
def _add(
    total,
    space_pointer,
    last,
    row,
    here,
    column,
    inside,
    start,
    rank,
    count,
    max_rank,
    splits: tl.constexpr,
    precision: tl.constexpr,
    tile: tl.constexpr,
    ranks: tl.constexpr,
):
    """Add what some ranks have: the sums of the splits times rows of the last factor."""
    number = start + tl.arange(0, ranks)
    known = number < rank
    where = column.to(tl.int64)[:, None] * rank + number[None, :]
    factor = tl.load(last + where, inside[:, None] & known[None, :], other=0.0)
    stride = count.to(tl.int64) * max_rank
    where = row.to(tl.int64)[:, None] * max_rank + number[None, :]
    some = here[:, None] & known[None, :]
    hidden = tl.zeros([tile, ranks], dtype=tl.float32)
    for split in tl.static_range(splits):
        hidden += tl.load(space_pointer + split * stride + where, some, other=0.0)
    return tl.dot(hidden, tl.trans(factor.to(tl.float32)), total, input_precision=precision)


@triton.jit
def _sums(
    total,
    space_pointer,
    last,
    row,
    here,
    column,
    inside,
    rank,
    count,
    max_rank,
    splits: tl.constexpr,
    precision: tl.constexpr,
    tile: tl.constexpr,
    wide: tl.constexpr,
):
    """Add what all ranks have, see :func:`_add`."""
    if rank % 8 == 0:
        even = rank // 8 * 8  # so the compiler sees that loads can be wide
        for start in range(0, even, wide):
            if wide == _FEW_RANKS:
                total = _add(
                    total, space_pointer, last, row, here, column, inside, start, even, count,
                    max_rank, splits, precision, tile, _FEW_RANKS,
                )  # fmt: skip
            elif even - start > _FEW_RANKS:
                total = _add(
                    total, space_pointer, last, row, here, column, inside, start, even, count,
                    max_rank, splits, precision, tile, wide,
                )  # fmt: skip
            else:
                total = _add(
                    total, space_pointer, last, row, here, column, inside, start, even, count,
                    max_rank, splits, precision, tile, _FEW_RANKS,
                )  # fmt: skip
    else:
        for start in range(0, rank, _FEW_RANKS):
            total = _add(
                total, space_pointer, last, row, here, column, inside, start, rank, count,
                max_rank, splits, precision, tile, _FEW_RANKS,
            )  # fmt: skip
    return total


@triton.jit
def _change(
    y_pointer,
    space_pointer,
    table,
    row,
    here,
    column,
    columns,
    max_rank,
    count,
    layer,
    splits: tl.constexpr,
    precision: tl.constexpr,
    tile: tl.constexpr,
    block: tl.constexpr,
    wide: tl.constexpr,
):
    """Write some columns of the rows of a tile that have one adapter."""
    inside = column < columns
    place = row.to(tl.int64)[:, None] * columns + column[None, :]
    some = here[:, None] & inside[None, :]
    total = tl.zeros([tile, block], dtype=tl.float32)
    y = tl.load(y_pointer + place, some, other=0.0).to(tl.float32)
    entry = (table + layer * 64).to(tl.pointer_type(tl.int64))
    last = tl.load(entry + 1).to(tl.pointer_type(y_pointer.dtype.element_ty))
    last = tl.multiple_of(last, 16)
    scale_address = tl.load(entry + 2)
    shift_address = tl.load(entry + 3)
    rank = tl.load(entry + 4).to(tl.int32)
    scaling = tl.load(entry + 5).to(tl.float64, bitcast=True).to(tl.float32)
    scales = tl.multiple_of(scale_address.to(tl.pointer_type(tl.float32)), 16)
    shifts = tl.multiple_of(shift_address.to(tl.pointer_type(tl.float32)), 16)
    scale = tl.load(scales + column, inside & (scale_address != 0), other=1.0)
    shift = tl.load(shifts + column, inside & (shift_address != 0), other=0.0)
    total = _sums(
        total, space_pointer, last, row, here, column, inside, rank, count, max_rank, splits,
        precision, tile, wide,
    )  # fmt: skip
    y = ((y + scaling * total) * scale[None, :] + shift[None, :]).to(y_pointer.dtype.element_ty)
    changes = (rank > 0) | (scale_address != 0) | (shift_address != 0)
    tl.store(y_pointer + place, y, some & changes)


@triton.jit(do_not_specialize=["count", "layer"])
def pool_expand(
    y_pointer,
    rows_pointer,
    space_pointer,
    columns,
    max_rank,
    count,
    layer,
    tile: tl.constexpr,
    splits: tl.constexpr,
    block: tl.constexpr,
    piece: tl.constexpr,
    wide: tl.constexpr,
    precision: tl.constexpr,
):
    """Some columns of a tile's rows, in place, ``piece`` columns at once."""
    row, left = _tables(rows_pointer, count, tile)
    first = tl.program_id(1) * block
    table = tl.min(left, 0)
    while table != _NONE:
        here = left == table
        for start in range(first, tl.minimum(first + block, columns), piece):
            _change(
                y_pointer, space_pointer, table, row, here, start + tl.arange(0, piece), columns,
                max_rank, count, layer, splits, precision, tile, piece, wide,
            )  # fmt: skip
        left = tl.where(here, _NONE, left)
        table = tl.min(left, 0)


@triton.jit
def _entry(rows_pointer, row, count, layer):
    """Return the address of a row's entry in its adapter's table; 0 if it has no adapter."""
    names = tl.load(rows_pointer).to(tl.int32)
    table = tl.load(rows_pointer + 1 + row // tl.maximum(count // names, 1))
    return tl.where(table == 0, 0, table + layer * 64)


@triton.jit(do_not_specialize=["count", "layer"])
def pool_shrink_row(
    x_pointer,
    rows_pointer,
    space_pointer,
    width,
    max_rank,
    count,
    layer,
    splits: tl.constexpr,
    block: tl.constexpr,
    early: tl.constexpr,
):
    """The product of one row with its first factor, over one of ``splits`` ranges."""
    if early:
        gdc_launch_dependents()
    row = tl.program_id(0)
    split = tl.program_id(1)
    address = _entry(rows_pointer, row, count, layer)
    if address != 0:
        entry = address.to(tl.pointer_type(tl.int64))
        first = tl.load(entry).to(tl.pointer_type(x_pointer.dtype.element_ty))
        first = tl.multiple_of(first, 16)
        rank = tl.load(entry + 4).to(tl.int32)
        share = tl.cdiv(tl.cdiv(width, splits), block) * block
        begin = split * share
        end = tl.minimum(begin + share, width)
        x_row = x_pointer + row.to(tl.int64) * width
        place = (split * count + row).to(tl.int64) * max_rank
        for start in range(0, rank, _FEW_RANKS):
            number = start + tl.arange(0, _FEW_RANKS)
            known = number < rank
            first_row = first + number.to(tl.int64)[:, None] * width
            total = tl.zeros([_FEW_RANKS, block], dtype=tl.float32)
            for some in range(begin, end, block):
                column = some + tl.arange(0, block)
                inside = column < width
                x = tl.load(x_row + column, inside, other=0.0).to(tl.float32)
                mask = known[:, None] & inside[None, :]
                factor = tl.load(first_row + column[None, :], mask, other=0.0).to(tl.float32)
                total += factor * x[None, :]
            tl.store(space_pointer + place + number, tl.sum(total, 1), known)


@triton.jit
def _row_sum(
    total,
    space_pointer,
    last,
    row,
    column,
    inside,
    start,
    rank,
    count,
    max_rank,
    splits: tl.constexpr,
    early: tl.constexpr,
):
    """Add what some ranks have, for one row."""
    number = start + tl.arange(0, _FEW_RANKS)
    known = number < rank
    where = column.to(tl.int64)[:, None] * rank + number[None, :]
    factor = tl.load(last + where, inside[:, None] & known[None, :], other=0.0)
    if early:
        gdc_wait()
    split = tl.arange(0, splits)
    where = (split * count + row).to(tl.int64)[:, None] * max_rank + number[None, :]
    hidden = tl.sum(tl.load(space_pointer + where, known[None, :], other=0.0), 0)
    return total + tl.sum(factor.to(tl.float32) * hidden[None, :], 1)


@triton.jit(do_not_specialize=["count", "layer"])
def pool_expand_row(
    y_pointer,
    rows_pointer,
    space_pointer,
    columns,
    max_rank,
    count,
    layer,
    splits: tl.constexpr,
    block: tl.constexpr,
    early: tl.constexpr,
):
    """Some columns of one row, in place."""
    row = tl.program_id(0)
    address = _entry(rows_pointer, row, count, layer)
    if address != 0:
        entry = address.to(tl.pointer_type(tl.int64))
        last = tl.load(entry + 1).to(tl.pointer_type(y_pointer.dtype.element_ty))
        last = tl.multiple_of(last, 16)
        scale_address = tl.load(entry + 2)
        shift_address = tl.load(entry + 3)
        rank = tl.load(entry + 4).to(tl.int32)
        scaling = tl.load(entry + 5).to(tl.float64, bitcast=True).to(tl.float32)
        column = tl.program_id(1) * block + tl.arange(0, block)
        inside = column < columns
        place = row.to(tl.int64) * columns + column
        y = tl.load(y_pointer + place, inside, other=0.0).to(tl.float32)
        scales = tl.multiple_of(scale_address.to(tl.pointer_type(tl.float32)), 16)
        shifts = tl.multiple_of(shift_address.to(tl.pointer_type(tl.float32)), 16)
        scale = tl.load(scales + column, inside & (scale_address != 0), other=1.0)
        shift = tl.load(shifts + column, inside & (shift_address != 0), other=0.0)
        total = tl.zeros([block], dtype=tl.float32)
        if rank % 8 == 0:
            even = rank // 8 * 8  # so the compiler sees that loads can be wide
            for start in range(0, even, _FEW_RANKS):
                total = _row_sum(
                    total, space_pointer, last, row, column, inside, start, even, count, max_rank,
                    splits, early,
                )  # fmt: skip
        else:
            for start in range(0, rank, _FEW_RANKS):
                total = _row_sum(
                    total, space_pointer, last, row, column, inside, start, rank, count, max_rank,
                    splits, early,
                )  # fmt: skip
        y = ((y + scaling * total) * scale + shift).to(y_pointer.dtype.element_ty)
        changes = (rank > 0) | (scale_address != 0) | (shift_address != 0)
        tl.store(y_pointer + place, y, inside & changes)
    if early:  # also where nothing was read: what follows may write to what the first kernel reads
        gdc_wait()
