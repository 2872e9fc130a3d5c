"""Measure ways of running unmerged adapters, on any causal language model that PEFT wraps.

::

    ways = bench.standard_ways(max_bytes="8MiB")
    comparison = bench.compare(peft_model, input_ids, adapters=["a", "b"], ways=ways)
    rich.print(bench.table(comparison))
    more = bench.measure_phases(peft_model, adapters=["a", "b"], ways=ways, prefill=[(1, 512)])
"""

from dora_cache.bench.chart import draw
from dora_cache.bench.compiled import measure_compiled
from dora_cache.bench.machine import describe_machine
from dora_cache.bench.measure import (
    Comparison,
    Decoded,
    Result,
    Spread,
    compare,
    decode,
    logits,
    working_set,
)
from dora_cache.bench.models import plain_lora, random_dora, twin
from dora_cache.bench.phases import (
    Cell,
    Footprint,
    Phase,
    Phases,
    measure_phases,
    random_prompt,
)
from dora_cache.bench.profiling import Profile, profile
from dora_cache.bench.report import (
    as_dict,
    format_bytes,
    legend,
    memory_table,
    phase_of,
    phases_table,
    reasons,
    table,
)
from dora_cache.bench.shapes import SHAPES, shape_config, shaped
from dora_cache.bench.ways import (
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
    "SHAPES",
    "Cell",
    "Comparison",
    "Decoded",
    "Footprint",
    "Phase",
    "Phases",
    "Profile",
    "Result",
    "Running",
    "Spread",
    "Way",
    "as_dict",
    "compare",
    "decode",
    "describe_machine",
    "dora_caching_bytes",
    "draw",
    "format_bytes",
    "legend",
    "logits",
    "measure_compiled",
    "measure_phases",
    "memory_table",
    "phase_of",
    "phases_table",
    "plain_lora",
    "profile",
    "random_dora",
    "random_prompt",
    "reasons",
    "shape_config",
    "shaped",
    "standard_ways",
    "table",
    "twin",
    "with_cache",
    "working_set",
]
