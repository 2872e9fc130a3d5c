"""UniLoRA (https://arxiv.org/abs/2506.00799): LoRA's matrices, read out of one vector.

The vector is shared by all layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peft import UniLoraConfig
from peft.tuners.unilora.layer import Linear

from dora_cache.recipes.banks import bank_hooks
from dora_cache.recipes.examples import TARGETS, Example
from dora_cache.recipes.hooks import LayerRecipe, parameter

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["RECIPE"]

_BUFFERS = ("unilora_indices_A", "unilora_indices_B", "unilora_scales_A", "unilora_scales_B")


def _depends_on(layer: Any, adapter: str, cast_to_fp32: bool = False) -> Iterator[object]:  # noqa: ARG001, FBT001, FBT002 - PEFT's signature
    yield parameter(layer, "unilora_theta_d", adapter)
    modules = layer._modules
    for name in _BUFFERS:
        yield modules[name]._buffers[adapter]


_hooks = bank_hooks(
    Linear,
    "UniLoRA matrices",
    adapters="unilora_indices_A",
    bank="unilora_theta_d",
    dropout="unilora_dropout",
    depends_on=_depends_on,
)

RECIPE = LayerRecipe(
    name="UniLoRA",
    hooks={Linear: _hooks},
    adapters="unilora_indices_A",
    relies_on={
        "peft.tuners.unilora.layer:Linear._get_lora_matrices": "db1d55913abd",
        "peft.tuners.unilora.layer:Linear.forward": "f7b7e50bee5b",
    },
    examples=[
        Example(
            "UniLoRA",
            lambda inputs, outputs: UniLoraConfig(
                theta_d_length=256 if min(inputs, outputs) >= 256 else 20,  # noqa: PLR2004
                target_modules=TARGETS,
            ),
        )
    ],
)
