"""Events that void stored values: mode switches, moves, adapter operations, optimizer steps."""

from dora_cache.lifecycle.followers import Followers
from dora_cache.lifecycle.observe import Observer, observe, plain_class, reduce_as_plain
from dora_cache.lifecycle.optimizers import follow_optimizers
from dora_cache.lifecycle.refills import follow_refills
from dora_cache.lifecycle.registrations import follow_registrations

__all__ = [
    "Followers",
    "Observer",
    "follow_optimizers",
    "follow_refills",
    "follow_registrations",
    "observe",
    "plain_class",
    "reduce_as_plain",
]
