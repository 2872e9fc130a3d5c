"""Products with matrices of which few entries are not zero.

PyTorch's sparse layouts are slow at a handful of tokens, lack the 16-bit types on some devices, or
warn of being unfinished. ``embedding_bag`` is the same sum, in every dtype: the rows of the input,
transposed, are the embeddings, and each output is a bag of them with weights.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, bincount, nn
from torch.nn.functional import embedding_bag

from dora_cache.recipes.peft_layers import base_layer

__all__ = ["compress", "fits", "multiply", "warn_of_hooks"]

Sparse = tuple[Tensor, Tensor, Tensor]


def compress(places: Tensor, values: Tensor, outputs: int, inputs: int) -> Sparse:
    """Sort the entries of a matrix row by row.

    Args:
        places: where they are in the flattened matrix, in any order.
        values: the entries.
        outputs: the number of rows.
        inputs: the number of columns.

    Returns:
        For each row the number of entries before it, the columns (both int32), and the values:
        what :func:`multiply` takes.
    """
    places, order = places.long().sort(stable=True)
    counts = bincount(places // inputs, minlength=outputs)
    return (counts.cumsum(0) - counts).int(), (places % inputs).int(), values[order]


def multiply(x: Tensor, starts: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    """Return ``x`` times the transposed matrix, as ``nn.functional.linear`` does.

    Args:
        x: shape (..., inputs), with at least one row, of the values' dtype.
        starts: see :func:`compress`.
        columns: likewise.
        values: likewise.
    """
    table = x.reshape(-1, x.shape[-1]).t()
    tokens = table.shape[1]
    if tokens == 1:
        table = table.expand(-1, 2)  # embeddings of one number miss the fast path on the CPU
    bags = embedding_bag(columns, table.contiguous(), starts, mode="sum", per_sample_weights=values)
    return bags[:, :tokens].t().reshape(*x.shape[:-1], -1)


def fits(base: Any, entries: int) -> bool:
    """Whether a delta with so many entries is worth keeping sparse beside a base layer.

    At an eighth of the weight's entries it takes a quarter of its bytes in float32.
    """
    return type(base) is nn.Linear and 8 * entries <= base.weight.numel()


def warn_of_hooks(layer: Any, module: Any) -> None:
    """Warn as PEFT does if the base layer has hooks: they do not run, as its forward does not.

    PEFT's warning keeps the layer alive for good, so it is not given where there is no need.

    Args:
        layer: the tuner layer.
        module: the module of PEFT's that has its class.
    """
    base = base_layer(layer)
    if (
        base._forward_hooks
        or base._forward_pre_hooks
        or base._backward_hooks
        or base._backward_pre_hooks
    ):
        module._warn_once_about_module_hooks(layer)
