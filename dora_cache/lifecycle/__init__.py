"""Events that void stored values: mode switches, moves, adapter operations, optimizer steps."""

from dora_cache.lifecycle.observe import Observer, observe, plain_class, reduce_as_plain
from dora_cache.lifecycle.optimizers import follow_optimizers

__all__ = ["Observer", "follow_optimizers", "observe", "plain_class", "reduce_as_plain"]
