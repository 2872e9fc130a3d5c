"""Measure ways of running unmerged adapters, on any causal language model that PEFT wraps.

::

    ways = bench.standard_ways(max_bytes="8MiB")
    comparison = bench.compare(peft_model, input_ids, adapters=["a", "b"], ways=ways)
    rich.print(bench.table(comparison))
    more = bench.measure_phases(peft_model, adapters=["a", "b"], ways=ways, prefill=[(1, 512)])
"""

from dora_cache.lab.bench.chart import draw
from dora_cache.lab.bench.compiled import measure_compiled
from dora_cache.lab.bench.measure import (
    Comparison,
    Decoded,
    Result,
    Spread,
    compare,
    decode,
    figure,
    logits,
    working_set,
)
from dora_cache.lab.bench.mixed import (
    Check,
    Limit,
    Mixed,
    Mixture,
    bandwidth,
    measure_mixed,
    mixed_ways,
    mixture,
)
from dora_cache.lab.bench.phases import (
    Cell,
    Footprint,
    Phase,
    Phases,
    measure_phases,
    random_prompt,
)
from dora_cache.lab.bench.profiling import Profile, profile
from dora_cache.lab.bench.report import (
    as_dict,
    legend,
    memory_table,
    phase_of,
    phases_table,
    reasons,
    table,
)
from dora_cache.lab.bench.ways import (
    BASE,
    LORA,
    MERGED,
    PEFT,
    PEFT_CACHING,
    Running,
    Way,
    dora_caching_bytes,
    standard_ways,
    with_cache,
)

__all__ = [
    "BASE",
    "LORA",
    "MERGED",
    "PEFT",
    "PEFT_CACHING",
    "Cell",
    "Check",
    "Comparison",
    "Decoded",
    "Footprint",
    "Limit",
    "Mixed",
    "Mixture",
    "Phase",
    "Phases",
    "Profile",
    "Result",
    "Running",
    "Spread",
    "Way",
    "as_dict",
    "bandwidth",
    "compare",
    "decode",
    "dora_caching_bytes",
    "draw",
    "figure",
    "legend",
    "logits",
    "measure_compiled",
    "measure_mixed",
    "measure_phases",
    "memory_table",
    "mixed_ways",
    "mixture",
    "phase_of",
    "phases_table",
    "profile",
    "random_prompt",
    "reasons",
    "standard_ways",
    "table",
    "with_cache",
    "working_set",
]
