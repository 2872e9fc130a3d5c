"""The CUDA kernel of the audit; imports Triton."""
# ruff: noqa: ANN001, ANN201, PLR2004 - Triton reads annotations as its own

import triton
import triton.language as tl

__all__ = ["hash_blocks"]


@triton.jit(do_not_specialize=["number"])
def hash_blocks(
    table_pointer,
    expected_pointer,
    flag_pointer,
    number,
    compare: tl.constexpr,
    width: tl.constexpr,
    block: tl.constexpr,
):
    """Hash one block of memory; store the hash, or compare it and store ``number`` on a difference.

    The hash is multilinear modulo 2**64, as in ``contents.py``, with odd coefficients made of the
    position by two rounds of multiplying and shifting (Steele et al., SplitMix, 2014).

    Args:
        table_pointer: int64, shape (blocks, 2): address, and number of elements of ``width`` bytes.
        expected_pointer: int64, shape (blocks,): the hashes.
        flag_pointer: int64, one element; may be pinned host memory.
        number: what to store there.
        compare: whether to compare; else hashes are stored.
        width: 4, or 1 where an address or size is no multiple of four.
        block: elements at once.
    """
    program = tl.program_id(0).to(tl.int64)
    address = tl.load(table_pointer + 2 * program)
    count = tl.load(table_pointer + 2 * program + 1)
    if width == 4:
        pointer = address.to(tl.pointer_type(tl.int32))
    else:
        pointer = address.to(tl.pointer_type(tl.uint8))
    total = tl.zeros([block], dtype=tl.int64)
    for start in range(0, count, block):
        index = start + tl.arange(0, block).to(tl.int64)
        element = tl.load(pointer + index, index < count, other=0).to(tl.int64)
        mixed = (index + 1) * 0x1E3779B97F4A7C15
        mixed = (mixed ^ (mixed >> 30)) * 0x3F58476D1CE4E5B9
        mixed = (mixed ^ (mixed >> 27)) * 0x14D049BB133111EB
        total += element * (mixed | 1)
    found = tl.sum(total, 0) + count
    if compare:
        expected = tl.load(expected_pointer + program)
        tl.store(flag_pointer, number.to(tl.int64), found != expected)
    else:
        tl.store(expected_pointer + program, found)
