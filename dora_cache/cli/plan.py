"""``dora-cache plan``: what a cache will hold, before any weight is loaded."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 - typer reads the annotations
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich import box
from rich.table import Table

from dora_cache import backends
from dora_cache.cli.console import CliError, quiet, reported, results, spinner
from dora_cache.cli.loading import (
    check_source,
    parse_adapters,
    parse_device,
    read_adapters,
    read_model,
)
from dora_cache.cli.options import (
    AdapterOption,
    BackendOption,
    DeviceOption,
    LayersOption,
    MaxBytesOption,
    NumericsOption,
    given,
)
from dora_cache.config import CacheConfig
from dora_cache.lab import planning
from dora_cache.lab.shapes import SHAPES, shape_config
from dora_cache.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

__all__ = ["plan"]

_POLICIES = ("lru", "budget")
_SHARES = (10, 25, 50, 75, 90, 100)
_ALONE = 8  # adapters shown one by one
_RANDOM = ("a", "b")


def plan(
    model: Annotated[
        Path | None,
        typer.Argument(
            metavar="[MODEL]", help="Folder with a model's config.json; or give --shape."
        ),
    ] = None,
    *,
    shape: Annotated[
        str | None,
        typer.Option(metavar="NAME", help=f"Instead of MODEL: {', '.join(SHAPES)}."),
    ] = None,
    layers: LayersOption = None,
    adapter: AdapterOption = None,
    rank: Annotated[
        int, typer.Option(min=1, help="With --shape and no --adapter: rank of two DoRA adapters.")
    ] = 8,
    max_bytes: MaxBytesOption = None,
    backend: BackendOption = None,
    numerics: NumericsOption = None,
    pin: Annotated[
        list[str] | None,
        typer.Option("--pin", metavar="NAME", help="An adapter to be pinned; may be repeated."),
    ] = None,
    tokens: Annotated[
        int, typer.Option(min=1, help="Forwards with an adapter before the next one's turn.")
    ] = 16,
    device: DeviceOption = None,
) -> None:
    """Say what a cache will hold and how often it will hit, from configurations alone.

    Reads config.json and adapter_config.json; no weights. The hit rates are those of a model of
    traffic: adapters take turns, or one is used alone.
    """
    with reported():
        paths = parse_adapters(adapter or [])
        _check(model, shape, layers, adapters=bool(paths))
        takes_cap = backend is None or _takes_cap(backend)
        # With any cap at all: to find mistakes before anything is planned.
        least = 0 if takes_cap and max_bytes is None else max_bytes
        settings = given(max_bytes=least, numerics=numerics)
        config = CacheConfig(backend=backend or "lru", **settings)
        with spinner("planning"), quiet():
            base, dtype = _config(model, shape, layers)
            configs = read_adapters(paths) if paths else _random(rank)
            found = planning.plan(_adapted(base, dtype, configs), numerics=config.numerics)
        cap = None
        if max_bytes is not None:
            cap = config.make_cap(config.memory(parse_device(device)))
        if pin:
            if cap is None:
                raise CliError("--pin goes with a cap: give --max-bytes, as --max-bytes 64MiB")
            found.check_pins(pin, cap)
        console = results()
        _show(console, found)
        if not found.values:
            return
        if cap is not None:
            console.print(_holds(found, cap) + "\n", markup=False)
        if not takes_cap:
            console.print(f"{backend} has no cap.")
            return
        policies = [backend] if backend else _POLICIES
        shares = _SHARES if cap is None else ()
        caps = [cap] if cap is not None else [found.working_set * share // 100 for share in shares]
        console.print(_rates(found, policies, caps, shares, tokens, pin or ()))
        turns = f", and all in turn with {tokens} forwards each" if len(found.adapters) > 1 else ""
        console.print(
            f"Expected hits per lookup once traffic has settled: one adapter alone{turns}. Costs "
            "are not known before a run: budget is simulated with the same for every byte.",
            markup=False,
        )


def _takes_cap(backend: str) -> bool:
    known = backends.available()
    return backend not in known or "max_bytes" in known[backend].options


def _check(model: Path | None, shape: str | None, layers: int | None, *, adapters: bool) -> None:
    check_source(model, shape, layers)
    if shape is None and not adapters:
        raise CliError("no adapter given: write --adapter name=PATH")


def _config(
    model: Path | None, shape: str | None, layers: int | None
) -> tuple[Any, torch.dtype | None]:
    """Return the model's configuration, and the dtype of its weights where that does not say."""
    if model is not None:
        return read_model(model), None
    try:
        return shape_config(shape or "", layers=layers), torch.bfloat16
    except ValueError as error:
        raise CliError(f"--layers {layers}: {error}") from None


def _adapted(config: Any, dtype: torch.dtype | None, adapters: dict[str, Any]) -> Any:
    base = planning.without_weights(config, dtype=dtype)
    try:
        return planning.with_adapters(base, adapters)
    except Exception as error:  # noqa: BLE001 - PEFT has many ways to refuse an adapter
        text = " ".join(str(error).split()) or type(error).__name__
        msg = f"PEFT cannot put these adapters into this model, give others: {text}"
        raise CliError(msg) from None


def _random(rank: int) -> dict[str, Any]:
    from peft import LoraConfig

    return {
        name: LoraConfig(r=rank, target_modules="all-linear", use_dora=True, task_type="CAUSAL_LM")
        for name in _RANDOM
    }


def _show(console: Console, found: planning.Plan) -> None:
    table = _table(("kind", "adapter"), ("values", "bytes"))
    for row in found.rows:
        table.add_row(
            row.kind, str(row.adapter or ""), f"{row.entries:,}", format_bytes(row.nbytes)
        )
    table.add_section()
    table.add_row("working set", "", f"{len(found.values):,}", format_bytes(found.working_set))
    console.print(table)
    if found.declined:
        console.print("Not planned:")
        for one in found.declined:
            name = f" {one.adapter!r}" if one.adapter else ""
            console.print(f"  {one.kind}{name}, {one.where}: {one.reason}", markup=False)
    console.print()


def _holds(found: planning.Plan, cap: int) -> str:
    text = f"A cap of {format_bytes(cap)} holds "
    if cap >= found.working_set:
        return f"{text}all of that; nothing is derived twice."
    whole, count = found.whole(cap), len(found.adapters)
    text += f"{cap / found.working_set:.0%} of that"
    if count > 1:
        text += f", or {whole} of the {count} adapters whole"
    if not whole:
        text += (
            "; not even one adapter fits: a forward visits the layers in a cycle, which makes an "
            "LRU evict each value just before its next use"
        )
    return f"{text}."


def _rates(
    found: planning.Plan,
    policies: Sequence[str],
    caps: Sequence[int],
    shares: Sequence[int],
    tokens: int,
    pinned: Sequence[str],
) -> Table:
    names = found.adapters
    traffics = [(f"{name} alone", [name]) for name in names[:_ALONE]]
    if len(names) > 1:
        traffics.append(("all in turn", list(names)))
    table = _table(("cap", "traffic"), policies)
    for index, cap in enumerate(caps):
        label = format_bytes(cap)
        if shares:
            label = f"{label} ({shares[index]} %)"
        for traffic, adapters in traffics:
            rates = []
            for policy in policies:
                rate = found.hit_rate(policy, cap, adapters, tokens=tokens, pinned=pinned)
                rates.append(f"{rate:.1%}")
            table.add_row(label, traffic, *rates)
            label = ""
        table.add_section()
    return table


def _table(names: Sequence[str], figures: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in names:
        table.add_column(name, overflow="fold")
    for name in figures:
        table.add_column(name, justify="right", no_wrap=True)
    return table
