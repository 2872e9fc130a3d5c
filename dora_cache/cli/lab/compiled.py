"""``dora-cache lab compiled``: every kind of adapter under ``torch.compile``."""

from pathlib import Path
from typing import Annotated

import torch
import typer

from dora_cache.cli.console import CliError, progress_bar, quiet, reported, results
from dora_cache.cli.output import check_file, make_folder

__all__ = ["compiled"]

_CUDA = torch.cuda.is_available()


def compiled(
    *,
    kind: Annotated[
        list[str] | None,
        typer.Option(help="Only this kind of adapter; may be repeated.", metavar="NAME"),
    ] = None,
    every_example: Annotated[
        bool, typer.Option("--every-example", help="Not only the first of each kind of layer.")
    ] = False,
    device: Annotated[str, typer.Option(help="Where the models are.")] = "cuda" if _CUDA else "cpu",
    dtype: Annotated[str, typer.Option(help="Of the base layers.")] = (
        "bfloat16" if _CUDA else "float32"
    ),
    size: Annotated[int, typer.Option(min=32, help="Inputs and outputs of linear layers.")] = (
        4096 if _CUDA else 1024
    ),
    layers: Annotated[int, typer.Option(min=1, help="Layers of each model.")] = 4,
    tokens: Annotated[str, typer.Option(help="Lengths of the inputs.")] = "1,128",
    rounds: Annotated[int, typer.Option(min=2, help="Of timing, at most.")] = 60,
    seconds: Annotated[float, typer.Option(min=0.0, help="Time for each kind and length.")] = 1.0,
    backend: Annotated[str, typer.Option(help="Of torch.compile.")] = "inductor",
    mode: Annotated[
        str | None, typer.Option(help="Of torch.compile, such as reduce-overhead.")
    ] = None,
    limit: Annotated[
        float, typer.Option(min=1.0, help="Seconds to compile one kind and length.")
    ] = 240.0,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes that compile at once.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads for PyTorch.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder for the JSON file.", metavar="DIR")] = Path(
        "out"
    ),
    markdown: Annotated[
        Path | None, typer.Option(help="Also write the table to this file.", dir_okay=False)
    ] = None,
) -> None:
    """Time each kind of adapter compiled, by PEFT and by dora-cache, side by side."""
    from dora_cache.lab import compiled_kinds as measuring

    with reported():
        try:
            lengths = tuple(int(one) for one in tokens.split(","))
        except ValueError:
            msg = f"--tokens {tokens} is no list of lengths: write for example 1,128"
            raise CliError(msg) from None
        data_file = make_folder(out, "compiled.json") / "compiled.json"
        check_file(markdown, "--markdown")
        settings = measuring.Settings(
            kinds=None if kind is None else tuple(kind),
            every_example=every_example,
            device=device,
            dtype=dtype,
            size=size,
            layers=layers,
            tokens=lengths,
            rounds=rounds,
            seconds=seconds,
            backend=backend,
            mode=mode,
            limit=limit,
            jobs=jobs or measuring.default_jobs(device),
            threads=threads,
        )
        with quiet(), progress_bar("kinds", 0) as move:
            try:
                text = measuring.run_and_write(
                    settings, data_file, markdown, lambda _, done, total: move(done, total)
                )
            except ValueError as error:
                raise CliError(str(error)) from None
        results().print(text, markup=False, soft_wrap=True)
