"""Time greedy decoding, and compare what comes out."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dora_cache.attachment import attach
from dora_cache.errors import AdapterNotFoundError
from dora_cache.lab.bench.ways import LORA, PEFT, Running, Way, groups, rotated
from dora_cache.lab.models import twin

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from peft import PeftModel

    from dora_cache.stats import CacheStats

__all__ = [
    "Comparison",
    "Decoded",
    "Decoding",
    "Result",
    "Spread",
    "blocks",
    "compare",
    "decode",
    "figure",
    "keep_freed_memory",
    "logits",
    "synchronize",
    "working_set",
]

_WARM_UP_TOKENS = 2
_TURN = 8
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_LARGEST_INT, _LARGEST_THRESHOLD = (1 << 31) - 1, 1 << 25


@dataclass(frozen=True, slots=True)
class Decoded:
    """One greedy generation.

    Attributes:
        tokens: the new token ids.
        first_ms: milliseconds of the pass over the prompt, which gives the first token.
        step_ms: milliseconds of each further token.
    """

    tokens: tuple[int, ...]
    first_ms: float
    step_ms: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Spread:
    """Repeated measurements of one quantity: the middle, and how low and how high they go."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Summarise at least one value."""
        ordered = sorted(values)
        return cls(statistics.median(ordered), ordered[0], ordered[-1])

    @classmethod
    def quartiles(cls, values: Iterable[float]) -> Spread:
        """Summarise at least one value by its quartiles."""
        ordered = sorted(values)
        if len(ordered) == 1:
            return cls.of(ordered)
        low, median, high = statistics.quantiles(ordered, n=4, method="inclusive")
        return cls(median, low, high)

    def __str__(self) -> str:
        """Return the middle, and the others in parentheses, with three digits or more."""
        return f"{figure(self.median)} ({figure(self.low)}\N{EN DASH}{figure(self.high)})"


def figure(value: float) -> str:
    """Return a number with three digits, or as many as it has before the point."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"  # noqa: PLR2004


@dataclass(frozen=True, slots=True)
class Result:
    """What one way of running costs, and what it changes.

    Attributes:
        way: its name.
        label: its name for people.
        token_ms: milliseconds per token after a generation's first: the median over all tokens,
            and the quartiles, between which half of them lie.
        first_ms: milliseconds of a generation's first pass, right after switching adapters.
        ratio: the median over all tokens of the time relative to that of plain LoRA's token of the
            same turn; None if that was not measured.
        ratio_spread: that median, and the quartiles.
        held_bytes: bytes held at the end so as not to derive them again; None where nothing is
            meant to be.
        stats: the cache's counters at the end; None where there is none to ask.
        max_logit_difference: largest absolute difference from uncached PEFT over every position,
            vocabulary entry and adapter; None for a way that computes something else.
    """

    way: str
    label: str
    token_ms: Spread
    first_ms: Spread
    ratio: float | None
    ratio_spread: Spread | None
    held_bytes: int | None
    stats: CacheStats | None
    max_logit_difference: float | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """The ways of running one model, measured side by side.

    Attributes:
        results: in the order the ways were given.
        adapters: names, in the order of a round.
        rounds: generations of every way with every adapter.
        tokens: new tokens of each generation, the first included.
        prompt_tokens: tokens of the prompt.
        working_set: bytes that dora-cache holds when nothing is evicted, by adapter.
    """

    results: tuple[Result, ...]
    adapters: tuple[str, ...]
    rounds: int
    tokens: int
    prompt_tokens: int
    working_set: dict[str, int]


def compare(
    model: PeftModel,
    input_ids: Tensor,
    *,
    adapters: Sequence[str],
    ways: Sequence[Way],
    tokens: int = 8,
    rounds: int = 4,
    on_step: Callable[[str, int, int], object] | None = None,
) -> Comparison:
    """Measure greedy decoding with a key-value cache, one request at a time.

    Every way is warmed up first. Then each round generates from the prompt with one adapter after
    the other; all ways do so side by side, a few tokens each in turn and every time another one
    first, so that what slows the machine down for a while slows all of them alike. (With one token
    each, most of what is timed would be the processor's caches, full of what the others left.)
    Switching adapters is not timed by itself, but the first pass after it is. Ways that work in
    place come last.

    Args:
        model: in eval mode; its weights are shared with what is measured, and do not change, but
            for the rounding that a way that works in place leaves behind.
        input_ids: the prompt, int64, shape (1, length), on the model's device.
        adapters: names of the model's adapters to switch between.
        ways: with distinct names.
        tokens: new tokens of each generation; the first is timed apart from the others.
        rounds: generations of every way with every adapter.
        on_step: called with a way's label, the steps done and the steps in all.

    Raises:
        ValueError: the model is in training mode, or there is too little to measure.
        NothingToCacheError: a way attaches dora-cache, and the model has nothing to cache.
    """
    _check(model, adapters, ways, tokens, rounds)
    sets = groups(ways)
    total = sum(map(len, sets)) * len(adapters) * (1 + rounds * tokens)
    steps = 0

    def step(label: str) -> None:
        nonlocal steps
        steps += 1
        if on_step is not None:
            on_step(label, steps, total)

    with PEFT.open(model, adapters) as plain:
        expected = {name: _warm_up(plain, name, input_ids) for name in adapters}
    found: dict[str, Result] = {}
    for together in sets:
        results = _side_by_side(
            model, input_ids, expected, together, tokens=tokens, rounds=rounds, step=step
        )
        found = {result.way: result for result in results} | found  # LoRA's own, not a companion's
    return Comparison(
        results=tuple(found[way.name] for way in ways),
        adapters=tuple(adapters),
        rounds=rounds,
        tokens=tokens,
        prompt_tokens=input_ids.shape[1],
        working_set=working_set(model, adapters),
    )


def _side_by_side(
    model: PeftModel,
    input_ids: Tensor,
    expected: dict[str, Tensor],
    ways: Sequence[Way],
    *,
    tokens: int,
    rounds: int,
    step: Callable[[str], None],
) -> Iterator[Result]:
    """Measure ways that can take turns; ``expected`` are the prompt's logits by adapter."""
    adapters = list(expected)
    timed: dict[str, list[Decoded]] = {way.name: [] for way in ways}
    differences: dict[str, float] = {}
    with ExitStack() as stack:
        running = {way.name: stack.enter_context(way.open(model, adapters)) for way in ways}
        for way in ways:
            for name in adapters:
                found = _warm_up(running[way.name], name, input_ids)
                if way.comparable:
                    difference = float((found - expected[name]).abs().max())
                    differences[way.name] = max(differences.get(way.name, 0.0), difference)
                step(way.label)
        for turn, name in enumerate(adapters * rounds):
            decodings = {}
            for way in ways:
                running[way.name].select(name)
                decodings[way.name] = Decoding(running[way.name].model, input_ids)
            for block, size in enumerate(blocks(tokens)):
                for way in rotated(ways, turn + block):
                    with running[way.name].turn():
                        for _ in range(size):
                            decodings[way.name].step()
                            step(way.label)
            for way in ways:
                timed[way.name].append(decodings[way.name].so_far())
        for way in ways:
            own = timed[way.name]
            ratio = _ratio(own, timed.get(LORA.name))
            yield Result(
                way=way.name,
                label=way.label,
                token_ms=Spread.quartiles(ms for one in own for ms in one.step_ms),
                first_ms=Spread.of(one.first_ms for one in own),
                ratio=None if ratio is None else ratio.median,
                ratio_spread=ratio,
                held_bytes=running[way.name].held(),
                stats=running[way.name].stats(),
                max_logit_difference=differences.get(way.name),
            )


def blocks(tokens: int) -> list[int]:
    """Split a generation into turns: the pass over the prompt, then a few tokens each."""
    rest = tokens - 1
    return [1, *[_TURN] * (rest // _TURN), *([rest % _TURN] if rest % _TURN else [])]


def decode(model: Any, input_ids: Tensor, tokens: int) -> Decoded:
    """Generate greedily with a key-value cache, timing each token; no end token stops it.

    Args:
        model: a causal language model, or a PEFT model of one.
        input_ids: the prompt, int64, shape (1, length).
        tokens: how many to generate, one or more.
    """
    decoding = Decoding(model, input_ids)
    for _ in range(tokens):
        decoding.step()
    return decoding.so_far()


class Decoding:
    """A greedy generation under way.

    Args:
        model: as of :func:`decode`.
        input_ids: the prompts, int64, shape (batch, length).
    """

    def __init__(self, model: Any, input_ids: Tensor) -> None:
        self._model = model
        self._ids = input_ids
        self._past: Any = None
        self._found: list[Tensor] = []
        self._milliseconds: list[float] = []

    @torch.inference_mode()
    def step(self) -> float:
        """Generate one more token of each prompt; return the milliseconds."""
        synchronize(self._ids.device)
        began = time.perf_counter()
        output = self._model(input_ids=self._ids, past_key_values=self._past, use_cache=True)
        self._past = output.past_key_values
        self._ids = output.logits[:, -1:].argmax(dim=-1)
        synchronize(self._ids.device)
        self._milliseconds.append(1e3 * (time.perf_counter() - began))
        self._found.append(self._ids)
        return self._milliseconds[-1]

    def so_far(self) -> Decoded:
        """Return what the first prompt has got."""
        first, *others = self._milliseconds
        return Decoded(tuple(torch.cat(self._found, dim=1)[0].tolist()), first, tuple(others))


def logits(model: Any, input_ids: Tensor) -> Tensor:
    """Return the logits of one pass over a prompt, shape (1, length, vocabulary)."""
    with torch.inference_mode():
        found: Tensor = model(input_ids=input_ids, use_cache=False).logits
    return found


def working_set(model: PeftModel, adapters: Sequence[str]) -> dict[str, int]:
    """Return the bytes that dora-cache would hold for each adapter if nothing were evicted.

    An adapter that derives nothing, a plain LoRA one for instance, holds none.

    Raises:
        NothingToCacheError: the model has nothing to cache.
    """
    sizes = Counter[str]()
    other = twin(model)  # named, so that it lives as long as its cache
    with attach(other, backend="dict") as cache:
        before = 0
        for name in adapters:
            with suppress(AdapterNotFoundError):
                cache.warm([name])
            after = cache.stats().nbytes
            sizes[name] = after - before
            before = after
    return dict(sizes)


def _check(
    model: PeftModel, adapters: Sequence[str], ways: Sequence[Way], tokens: int, rounds: int
) -> None:
    if model.training:
        raise ValueError("nothing is cached in training mode: call model.eval() first")
    if tokens < 2 or rounds < 1 or not adapters or not ways:  # noqa: PLR2004 - first and one more
        raise ValueError("give two tokens or more, and a round, an adapter and a way or more")
    repeated = [name for name, count in Counter(way.name for way in ways).items() if count > 1]
    if repeated:
        raise ValueError(f"the way {repeated[0]!r} is there twice: give each a name of its own")


def _warm_up(running: Running, adapter: str, input_ids: Tensor) -> Tensor:
    """Run a little of everything that is timed later; return the prompt's logits."""
    running.select(adapter)
    with running.turn():
        decode(running.model, input_ids, _WARM_UP_TOKENS)
        return logits(running.model, input_ids)


def _ratio(generations: Sequence[Decoded], floor: Sequence[Decoded] | None) -> Spread | None:
    if floor is None:
        return None
    return Spread.quartiles(
        own / plain
        for one, other in zip(generations, floor, strict=True)
        for own, plain in zip(one.step_ms, other.step_ms, strict=True)
    )


def synchronize(device: torch.device) -> None:
    """Wait for what runs on a device, so that it is timed where it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def keep_freed_memory() -> bool:
    """Have glibc's malloc keep memory that is freed, for the rest of the process.

    By default it may give back large blocks, depending on what else lies where, and then every
    derived matrix costs page faults: noise as large as what is to be measured. PyTorch's allocator
    on a GPU keeps memory as well, and so do jemalloc and tcmalloc.

    Returns:
        Whether malloc could be told so; False without glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
        return bool(
            mallopt(_M_MMAP_THRESHOLD, _LARGEST_THRESHOLD)
            and mallopt(_M_TRIM_THRESHOLD, _LARGEST_INT)
        )
    except (AttributeError, OSError, TypeError):
        return False
