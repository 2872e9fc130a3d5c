"""VB-LoRA (https://arxiv.org/abs/2405.15179): LoRA's matrices, put together from a vector bank.

The bank is shared by all layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peft import VBLoRAConfig
from peft.tuners.vblora.layer import Linear

from dora_cache.recipes.banks import bank_hooks
from dora_cache.recipes.examples import TARGETS, Example
from dora_cache.recipes.hooks import LayerRecipe, parameter

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["RECIPE"]


def _depends_on(layer: Any, adapter: str, cast_to_fp32: bool = False) -> Iterator[object]:  # noqa: ARG001, FBT001, FBT002 - PEFT's signature
    yield parameter(layer, "vblora_logits_A", adapter)
    yield parameter(layer, "vblora_logits_B", adapter)
    yield parameter(layer, "vblora_vector_bank", adapter)
    yield layer.topk[adapter]


_hooks = bank_hooks(
    Linear,
    "VB-LoRA matrices",
    adapters="vblora_logits_A",
    bank="vblora_vector_bank",
    dropout="vblora_dropout",
    depends_on=_depends_on,
)

RECIPE = LayerRecipe(
    name="VB-LoRA",
    hooks={Linear: _hooks},
    adapters="vblora_logits_A",
    relies_on={
        "peft.tuners.vblora.layer:Linear._get_lora_matrices": "357510e3043b",
        "peft.tuners.vblora.layer:Linear._get_low_rank_matrix": "bd50355dd0fe",
        "peft.tuners.vblora.layer:Linear.forward": "4ed474b9506b",
    },
    examples=[
        Example(
            "VB-LoRA",
            lambda inputs, outputs: VBLoRAConfig(
                num_vectors=256 if min(inputs, outputs) >= 256 else 10,  # noqa: PLR2004
                vector_length=256 if inputs % 256 == outputs % 256 == 0 else 8,
                target_modules=TARGETS,
            ),
        )
    ],
)
