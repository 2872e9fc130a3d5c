"""``dora-cache lab export``: exported programs with baked adapters, beside a merged one."""

import json
from pathlib import Path
from typing import Annotated

import torch
import typer

from dora_cache.cli.console import CliError, quiet, reported, results, spinner
from dora_cache.cli.output import check_file, make_folder, writing
from dora_cache.lab.machine import describe_machine

__all__ = ["export"]


def export(
    *,
    tokens: Annotated[str, typer.Option(help="Lengths of the inputs.")] = "1,16",
    ways: Annotated[
        str, typer.Option(help="Of merged, derived, baked and baked weights.")
    ] = "merged,baked,baked weights",
    seconds: Annotated[float, typer.Option(min=0.0, help="Time for each length.")] = 20.0,
    threads: Annotated[int, typer.Option(min=1, help="Threads for PyTorch.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder for the JSON file.", metavar="DIR")] = Path(
        "out"
    ),
    markdown: Annotated[
        Path | None, typer.Option(help="Also write the table to this file.", dir_okay=False)
    ] = None,
) -> None:
    """Time SmolLM2 with one DoRA adapter, exported and compiled by AOTInductor."""
    from dora_cache.lab import exported as measuring
    from dora_cache.lab.demo import adapter_directory
    from dora_cache.lab.demo.smollm import load_model, model_directory

    with reported():
        chosen = [one.strip() for one in ways.split(",")]
        unknown = [one for one in chosen if one not in measuring.WAYS]
        if unknown:
            msg = f"--ways has no {unknown[0]!r}: write some of {', '.join(measuring.WAYS)}"
            raise CliError(msg)
        try:
            lengths = [int(one) for one in tokens.split(",")]
        except ValueError:
            msg = f"--tokens {tokens} is no list of lengths: write for example 1,16"
            raise CliError(msg) from None
        data_file = make_folder(out, "export.json") / "export.json"
        check_file(markdown, "--markdown")
        torch.set_num_threads(threads)
        with quiet(), spinner("loading") as say:
            from peft import PeftModel

            try:
                base, _ = load_model(model_directory())
            except FileNotFoundError as error:
                raise CliError(str(error)) from None
            model = PeftModel.from_pretrained(base, str(adapter_directory("sonnets"))).eval()
            rows = list(
                measuring.measure_exported(
                    model,
                    ways=chosen,
                    tokens=lengths,
                    seconds=seconds,
                    on_step=lambda way, length: say(f"compiling {way}, {length} tokens"),
                )
            )
        table = measuring.as_markdown(rows)
        results().print(table, markup=False, soft_wrap=True)
        machine = describe_machine()
        with writing(data_file, "folder as --out"):
            data = {"machine": machine, "rows": measuring.as_json(rows)}
            data_file.write_text(json.dumps(data, indent=1), encoding="utf-8")
        if markdown is not None:
            with writing(markdown, "--markdown"):
                markdown.write_text(table, encoding="utf-8")
