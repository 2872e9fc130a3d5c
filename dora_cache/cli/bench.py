"""``dora-cache bench``: the ways of running adapters, on one's own model."""

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from dora_cache import bench as measurement
from dora_cache.cli.console import make_folder, quiet, reported, results, spinner
from dora_cache.cli.loading import (
    load_adapters,
    load_model,
    parse_adapters,
    parse_device,
)
from dora_cache.cli.measuring import measure, save, show
from dora_cache.cli.options import (
    AdapterOption,
    BackendOption,
    DeviceBytesOption,
    DeviceOption,
    MaxBytesOption,
    ModelArgument,
    NumericsOption,
    OutOption,
    given,
)
from dora_cache.config import CacheConfig

__all__ = ["bench"]

_PROMPT_TOKENS = 16
_RANDOM = ("a", "b")
_STANDARD = ("dict", "lru", "cpu")


def bench(
    model: ModelArgument,
    *,
    adapter: AdapterOption = None,
    rank: Annotated[
        int, typer.Option(min=1, help="Without --adapter: rank of two random DoRA adapters.")
    ] = 8,
    backend: BackendOption = None,
    max_bytes: MaxBytesOption = None,
    device_bytes: DeviceBytesOption = None,
    numerics: NumericsOption = None,
    tokens: Annotated[int, typer.Option(min=2, help="New tokens of each generation.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of every way.")] = 4,
    out: OutOption = Path("out"),
    device: DeviceOption = None,
) -> None:
    """Measure LoRA, PEFT, DoraCaching and dora-cache on your model, side by side.

    Without --backend: dict, lru (with the cap of --max-bytes, or with too little for all
    adapters), and cpu.
    """
    with reported():
        paths = parse_adapters(adapter or [])
        settings = given(max_bytes=max_bytes, device_bytes=device_bytes, numerics=numerics)
        if backend is not None:
            CacheConfig(backend=backend, **settings)
        where = parse_device(device)
        folder = make_folder(out)
        with spinner("loading"):
            base = load_model(model, where)
            names = tuple(paths) or _RANDOM
            with quiet():
                wrapped = (
                    load_adapters(base, paths)
                    if paths
                    else measurement.random_dora(base, names, rank=rank)
                )
            cap = max_bytes or _cap(measurement.working_set(wrapped, names))
        configs = _configs(backend, cap, settings)
        ways = (
            measurement.BASE,
            measurement.LORA,
            measurement.PEFT,
            measurement.PEFT_CACHING,
            *map(measurement.with_cache, configs),
        )
        input_ids = _prompt(base, where)
        found = measure(wrapped, input_ids, names, ways, tokens=tokens, rounds=rounds)
        console = results()
        limits = [result.stats.max_bytes for result in found.results if result.stats]
        show(console, found, next((limit for limit in limits if limit is not None), None))
        more = {
            "model": model.resolve().name,
            "rank": None if paths else rank,
            "machine": measurement.describe_machine(where),
        }
        save(
            console, found, folder, "bench", title=f"{more['model']}: unmerged adapters", more=more
        )


def _cap(sizes: dict[str, int]) -> int:
    """Choose a cap under which one adapter fits, and all do not where there are several."""
    total = sum(sizes.values())
    return total if len(sizes) == 1 else total - min(sizes.values()) // 2


def _configs(backend: str | None, cap: int | str, settings: dict[str, Any]) -> list[CacheConfig]:
    if backend is not None:
        return [CacheConfig(backend=backend, **settings)]
    shared = given(numerics=settings.get("numerics"))
    own: dict[str, dict[str, Any]] = {
        "lru": {"max_bytes": cap},
        "cpu": given(device_bytes=settings.get("device_bytes")),
    }
    return [CacheConfig(backend=name, **shared, **own.get(name, {})) for name in _STANDARD]


def _prompt(model: Any, device: torch.device) -> torch.Tensor:
    """Return random token ids, the same ones every time; shape (1, 16)."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().num_embeddings
    return torch.randint(vocabulary, (1, _PROMPT_TOKENS), generator=generator).to(device)
