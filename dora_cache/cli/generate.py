"""``dora-cache generate``: text from one's own model and adapters."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from dora_cache.attachment import attach
from dora_cache.cli.console import CliError, progress_bar, quiet, reported, results, spinner
from dora_cache.cli.loading import (
    load_adapters,
    load_model,
    parse_adapters,
    parse_device,
    tokenizer_of,
)
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
from dora_cache.cli.texts import greedy
from dora_cache.config import CacheConfig
from dora_cache.stats import CacheStats
from dora_cache.units import format_bytes

__all__ = ["generate"]


def generate(
    model: ModelArgument,
    *,
    prompt: Annotated[str, typer.Option(help="Text to continue; taken as it is.")],
    adapter: AdapterOption = None,
    use: Annotated[
        str | None, typer.Option(help="Which adapter; by default the first.", metavar="NAME")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The most tokens to add.")] = 64,
    backend: BackendOption = None,
    max_bytes: MaxBytesOption = None,
    device_bytes: DeviceBytesOption = None,
    numerics: NumericsOption = None,
    config: Annotated[
        Path | None, typer.Option(help="TOML file with these settings.", metavar="FILE")
    ] = None,
    device: DeviceOption = None,
) -> None:
    """Continue a prompt greedily with one of your adapters, cached."""
    with reported():
        paths = parse_adapters(adapter or [])
        if not paths:
            raise CliError("no adapter given: write --adapter name=PATH")
        name = use or next(iter(paths))
        if name not in paths:
            known = " or ".join(f"--use {known}" for known in paths)
            raise CliError(f"no adapter is called {name!r}: write {known}")
        settings = given(
            backend=backend, max_bytes=max_bytes, device_bytes=device_bytes, numerics=numerics
        )
        cache_config = (
            CacheConfig.from_file(config, **settings) if config else CacheConfig(**settings)
        )
        where = parse_device(device)
        with spinner("loading"):
            base = load_model(model, where)
            tokenizer = tokenizer_of(model)
            wrapped = load_adapters(base, paths)
        with quiet():
            wrapped.set_adapter(name, inference_mode=True)
        with (
            attach(wrapped, cache_config) as cache,
            progress_bar("generating", max_new_tokens) as move,
        ):
            ids, _ = greedy(wrapped, tokenizer, prompt, max_new_tokens, move)
            stats = cache.stats()
        text = tokenizer.decode(ids[0], skip_special_tokens=True)
        results().print(text, markup=False, soft_wrap=True)
        Console(stderr=True, highlight=False).print(
            _summary(cache_config.backend, stats), style="dim", soft_wrap=True
        )


def _summary(backend: str, stats: CacheStats) -> str:
    cap = "" if stats.max_bytes is None else f" of {format_bytes(stats.max_bytes)}"
    return (
        f"cache: {backend}, {stats.entries} entries, {format_bytes(stats.nbytes)}{cap}, "
        f"{stats.hit_rate:.1%} hits ({stats.hits:,} hits, {stats.misses:,} misses, "
        f"{stats.evictions:,} evictions)"
    )
