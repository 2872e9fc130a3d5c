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
from dora_cache.cli.loading import about, check_source, load_measured
from dora_cache.cli.options import DTYPES
from dora_cache.cli.output import make_folder, writing
from dora_cache.lab import bench
from dora_cache.lab.machine import describe_machine
from dora_cache.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    import torch
    from rich.console import Console

    from dora_cache.cli.options import Dtype

__all__ = ["mixed"]

_FILE = "mixed.json"
_LEGEND = (
    "Medians, with the quartiles; times relative to those of one LoRA adapter for all rows are of "
    "the same turn. Decode and CUDA graph: a step of the whole batch, one token a row."
)


def mixed(
    model: Path | None,
    shape: str | None,
    rows: str,
    console: Console,
    out: Path,
    device: torch.device,
    *,
    layers: int | None,
    dtype: Dtype | None,
    adapter_dtype: Dtype | None,
    rank: int,
    ranks: str | None,
    ways: str | None,
    graphs: bool,
    settings: dict[str, int],
    seconds: float | None,
) -> None:
    """Measure batches of several sizes, print what was found, and write it to a folder.

    Args:
        model: its folder; None for a shape.
        shape: the shape's name.
        rows: of the batches, and adapters, such as ``1,4,16``.
        console: to print on.
        out: the folder to write to.
        device: to measure on.
        layers: of a shape, how many.
        dtype: of the weights; by default the usual one.
        adapter_dtype: of adapters; by default the model's.
        rank: of LoRA and DoRA adapters.
        ranks: of further DoRA adapters, in turn, such as ``8,16,64``.
        ways: those that are wanted, by name; by default all.
        graphs: whether to measure CUDA graphs as well.
        settings: more of :func:`dora_cache.lab.bench.measure_mixed`.
        seconds: for each phase; None for no limit.

    Raises:
        CliError: something that was asked for is not possible, or an output is wrong.
    """
    check_source(model, shape, layers)
    counts = sorted(_numbers("--mixed", rows))
    each = () if ranks is None else _numbers("--ranks", ranks)
    if graphs and device.type != "cuda":
        raise CliError(f"--graphs is for CUDA devices: leave it out on {device}")
    folder = make_folder(out, _FILE)
    with spinner("loading"):
        base = load_measured(model, shape, device, layers=layers, dtype=dtype)
    found: dict[int, bench.Mixed] = {}
    with TemporaryDirectory(prefix="dora-cache-") as adapters, quiet():
        with spinner("making adapters"):
            mixing = ways is None or "peft-mixed" in ways
            loaded = None if mixing else {0, *(count - 1 for count in counts)}
            made = _made(base, Path(adapters), max(counts), rank, each, adapter_dtype, loaded)
            chosen = choose_ways(bench.mixed_ways(made), ways, shape=False)
            per_second = bench.bandwidth(device)
        for count in counts:
            with progress_bar(f"measuring {count} rows", 1) as move:
                found[count] = bench.measure_mixed(
                    made,
                    count,
                    ways=chosen,
                    **settings,
                    seconds=math.inf if seconds is None else seconds,
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
        **about(base, model, shape),
        **settings,
        "adapter_dtype": adapter_dtype,
        "rank": rank,
        "ranks": list(each),
        "rows": counts,
        "seconds": seconds,
        "machine": describe_machine(device),
        "bytes_per_second": per_second,
        "labels": labels,
        "phases": {phase.name: asdict(phase)["cells"] for phase in phases},
        "limits": [asdict(limit) for limit in limits],
        "checks": [asdict(check) | {"right": check.right} for check in checks],
    }
    path = folder / _FILE
    with writing(path, "folder as --out"):
        path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    console.print(f"\nnumbers: {path}", soft_wrap=True, markup=False)
    wrong = sum(not check.right for check in checks)
    if wrong:
        raise CliError(f"{wrong} of {len(checks)} outputs of a pool are wrong: report this, please")


def _numbers(option: str, text: str) -> tuple[int, ...]:
    """Read whole numbers such as ``1,4,16``.

    Raises:
        CliError: it is something else.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise CliError(f"{option} {text!r} is no list of numbers: write, e.g., {option} 1,4,16")
    return tuple(dict.fromkeys(map(int, parts)))


def _made(
    base: Any,
    folder: Path,
    count: int,
    rank: int,
    ranks: Sequence[int],
    dtype: Dtype | None,
    loaded: Collection[int] | None,
) -> bench.Mixture:
    kind = None if dtype is None else DTYPES[dtype]
    try:
        return bench.mixture(base, folder, count, rank=rank, ranks=ranks, dtype=kind, loaded=loaded)
    except ValueError as error:
        raise CliError(f"--mixed: {error}") from None


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
