"""``dora-cache lab caps``: decoding speed over caps, with several backends."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from dora_cache.cli.console import CliError, progress_bar, quiet, reported, results
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
    OutOption,
    ShapeOption,
)
from dora_cache.cli.output import make_folder, writing

__all__ = ["caps"]

_PROMPT_TOKENS = 8


def caps(
    model: ModelOrShape = None,
    *,
    shape: ShapeOption = None,
    layers: LayersOption = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of the weights; by default the model's, or float32.")
    ] = None,
    adapter: AdapterOption = None,
    kind: Annotated[
        str, typer.Option(help="Without --adapter: a random one of this kind on all linear layers.")
    ] = "LoHa",
    backends: Annotated[
        str, typer.Option(metavar="LIST", help="Backends that take a cap; cpu's is the device's.")
    ] = "lru,budget",
    shares: Annotated[
        str, typer.Option(metavar="LIST", help="Caps, in percent of the working set.")
    ] = "10,25,50,75,90",
    tokens: Annotated[int, typer.Option(min=2, help="Tokens to time at each turn.")] = 6,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of every setting.")] = 2,
    device: DeviceOption = None,
    out: OutOption = Path("out"),
) -> None:
    """Measure how much of the gain is left when not everything fits, backend by backend."""
    from dora_cache.lab import bench
    from dora_cache.lab import caps as measuring
    from dora_cache.lab.machine import describe_machine

    with reported():
        check_source(model, shape, layers)
        if kind not in measuring.KINDS:
            raise CliError(f"--kind {kind}: choose from {', '.join(measuring.KINDS)}")
        percents = _percents(shares)
        names = backends.split(",")
        paths = parse_adapters(adapter or [])
        where = parse_device(device)
        folder = make_folder(out, "caps.json", "caps.png")
        with quiet():
            base: Any = load_base(
                model, shape, where, layers=layers, dtype=None if dtype is None else DTYPES[dtype]
            )
            wrapped = load_adapters(base, paths) if paths else measuring.random_adapter(base, kind)
            input_ids = bench.random_prompt(base, 1, _PROMPT_TOKENS)
            total = rounds * (2 + len(percents) * len(names))
            with progress_bar("settings", total) as move:
                found = measuring.measure_caps(
                    wrapped,
                    input_ids,
                    backends=names,
                    shares=percents,
                    tokens=tokens,
                    rounds=rounds,
                    move=move,
                )
        console = results()
        console.print(measuring.table(found))
        title = f"{shape or (model or Path()).resolve().name}, {kind if not paths else 'adapters'}"
        data = {
            "model": title,
            "machine": describe_machine(where),
            **measuring.as_dict(found),
        }
        with writing(folder / "caps.json", "folder as --out"):
            (folder / "caps.json").write_text(json.dumps(data, indent=1), encoding="utf-8")
        with writing(folder / "caps.png", "folder as --out"):
            measuring.draw(found, folder / "caps.png", title=title)


def _percents(text: str) -> list[float]:
    try:
        found = [float(part) / 100 for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < share <= 1 for share in found):
        msg = f"--shares {text} is no list of percentages: write for example 10,25,50,75,90"
        raise CliError(msg)
    return found
