"""``dora-cache serve``: a model and a folder of adapters, with OpenAI's interface."""

import logging
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from dora_cache.cli.console import CliError, quiet, reported, spinner
from dora_cache.cli.loading import parse_device, tokenizer_of
from dora_cache.cli.options import DTYPES, DeviceOption, Dtype
from dora_cache.lab.demo import ADAPTERS, adapter_directory
from dora_cache.lab.demo.smollm import model_directory
from dora_cache.units import format_bytes

__all__ = ["serve"]

_DEMO = "smollm2"


def serve(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help=f"Folder of a causal language model, its name on the Hub, or {_DEMO} for the "
            "demo's.",
        ),
    ],
    *,
    adapters: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Folder whose folders are adapters; for the demo, its own."
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="What requests call the base model; by default as MODEL.")
    ] = None,
    device_bytes: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Cap on adapters on the device, e.g. 2GiB.")
    ] = None,
    max_bytes: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Cap on adapters in the host's memory.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 for any that is free.")] = 8000,
    max_prompt: Annotated[int, typer.Option(min=1, help="The most tokens of a prompt.")] = 2048,
    max_tokens: Annotated[int, typer.Option(min=1, help="The most tokens of an answer.")] = 512,
    batch: Annotated[int, typer.Option(min=1, help="Requests that run at once.")] = 16,
    queue: Annotated[int, typer.Option(min=0, help="Requests that wait for that.")] = 256,
    kv_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of the key-value cache, for all that run.")
    ] = 16384,
    refresh: Annotated[
        float, typer.Option(min=0, help="Seconds between looks at the folder; 0 for none.")
    ] = 5.0,
    drain: Annotated[
        float | None,
        typer.Option(min=0, help="Seconds for accepted requests after SIGTERM; by default any."),
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of the weights; by default the model's.")
    ] = None,
    attention: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Of Transformers', as sdpa or flash_attention_2."),
    ] = None,
    device: DeviceOption = None,
    replicas: Annotated[
        int | None,
        typer.Option(min=1, help="Processes with the model, by Ray Serve; --queue is before them."),
    ] = None,
    max_replicas: Annotated[
        int | None,
        typer.Option(min=1, help="As many where requests queue; --replicas are the fewest then."),
    ] = None,
) -> None:
    """Serve a model and its adapters: many adapters in one batch, under a cap.

    `model` in a request is an adapter's name or the base model's. After SIGTERM, accepted requests
    are answered.
    """
    with reported():
        try:
            from dora_cache.serving import server
        except ImportError as error:
            raise CliError(str(error)) from None
        from dora_cache import AdapterPool

        if adapters is None and model == _DEMO:
            adapters = adapter_directory(ADAPTERS[0]).parent
        if adapters is not None and not adapters.is_dir():
            raise CliError(f"no folder {adapters}: give --adapters the folder that has them")
        where = parse_device(device)
        limits = server.Limits(
            max_prompt=max_prompt,
            max_tokens=max_tokens,
            batch=batch,
            queue=queue,
            kv_tokens=kv_tokens,
            batch_tokens=max(512, batch),
        )
        if max_replicas is not None and max_replicas < (replicas or 1):
            raise CliError(f"--max-replicas {max_replicas}: give at least {replicas or 1}")
        if replicas is not None or max_replicas is not None:
            settings = {
                "model": str(model_directory() if model == _DEMO else model),
                "adapters": adapters,
                "name": name or (_DEMO if model == _DEMO else None),
                "device_bytes": device_bytes,
                "max_bytes": max_bytes,
                "replicas": (replicas or 1, max_replicas) if max_replicas else replicas,
                "limits": limits,
                "refresh": refresh or None,
                "dtype": "auto" if dtype is None else str(DTYPES[dtype]).removeprefix("torch."),
                "attention": attention,
                "num_gpus": int(where.type == "cuda"),
                **({} if drain is None else {"drain": drain}),
            }
            _replicated(settings, host, port)
            return
        with spinner("loading the model") as rename:
            base, tokenizer = _load(model, where, dtype, attention)
            base_name = name or (Path(model).resolve().name if Path(model).is_dir() else model)
            pool = AdapterPool(base, device_bytes=device_bytes, max_bytes=max_bytes)
            rename("reading the adapters")
            folder = server.AdapterFolder(pool, adapters, reserved=frozenset({base_name}))
            folder.refresh()
            engine = server.Engine(base, pool, folder, limits)
        for refused, reason in folder.refused.items():
            typer.echo(f"refused {refused}: {reason}", err=True)
        cap = pool.stats().max_device_bytes
        typer.echo(
            f"serving {base_name} and {len(folder.versions)} adapters, "
            f"{'no cap' if cap is None else f'up to {format_bytes(cap)} of them'} on {where}",
            err=True,
        )
        logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
        app = server.create_app(engine, tokenizer, model=base_name, refresh=refresh or None)
        try:
            server.run(app, engine, host=host, port=port, drain=drain)
        finally:
            pool.close()


def _replicated(settings: dict[str, Any], host: str, port: int) -> None:
    """Serve from replicas.

    Raises:
        CliError: they cannot be had.
    """
    try:
        from dora_cache.serving import ray
    except ImportError as error:
        raise CliError(str(error)) from None
    if settings["adapters"] is None:
        raise CliError("--replicas needs --adapters: give the folder that has the adapters")
    try:
        ray.run(ray.Settings(**settings), host=host, port=port)
    except (ConnectionError, RuntimeError) as error:
        raise CliError(f"Ray: {error}") from None


def _load(model: str, device: torch.device, dtype: Dtype | None, attention: str | None) -> Any:
    """Return a model in eval mode, and its tokenizer.

    Raises:
        CliError: one cannot be loaded.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    settings: dict[str, Any] = {"dtype": "auto" if dtype is None else DTYPES[dtype]}
    if attention is not None:
        settings["attn_implementation"] = attention
    try:
        source = str(model_directory() if model == _DEMO else model)
        with quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(source, **settings)
            if Path(source).is_dir():
                tokenizer = tokenizer_of(Path(source))
            else:
                tokenizer = AutoTokenizer.from_pretrained(source)
    except CliError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever a damaged file makes its reader raise
        text = " ".join(str(error).split())[:300]
        hint = "give a folder that save_pretrained() made, or a name on the Hub"
        msg = f"cannot load {model}: {text}; {hint}"
        raise CliError(msg) from None
    return loaded.to(device).eval(), tokenizer
