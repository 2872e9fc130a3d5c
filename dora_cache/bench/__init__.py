"""Measure ways of running unmerged adapters, on any causal language model that PEFT wraps.

::

    ways = bench.standard_ways(max_bytes="8MiB")
    comparison = bench.compare(peft_model, input_ids, adapters=["a", "b"], ways=ways)
    rich.print(bench.table(comparison))
"""

from dora_cache.bench.chart import draw
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
from dora_cache.bench.report import as_dict, format_bytes, legend, table
from dora_cache.bench.ways import (
    BASE,
    LORA,
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
    "PEFT",
    "PEFT_CACHING",
    "Comparison",
    "Decoded",
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
    "plain_lora",
    "random_dora",
    "standard_ways",
    "table",
    "twin",
    "with_cache",
    "working_set",
]
