"""What PyTorch and PEFT offer to change a derived value's sources, or how the value is used.

Each operation works on a :class:`~dora_cache.lab.freshness.scene.Scene`, through PyTorch's and
PEFT's interfaces alone: none knows of a cache. To add one, write a function and decorate it.
"""

from dora_cache.lab.freshness.operations import (  # noqa: I001 - the order in which they are listed
    weights,
    base,
    adapters,
    usage,
    transforms,
    raw,
)
from dora_cache.lab.freshness.operations.registry import OPERATIONS, RAW, Operation, named

__all__ = [
    "OPERATIONS",
    "RAW",
    "Operation",
    "adapters",
    "base",
    "named",
    "raw",
    "transforms",
    "usage",
    "weights",
]
