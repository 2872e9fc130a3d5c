"""What to store for each kind of adapter: one small module for each family.

To add an adapter kind, write a module with a ``RECIPE`` (most are a ``hooks.LayerRecipe``;
``fourierft.py`` is a short example) and add its row to ``RECIPES``. From another package, use
:func:`register_recipe` or an entry point.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, NamedTuple

from dora_cache.errors import ConfigError, warn_once

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from dora_cache.core.engine import Engine
    from dora_cache.recipes.peft_layers import Recipe

__all__ = [
    "ENTRY_POINT_GROUP",
    "LIBRARIES",
    "RECIPES",
    "Library",
    "Recipes",
    "load_recipes",
    "register_recipe",
]

RECIPES = {
    "BOFT": "dora_cache.recipes.boft",
    "C3A": "dora_cache.recipes.c3a",
    "DeLoRA": "dora_cache.recipes.delora",
    "DoRA": "dora_cache.recipes.dora",
    "FourierFT": "dora_cache.recipes.fourierft",
    "FRoD": "dora_cache.recipes.frod",
    "GLoRA": "dora_cache.recipes.glora",
    "HiRA": "dora_cache.recipes.hira",
    "HRA": "dora_cache.recipes.hra",
    "LoHa": "dora_cache.recipes.loha",
    "LoKr": "dora_cache.recipes.lokr",
    "LoRA on attention": "dora_cache.recipes.lora_attention",
    "LoRA on parameters": "dora_cache.recipes.lora_parameters",
    "MiSS": "dora_cache.recipes.miss",
    "OFT": "dora_cache.recipes.oft",
    "OSF": "dora_cache.recipes.osf",
    "PEANuT": "dora_cache.recipes.peanut",
    "Poly": "dora_cache.recipes.poly",
    "prompt encoders": "dora_cache.recipes.prompts",
    "PSOFT": "dora_cache.recipes.psoft",
    "RandLoRA": "dora_cache.recipes.randlora",
    "SHiRA": "dora_cache.recipes.shira",
    "Super-Tuning": "dora_cache.recipes.supertuning",
    "TrainableTokens": "dora_cache.recipes.trainable_tokens",
    "UniLoRA": "dora_cache.recipes.unilora",
    "VB-LoRA": "dora_cache.recipes.vblora",
    "WaveFT": "dora_cache.recipes.waveft",
}
"""PEFT's adapter kinds by name, and the module that has the recipe."""


class Library(NamedTuple):
    """A library of adapter layers.

    Attributes:
        package: its name as it is imported. Nothing of it is loaded unless it has been.
        recipes: adapter kinds by name, and the module that has the recipe; loaded when a model is
            attached.
        layers: the module that knows its layers: has ``layers_in(model)``, which returns those of a
            model, other modules included, and ``follow_model(cache, model, apply)``, called once
            recipes are applied; see :mod:`dora_cache.recipes.peft_layers`.
    """

    package: str
    recipes: Mapping[str, str]
    layers: str

    @property
    def is_imported(self) -> bool:
        """Whether anybody has imported it; else no model has its layers, and it may be slow."""
        return sys.modules.get(self.package) is not None


LIBRARIES = (
    Library("peft", RECIPES, "dora_cache.recipes.peft_layers"),
    Library(
        "lycoris",
        {"LyCORIS": "dora_cache.recipes.lycoris_modules"},
        "dora_cache.recipes.lycoris_modules",
    ),
)
"""The libraries that there are recipes for."""

ENTRY_POINT_GROUP = "dora_cache.recipes"
"""Installed packages offer recipes under it: a name, and ``package.module:RECIPE``."""

_registered: dict[str, Recipe] = {}


def register_recipe(recipe: Recipe) -> Recipe:
    """Have a recipe applied to every model that is attached from now on.

    It comes before the built-in ones, so it may take layers over from them. A recipe of the same
    name that was registered before is replaced.

    Args:
        recipe: see :class:`dora_cache.recipes.peft_layers.Recipe`.

    Returns:
        The recipe, so that ``RECIPE = register_recipe(...)`` can be written.

    Raises:
        ConfigError: it lacks a name, a method, or what it relies on.
    """
    _check(recipe)
    _registered[recipe.name] = recipe
    return recipe


def load_recipes(cache: Engine | None = None) -> list[Recipe]:
    """Return every recipe there is: registered ones, installed ones, built-in ones.

    Of several by one name the first in this order counts.

    Args:
        cache: declines what cannot be loaded, so that attaching goes on, and needs no recipes for
            libraries that have not been imported. Without it, what cannot be loaded is an error,
            and the recipes for all libraries that are installed are returned.
    """
    found = dict(_registered)
    origins: dict[str, str] = {}
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        origin = entry.dist.name if entry.dist else entry.value
        if origins.setdefault(entry.name, origin) != origin:
            warn_once(
                f"the recipe {entry.name!r} of {origin} ({entry.value}) is not used, since "
                f"{origins[entry.name]} has one of that name as well: give its entry point another "
                "name, or write dora_cache.register_recipe(...) with what it names"
            )
        _load(found, entry.name, entry.load, cache)
    for library in LIBRARIES:
        wanted = library.is_imported or cache is None
        if wanted and importlib.util.find_spec(library.package) is not None:
            for name, where in library.recipes.items():
                _load(found, name, lambda where=where: importlib.import_module(where).RECIPE, cache)
    return list(found.values())


def _load(found: dict[str, Recipe], name: str, load: Any, cache: Engine | None) -> None:
    if name in found:
        return
    try:
        recipe = load()
        _check(recipe)
    except Exception as error:  # whatever is wrong with it, models are attached without it
        if cache is None:
            raise
        cache.decline(name, "recipe", f"it cannot be loaded: {type(error).__name__}: {error}")
        return
    found[name] = recipe


def _check(recipe: Any) -> None:
    for attribute in ("name", "relies_on", "applies", "apply"):
        if not hasattr(recipe, attribute):
            msg = (
                f"{recipe!r} is no recipe, it has no {attribute!r}: give a "
                "dora_cache.recipes.hooks.LayerRecipe, or an object with name, relies_on, "
                "applies(layer) and apply(cache, layer)"
            )
            raise ConfigError(msg)


class Recipes:
    """The recipes of one cache, applied to what comes into its models; it holds no cache."""

    def __init__(self) -> None:
        self._recipes: list[Recipe] = []
        self._libraries: list[Any] = []  # that the recipes are for
        self._sound: dict[str, bool] = {}

    def apply(self, cache: Engine, model: nn.Module) -> int:
        """Cache every adapter layer in a model that there is a recipe for.

        A recipe that was written for other methods than the installed library has is declined.

        Returns:
            How many layers are cached.
        """
        there = [importlib.import_module(one.layers) for one in LIBRARIES if one.is_imported]
        if len(there) > len(self._libraries):
            self._recipes, self._libraries = load_recipes(cache), there
        layers = {id(one): one for library in there for one in library.layers_in(model)}
        found = sum(self._apply(cache, layer) for layer in layers.values())
        for library in there:
            library.follow_model(cache, model, self._apply)
        return found

    def _apply(self, cache: Engine, module: nn.Module) -> bool:
        fitting = [
            one for one in self._recipes if one.applies(module) and self._is_sound(cache, one)
        ]
        return any([recipe.apply(cache, module) for recipe in fitting])  # noqa: C419 - all of them

    def _is_sound(self, cache: Engine, recipe: Recipe) -> bool:
        from dora_cache.recipes.fingerprints import changed

        sound = self._sound.get(recipe.name)
        if sound is None:  # looked at when a layer needs it: reading sources takes time
            other = changed(recipe.relies_on)
            sound = self._sound[recipe.name] = not other
            if other:
                packages = " and ".join({path.partition(".")[0]: None for path in other})
                reason = f"this {packages} has another {', '.join(other)} than it was written for"
                cache.decline(recipe.name, "recipe", reason)
        return sound
