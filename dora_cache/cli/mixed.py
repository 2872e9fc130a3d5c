"""``dora-cache bench --mixed``: batches of which each row has an adapter of its own."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from dora_cache.cli.choosing import choose_ways
from dora_cache.cli.console import CliError, progress_bar, quiet, spinner
from dora_cache.cli.options import DTYPES
from dora_cache.cli.output import writing
from dora_cache.lab import bench
from dora_cache.lab.machine import describe_machine
from dora_cache.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from dora_cache.cli.options import Dtype

__all__ = ["FILE", "mixed", "parse_numbers"]

FILE = "mixed.json"
_LEGEND = (
    "Medians, with the quartiles; times relative to those of one LoRA adapter for all rows are of "
    "the same turn. Decode and CUDA graph: a step of the whole batch, one token a row."
)


def parse_numbers(option: str, text: str) -> tuple[int, ...]:
    """Read whole numbers such as ``1,4,16``.

    Raises:
        CliError: it is something else.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise CliError(f"{option} {text!r} is no list of numbers: write, e.g., {option} 1,4,16")
    return tuple(dict.fromkeys(map(int, parts)))


def mixed(
    console: Console,
    base: Any,
    counts: Sequence[int],
    folder: Path,
    *,
    rank: int,
    ranks: Sequence[int],
    dtype: Dtype | None,
    ways: str | None,
    about: dict[str, Any],
    graphs: bool,
    tokens: int,
    rounds: int,
    seconds: float | None,
    prompt: int,
) -> None:
    """Measure batches of several sizes, print what was found, and write it to a folder.

    Args:
        console: to print on.
        base: the model.
        counts: rows of the batches, and adapters.
        folder: exists already.
        rank: of LoRA and DoRA adapters.
        ranks: of further DoRA adapters, in turn.
        dtype: of adapters; by default the model's.
        ways: those that are wanted, by name; by default all.
        about: what else goes into the file.
        graphs: see :func:`dora_cache.lab.bench.measure_mixed`, also for what follows.
        tokens: likewise.
        rounds: likewise.
        seconds: likewise; None for no limit.
        prompt: likewise.

    Raises:
        CliError: a way is not known, the model has no linear layers, or an output is wrong.
    """
    device = base.device
    found: dict[int, bench.Mixed] = {}
    with TemporaryDirectory(prefix="dora-cache-") as adapters, quiet():
        with spinner("making adapters"):
            try:
                made = bench.mixture(
                    base,
                    Path(adapters),
                    max(counts),
                    rank=rank,
                    ranks=ranks,
                    dtype=None if dtype is None else DTYPES[dtype],
                )
            except ValueError as error:
                raise CliError(f"--mixed: {error}") from None
            chosen = choose_ways(bench.mixed_ways(made), ways, shape=False)
            per_second = bench.bandwidth(device)
        for count in counts:
            with progress_bar(f"measuring {count} rows", 1) as move:
                found[count] = bench.measure_mixed(
                    made,
                    count,
                    ways=chosen,
                    tokens=tokens,
                    rounds=rounds,
                    seconds=math.inf if seconds is None else seconds,
                    prompt=prompt,
                    graphs=graphs,
                    per_second=per_second,
                    on_step=move,
                )
    labels = {way.name: way.label for way in chosen}
    phases = [phase for one in found.values() for phase in one.phases]
    console.print(bench.phases_table(phases, labels))
    for reason in bench.reasons(phases, labels):
        console.print(reason, markup=False)
    console.print(_LEGEND + "\n", markup=False)
    limits = [limit for one in found.values() for limit in one.limits]
    for limit in limits:
        console.print(_limit(limit, labels, per_second), markup=False)
    console.print()
    checks = [check for one in found.values() for check in one.checks]
    for check in checks:
        console.print(_check(check, labels), markup=False)
    data = {
        **about,
        "rank": rank,
        "ranks": list(ranks),
        "adapter_dtype": dtype,
        "rows": list(counts),
        "tokens": tokens,
        "rounds": rounds,
        "seconds": seconds,
        "prompt": prompt,
        "machine": describe_machine(device),
        "bytes_per_second": per_second,
        "labels": labels,
        "phases": {phase.name: asdict(phase)["cells"] for phase in phases},
        "limits": [asdict(limit) for limit in limits],
        "checks": [asdict(check) | {"right": check.right} for check in checks],
    }
    path = folder / FILE
    with writing(path, "folder as --out"):
        path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    console.print(f"\nnumbers: {path}", soft_wrap=True, markup=False)
    wrong = sum(not check.right for check in checks)
    if wrong:
        raise CliError(f"{wrong} of {len(checks)} outputs of a pool are wrong: report this, please")


def _limit(limit: bench.Limit, labels: dict[str, str], per_second: float) -> str:
    return (
        f"limit of {labels[limit.way]}, {limit.phase}: {limit.ms:.3g} ms, the base batch and "
        f"{format_bytes(limit.nbytes)} of adapters at {per_second / 1e9:.3g} GB/s; "
        f"it takes {limit.times:.2f} x that"
    )


def _check(check: bench.Check, labels: dict[str, str]) -> str:
    return (
        f"{'right' if check.right else 'WRONG'}: {labels[check.way]}, {check.what}: "
        f"{check.error:.2g} of the output, of which the adapter changes {check.effect:.2g}"
    )
