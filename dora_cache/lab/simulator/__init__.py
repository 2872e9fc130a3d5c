"""Simulate eviction policies on traces, and compare them with the offline optimum.

::

    traces = standard_traces()
    scores = simulate(traces, policies())
    rich.print(report.table(scores))
"""

from dora_cache.lab.simulator.bounds import optimum
from dora_cache.lab.simulator.scoring import SHARES, Score, play, policies, simulate
from dora_cache.lab.simulator.traces import (
    TUNERS,
    Layer,
    Trace,
    make_trace,
    requests,
    standard_traces,
    zipf,
)

__all__ = [
    "SHARES",
    "TUNERS",
    "Layer",
    "Score",
    "Trace",
    "make_trace",
    "optimum",
    "play",
    "policies",
    "requests",
    "simulate",
    "standard_traces",
    "zipf",
]
