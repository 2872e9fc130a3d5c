"""``dora-cache lab coverage``: what caching does for each kind of adapter."""

import json
from pathlib import Path
from typing import Annotated

import torch
import typer

from dora_cache.cli.console import CliError, progress_bar, quiet, reported, results
from dora_cache.cli.output import check_file, make_folder, writing
from dora_cache.lab.machine import describe_machine

__all__ = ["coverage"]


def coverage(
    *,
    kind: Annotated[
        list[str] | None,
        typer.Option(help="Only this kind of adapter; may be repeated.", metavar="NAME"),
    ] = None,
    size: Annotated[int, typer.Option(min=32, help="Inputs and outputs of linear layers.")] = 1024,
    tokens: Annotated[str, typer.Option(help="Lengths of the inputs.")] = "1,128",
    seconds: Annotated[
        float, typer.Option(min=0.0, help="Time for each example and length.")
    ] = 2.0,
    threads: Annotated[int, typer.Option(min=1, help="Threads for PyTorch.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder for the JSON file.", metavar="DIR")] = Path(
        "out"
    ),
    markdown: Annotated[
        Path | None, typer.Option(help="Also write the table to this file.", dir_okay=False)
    ] = None,
) -> None:
    """Time one layer of each kind of adapter, with PEFT alone and with dora-cache, side by side."""
    from dora_cache.lab import coverage as measuring
    from dora_cache.recipes import load_recipes

    with reported():
        names = [recipe.name for recipe in load_recipes()]
        for name in kind or ():
            if name not in names:
                msg = f"no recipe {name!r}: --kind takes {', '.join(names)}"
                raise CliError(msg)
        lengths = _lengths(tokens)
        data_file = make_folder(out, "coverage.json") / "coverage.json"
        check_file(markdown, "--markdown")
        torch.set_num_threads(threads)
        rows = []
        with quiet(), progress_bar("examples", measuring.count_examples(kind)) as move:
            for row in measuring.measure_coverage(kind, size=size, tokens=lengths, seconds=seconds):
                rows.append(row)
                move()
        console = results()
        console.print(measuring.as_table(rows))
        console.print(measuring.summary(rows))
        data = {"machine": describe_machine(), "rows": measuring.as_json(rows)}
        with writing(data_file, "folder as --out"):
            data_file.write_text(json.dumps(data, indent=1), encoding="utf-8")
        if markdown is not None:
            with writing(markdown, "--markdown"):
                markdown.write_text(measuring.page(rows, describe_machine()), encoding="utf-8")


def _lengths(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        msg = f"--tokens {text} is no list of lengths: write for example 1,128"
        raise CliError(msg)
    return found
