"""``dora-cache lab traffic``: requests for a thousand adapters, under a cap for some of them."""

import json
from pathlib import Path
from typing import Annotated

import typer

from dora_cache.cli.console import progress_bar, quiet, reported, results
from dora_cache.cli.options import OutOption
from dora_cache.cli.output import make_folder, writing

__all__ = ["traffic"]


def traffic(
    *,
    adapters: Annotated[int, typer.Option(min=2, help="Adapters of the model.")] = 1000,
    slots: Annotated[int, typer.Option(min=1, help="Adapters that the cap suffices for.")] = 50,
    requests: Annotated[int, typer.Option(min=10, help="Requests to serve.")] = 2000,
    forwards: Annotated[int, typer.Option(min=2, help="Forwards of each request.")] = 4,
    backends: Annotated[
        str, typer.Option(metavar="LIST", help="Backends that take a cap.")
    ] = "lru,budget",
    out: OutOption = Path("out"),
) -> None:
    """Serve requests for many adapters of a small model by Zipf's law, backend by backend."""
    from dora_cache.lab import traffic as measuring
    from dora_cache.lab.machine import describe_machine

    with reported():
        data_file = make_folder(out, "traffic.json") / "traffic.json"
        names = backends.split(",")
        with quiet(), progress_bar("adapters", adapters) as move:
            model = measuring.make_model(adapters, move=move)
        with quiet(), progress_bar("requests", requests * (1 + len(names))) as move:
            found = measuring.measure_traffic(
                model,
                backends=names,
                slots=slots,
                requests=requests,
                forwards=forwards,
                move=move,
            )
        console = results()
        console.print(measuring.table(found))
        console.print(
            f"{found.requests:,} requests of {found.forwards} forwards, for {found.adapters:,} "
            f"adapters by Zipf's law; the cap suffices for {found.slots}. With foresight "
            f"{found.optimum:.1%} of the lookups can be hits. First: the forward right after a "
            f"switch. PEFT's set_adapter() takes {found.set_adapter_ms:.0f} ms more, cached or not."
        )
        data = {"machine": describe_machine(), **measuring.as_dict(found)}
        with writing(data_file, "folder as --out"):
            data_file.write_text(json.dumps(data, indent=1), encoding="utf-8")
