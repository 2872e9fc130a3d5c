"""``dora-cache freshness``: whether outputs stay right, operation by operation."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer

from dora_cache.cli.console import progress_bar, quiet, reported, results
from dora_cache.cli.loading import parse_device
from dora_cache.cli.options import DeviceOption
from dora_cache.cli.output import check_file, writing

__all__ = ["freshness"]


class Precision(StrEnum):
    """Names of dtypes."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT64 = "float64"


def freshness(
    *,
    dtype: Annotated[Precision, typer.Option(help="dtype of the model.")] = Precision.FLOAT32,
    device: DeviceOption = None,
    markdown: Annotated[
        Path | None, typer.Option(help="Also write the table to this file.", dir_okay=False)
    ] = None,
) -> None:
    """Change a small DoRA model in every way, and compare cached outputs with uncached ones.

    The left column is PEFT's DoraCaching, the right one dora-cache. Ends with exit code 1 if
    dora-cache is ever wrong.
    """
    from dora_cache.lab.freshness import report

    with reported():
        where = parse_device(device)
        check_file(markdown, "--markdown")
        with quiet(), progress_bar("operations", 0) as move:
            found = list(
                report.rows(
                    dtype=getattr(torch, dtype.value),
                    device=where,
                    moved=move,
                )
            )
        console = results()
        console.print(report.as_table(found))
        console.print(report.summary(found))
        if markdown is not None:
            with writing(markdown, "--markdown"):
                markdown.write_text(report.as_markdown(found), encoding="utf-8")
    if any(row.ours.verdict.word != "fresh" for row in found):
        raise typer.Exit(1)
