"""``dora-cache lab audit``: what the audit costs, and how soon it notices an uncounted write."""

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer

from dora_cache.cli.console import quiet, reported, results, spinner
from dora_cache.cli.loading import (
    check_source,
    load_adapters,
    load_base,
    parse_adapters,
    parse_device,
)
from dora_cache.cli.options import (
    DTYPES,
    AdapterOption,
    DeviceOption,
    Dtype,
    LayersOption,
    ModelOrShape,
    ShapeOption,
)

__all__ = ["audit"]


def audit(
    model: ModelOrShape = None,
    *,
    shape: ShapeOption = None,
    layers: LayersOption = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Of the weights of --shape.")] = None,
    adapter: AdapterOption = None,
    rank: Annotated[int, typer.Option(min=1, help="Without --adapter: rank of a random one.")] = 8,
    tokens: Annotated[int, typer.Option(min=2, help="New tokens of each turn.")] = 32,
    rounds: Annotated[int, typer.Option(min=2, help="Turns with the audit and without.")] = 8,
    device: DeviceOption = None,
) -> None:
    """Measure what the audit costs per token, and after how many forwards it notices a write."""
    from dora_cache.lab import bench
    from dora_cache.lab.audit import measure_audit
    from dora_cache.lab.machine import describe_machine
    from dora_cache.lab.models import random_dora

    with reported():
        check_source(model, shape, layers)
        paths = parse_adapters(adapter or [])
        where = parse_device(device)
        with quiet(), spinner("measuring"):
            base: Any = load_base(model, shape, where, layers=layers, dtype=DTYPES[dtype or "fp32"])
            names = list(paths) or ["a"]
            wrapped = load_adapters(base, paths) if paths else random_dora(base, names, rank=rank)
            found = measure_audit(
                wrapped.eval(),
                bench.random_prompt(base, 1, 8),
                adapter=names[0],
                tokens=tokens,
                rounds=rounds,
            )
        console = results()
        low, high = found.ratio_quartiles
        console.print(
            f"{found.values} values; {found.token_ms:.2f} ms a token, {found.audits:.1f} audited "
            f"uses in each, which take {found.share:.2%} of its time on the host.\n"
            f"Time per token with the audit: {found.ratio:.3f} x that without "
            f"(quartiles {low:.3f} to {high:.3f}).\n"
            f"Deriving it all: {found.warm_ms:.1f} ms, {found.warm_ratio:.2f} x that without.\n"
            f"After p.data.copy_ on all factors the output is right from forward "
            f"{found.forwards} on."
        )
        machine = describe_machine(where)
        console.print(json.dumps({"machine": machine, **asdict(found)}), soft_wrap=True)
