"""The CUDA kernel of the audit; imports Triton."""
# ruff: noqa: ANN001, ANN201, ANN202, D417, PLR2004 - Triton reads annotations as its own

import triton
import triton.language as tl

__all__ = ["hash_blocks"]

_INTEGERS = ["number", "offset", *(f"{letter}{index}" for letter in "as" for index in range(8))]


@triton.jit
def _pick(program, first, address, size, before, next_address, next_size, per: tl.constexpr):
    """Go on to the next span if the program's block is in it or after it."""
    here = program >= before
    address = tl.where(here, next_address, address)
    size = tl.where(here, next_size, size)
    first = tl.where(here, before, first)
    return first, address, size, before + tl.cdiv(next_size, per)


@triton.jit(do_not_specialize=_INTEGERS)
def hash_blocks(
    expected_pointer,
    flag_pointer,
    number,
    offset,
    a0, a1, a2, a3, a4, a5, a6, a7,
    s0, s1, s2, s3, s4, s5, s6, s7,
    compare: tl.constexpr,
    width: tl.constexpr,
    per: tl.constexpr,
    step: tl.constexpr,
):  # fmt: skip
    """Hash one block of some spans; store the hash, or compare it, and store ``number`` if unequal.

    The hash is multilinear modulo 2**64, as in ``contents.py``, with odd coefficients made of the
    position by two rounds of multiplying and shifting (Steele et al., SplitMix, 2014).

    Args:
        expected_pointer: int64, shape (blocks,): the hashes.
        flag_pointer: int64, one element; may be pinned host memory.
        number: what to store there.
        offset: where the hash of the first block is.
        a0: address of the first span; and so on. Unused ones have size 0.
        s0: its elements of ``width`` bytes; and so on.
        compare: whether to compare; else hashes are stored.
        width: 4, or 1 where an address or size is no multiple of four.
        per: elements of a block.
        step: elements at once.
    """
    program = tl.program_id(0)
    first, address, size, before = 0, a0.to(tl.int64), s0, tl.cdiv(s0, per)
    first, address, size, before = _pick(program, first, address, size, before, a1, s1, per)
    first, address, size, before = _pick(program, first, address, size, before, a2, s2, per)
    first, address, size, before = _pick(program, first, address, size, before, a3, s3, per)
    first, address, size, before = _pick(program, first, address, size, before, a4, s4, per)
    first, address, size, before = _pick(program, first, address, size, before, a5, s5, per)
    first, address, size, before = _pick(program, first, address, size, before, a6, s6, per)
    first, address, size, before = _pick(program, first, address, size, before, a7, s7, per)
    start = (program - first).to(tl.int64) * per
    count = tl.minimum(size - start, per)
    if width == 4:
        pointer = (address + start * 4).to(tl.pointer_type(tl.int32))
    else:
        pointer = (address + start).to(tl.pointer_type(tl.uint8))
    total = tl.zeros([step], dtype=tl.int64)
    for place in range(0, per, step):
        index = place + tl.arange(0, step).to(tl.int64)
        element = tl.load(pointer + index, index < count, other=0).to(tl.int64)
        mixed = (index + 1) * 0x1E3779B97F4A7C15
        mixed = (mixed ^ (mixed >> 30)) * 0x3F58476D1CE4E5B9
        mixed = (mixed ^ (mixed >> 27)) * 0x14D049BB133111EB
        total += element * (mixed | 1)
    found = tl.sum(total, 0) + count
    if compare:
        expected = tl.load(expected_pointer + offset + program)
        tl.store(flag_pointer, number.to(tl.int64), found != expected)
    else:
        tl.store(expected_pointer + offset + program, found)
