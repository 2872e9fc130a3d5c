"""Time ways of doing the same, in turn, so that what slows a machine down slows all alike."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["take_turns"]

_LEAST_SECONDS = 0.002  # of one piece that is timed, so that the clock's steps do not matter


def take_turns(
    ways: Mapping[str, Callable[[], object]], rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Time all ways in turn, another way first in every round.

    Args:
        ways: what to call, by name. Each is called three times before it is timed.
        rounds: how often each is timed, at most.
        seconds: for how long they take turns; at least three rounds, if ``rounds`` allows.

    Returns:
        By name, seconds per call, round by round; work on a GPU is waited for.
    """
    repeats = {}
    for way, run in ways.items():
        run()
        run()
        repeats[way] = max(1, int(_LEAST_SECONDS / max(1e-7, _timed(run, 1))))
    times: dict[str, list[float]] = {way: [] for way in ways}
    end = time.perf_counter() + seconds
    names = list(ways)
    for index in range(rounds):
        first = index % len(names)
        for way in names[first:] + names[:first]:
            times[way].append(_timed(ways[way], repeats[way]))
        if index >= 2 and time.perf_counter() > end:  # noqa: PLR2004 - three rounds at least
            break
    return times


def _timed(run: Callable[[], object], count: int) -> float:
    _wait()
    began = time.perf_counter()
    for _ in range(count):
        run()
    _wait()
    return (time.perf_counter() - began) / count


def _wait() -> None:
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
