"""What VB-LoRA and UniLoRA share: LoRA's two matrices, put together from a bank of all layers'."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.nn.functional import linear

from dora_cache.recipes.hooks import Hook, active_in, guard, memo, parameter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor

__all__ = ["bank_hooks"]


def bank_hooks(
    owner: type,
    name: str,
    *,
    adapters: str,
    bank: str,
    dropout: str,
    depends_on: Callable[..., Iterable[object]],
) -> list[Hook]:
    """Return hooks for ``_get_lora_matrices``, whose results are stored, and for ``forward``.

    The forward is PEFT's to the bit. It saves the properties that PEFT asks on its way, which take
    about as long as the matrices do.

    Args:
        owner: the class of layers.
        name: what the two matrices are called, for people.
        adapters: the attribute that has something for each adapter of the layer.
        bank: the attribute that has the bank, by adapter.
        dropout: the attribute that has the dropout, by adapter.
        depends_on: what the matrices depend on, see :func:`dora_cache.cached`.
    """

    def forward(layer: Any, x: Tensor) -> Tensor:
        found = [(name, parameter(layer, bank, name)) for name in active_in(layer, adapters)]
        dtype = x.dtype
        result: Tensor = layer.base_layer(x)
        dropouts = layer._modules[dropout]._modules
        for adapter, vectors in found:
            first, second = layer._get_lora_matrices(adapter)
            x = x.to(vectors.dtype)
            inner = linear(dropouts[adapter](x), first)
            result = result + linear(inner, second)
        return result.to(dtype)

    matrices = memo(owner, "_get_lora_matrices", name, adapter="adapter", depends_on=depends_on)
    return [guard(forward, stored=True), matrices]
