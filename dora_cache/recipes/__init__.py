"""What is worth storing, one small module for each family of adapters.

To add an adapter kind, write a module with a ``RECIPE`` (see ``peft_layers.Recipe``; ``loha.py`` is
the shortest example) and add its row to ``RECIPES``.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from dora_cache.cache import AdapterCache
    from dora_cache.recipes.peft_layers import Recipe

__all__ = ["RECIPES", "apply_recipes"]

RECIPES = {
    "DoRA": "dora_cache.recipes.dora",
    "LoHa": "dora_cache.recipes.loha",
    "OFT": "dora_cache.recipes.oft",
}
"""Adapter kinds by name, and the module that has the recipe; loaded when a model is attached."""


def apply_recipes(cache: AdapterCache, model: nn.Module) -> int:
    """Cache every PEFT layer in a model that there is a recipe for.

    Adapters and layers that PEFT adds to the model later are cached as well.

    Returns:
        How many layers are cached.
    """
    if "peft" not in sys.modules:  # then the model has no PEFT layers, and PEFT is slow to import
        return 0
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

    from dora_cache.recipes.hotswap import follow_hotswap
    from dora_cache.recipes.peft_layers import follow_layer, follow_tuner

    recipes: list[Recipe] = [importlib.import_module(name).RECIPE for name in RECIPES.values()]

    def scan() -> int:
        layers = [part for part in model.modules() if isinstance(part, BaseTunerLayer)]
        return sum(
            recipe.apply(cache, layer)
            for layer in layers
            for recipe in recipes
            if recipe.applies(layer)
        )

    found = scan()
    if found:
        # Merging writes into base weights past their version counters, and layers may share them.
        other = _Other(recipes)
        for part in list(model.modules()):
            if isinstance(part, BaseTunerLayer):
                follow_layer(cache, part, other)
        follow_hotswap(cache)
        for part in list(model.modules()):
            if isinstance(part, BaseTuner):
                follow_tuner(cache, part, scan)
    return found


class _Other:
    """Stands in for a recipe where a layer has nothing to cache, until an adapter is added."""

    name = "other"

    def __init__(self, recipes: list[Recipe]) -> None:
        self.recipes = recipes

    def applies(self, layer: nn.Module) -> bool:
        return any(recipe.applies(layer) for recipe in self.recipes)

    def apply(self, cache: AdapterCache, layer: nn.Module) -> bool:
        applied = [recipe.apply(cache, layer) for recipe in self.recipes if recipe.applies(layer)]
        return any(applied)
