"""``dora-cache lab field``: in which set-ups caching works, and what it gains."""

import json
from pathlib import Path
from typing import Annotated

import torch
import typer

from dora_cache.cli.console import CliError, progress_bar, quiet, reported, results
from dora_cache.cli.output import check_file, make_folder, writing
from dora_cache.lab.machine import describe_machine

__all__ = ["field"]


def field(
    *,
    library: Annotated[
        str | None, typer.Option(help="Only this library's set-ups.", metavar="NAME")
    ] = None,
    named: Annotated[
        str, typer.Option(help="Only set-ups with this in their names.", metavar="TEXT")
    ] = "",
    width: Annotated[int, typer.Option(min=16, help="Size of the models' layers.")] = 1024,
    seconds: Annotated[float, typer.Option(min=0.0, help="Time for each set-up.")] = 3.0,
    threads: Annotated[int, typer.Option(min=1, help="Threads for PyTorch.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder for the JSON file.", metavar="DIR")] = Path(
        "out"
    ),
    markdown: Annotated[
        Path | None, typer.Option(help="Also write the table to this file.", dir_okay=False)
    ] = None,
) -> None:
    """Run every set-up uncached, cached and with plain LoRA, and compare outputs and times.

    Ends with exit code 1 if outputs are wrong, or a set-up is cached or not other than listed.
    """
    from dora_cache.lab.field import measuring, setups

    with reported():
        with quiet():
            known = setups()
        libraries = list(dict.fromkeys(setup.library for setup in known))
        if library is not None and library not in libraries:
            msg = f"no set-ups of {library!r}: --library takes {', '.join(libraries)}"
            raise CliError(msg)
        data_file = make_folder(out, "field.json") / "field.json"
        check_file(markdown, "--markdown")
        torch.set_num_threads(threads)
        chosen = [one for one in known if library in {None, one.library} and named in one.name]
        if not chosen:
            msg = f"no set-up of {library or 'any library'} has {named!r} in its name"
            raise CliError(msg)
        rows = []
        with quiet(), progress_bar("set-ups", len(chosen)) as move:
            for setup in chosen:
                rows.append(measuring.measure(setup, width=width, seconds=seconds))
                move()
        console = results()
        console.print(measuring.as_table(rows))
        console.print(measuring.summary(rows))
        machine = describe_machine()
        data = {"machine": machine, "width": width, "rows": measuring.as_json(rows)}
        with writing(data_file, "folder as --out"):
            data_file.write_text(json.dumps(data, indent=1), encoding="utf-8")
        if markdown is not None:
            with writing(markdown, "--markdown"):
                markdown.write_text(measuring.page(rows, machine, width), encoding="utf-8")
    if not all(row.agrees for row in rows):
        raise typer.Exit(1)
