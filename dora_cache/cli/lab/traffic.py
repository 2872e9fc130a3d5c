"""``dora-cache lab traffic``: requests for many adapters, under caps for some of them."""

import json
import tempfile
from pathlib import Path
from typing import Annotated, Literal

import typer

from dora_cache.cli.console import progress_bar, quiet, reported, results
from dora_cache.cli.loading import about, check_source, load_measured, parse_device
from dora_cache.cli.options import (
    DeviceOption,
    Dtype,
    LayersOption,
    ModelOrShape,
    OutOption,
    ShapeOption,
)
from dora_cache.cli.output import make_folder, writing
from dora_cache.units import format_bytes

__all__ = ["traffic"]


def traffic(
    model: ModelOrShape = None,
    *,
    shape: ShapeOption = None,
    layers: LayersOption = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option(help="Of the weights; by default the model's, or of a shape bf16 on a GPU."),
    ] = None,
    adapters: Annotated[int, typer.Option(min=2, help="Random adapters in files.")] = 300,
    rank: Annotated[int, typer.Option(min=1, help="Of every adapter.")] = 8,
    slots: Annotated[
        int, typer.Option(min=1, help="Adapters that the device's cap suffices for.")
    ] = 50,
    host_slots: Annotated[
        int, typer.Option(min=1, help="Adapters that the host's cap suffices for.")
    ] = 200,
    requests: Annotated[int, typer.Option(min=10, help="Requests to serve.")] = 2000,
    exponent: Annotated[float, typer.Option(min=0, help="Of Zipf's law.")] = 1.0,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 16,
    tokens: Annotated[int, typer.Option(min=2, help="New tokens of each request.")] = 4,
    policy: Annotated[
        Literal["lru", "budget"], typer.Option(help="What leaves the device first.")
    ] = "lru",
    device: DeviceOption = None,
    out: OutOption = Path("out"),
) -> None:
    """Serve requests for many adapters by Zipf's law from a pool with capped tiers.

    Without MODEL and --shape: the shape tiny. Half of the adapters are LoRA and half are DoRA.
    """
    from dora_cache.lab import traffic as measuring
    from dora_cache.lab.machine import describe_machine

    with reported():
        if model is None:
            shape = shape or "tiny"
        check_source(model, shape, layers)
        where = parse_device(device)
        data_file = make_folder(out, "traffic.json") / "traffic.json"
        with quiet(), tempfile.TemporaryDirectory(prefix="dora-cache-") as scratch:
            base = load_measured(model, shape, where, layers=layers, dtype=dtype)
            folder = Path(scratch)
            with progress_bar("adapters", adapters) as move:
                measuring.write_adapters(base, folder, adapters, rank=rank, move=move)
            with progress_bar("requests", 2 * requests) as move:
                found = measuring.measure_traffic(
                    base,
                    folder,
                    slots=slots,
                    host_slots=host_slots,
                    requests=requests,
                    exponent=exponent,
                    prompt=prompt,
                    tokens=tokens,
                    policy=policy,
                    move=move,
                )
        console = results()
        times, held = measuring.tables(found)
        console.print(times)
        console.print()
        console.print(held)
        wrong = sum(one.wrong for one in found.served)
        error = max(one.largest_error for one in found.served)
        console.print(
            f"\n{found.requests:,} requests of {found.tokens} tokens, by Zipf's law with exponent "
            f"{found.exponent:g} for {found.adapters:,} adapters, twice: without prefetching, and "
            "with each adapter prefetched once the request before has its first token. Optimum: "
            "no policy has a higher hit rate, even with foresight."
        )
        console.print(
            f"Wrong outputs: {wrong} of {2 * found.requests:,}. They differ from PEFT's in float64 "
            f"by {error:.1g} at most; wrong is above {found.limit:.1g}. The outputs of two "
            f"adapters differ by {found.nearest:.1g} at least."
        )
        growth = [one.cuda_growth for one in found.served if one.cuda_growth is not None]
        if growth:
            console.print(
                "Memory allocated on the GPU, without workspaces of cuBLAS, grew by "
                f"{format_bytes(max(growth))} at most."
            )
        data = {
            "machine": describe_machine(where),
            **about(base, model, shape),
            **measuring.as_dict(found),
        }
        with writing(data_file, "folder as --out"):
            data_file.write_text(json.dumps(data, indent=1), encoding="utf-8")
