"""Ask of any cache for DoRA whether its outputs stay right, operation by operation.

::

    trial = run_trial(named("AdamW step, fused"), attached(backend="lru", max_bytes="1MiB"))
    assert trial.verdict.word == "fresh"
"""

from dora_cache.lab.freshness.operations import OPERATIONS, RAW, Operation, named
from dora_cache.lab.freshness.scene import ADAPTERS, KINDS, LAYERS, Net, Pick, Scene
from dora_cache.lab.freshness.trial import DORA_CACHING, Trial, Verdict, attached, run_trial

__all__ = [
    "ADAPTERS",
    "DORA_CACHING",
    "KINDS",
    "LAYERS",
    "OPERATIONS",
    "RAW",
    "Net",
    "Operation",
    "Pick",
    "Scene",
    "Trial",
    "Verdict",
    "attached",
    "named",
    "run_trial",
]
