"""Options that several commands share."""

from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import torch
import typer

from dora_cache.lab.shapes import SHAPES

__all__ = [
    "DTYPES",
    "AdapterOption",
    "BackendOption",
    "DeviceBytesOption",
    "DeviceOption",
    "Dtype",
    "LayersOption",
    "MaxBytesOption",
    "ModelArgument",
    "ModelOrShape",
    "NumericsOption",
    "OutOption",
    "ShapeOption",
    "given",
]

Dtype: TypeAlias = Literal["bf16", "fp32"]
DTYPES: dict[Dtype, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}

ModelArgument: TypeAlias = Annotated[
    Path, typer.Argument(metavar="MODEL", help="Folder of a causal language model.")
]
ModelOrShape: TypeAlias = Annotated[
    Path | None,
    typer.Argument(metavar="[MODEL]", help="Folder of a causal language model; or --shape."),
]
ShapeOption: TypeAlias = Annotated[
    str | None,
    typer.Option(metavar="NAME", help=f"Instead of MODEL, random weights: {', '.join(SHAPES)}."),
]
AdapterOption: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        metavar="NAME=PATH",
        help="A PEFT adapter's folder and the name to give it; may be repeated.",
    ),
]
BackendOption: TypeAlias = Annotated[
    str | None, typer.Option(help="See `dora-cache backends`.", metavar="NAME")
]
MaxBytesOption: TypeAlias = Annotated[
    str | None,
    typer.Option(help="Cap on the bytes held, e.g. 8MiB or 10%.", metavar="SIZE"),
]
DeviceBytesOption: TypeAlias = Annotated[
    str | None,
    typer.Option(help="For the cpu backend: cap on what is on the device.", metavar="SIZE"),
]
NumericsOption: TypeAlias = Annotated[
    Literal["peft", "fast"] | None,
    typer.Option(help="peft: bit for bit PEFT's output; fast: fewer operations."),
]
DeviceOption: TypeAlias = Annotated[
    str | None,
    typer.Option(help="cpu, cuda, ...; by default the GPU if there is one.", metavar="NAME"),
]
LayersOption: TypeAlias = Annotated[
    int | None, typer.Option(min=1, help="With --shape: make only so many layers.")
]
OutOption: TypeAlias = Annotated[
    Path, typer.Option("--out", help="Folder for the JSON file and the chart.", metavar="DIR")
]


def given(**settings: Any) -> dict[str, Any]:
    """Return the settings that have a value: the others are for files and the environment."""
    return {name: value for name, value in settings.items() if value is not None}
