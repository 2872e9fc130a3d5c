"""Decoding speed over caps: how much of a cache's gain is left when not everything fits."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from rich import box
from rich.table import Table

from dora_cache.attachment import attach
from dora_cache.backends import CPUBackend
from dora_cache.lab.bench.measure import decode, keep_freed_memory
from dora_cache.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torch import Tensor

    from dora_cache.cache import AdapterCache

__all__ = ["KINDS", "Capped", "Caps", "as_dict", "draw", "measure_caps", "random_adapter", "table"]

_WARM_UP_TOKENS = 8  # the budget backend learns what derivations cost, and settles


def _loha(config: Any) -> Any:
    return config.LoHaConfig(r=8, alpha=8, target_modules="all-linear", init_weights=False)


def _lokr(config: Any) -> Any:
    return config.LoKrConfig(r=8, alpha=8, target_modules="all-linear", init_weights=False)


def _fourierft(config: Any) -> Any:
    return config.FourierFTConfig(n_frequency=1000, target_modules="all-linear")


def _oft(config: Any) -> Any:
    return config.OFTConfig(r=0, oft_block_size=32, target_modules="all-linear", init_weights=False)


def _hra(config: Any) -> Any:
    return config.HRAConfig(r=8, target_modules="all-linear", init_weights=False)


def _dora(config: Any) -> Any:
    return config.LoraConfig(
        r=8, use_dora=True, target_modules="all-linear", init_lora_weights=False
    )


KINDS: dict[str, Callable[[Any], Any]] = {
    "LoHa": _loha,
    "LoKr": _lokr,
    "FourierFT": _fourierft,
    "OFT": _oft,
    "HRA": _hra,
    "DoRA": _dora,
}
"""Adapters to try, by name; each makes a config of the module that is given, ``peft``."""


@dataclass(frozen=True, slots=True)
class Capped:
    """One backend under one cap.

    Attributes:
        backend: its name; empty for PEFT uncached.
        share: the cap as a share of the working set.
        max_bytes: the cap.
        token_ms: milliseconds per token, the median over tokens and rounds.
        held: bytes held at the end, by ``cpu`` also those in host memory.
        hit_rate: hits per lookup while it was timed.
        gain: share of the time that an unbounded cache saves: 0 for uncached, 1 for everything.
        copy_ms: milliseconds per token that copies from the host take by themselves; 0 without any.
        ahead: share of these copies that had begun before they were needed; None without any.
        hidden: share of their time that decoding took no longer for, against everything cached.
    """

    backend: str
    share: float
    max_bytes: int
    token_ms: float
    held: int
    hit_rate: float
    gain: float
    copy_ms: float = 0.0
    ahead: float | None = None
    hidden: float | None = None


class _Seen(NamedTuple):
    """What a setting's last turn showed besides its times."""

    cap: int
    held: int
    hit_rate: float
    copies: int = 0
    ahead: int = 0
    copying: float = 0.0


@dataclass(frozen=True, slots=True)
class Caps:
    """What was measured: PEFT uncached, everything cached, and the caps between."""

    uncached_ms: float
    cached_ms: float
    working_set: int
    rows: tuple[Capped, ...]


def random_adapter(base: Any, kind: str) -> Any:
    """Wrap a Transformers model with a random adapter on all its linear layers; in eval mode."""
    import peft
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return peft.get_peft_model(base, KINDS[kind](peft)).eval()


def measure_caps(
    model: Any,
    input_ids: Tensor,
    *,
    backends: Sequence[str] = ("lru", "budget"),
    shares: Sequence[float] = (0.1, 0.25, 0.5, 0.75, 0.9),
    tokens: int = 6,
    rounds: int = 2,
    move: Callable[[], object] = lambda: None,
) -> Caps:
    """Decode under each cap with each backend, uncached and with everything cached, in turn.

    Where the model is on the CPU, malloc keeps freed memory from here on, for all settings alike.

    Args:
        model: a PEFT model of a causal language model, in eval mode.
        input_ids: the prompt, int64, shape (1, length).
        backends: names of backends that take ``max_bytes``, or ``cpu``, for which the cap is that
            of the device.
        shares: caps, as shares of the working set.
        tokens: tokens that are timed, each time.
        rounds: how often each setting has its turn. Each time the cache starts empty and settles
            over a few tokens that are not timed.
        move: called after each setting's turn.
    """
    if not next(model.parameters()).is_cuda:
        keep_freed_memory()
    with attach(model) as cache:
        cache.warm()
        working_set = cache.stats().nbytes
    settings: list[tuple[str, float]] = [("", 0.0), ("dict", 1.0)]
    settings += [(backend, share) for share in shares for backend in backends]
    times: dict[tuple[str, float], list[float]] = {setting: [] for setting in settings}
    seen: dict[tuple[str, float], _Seen] = {}
    for index in range(rounds):
        for backend, share in settings[index % 2 :: 2] + settings[1 - index % 2 :: 2]:
            times[backend, share] += _time(
                model, input_ids, backend, share, working_set, tokens, seen
            )
            move()
    medians = {setting: statistics.median(found) for setting, found in times.items()}
    uncached, cached = medians["", 0.0], medians["dict", 1.0]
    rows = []
    for backend, share in settings[2:]:
        turn, taken = seen[backend, share], medians[backend, share]
        gain = (uncached - taken) / (uncached - cached)
        copy_ms = 1e3 * turn.copying / (1 + tokens)
        rows.append(
            Capped(
                backend,
                share,
                turn.cap,
                taken,
                turn.held,
                turn.hit_rate,
                gain,
                copy_ms,
                turn.ahead / turn.copies if turn.copies else None,
                min(max(1 - (taken - cached) / copy_ms, 0.0), 1.0) if turn.copies else None,
            )
        )
    return Caps(uncached, cached, working_set, tuple(rows))


def _time(
    model: Any,
    input_ids: Tensor,
    backend: str,
    share: float,
    working_set: int,
    tokens: int,
    seen: dict[tuple[str, float], _Seen],
) -> list[float]:
    if not backend:
        return list(decode(model, input_ids, 1 + tokens).step_ms)
    cap = int(share * working_set)
    limits: dict[str, Any] = {"dict": {}, "cpu": {"device_bytes": cap}}.get(
        backend, {"max_bytes": cap}
    )
    with attach(model, backend=backend, **limits) as cache:
        decode(model, input_ids, _WARM_UP_TOKENS)
        before, copied = cache.stats(), _copied(cache)
        found = decode(model, input_ids, 1 + tokens)
        after = cache.stats()
        lookups = after.lookups - before.lookups
        rate = (after.hits - before.hits) / lookups if lookups else 0.0
        copies = [new - old for new, old in zip(_copied(cache), copied, strict=True)]
        seen[backend, share] = _Seen(cap, after.nbytes, rate, *copies)
    return list(found.step_ms)


def _copied(cache: AdapterCache) -> tuple[Any, ...]:
    backend = cache._engine.memory.backend
    if isinstance(backend, CPUBackend):
        return backend.fetches, backend.prefetched, backend.copying
    return 0, 0, 0.0


def table(found: Caps) -> Table:
    """Return one row for each backend and cap."""
    rows = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    rows.add_column("")
    copying = any(row.ahead is not None for row in found.rows)
    columns = ["cap", "held", "ms per token", "tokens/s", "hit rate", "of the gain"]
    for column in columns + ["ms of copies", "ahead", "hidden"] * copying:
        rows.add_column(column, justify="right")
    rows.add_row("PEFT uncached", "", "", *_speed(found.uncached_ms), "", "0%")
    for row in found.rows:
        rows.add_row(
            row.backend,
            f"{row.share:.0%}",
            format_bytes(row.held),
            *_speed(row.token_ms),
            f"{row.hit_rate:.0%}",
            f"{row.gain:.0%}",
            *_copies(row),
        )
    whole = format_bytes(found.working_set)
    rows.add_row("everything cached", "", whole, *_speed(found.cached_ms), "100%", "100%")
    return rows


def _copies(row: Capped) -> tuple[str, ...]:
    if row.ahead is None or row.hidden is None:
        return ()
    return f"{row.copy_ms:.1f}", f"{row.ahead:.0%}", f"{row.hidden:.0%}"


def _speed(milliseconds: float) -> tuple[str, str]:
    return f"{milliseconds:.1f}", f"{1000 / milliseconds:.2f}"


def as_dict(found: Caps) -> dict[str, Any]:
    """Return everything as JSON knows it; times in ms, sizes in bytes."""
    return asdict(found)


def draw(found: Caps, path: Path, *, title: str) -> None:
    """Draw tokens/s over the cap, a line for each backend, and write a PNG.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colors = iter(("#8a8f98", "#2563a8", "#c2752d", "#3f7d4e"))
    for backend in dict.fromkeys(row.backend for row in found.rows):
        rows = [row for row in found.rows if row.backend == backend]
        axes.plot(
            [100 * row.share for row in rows],
            [1000 / row.token_ms for row in rows],
            marker="o",
            color=next(colors),
            label=backend,
        )
    for milliseconds, text in (
        (found.uncached_ms, "PEFT uncached"),
        (found.cached_ms, "everything cached"),
    ):
        axes.axhline(1000 / milliseconds, color="#333333", linewidth=0.8, linestyle="--")
        axes.annotate(
            text, (100, 1000 / milliseconds), ha="right", va="bottom", fontsize=9, color="#333333"
        )
    axes.set_xlim(0, 100)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(f"cap, % of the working set ({format_bytes(found.working_set)})")
    axes.set_ylabel("tokens per second")
    axes.legend(frameon=False, loc="upper left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, loc="left", fontsize=11)
    figure.savefig(path, format="png")
