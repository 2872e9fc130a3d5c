"""Events that invalidate stored values: mode switches, moves, adapter operations, writers."""

from dora_cache.lifecycle.arrivals import follow_arrivals
from dora_cache.lifecycle.followers import Followers, wrap
from dora_cache.lifecycle.modes import follow_modes
from dora_cache.lifecycle.observe import (
    Observer,
    observe,
    plain_class,
    reduce_as_plain,
)
from dora_cache.lifecycle.offloading import (
    bring,
    is_bare,
    is_offloaded,
    only_moves,
    stays_in_place,
    weights_in_place,
)
from dora_cache.lifecycle.optimizers import follow_optimizers
from dora_cache.lifecycle.refills import follow_refills
from dora_cache.lifecycle.registrations import follow_registrations
from dora_cache.lifecycle.writers import follow_writers

__all__ = [
    "Followers",
    "Observer",
    "bring",
    "follow_arrivals",
    "follow_modes",
    "follow_optimizers",
    "follow_refills",
    "follow_registrations",
    "follow_writers",
    "is_bare",
    "is_offloaded",
    "observe",
    "only_moves",
    "plain_class",
    "reduce_as_plain",
    "stays_in_place",
    "weights_in_place",
    "wrap",
]
