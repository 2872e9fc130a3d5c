"""The kernels themselves; imports Triton. See ``kernels.py`` for what they compute."""
# ruff: noqa: ANN001, ANN201, ANN202, PLR2004 - Triton reads annotations as its own

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = ["pool_expand", "pool_shrink"]

_NONE = tl.constexpr(0x7FFFFFFFFFFFFFFF)  # no table is at this address
_FEW_RANKS = tl.constexpr(16)  # tl.dot takes no less


@triton.jit
def _tables(rows_pointer, count, each: tl.constexpr, tile: tl.constexpr):
    """Return a tile's rows and the addresses of their adapters' tables.

    The address is ``_NONE`` for rows that this program has nothing to do for. With ``each``, a
    program stands for one row, and does all rows of its tile that have the same adapter, if there
    is none before it: so an adapter is read once for a tile, and distinct ones at the same time.
    Without, one program does a whole tile, one adapter after another.
    """
    program = tl.program_id(0)
    if each:
        row = program // tile * tile + tl.arange(0, tile)
    else:
        row = program * tile + tl.arange(0, tile)
    names = tl.load(rows_pointer).to(tl.int32)
    name = row // tl.maximum(count // names, 1)
    table = tl.load(rows_pointer + 1 + name, row < count, other=0)
    if each:
        mine = tl.sum(tl.where(row == program, table, 0), 0)
        same = table == mine
        before = tl.sum((same & (row < program)).to(tl.int32), 0)
        table = tl.where(same & (before == 0), table, 0)
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
    each: tl.constexpr,
    tile: tl.constexpr,
    splits: tl.constexpr,
    block: tl.constexpr,
    wide: tl.constexpr,
    precision: tl.constexpr,
    early: tl.constexpr,
):
    """The products of a tile's rows with their first factors, over one of ``splits`` ranges."""
    if early:
        gdc_launch_dependents()
    row, left = _tables(rows_pointer, count, each, tile)
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
    early: tl.constexpr,
):
    """Add what some ranks have: the sums of the splits times rows of the last factor.

    Args:
        total: shape (tile, columns) for a tile of rows, or (columns,) for one row, whose number is
            ``row``.
    """
    number = start + tl.arange(0, ranks)
    known = number < rank
    where = column.to(tl.int64)[:, None] * rank + number[None, :]
    factor = tl.load(last + where, inside[:, None] & known[None, :], other=0.0).to(tl.float32)
    if early:
        gdc_wait()
    stride = count.to(tl.int64) * max_rank
    if tile == 1:
        where = row * max_rank + number[None, :] + tl.arange(0, splits)[:, None] * stride
        hidden = tl.sum(tl.load(space_pointer + where, known[None, :], other=0.0), 0)
        total += tl.sum(factor * hidden[None, :], 1)
    else:
        where = row.to(tl.int64)[:, None] * max_rank + number[None, :]
        some = here[:, None] & known[None, :]
        hidden = tl.zeros([tile, ranks], dtype=tl.float32)
        for split in tl.static_range(splits):
            hidden += tl.load(space_pointer + split * stride + where, some, other=0.0)
        total = tl.dot(hidden, tl.trans(factor), total, input_precision=precision)
    return total


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
    early: tl.constexpr,
):
    """Add what all ranks have, see :func:`_add`."""
    odd: tl.constexpr = 8 if tile == 1 else _FEW_RANKS  # narrow loads take many registers
    if rank % 8 == 0:
        even = rank // 8 * 8  # so the compiler sees that loads can be wide
        step: tl.constexpr = _FEW_RANKS if tile == 1 else wide
        for start in range(0, even, step):
            if tile == 1 or wide == _FEW_RANKS:
                total = _add(
                    total, space_pointer, last, row, here, column, inside, start, even, count,
                    max_rank, splits, precision, tile, _FEW_RANKS, early,
                )  # fmt: skip
            elif even - start > _FEW_RANKS:
                total = _add(
                    total, space_pointer, last, row, here, column, inside, start, even, count,
                    max_rank, splits, precision, tile, wide, early,
                )  # fmt: skip
            else:
                total = _add(
                    total, space_pointer, last, row, here, column, inside, start, even, count,
                    max_rank, splits, precision, tile, _FEW_RANKS, early,
                )  # fmt: skip
    else:
        for start in range(0, rank, odd):
            total = _add(
                total, space_pointer, last, row, here, column, inside, start, rank, count,
                max_rank, splits, precision, tile, odd, early,
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
    early: tl.constexpr,
):
    """Write some columns of the rows of a tile that have one adapter; or, ``tile`` 1, of a row."""
    inside = column < columns
    if tile == 1:
        place = row.to(tl.int64) * columns + column
        some = inside
        total = tl.zeros([block], dtype=tl.float32)
    else:
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
        precision, tile, wide, early,
    )  # fmt: skip
    if tile != 1:
        scale, shift = scale[None, :], shift[None, :]
    y = ((y + scaling * total) * scale + shift).to(y_pointer.dtype.element_ty)
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
    each: tl.constexpr,
    tile: tl.constexpr,
    splits: tl.constexpr,
    block: tl.constexpr,
    piece: tl.constexpr,
    wide: tl.constexpr,
    precision: tl.constexpr,
    early: tl.constexpr,
):
    """Some columns of a tile's rows, in place; ``piece`` columns at once where rows share."""
    row, left = _tables(rows_pointer, count, each, tile)
    first = tl.program_id(1) * block
    table = tl.min(left, 0)
    while table != _NONE:
        here = left == table
        alone = False
        if each:  # then registers are for as many columns as can be; a product takes 16 rows' worth
            alone = tl.sum(here.to(tl.int32), 0) == 1
        if alone:
            _change(
                y_pointer, space_pointer, table, tl.program_id(0), here,
                first + tl.arange(0, block), columns, max_rank, count, layer, splits, precision, 1,
                block, wide, early,
            )  # fmt: skip
        else:
            for start in range(first, tl.minimum(first + block, columns), piece):
                _change(
                    y_pointer, space_pointer, table, row, here, start + tl.arange(0, piece),
                    columns, max_rank, count, layer, splits, precision, tile, piece, wide, early,
                )  # fmt: skip
        left = tl.where(here, _NONE, left)
        table = tl.min(left, 0)
