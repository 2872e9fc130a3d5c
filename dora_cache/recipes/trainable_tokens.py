"""TrainableTokens: an embedding of which a few rows are replaced.

PEFT copies all of it at each forward. Here the outputs are looked up in the base weight, and those
of replaced tokens in the rows that replace them, which gives the same bits. Heads that are tied to
the embedding multiply by all rows, so they need the copy; under ``numerics="fast"`` they too do
without.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from peft import TrainableTokensConfig
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from dora_cache.core.decorator import cached
from dora_cache.recipes.bases import require_dense
from dora_cache.recipes.entry import text_of
from dora_cache.recipes.examples import BOTH, TARGETS, Example, head
from dora_cache.recipes.examples import embedding as embedding_base
from dora_cache.recipes.hooks import LayerRecipe, UnusualError, active_in, guard, parameter

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["RECIPE"]


def _depends_on(layer: Any, *adapters: str) -> Iterator[object]:
    yield layer._modules["base_layer"]._parameters["weight"]
    for adapter in adapters:
        yield parameter(layer, "trainable_tokens_delta", adapter)
        yield text_of(layer.token_indices[adapter])


@cached("TrainableTokens rows", adapter="adapters", depends_on=_depends_on)
def _rows(layer: Any, *adapters: str) -> tuple[Tensor, Tensor]:
    """Derive the replaced tokens, shape (n,), and the rows that replace them, shape (n, inputs).

    Raises:
        UnusualError: there are none, or one is replaced twice.
        ValueError: two adapters replace the same token (PEFT's error).
    """
    layer._check_overlapping_tokens(list(adapters))
    weight = layer.base_layer.weight
    tokens = [token for adapter in adapters for token in layer.token_indices[adapter]]
    if not tokens or len(set(tokens)) < len(tokens) or min(tokens) < 0:
        msg = "no token, one that is replaced twice, or a negative one"
        raise UnusualError(msg)
    rows = [layer.trainable_tokens_delta[adapter].to(weight) for adapter in adapters]
    return torch.tensor(tokens, device=weight.device), torch.cat(rows)


@cached("TrainableTokens slots", adapter="adapters", depends_on=_depends_on)
def _slots(layer: Any, *adapters: str) -> tuple[Tensor, Tensor]:
    """Derive which row replaces each token, counted from 1, 0 for none; and the rows.

    Their shapes are (all tokens,) and (n, inputs).
    """
    tokens, rows = _rows.__wrapped__(layer, *adapters)
    slots = torch.zeros(layer.base_layer.weight.shape[:1], dtype=torch.int32, device=rows.device)
    numbers = torch.arange(1, len(tokens) + 1, dtype=torch.int32, device=rows.device)
    return slots.index_copy(0, tokens, numbers), rows


@cached("TrainableTokens weight", adapter="adapters", depends_on=_depends_on)
def _weight(layer: Any, *adapters: str) -> Tensor:
    """Derive the weight with its rows replaced; shape (outputs, inputs)."""
    layer._check_overlapping_tokens(list(adapters))
    weight: Tensor = layer.get_merged_weights(adapters)
    return weight


def _forward(layer: Any, x: Tensor) -> Tensor | None:
    adapters = _adapters(layer)
    if not adapters:
        return None
    if isinstance(layer._modules["base_layer"], nn.Embedding):
        return _embed(layer, x, adapters)
    return linear(x, _weight(layer, *adapters))


def _forward_fast(layer: Any, x: Tensor) -> Tensor | None:
    adapters = _adapters(layer)
    if not adapters:
        return None
    base = layer._modules["base_layer"]
    if isinstance(base, nn.Embedding):
        return _embed(layer, x, adapters)
    tokens, rows = _rows(layer, *adapters)
    return linear(x, base.weight).index_copy_(-1, tokens, linear(x, rows))


def _adapters(layer: Any) -> tuple[str, ...]:
    """Return the active adapters.

    Raises:
        UnusualError: the base layer is not one of the usual ones, or lacks an active adapter.
    """
    base = layer._modules["base_layer"]
    if not isinstance(base, nn.Embedding | nn.Linear):
        msg = f"the base layer is a {type(base).__name__}"
        raise UnusualError(msg)
    if type(base._parameters.get("weight")) is not nn.Parameter:
        require_dense(layer)
    adapters = tuple(active_in(layer, "trainable_tokens_delta"))
    if len(adapters) != len(layer.active_adapters):
        msg = "the layer lacks an active adapter"  # of which PEFT has something to say
        raise UnusualError(msg)
    return adapters


def _embed(layer: Any, x: Tensor, adapters: tuple[str, ...]) -> Tensor:
    base = layer._modules["base_layer"]
    if base.max_norm is not None:
        msg = "a lookup that shortens rows"
        raise UnusualError(msg)
    slots, rows = _slots(layer, *adapters)
    result = embedding(x, base.weight)
    slot = slots.index_select(0, x.reshape(-1))
    flat = result.view(-1, result.shape[-1])
    chosen = rows.index_select(0, (slot - 1).clamp_min(0))
    torch.where((slot > 0).unsqueeze(1), chosen, flat, out=flat)
    scale = layer._get_embed_scale()
    return result if scale is None else result * scale.to(result.dtype)


def _warm(layer: Any, adapter: str) -> object:
    if isinstance(layer.base_layer, nn.Embedding):
        return None if layer.base_layer.max_norm is not None else _slots(layer, adapter)
    return _weight(layer, adapter)


def _warm_fast(layer: Any, adapter: str) -> object:
    if isinstance(layer.base_layer, nn.Embedding):
        return _warm(layer, adapter)
    return _rows(layer, adapter)


def _config(first: int) -> Any:
    def make(inputs: int, outputs: int) -> TrainableTokensConfig:
        tokens = range(first, min(inputs, outputs), max(2, inputs // 16))
        return TrainableTokensConfig(
            token_indices=list(tokens), init_weights=False, target_modules=TARGETS
        )

    return make


RECIPE = LayerRecipe(
    name="TrainableTokens",
    hooks={TrainableTokensLayer: [guard(_forward, warm=_warm)]},
    fast={TrainableTokensLayer: [guard(_forward_fast, warm=_warm_fast)]},
    adapters="trainable_tokens_delta",
    relies_on={
        "peft.tuners.trainable_tokens.layer:TrainableTokensLayer.forward": "2f85472c1c4e",
        "peft.tuners.trainable_tokens.layer:TrainableTokensLayer.forward_adapters": "82145e2a0730",
        "peft.tuners.trainable_tokens.layer:TrainableTokensLayer.get_merged_weights": (
            "406c0b4533b3"
        ),
        "peft.tuners.trainable_tokens.layer:TrainableTokensLayer._check_overlapping_tokens": (
            "d2a591035262"
        ),
        "peft.tuners.trainable_tokens.layer:TrainableTokensLayer.update_layer": "cfa0acc3f4f7",
    },
    examples=[
        Example("TrainableTokens", _config(0), embedding_base, second=_config(1)),
        Example("TrainableTokens, head", _config(0), head, second=_config(1), numerics=BOTH),
    ],
)
