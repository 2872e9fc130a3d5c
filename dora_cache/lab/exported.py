"""Exported models in AOTInductor: a merged one beside those with baked adapters."""

from __future__ import annotations

import copy
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dora_cache.attachment import attach
from dora_cache.lab.bench.measure import Spread
from dora_cache.lab.turns import take_turns
from dora_cache.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = ["WAYS", "Exported", "as_json", "as_markdown", "measure_exported"]

WAYS = ("merged", "derived", "baked", "baked weights")
"""Merged by PEFT; exported without ``baked()``; with it; with ``baked(weights=True)``."""


@dataclass(frozen=True, slots=True)
class Exported:
    """One exported program.

    Attributes:
        way: one of :data:`WAYS`.
        tokens: length of its input.
        ms: of a run, in milliseconds: the median over rounds.
        ratio: its time over that of the merged model, within rounds; the median and the quartiles.
        error: the largest difference of a logit from the eager model's, relative to the largest
            logit.
        operations: in the exported graph.
        constants: bytes of what is baked; 0 where nothing is.
        file: bytes of the package.
        seconds: to export and compile it.
    """

    way: str
    tokens: int
    ms: float
    ratio: Spread | None
    error: float
    operations: int
    constants: int
    file: int
    seconds: float


class _Logits(nn.Module):
    """A causal language model without a cache of keys, from token ids to logits."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return logits


def measure_exported(
    model: Any,
    *,
    ways: Sequence[str] = WAYS,
    tokens: Sequence[int] = (1, 16),
    rounds: int = 60,
    seconds: float = 20.0,
    on_step: Callable[[str, int], object] = lambda *_: None,
) -> Iterator[Exported]:
    """Export and compile a model each way, and run the programs in turn.

    Args:
        model: a PEFT causal language model in eval mode, with the adapter active.
        ways: of :data:`WAYS`.
        tokens: lengths of the inputs.
        rounds: how often each program is timed, at most.
        seconds: for how long the programs of one length take turns.
        on_step: called with a way and a length before that is compiled.
    """
    vocabulary = model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(0)
    for length in tokens:
        ids = torch.randint(vocabulary, (1, length), generator=generator)
        ids = ids.to(model.get_input_embeddings().weight.device)
        with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
            expected = _Logits(model)(ids)
            programs: dict[str, Callable[..., Any]] = {}
            known: dict[str, dict[str, Any]] = {}
            for way in ways:
                on_step(way, length)
                path = Path(folder) / f"{ways.index(way)}.pt2"
                began = time.perf_counter()
                program, constants = _export(model, way, ids)
                torch._inductor.aoti_compile_and_package(program, package_path=str(path))
                spent = time.perf_counter() - began
                programs[way] = run = torch._inductor.aoti_load_package(str(path))
                difference = (run(ids) - expected).abs().max() / expected.abs().max()
                known[way] = {
                    "error": float(difference),
                    "operations": sum(one.op == "call_function" for one in program.graph.nodes),
                    "constants": constants,
                    "file": path.stat().st_size,
                    "seconds": spent,
                }
                del program
            runs = {way: partial(run, ids) for way, run in programs.items()}
            times = take_turns(runs, rounds, seconds)
        merged = times.get("merged")
        for way, own in times.items():
            ratios = [a / b for a, b in zip(own, merged, strict=True)] if merged else None
            yield Exported(
                way,
                length,
                1e3 * Spread.quartiles(own).median,
                Spread.quartiles(ratios) if ratios else None,
                **known[way],
            )


def _export(model: Any, way: str, ids: Tensor) -> tuple[torch.export.ExportedProgram, int]:
    if way == "merged":
        merged = copy.deepcopy(model).merge_and_unload()
        return torch.export.export(_Logits(merged), (ids,)), 0
    if way == "derived":
        return torch.export.export(_Logits(model), (ids,)), 0
    with attach(model) as cache, cache.baked(weights=way == "baked weights") as baked:
        return torch.export.export(_Logits(model), (ids,)), baked.nbytes


def as_markdown(rows: Sequence[Exported]) -> str:
    """Return a row for each program."""
    heads = [
        "tokens",
        "program",
        "ms",
        "x merged (quartiles)",
        "operations",
        "constants",
        "package",
    ]
    heads += ["max error", "s to compile"]
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for row in rows:
        cells = [str(row.tokens), row.way, f"{row.ms:.1f}", str(row.ratio or "-")]
        cells += [str(row.operations), format_bytes(row.constants) if row.constants else "-"]
        cells += [format_bytes(row.file), f"{row.error:.1e}", f"{row.seconds:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def as_json(rows: Sequence[Exported]) -> list[dict[str, Any]]:
    """Return everything as JSON knows it."""
    return [asdict(row) for row in rows]
