"""Every recipe on one layer: what it holds, and how much sooner the layer is done."""

from __future__ import annotations

import copy
import statistics
import warnings
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from rich import box
from rich.table import Table

from dora_cache.attachment import attach
from dora_cache.lab.turns import take_turns
from dora_cache.recipes import load_recipes
from dora_cache.recipes.examples import make_model
from dora_cache.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from dora_cache.recipes.examples import Example

__all__ = [
    "NOTHING_TO_CACHE",
    "Covered",
    "as_json",
    "as_markdown",
    "as_table",
    "count_examples",
    "measure_coverage",
    "nothing_as_markdown",
    "page",
    "sizes_of",
    "summary",
]

NOTHING_TO_CACHE = {
    "LORA": ("LoRA without DoRA", "both of its products involve the input"),
    "ADALORA": (
        "AdaLoRA",
        "it multiplies one factor by a vector, which takes no longer than a lookup",
    ),
    "ADAMSS": ("AdaMSS", "all of its products involve the input"),
    "ADAPTION_PROMPT": (
        "Adaption prompt",
        "it projects a few prompt tokens; the rest is attention",
    ),
    "BEFT": ("BEFT", "it adds a bias"),
    "CARTRIDGE": ("Cartridge", "it stores its keys and values directly"),
    "CPT": ("CPT", "its prompt is an embedding lookup"),
    "DEFT": (
        "DEFT",
        "most of its forward involves the input; the rest takes no longer than a lookup",
    ),
    "GRALORA": ("GraLoRA", "all of its products involve the input"),
    "IA3": ("IA³", "it multiplies by a vector"),
    "LILY": ("Lily", "its router mixes factors depending on the input"),
    "LN_TUNING": ("LN tuning", "it trains ordinary layer norms"),
    "MULTITASK_PROMPT_TUNING": ("Multitask prompt tuning", "it multiplies its prompt by a vector"),
    "PROMPT_TUNING": ("Prompt tuning", "its prompt is an embedding lookup"),
    "PVERA": ("PVeRA", "all of its products involve the input"),
    "ROAD": (
        "RoAd",
        "it computes sines and cosines of vectors, which takes no longer than a lookup",
    ),
    "SHADOW": ("Shadow", "it works on hidden states"),
    "TINYLORA": ("TinyLoRA", "it computes a tiny matrix, which takes no longer than a lookup"),
    "VERA": ("VeRA", "all of its products involve the input"),
    "XLORA": ("X-LoRA", "its scalings depend on the input"),
}
"""Kinds by PEFT's names for them: what they are called, and why they need no cache."""


@dataclass(frozen=True, slots=True)
class Speed:
    """How one way compares with PEFT uncached, for one number of tokens.

    Attributes:
        us: a forward through the layer, in microseconds; the median over rounds.
        speedup: PEFT's uncached time over this one, within rounds; the median.
        low: the lower quartile of that.
        high: the upper one.
    """

    us: float
    speedup: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Covered:
    """What caching does for one example.

    Attributes:
        kind: the recipe's name.
        example: the example's.
        layer: the kind of layer, and its size.
        base_bytes: bytes of the layer's own weight.
        stores: by numerics, names of the values that are stored.
        held: by numerics, bytes held for one adapter.
        uncached_us: by number of tokens, a forward of PEFT's in microseconds.
        speeds: by numerics and number of tokens.
        note: why nothing was measured, if so.
    """

    kind: str
    example: str
    layer: str
    base_bytes: int
    stores: dict[str, list[str]] = field(default_factory=dict)
    held: dict[str, int] = field(default_factory=dict)
    uncached_us: dict[int, float] = field(default_factory=dict)
    speeds: dict[str, dict[int, Speed]] = field(default_factory=dict)
    note: str = ""


def count_examples(kinds: Sequence[str] | None = None) -> int:
    """Return how many rows :func:`measure_coverage` yields."""
    return len(_examples(kinds))


def measure_coverage(
    kinds: Sequence[str] | None = None,
    *,
    size: int = 1024,
    tokens: Sequence[int] = (1, 128),
    rounds: int = 15,
    seconds: float = 2.0,
    dtype: torch.dtype = torch.float32,
) -> Iterator[Covered]:
    """Measure every example of every recipe, all ways of an example in turn.

    Args:
        kinds: names of recipes; by default all.
        size: inputs and outputs of linear layers. Convolutions have an eighth of that as channels,
            embeddings eight times as many rows.
        tokens: lengths of the inputs.
        rounds: how often each way is timed, at most.
        seconds: for how long the ways of one example and length take turns; at least three rounds.
        dtype: of the base layer.
    """
    for kind, example in _examples(kinds):
        yield _measure(kind, example, size, tokens, rounds, seconds, dtype)


def _examples(kinds: Sequence[str] | None) -> list[tuple[str, Example]]:
    return [
        (recipe.name, example)
        for recipe in load_recipes()
        if kinds is None or recipe.name in kinds
        for example in getattr(recipe, "examples", ())
    ]


def sizes_of(example: Example, size: int) -> tuple[int, int]:
    """Return the inputs and outputs of an example's layer; see :func:`measure_coverage`."""
    name = example.base.name
    if "Conv" in name:
        return size // 8, size // 8
    vocabulary = 8 * size
    return {"Embedding": (vocabulary, size), "Head": (size, vocabulary)}.get(name, (size, size))


def _measure(
    kind: str,
    example: Example,
    size: int,
    tokens: Sequence[int],
    rounds: int,
    seconds: float,
    dtype: torch.dtype,
) -> Covered:
    inputs, outputs = sizes_of(example, size)
    layer = f"{example.base.name}({inputs}, {outputs})"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain, _ = make_model(example, inputs, outputs, dtype=dtype, layers=1)
        models = {numerics: copy.deepcopy(plain) for numerics in example.numerics}
        caches = {numerics: attach(model, numerics=numerics) for numerics, model in models.items()}
        found = Covered(kind, example.name, layer, _base_bytes(plain))
        try:
            for length in tokens:
                _, x = make_model(example, inputs, outputs, dtype=dtype, layers=1, tokens=length)
                ways = {"": plain, **models}
                times = take_turns(
                    {way: _forward(model, x) for way, model in ways.items()}, rounds, seconds
                )
                found.uncached_us[length] = 1e6 * statistics.median(times[""])
                for numerics in models:
                    found.speeds.setdefault(numerics, {})[length] = _speed(
                        times[""], times[numerics]
                    )
            for numerics, cache in caches.items():
                found.held[numerics] = cache.stats().nbytes
                names = {cell.kind for cell in cache._engine.cells.held()}
                found.stores[numerics] = sorted(names)
        finally:
            for cache in caches.values():
                cache.detach()
    return found


def _forward(model: Any, x: Any) -> Callable[[], object]:
    # Past PeftModel's own forward, which costs as much for every way.
    inner = getattr(getattr(model, "base_model", model), "model", model)
    target = inner if callable(inner) and type(model).__name__ == "PeftModel" else model

    def run() -> object:
        with torch.no_grad():
            return target(x)

    return run


def _base_bytes(model: Any) -> int:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            base = module.get_base_layer()
            return sum(p.numel() * p.element_size() for p in base.parameters(recurse=False))
    return 0


def _speed(uncached: list[float], cached: list[float]) -> Speed:
    ratios = sorted(a / b for a, b in zip(uncached, cached, strict=True))
    low, median, high = statistics.quantiles(ratios, n=4)
    return Speed(1e6 * statistics.median(cached), median, low, high)


def as_table(rows: Sequence[Covered]) -> Table:
    """Return one row for each example and numerics."""
    lengths = sorted({length for row in rows for length in row.uncached_us})
    found = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    found.add_column("adapter, layer")
    found.add_column("numerics")
    found.add_column("held", justify="right")
    found.add_column("of the\nweight", justify="right", vertical="bottom")
    for length in lengths:
        unit = "token" if length == 1 else "tokens"
        found.add_column(f"PEFT, µs\n{length} {unit}", justify="right", vertical="bottom")
        found.add_column("cached,\nµs", justify="right", vertical="bottom")
        found.add_column("faster", justify="right", vertical="bottom")
    for row in rows:
        for numerics, speeds in row.speeds.items():
            cells = []
            for length in lengths:
                speed = speeds[length]
                cells += [f"{row.uncached_us[length]:.0f}", f"{speed.us:.0f}", _times(speed)]
            first = f"{row.example}, {row.layer}" if numerics == "peft" else ""
            held = row.held[numerics]
            found.add_row(first, numerics, format_bytes(held), _share(held, row), *cells)
    return found


def _times(speed: Speed) -> str:
    return f"{speed.speedup:.0f}x" if speed.speedup >= 100 else f"{speed.speedup:.3g}x"  # noqa: PLR2004


def _share(held: int, row: Covered) -> str:
    if not row.base_bytes:
        return "-"
    share = held / row.base_bytes
    return f"{share:.0%}" if share >= 0.095 else f"{100 * share:.2g}%"  # noqa: PLR2004


def summary(rows: Sequence[Covered], least: float = 1.3) -> str:
    """Say how many kinds gain, and which lose, in one way or another."""
    one = min((length for row in rows for length in row.uncached_us), default=1)
    gaining = {
        row.kind
        for row in rows
        if max((speeds[one].speedup for speeds in row.speeds.values()), default=0) >= least
    }
    kinds = {row.kind for row in rows}
    slower = [
        f"{row.example} ({numerics}, {length} tokens, {speed.speedup:.2f}x)"
        for row in rows
        for numerics, speeds in row.speeds.items()
        for length, speed in speeds.items()
        if speed.speedup < 0.97  # noqa: PLR2004 - beyond what noise would explain
    ]
    smaller = sorted(
        {
            row.example
            for row in rows
            if "fast" in row.speeds
            and any(
                s.speedup > row.speeds["peft"][n].speedup for n, s in row.speeds["fast"].items()
            )
        }
    )
    return (
        f"{len(gaining)} of {len(kinds)} kinds are at least {least}x as fast for {one} token(s). "
        f"Slower than 0.97x: {', '.join(slower) or 'none'}. "
        f"The form of numerics=fast is faster for: {', '.join(smaller) or 'none'}."
    )


def page(rows: Sequence[Covered], machine: dict[str, Any]) -> str:
    """Return the tables for the documentation, in Markdown."""
    return (
        as_markdown(rows)
        + f"\nMeasured by `dora-cache lab coverage` on {machine['cpu']}, {machine['threads']} "
        f"thread(s), float32, torch {machine['torch']}, peft {machine['peft']}; medians of rounds "
        "in which all ways of a row took turns.\n\n## Nothing to cache\n\n" + nothing_as_markdown()
    )


def as_markdown(rows: Sequence[Covered]) -> str:
    """Return a row for each example and numerics; the layers' sizes are below the table."""
    lengths = sorted({length for row in rows for length in row.uncached_us})
    heads = ["adapter", "layer", "stored", "numerics", "held", "of the weight"]
    heads += [f"{length} token{'s' if length > 1 else ''}" for length in lengths]
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for row in rows:
        for numerics, speeds in row.speeds.items():
            held = row.held[numerics]
            cells = [
                row.example,
                _kind_of(row.layer),
                ", ".join(row.stores[numerics]),
                numerics,
                format_bytes(held).replace(" ", "\N{NO-BREAK SPACE}"),
                _share(held, row),
                *(_times(speeds[length]) for length in lengths),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    layers = {_kind_of(row.layer): row.layer for row in rows}
    return "\n".join([*lines, "", f"Sizes: {', '.join(layers.values())}.", ""])


def _kind_of(layer: str) -> str:
    return layer.rpartition("(")[0]


def nothing_as_markdown() -> str:
    """Return the table of the kinds that need no cache."""
    lines = ["| adapter | why there is nothing to cache |", "| --- | --- |"]
    lines += [f"| {name} | {reason} |" for name, reason in sorted(NOTHING_TO_CACHE.values())]
    return "\n".join(lines) + "\n"


def as_json(rows: Sequence[Covered]) -> list[dict[str, Any]]:
    """Return everything as JSON knows it; times in microseconds, sizes in bytes."""
    return [asdict(row) for row in rows]
