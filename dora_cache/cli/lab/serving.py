"""``dora-cache lab serve-load``, ``serve-faults`` and ``serve-replicas``: many clients."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from dora_cache.cli.console import CliError, progress_bar, quiet, reported, results
from dora_cache.cli.options import OutOption
from dora_cache.cli.output import make_folder, writing
from dora_cache.config import parse_size
from dora_cache.units import format_bytes

__all__ = ["serve_faults", "serve_load", "serve_replicas"]


def serve_load(
    *,
    clients: Annotated[int, typer.Option(min=1, help="Clients at once.")] = 16,
    requests: Annotated[int, typer.Option(min=1, help="Of each turn.")] = 48,
    tokens: Annotated[int, typer.Option(min=1, help="Of each answer.")] = 32,
    turns: Annotated[int, typer.Option(min=1, help="How often each server is measured.")] = 5,
    device_bytes: Annotated[str, typer.Option(metavar="SIZE", help="Cap on adapters.")] = "16MiB",
    threads: Annotated[int, typer.Option(min=1, help="Of PyTorch, in each server.")] = 2,
    out: OutOption = Path("out"),
) -> None:
    """Serve SmolLM2 to clients of the openai package, beside Transformers' own server.

    The demo's adapters and the base model are mixed, and every answer is compared with the same
    request alone. Transformers' server has one LoRA adapter.
    """
    with reported():
        load = _import("load")
        from dora_cache.lab.demo import ADAPTERS, adapter_directory
        from dora_cache.lab.demo.smollm import load_model, model_directory
        from dora_cache.lab.machine import describe_machine
        from dora_cache.lab.models import write_adapter

        cap = parse_size(device_bytes)
        if not isinstance(cap, int):
            raise CliError(f"--device-bytes {device_bytes}: give a number of bytes, as 16MiB")
        data_file = make_folder(out, "serve-load.json") / "serve-load.json"
        with tempfile.TemporaryDirectory(prefix="dora-cache-") as scratch, quiet():
            folder = Path(scratch)
            for name in ADAPTERS:
                shutil.copytree(adapter_directory(name), folder / name)
            model = model_directory()
            write_adapter(load_model(model)[0], folder / "lora", rank=4, seed=1)
            with progress_bar("turns", 3 * (turns + 1)) as move:
                found = load.measure_load(
                    model,
                    folder,
                    folder / "lora",
                    clients=clients,
                    requests=requests,
                    tokens=tokens,
                    turns=turns,
                    cap=cap,
                    threads=threads,
                    move=move,
                )
        console = results()
        console.print(load.table(found))
        console.print(
            f"\n{clients} clients at once, up to {tokens} tokens an answer. Wrong: differs from "
            "the same request alone, by plain PEFT. Adapters had up to "
            f"{format_bytes(found.device_bytes)} on the device; the cap is {format_bytes(cap)}. "
            f"Exit status after SIGTERM: {found.exit_status}."
        )
        data = {"machine": describe_machine(), **load.as_dict(found)}
        with writing(data_file, "folder as --out"):
            data_file.write_text(json.dumps(data, indent=1), encoding="utf-8")


def serve_faults(
    *,
    requests: Annotated[int, typer.Option(min=100, help="Requests to send.")] = 10_000,
    share: Annotated[
        float, typer.Option(min=0, max=0.9, help="Of them that are faulty, from 0 to 0.9.")
    ] = 0.1,
    seed: Annotated[int, typer.Option(help="Of the order of requests.")] = 0,
    out: OutOption = Path("out"),
) -> None:
    """Send a server of a small model many requests, some of them faulty, and check each answer.

    Unknown and corrupt adapters, oversize prompts, clients that go, adapters that come, go and
    change meanwhile, files that cannot be read, and a full queue.
    """
    with reported():
        faults = _import("faults")
        from dora_cache.lab.machine import describe_machine

        data_file = make_folder(out, "serve-faults.json") / "serve-faults.json"
        with (
            tempfile.TemporaryDirectory(prefix="dora-cache-") as scratch,
            quiet(),
            progress_bar("requests", requests) as move,
        ):
            found = faults.measure_faults(
                Path(scratch), requests=requests, share=share, seed=seed, move=move
            )
        console = results()
        console.print(faults.table(found))
        console.print(
            f"\n{found.requests:,} requests in {found.seconds:.0f} s. Wrong texts: {found.wrong}. "
            f"Wrong statuses: {found.unexpected}. Left at the end: {found.left}. The server's "
            f"process had {format_bytes(found.rss[0])} at the start, "
            f"{format_bytes(found.rss[len(found.rss) // 2])} after half of the requests and "
            f"{format_bytes(found.rss[-1])} at the end. Exit status after SIGTERM: "
            f"{found.exit_status}."
        )
        data = {"machine": describe_machine(), **faults.as_dict(found)}
        with writing(data_file, "folder as --out"):
            data_file.write_text(json.dumps(data, indent=1), encoding="utf-8")


def serve_replicas(
    *,
    adapters: Annotated[int, typer.Option(min=2, help="Adapters.")] = 40,
    room: Annotated[int, typer.Option(min=1, help="That fit on a replica's device.")] = 10,
    exponent: Annotated[float, typer.Option(min=0, max=4, help="Of Zipf's law.")] = 1.0,
    requests: Annotated[int, typer.Option(min=100, help="That are measured, of each way.")] = 2000,
    seed: Annotated[int, typer.Option(help="Of the order of requests.")] = 0,
    out: OutOption = Path("out"),
) -> None:
    """Serve a small model from two replicas by Ray Serve, with and without multiplexing.

    Adapters are asked for by Zipf's law. Then a replica is killed while more requests are sent.
    Every answer is compared with the same request alone.
    """
    with reported():
        replicas = _import("replicas")
        from dora_cache.lab.machine import describe_machine

        data_file = make_folder(out, "serve-replicas.json") / "serve-replicas.json"
        total = 2 * (requests + requests // 2) + requests
        with (
            tempfile.TemporaryDirectory(prefix="dora-cache-") as scratch,
            quiet(),
            progress_bar("requests", total) as move,
        ):
            found = replicas.measure_replicas(
                Path(scratch),
                adapters=adapters,
                room=room,
                exponent=exponent,
                requests=requests,
                seed=seed,
                move=move,
            )
        console = results()
        console.print(replicas.table(found))
        killed = found.killed
        again = ", ".join(f"{count} of status {code}" for code, count in killed.again.items())
        console.print(
            f"\n{adapters} adapters, two replicas with room for {room} each. A replica killed: "
            f"{killed.requests:,} of {killed.requests:,} requests answered, {killed.wrong} wrong; "
            f"sent again after {again or 'no error'}. The longest time without an answer was "
            f"{killed.longest:.1f} s; after {killed.replaced:.0f} s there were two replicas again."
        )
        data = {"machine": describe_machine(), **replicas.as_dict(found)}
        with writing(data_file, "folder as --out"):
            data_file.write_text(json.dumps(data, indent=1), encoding="utf-8")


def _import(name: str) -> Any:
    """Import a module that needs more packages than the command line.

    Raises:
        CliError: they are not installed.
    """
    import importlib

    try:
        return importlib.import_module(f"dora_cache.lab.serving.{name}")
    except ImportError as error:
        raise CliError(str(error)) from None
