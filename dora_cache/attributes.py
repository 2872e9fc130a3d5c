"""The attributes that this package sets on others' modules, in their ``__dict__``."""

__all__ = ["FACE", "OBSERVER", "OWN_ATTRIBUTES", "POOL", "POOLED", "SLOT"]

SLOT = "_dora_cache_binding"
"""Where an attached owner keeps its :class:`dora_cache.core.binding.Binding`.

Views of a layer for compiled code have a :class:`dora_cache.recipes.compiled.Face` there, and
copies for export have their constants: see :mod:`dora_cache.recipes.baking`.
"""

FACE = "_dora_cache_face"
"""Where compiled code begins to look."""

OBSERVER = "_dora_cache_observer"
"""Where an observed module keeps its :class:`dora_cache.lifecycle.Observer`."""

POOL = "_dora_cache_pool"
"""Where a model has the pool of its adapters."""

POOLED = "_dora_cache_pooled"
"""Where a module has its place in a pool."""

OWN_ATTRIBUTES = (SLOT, FACE, OBSERVER, POOL, POOLED)
"""All of them."""
