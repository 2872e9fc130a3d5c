"""``dora-cache demo``: two writing styles, one small model, no wait between them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.panel import Panel
from rich.text import Text

from dora_cache.attachment import attach
from dora_cache.cli.console import CliError, progress_bar, quiet, reported, results, spinner
from dora_cache.cli.loading import load_adapters
from dora_cache.cli.measuring import measure, save, show
from dora_cache.cli.output import make_folder
from dora_cache.cli.texts import greedy
from dora_cache.config import CacheConfig
from dora_cache.lab import bench
from dora_cache.lab.demo import ADAPTERS, adapter_directory
from dora_cache.lab.machine import describe_machine
from dora_cache.lab.models import random_dora, twin
from dora_cache.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from rich.console import Console

    from dora_cache.stats import CacheStats

__all__ = ["demo"]

_PROMPT = "O apples"
_TOKENS_TIMED = 8


@dataclass(frozen=True, slots=True)
class _Written:
    """Texts of the same prompt by each adapter, and what they took."""

    ids: dict[str, torch.Tensor]
    texts: dict[str, str]
    logits: dict[str, torch.Tensor]
    seconds: float


@dataclass(frozen=True, slots=True)
class _Mixed:
    """Texts of the same prompt by each adapter and by the base model, from one pool.

    Attributes:
        alone: one after another.
        together: in one batch.
        seconds_alone: what the first took.
        seconds_together: what the second took.
    """

    alone: list[str]
    together: list[str]
    seconds_alone: float
    seconds_together: float


def demo(
    tokens: Annotated[int, typer.Option(min=1, help="New tokens of each text.")] = 40,
    out: Annotated[
        Path, typer.Option(help="Folder for demo.json and demo.png.", metavar="DIR")
    ] = Path("out"),
    max_bytes: Annotated[
        str, typer.Option(help="Cap of the lru backend.", metavar="SIZE")
    ] = "1MiB",
    rank: Annotated[
        int | None,
        typer.Option(
            min=1, help="Measure random adapters of this rank instead of the two that come along."
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of every way of running.")] = 4,
) -> None:
    """Switch between two DoRA adapters of SmolLM2-135M under a memory cap, and measure it.

    In the end both of them and the base model write in one batch.
    Takes two to three minutes on two cores; the first time, it also unpacks the model.
    """
    with reported():
        config = CacheConfig(backend="lru", max_bytes=max_bytes)
        folder = make_folder(out, "demo.json", "demo.png")
        console = results()
        model, tokenizer = _load(console)
        cap, stats, cached, plain = _write_both(model, tokenizer, tokens, config)
        same = all((cached.ids[name].equal(plain.ids[name])) for name in ADAPTERS)
        difference = max(
            float((cached.logits[name] - plain.logits[name]).abs().max()) for name in ADAPTERS
        )
        _show_texts(console, cached, plain, cap, stats)
        verdict = "the same texts" if same else "DIFFERENT TEXTS"
        console.print(f"Uncached PEFT gives {verdict}; max |Δlogit| over them: {difference:g}\n")
        measured = model
        if rank is not None:
            with spinner("making random adapters"), quiet():
                measured = random_dora(twin(model).unload(), ADAPTERS, rank=rank)
        input_ids = cached.ids[ADAPTERS[0]][:, : len(tokenizer(_PROMPT)["input_ids"])]
        found = measure(
            measured,
            input_ids,
            ADAPTERS,
            bench.standard_ways(max_bytes),
            tokens=_TOKENS_TIMED,
            rounds=rounds,
        )
        show(console, found, cap)
        mixed = _write_mixed(model, tokenizer, tokens)
        texts = list(cached.texts.values())
        equal = mixed.together == mixed.alone and mixed.together[: len(texts)] == texts
        _show_mixed(console, mixed, equal=equal)
        more = {
            "model": "SmolLM2-135M-Instruct",
            "rank": rank or model.peft_config[ADAPTERS[0]].r,
            "max_bytes": cap,
            "machine": describe_machine(),
            "texts": {
                "prompt": _PROMPT,
                "tokens": tokens,
                **cached.texts,
                "same_as_peft": same,
                "max_logit_difference": difference,
                "seconds_dora_cache_lru": cached.seconds,
                "seconds_peft": plain.seconds,
            },
            "one_batch": {
                "same_as_alone": equal,
                "seconds_together": mixed.seconds_together,
                "seconds_one_after_another": mixed.seconds_alone,
                "base": mixed.together[-1],
            },
        }
        save(
            console,
            found,
            folder,
            "demo",
            title="SmolLM2-135M, two unmerged DoRA adapters in turn",
            more=more,
        )


def _load(console: Console) -> tuple[Any, Any]:
    """Return SmolLM2 with both adapters, and its tokenizer."""
    from dora_cache.lab.demo import smollm

    try:
        with spinner("finding the model") as rename:
            path = smollm.model_directory(progress=rename)
            rename("loading the model")
            base, tokenizer = smollm.load_model(path)
            rename("loading the adapters")
            model = load_adapters(base, {name: adapter_directory(name) for name in ADAPTERS})
    except OSError as error:
        raise CliError(f"no model for the demo: {error}") from None
    config = model.peft_config[ADAPTERS[0]]
    console.print(
        f"[bold]SmolLM2-135M-Instruct[/] with two DoRA adapters of rank {config.r}: "
        + " and ".join(ADAPTERS)
    )
    return model, tokenizer


def _write_both(
    model: Any, tokenizer: Any, tokens: int, config: CacheConfig
) -> tuple[int | None, CacheStats, _Written, _Written]:
    """Write the texts with dora-cache attached, and once more after it has been detached."""
    with progress_bar("writing", 2 * len(ADAPTERS) * tokens) as move:
        with attach(model, config) as cache:
            cached = _write(model, tokenizer, tokens, move)
            stats = cache.stats()
        plain = _write(model, tokenizer, tokens, move)
    return stats.max_bytes, stats, cached, plain


def _write(model: Any, tokenizer: Any, tokens: int, tick: Callable[[], None]) -> _Written:
    ids, texts, logits, seconds = {}, {}, {}, 0.0
    for name in ADAPTERS:
        model.set_adapter(name, inference_mode=True)
        began = time.perf_counter()
        ids[name], start = greedy(model, tokenizer, _PROMPT, tokens, tick)
        seconds += time.perf_counter() - began
        texts[name] = tokenizer.decode(ids[name][0, start:], skip_special_tokens=True)
        logits[name] = bench.logits(model, ids[name])
    return _Written(ids, texts, logits, seconds)


def _show_texts(
    console: Console, cached: _Written, plain: _Written, cap: int | None, stats: CacheStats
) -> None:
    for name in ADAPTERS:
        text = Text.assemble((_PROMPT, "dim"), cached.texts[name])
        console.print(Panel(text, title=name, title_align="left", width=min(100, console.width)))
    limit = "" if cap is None else f" of at most {format_bytes(cap)}"
    console.print(
        f"dora-cache (lru) took {cached.seconds:.1f} s for both and holds "
        f"{format_bytes(stats.nbytes)}{limit}; uncached PEFT took {plain.seconds:.1f} s."
    )


def _write_mixed(model: Any, tokenizer: Any, tokens: int) -> _Mixed:
    """Write with each adapter and with none: one after another, and in one batch."""
    from dora_cache.serving import AdapterPool

    names = (*ADAPTERS, None)
    base = twin(model).unload()
    with AdapterPool(base) as pool, progress_bar("writing", (len(names) + 1) * tokens) as move:
        for name in ADAPTERS:
            pool.add(name, adapter_directory(name))
        pool.prefetch(ADAPTERS).result()

        def write(*chosen: str | None) -> tuple[list[str], float]:
            began = time.perf_counter()
            with pool.use(chosen):
                ids, start = greedy(base, tokenizer, _PROMPT, tokens, move, rows=len(chosen))
            seconds = time.perf_counter() - began
            return tokenizer.batch_decode(ids[:, start:], skip_special_tokens=True), seconds

        alone = [write(name) for name in names]
        together, seconds = write(*names)
    return _Mixed(
        [text for texts, _ in alone for text in texts],
        together,
        sum(seconds for _, seconds in alone),
        seconds,
    )


def _show_mixed(console: Console, mixed: _Mixed, *, equal: bool) -> None:
    verdict = "the same as alone" if equal else "SOMETHING ELSE than alone"
    console.print(
        f"\nIn one batch of an AdapterPool, {', '.join(ADAPTERS)} and the base model took "
        f"{mixed.seconds_together:.1f} s, one after another {mixed.seconds_alone:.1f} s. "
        f"Each wrote {verdict}."
    )
