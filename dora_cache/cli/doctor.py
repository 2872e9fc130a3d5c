"""``dora-cache doctor``: what is cached in one's own model, and what is not and why."""

from pathlib import Path
from typing import Annotated

import typer

from dora_cache.cli.console import CliError, quiet, reported, results, spinner
from dora_cache.cli.loading import load_adapters, load_model, parse_adapters, parse_device
from dora_cache.cli.options import (
    AdapterOption,
    BackendOption,
    DeviceBytesOption,
    DeviceOption,
    MaxBytesOption,
    ModelArgument,
    NumericsOption,
    given,
)
from dora_cache.config import CacheConfig

__all__ = ["doctor"]


def doctor(
    model: ModelArgument,
    *,
    adapter: AdapterOption = None,
    backend: BackendOption = None,
    max_bytes: MaxBytesOption = None,
    device_bytes: DeviceBytesOption = None,
    numerics: NumericsOption = None,
    config: Annotated[
        Path | None, typer.Option(help="TOML file with these settings.", metavar="FILE")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Length of the input.")] = 16,
    seconds: Annotated[float, typer.Option(min=0.0, help="Time for measuring.")] = 2.0,
    device: DeviceOption = None,
) -> None:
    """Say what is cached in your model, what is not and why, what to do, and how fast that is.

    Runs two forwards with each adapter, and compares the time with PEFT's and plain LoRA's. Ends
    with exit code 1 if something is not cached.
    """
    from dora_cache.lab.bench import random_prompt
    from dora_cache.lab.doctor import examine

    with reported():
        paths = parse_adapters(adapter or [])
        if not paths:
            raise CliError("no adapter given: write --adapter name=PATH")
        settings = given(
            backend=backend, max_bytes=max_bytes, device_bytes=device_bytes, numerics=numerics
        )
        cache_config = (
            CacheConfig.from_file(config, **settings) if config else CacheConfig(**settings)
        )
        where = parse_device(device)
        with spinner("examining"), quiet():
            base = load_model(model, where)
            input_ids = random_prompt(base, 1, tokens)
            found = examine(
                load_adapters(base, paths),
                lambda one: one(input_ids=input_ids).logits,
                cache_config,
                adapters=tuple(paths),
                seconds=seconds,
            )
        results().print(str(found), markup=False, soft_wrap=True)
    if not found.healthy:
        raise typer.Exit(1)
