"""``dora-cache bench``: the ways of running adapters, on one's own model or on a known shape."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from dora_cache.cli.choosing import all_ways, choose_ways, parse_prefill
from dora_cache.cli.console import CliError, quiet, reported, results, spinner
from dora_cache.cli.loading import (
    about,
    check_source,
    load_adapters,
    load_measured,
    parse_adapters,
    parse_device,
)
from dora_cache.cli.measuring import measure, measure_more, save, show, show_more
from dora_cache.cli.mixed import mixed
from dora_cache.cli.options import (
    DTYPES,
    AdapterOption,
    BackendOption,
    DeviceBytesOption,
    DeviceOption,
    Dtype,
    LayersOption,
    MaxBytesOption,
    ModelOrShape,
    NumericsOption,
    OutOption,
    ShapeOption,
    given,
)
from dora_cache.cli.output import make_folder
from dora_cache.config import CacheConfig
from dora_cache.lab import bench as measurement
from dora_cache.lab.machine import describe_machine
from dora_cache.lab.models import random_dora

__all__ = ["bench"]

_PROMPT_TOKENS = 16
_RANDOM = ("a", "b")


def bench(
    model: ModelOrShape = None,
    *,
    shape: ShapeOption = None,
    layers: LayersOption = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option(help="Of the weights; by default the model's, or of a shape bf16 on a GPU."),
    ] = None,
    adapter: AdapterOption = None,
    rank: Annotated[
        int, typer.Option(min=1, help="Without --adapter: rank of the random adapters.")
    ] = 8,
    adapter_dtype: Annotated[
        Dtype | None,
        typer.Option(
            help="Without --adapter: dtype of these; fp32 as with PEFT, with --mixed the model's."
        ),
    ] = None,
    ways: Annotated[
        str | None, typer.Option(metavar="LIST", help="Only these, e.g. lora,peft,dora-cache.")
    ] = None,
    backend: BackendOption = None,
    max_bytes: MaxBytesOption = None,
    device_bytes: DeviceBytesOption = None,
    numerics: NumericsOption = None,
    tokens: Annotated[int, typer.Option(min=2, help="New tokens of each generation.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of every way.")] = 4,
    prefill: Annotated[
        str | None,
        typer.Option(metavar="BxL,...", help="Time prompts of this batch size and length, too."),
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Time compiled decoding, too; compiling takes long.")
    ] = False,
    profile: Annotated[
        str | None,
        typer.Option(metavar="WAY", help="Measure nothing; profile a few tokens of this way."),
    ] = None,
    mixed_rows: Annotated[
        str | None,
        typer.Option(
            "--mixed",
            metavar="N,...",
            help="Measure batches of N rows with N adapters instead: PEFT's LoRA, and a pool.",
        ),
    ] = None,
    ranks: Annotated[
        str | None,
        typer.Option(metavar="R,...", help="With --mixed: a pool of these ranks in turn, too."),
    ] = None,
    prompt: Annotated[
        int | None,
        typer.Option(min=1, metavar="LENGTH", help="With --mixed: time prompts so long, too."),
    ] = None,
    graphs: Annotated[
        bool, typer.Option("--graphs", help="With --mixed, on CUDA: time CUDA graphs, too.")
    ] = False,
    seconds: Annotated[
        float | None,
        typer.Option(min=0, help="With --mixed: for each phase, if --rounds take longer."),
    ] = None,
    out: OutOption = Path("out"),
    device: DeviceOption = None,
) -> None:
    """Measure LoRA, PEFT, DoraCaching and dora-cache on your model, side by side.

    Without --backend: dict, in both numerics; for MODEL also lru (with the cap of --max-bytes, or
    with too little for all adapters), and cpu.
    """
    with reported():
        others = given(
            adapter=adapter,
            backend=backend,
            max_bytes=max_bytes,
            device_bytes=device_bytes,
            numerics=numerics,
            prefill=prefill,
            compiled=compiled or None,
            profile=profile,
        )
        own = given(ranks=ranks, prompt=prompt, graphs=graphs or None, seconds=seconds)
        if mixed_rows is not None:
            _refuse(others, "has no meaning with --mixed: leave it out")
            mixed(
                model,
                shape,
                mixed_rows,
                results(),
                out,
                parse_device(device),
                layers=layers,
                dtype=dtype,
                adapter_dtype=adapter_dtype,
                rank=rank,
                ranks=ranks,
                ways=ways,
                graphs=graphs,
                settings={"tokens": tokens, "rounds": rounds, "prompt": prompt or 0},
                seconds=seconds,
            )
            return
        _refuse(own, "is for --mixed: write, e.g., --mixed 1,4,16")
        paths = parse_adapters(adapter or [])
        _check(model, shape, layers, adapter_dtype, adapters=bool(paths))
        prompts = parse_prefill(prefill)
        settings = given(max_bytes=max_bytes, device_bytes=device_bytes, numerics=numerics)
        if backend is not None:
            CacheConfig(backend=backend, **settings)
        # With any cap at all: to find mistakes in names before a model is loaded.
        known = all_ways(backend, max_bytes or 1, settings)
        choose_ways(known, ways, shape=bool(shape))
        if profile:
            _one(choose_ways(known, profile, shape=bool(shape)))
        where = parse_device(device)
        target = None if profile else make_folder(out, "bench.json", "bench.png")
        with spinner("loading"):
            base = load_measured(model, shape, where, layers=layers, dtype=dtype)
            names = tuple(paths) or _RANDOM
            with quiet():
                wrapped = (
                    load_adapters(base, paths)
                    if paths
                    else random_dora(base, names, rank=rank, dtype=DTYPES[adapter_dtype or "fp32"])
                )
            sizes = measurement.working_set(wrapped, names)
        known = all_ways(backend, max_bytes or _cap(sizes), settings)
        input_ids = measurement.random_prompt(base, 1, _PROMPT_TOKENS)
        console = results()
        if target is None:
            way = _one(choose_ways(known, profile, shape=bool(shape)))
            with quiet():
                found = measurement.profile(wrapped, input_ids, adapter=names[0], way=way)
            console.print(found.table, markup=False, soft_wrap=True)
            console.print(found.summary(), markup=False)
            return
        chosen = choose_ways(known, ways, shape=bool(shape))
        # A shape's adapters are alike, so that one of them says it all.
        decoded = measure(
            wrapped,
            input_ids,
            names[:1] if shape else names,
            chosen,
            tokens=tokens,
            rounds=rounds,
        )
        phases = measure_more(
            wrapped,
            input_ids,
            names,
            chosen,
            prefill=prompts,
            rounds=rounds,
            compiled=max(tokens, 3) if compiled else 0,
        )
        limits = [result.stats.max_bytes for result in decoded.results if result.stats]
        show(console, decoded, next((limit for limit in limits if limit is not None), None))
        everything = (measurement.phase_of(decoded), *phases.phases)
        show_more(console, everything, phases.memory, {way.name: way.label for way in chosen})
        more = about(base, model, shape) | {
            "adapter_dtype": None if paths else adapter_dtype or "fp32",
            "rank": None if paths else rank,
            "machine": describe_machine(where),
            "phases": {phase.name: asdict(phase)["cells"] for phase in everything},
            "memory": {way: asdict(weighed) for way, weighed in phases.memory.items()},
        }
        save(
            console,
            decoded,
            target,
            "bench",
            title=f"{more['model']}: unmerged adapters",
            more=more,
        )


def _refuse(options: dict[str, Any], why: str) -> None:
    for name in options:
        raise CliError(f"--{name.replace('_', '-')} {why}")


def _check(
    model: Path | None,
    shape: str | None,
    layers: int | None,
    adapter_dtype: str | None,
    *,
    adapters: bool,
) -> None:
    check_source(model, shape, layers)
    if shape is not None and adapters:
        raise CliError("--adapter is for a MODEL: a shape's adapters are random as well")
    if adapters and adapter_dtype is not None:
        raise CliError("--adapter-dtype is for random adapters: leave it out with --adapter")


def _one(ways: list[measurement.Way]) -> measurement.Way:
    if len(ways) > 1:
        names = ", ".join(way.name for way in ways)
        raise CliError(f"--profile takes one way: choose from {names}")
    return ways[0]


def _cap(sizes: dict[str, int]) -> int:
    """Choose a cap under which one adapter fits, and all do not where there are several."""
    total = sum(sizes.values())
    return total if len(sizes) == 1 else total - min(sizes.values()) // 2
