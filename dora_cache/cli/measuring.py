"""Measure behind a progress bar, then show and save what was found."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from dora_cache.cli.console import progress_bar, quiet
from dora_cache.cli.output import writing
from dora_cache.lab import bench
from dora_cache.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import torch
    from rich.console import Console

__all__ = ["capped", "measure", "measure_more", "save", "show", "show_more"]

_LEGEND = (
    "Medians over all rounds, with the quartiles; times relative to plain LoRA's are of the same "
    "round. Switch: from set_adapter() to the end of a forward, less a forward. Warm-up: deriving "
    "all values of an adapter; for PEFT uncached, what every forward takes more than LoRA's. "
    "Memory: weights, adapters, and what is held for one adapter; on a GPU also the peak."
)


def measure(
    model: Any,
    input_ids: torch.Tensor,
    adapters: Sequence[str],
    ways: Sequence[bench.Way],
    *,
    tokens: int,
    rounds: int,
) -> bench.Comparison:
    """Compare the ways of running a PEFT model; see :func:`dora_cache.lab.bench.compare`."""
    with progress_bar("measuring", 1) as move, quiet():

        def step(_: str, done: int, total: int) -> None:
            move(done, total)

        return bench.compare(
            model,
            input_ids,
            adapters=adapters,
            ways=ways,
            tokens=tokens,
            rounds=rounds,
            on_step=step,
        )


def measure_more(
    model: Any,
    input_ids: torch.Tensor,
    adapters: Sequence[str],
    ways: Sequence[bench.Way],
    *,
    prefill: Sequence[tuple[int, int]],
    rounds: int,
    compiled: int,
) -> bench.Phases:
    """Measure the other phases; see :func:`dora_cache.lab.bench.measure_phases`.

    Args:
        model: the PEFT model.
        input_ids: the prompt of compiled decoding.
        adapters: names.
        ways: of running.
        prefill: batch sizes and lengths.
        rounds: how often each is measured.
        compiled: tokens of each compiled generation; 0 for none.
    """
    with progress_bar("measuring phases", 1) as move, quiet():

        def step(_: str, done: int, total: int) -> None:
            move(done, total)

        found = bench.measure_phases(
            model, adapters=adapters, ways=ways, prefill=prefill, rounds=rounds, on_step=step
        )
    if not compiled:
        return found
    with progress_bar("compiling and measuring", 1) as move, quiet():
        phase = bench.measure_compiled(
            model,
            input_ids,
            adapter=adapters[0],
            ways=ways,
            tokens=compiled,
            rounds=rounds,
            on_step=step,
        )
    return bench.Phases((*found.phases, phase), found.memory)


def show_more(
    console: Console,
    phases: Sequence[bench.Phase],
    memory: Mapping[str, bench.Footprint],
    labels: Mapping[str, str],
) -> None:
    """Print all phases, what each way weighs, and what that means."""
    console.print()
    console.print(bench.phases_table(phases, labels))
    for reason in bench.reasons(phases, labels):
        console.print(reason, markup=False)
    console.print()
    console.print(bench.memory_table(memory, labels))
    console.print(_LEGEND + "\n", markup=False)


def capped(cap: int | str | None, sizes: dict[str, int]) -> str:
    """Say in a sentence what the adapters need, and what the cap lets them have."""
    needed = sum(sizes.values())
    each = ", ".join(f"{name} {format_bytes(size)}" for name, size in sizes.items())
    text = f"With nothing evicted, the adapters' values take {format_bytes(needed)} ({each})"
    if not isinstance(cap, int):
        return f"{text}."
    text = f"{text}; the lru cap is {format_bytes(cap)}, so "
    if cap >= needed:
        return f"{text}all of them fit."
    if cap >= max(sizes.values()):
        return (
            f"{text}one adapter fits at a time: switching derives values again, "
            "and then tokens hit."
        )
    return (
        f"{text}not even one adapter fits: a forward visits the layers in a cycle, which makes an "
        "LRU evict each value just before its next use."
    )


def show(console: Console, comparison: bench.Comparison, cap: int | str | None) -> None:
    """Print the table, how it came about, and what the cap means."""
    console.print(bench.table(comparison))
    console.print(bench.legend(comparison) + "\n", markup=False)
    console.print(capped(cap, comparison.working_set), markup=False)


def save(
    console: Console,
    comparison: bench.Comparison,
    folder: Path,
    name: str,
    *,
    title: str,
    more: dict[str, Any],
) -> None:
    """Write ``name.json`` and ``name.png``, and say where they are.

    Args:
        console: to say it on.
        comparison: what was measured.
        folder: exists already.
        name: of the files, without suffix.
        title: of the chart.
        more: what else goes into the JSON file, at its top level.

    Raises:
        CliError: a file cannot be written.
    """
    machine = more["machine"]
    where = f"{machine['cpu']}, {machine['threads']} threads"
    if machine["device"] != "cpu":
        where = machine["device"]
    subtitle = f"greedy decode, batch 1, {where}, torch {machine['torch']}, peft {machine['peft']}"
    data, chart = folder / f"{name}.json", folder / f"{name}.png"
    text = json.dumps(more | bench.as_dict(comparison), indent=2, ensure_ascii=False)
    with writing(data, "folder as --out"):
        data.write_text(text + "\n", encoding="utf-8")
    console.print(f"numbers: {data}", soft_wrap=True, markup=False)
    with writing(chart, "folder as --out"):
        bench.draw(comparison, chart, title=title, subtitle=subtitle)
    console.print(f"chart:   {chart}", soft_wrap=True, markup=False)
