"""Rotating an input by a block-diagonal matrix, block by block."""

from __future__ import annotations

import torch
from torch import Tensor

from dora_cache.reasons import Reason
from dora_cache.recipes.hooks import UnusualError

__all__ = ["rotate"]


def rotate(x: Tensor, blocks: Tensor, count: int) -> Tensor:
    """Return ``x @ block_diag(*blocks)``, of x's shape.

    Equal to the bit to ``einsum("...rk,rkc->...rc", x.unflatten(-1, (count, -1)), blocks)``, which
    comes to the same product of matrices.

    Args:
        x: shape (..., count * size), with two dimensions or more.
        blocks: shape (count, size, size), or (1, size, size) for the same block everywhere.
        count: how many blocks there are.

    Raises:
        UnusualError: the shapes do not fit, or there is nothing to multiply.
    """
    size = blocks.shape[-1]
    shape = x.shape
    if len(shape) < 2 or shape[-1] != count * size or not x.numel():  # noqa: PLR2004
        msg = f"an input of shape {tuple(shape)}"
        raise UnusualError(msg, Reason.UNUSUAL_INPUT)
    parts = x.reshape(-1, count, size).transpose(0, 1)
    return torch.bmm(parts, blocks.expand(count, size, size)).transpose(0, 1).reshape(shape)
