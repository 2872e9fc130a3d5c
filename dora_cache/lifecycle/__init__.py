"""Events that void stored values: mode switches, moves, adapter operations, steps, writers."""

from dora_cache.lifecycle.arrivals import follow_arrivals
from dora_cache.lifecycle.followers import Followers, wrap
from dora_cache.lifecycle.modes import follow_modes
from dora_cache.lifecycle.observe import Observer, observe, plain_class, reduce_as_plain
from dora_cache.lifecycle.optimizers import follow_optimizers
from dora_cache.lifecycle.refills import follow_refills
from dora_cache.lifecycle.registrations import follow_registrations
from dora_cache.lifecycle.writers import follow_writers

__all__ = [
    "Followers",
    "Observer",
    "follow_arrivals",
    "follow_modes",
    "follow_optimizers",
    "follow_refills",
    "follow_registrations",
    "follow_writers",
    "observe",
    "plain_class",
    "reduce_as_plain",
    "wrap",
]
