"""Try an operation on a warm cache, beside the same model that never had one."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from peft.helpers import DoraCaching
from torch import Tensor

from dora_cache.attachment import attach
from dora_cache.cache import AdapterCache
from dora_cache.lab.freshness.scene import Pick, Scene, quiet

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from dora_cache.lab.freshness.operations import Operation

__all__ = ["DORA_CACHING", "Trial", "Verdict", "attached", "run_trial"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of an operation.

    Attributes:
        word: ``"fresh"`` where every output equals the uncached model's to the bit, ``"stale"``
            where one does not, ``"fails"`` where there is an error that the uncached model does
            not raise.
        detail: the error, or by how much the outputs differ at most.
    """

    word: str
    detail: str = ""


@dataclass(slots=True)
class Trial:
    """An operation on one subject.

    Attributes:
        verdict: what came of it.
        held: entries before the operation and right after it; None without a cache that counts.
        again: how many layers derived their value again, by adapter.
    """

    verdict: Verdict = field(default_factory=lambda: Verdict("fresh"))
    held: tuple[int, int] | None = None
    again: dict[str, int] = field(default_factory=dict)


def DORA_CACHING(_: Scene) -> AbstractContextManager[object]:  # noqa: N802 - beside attached()
    """PEFT's own cache."""
    caching: AbstractContextManager[object] = DoraCaching()
    return caching


def attached(**settings: Any) -> Callable[[Scene], AbstractContextManager[object]]:
    """Return a subject: dora-cache with these settings."""
    return lambda scene: attach(scene.model, **settings)


def _uncached(_: Scene) -> AbstractContextManager[object]:
    return contextlib.nullcontext()


def run_trial(
    operation: Operation,
    subject: Callable[[Scene], AbstractContextManager[object]],
    pick: Pick = Pick(),  # noqa: B008 - frozen
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Trial:
    """Warm a cache up, do the operation, and compare every adapter's outputs with the uncached.

    Args:
        operation: what to do.
        subject: what caches, as a context around everything that is done to a scene.
        pick: what the operation is to work on.
        dtype: of the model.
        device: of the model.
    """
    trial = Trial()
    expected = _outputs(operation, _uncached, pick, Scene(dtype, device=device), Trial())
    found = _outputs(operation, subject, pick, Scene(dtype, device=device), trial)
    trial.verdict = _compare(found, expected)
    return trial


def _outputs(
    operation: Operation,
    subject: Callable[[Scene], AbstractContextManager[object]],
    pick: Pick,
    scene: Scene,
    trial: Trial,
) -> Sequence[Tensor | None] | Exception:
    with quiet(), subject(scene) as entered:
        cache = entered if isinstance(entered, AdapterCache) else None
        for _ in range(2):
            scene.run_each()
        before = cache.stats().entries if cache else 0
        try:
            torch.manual_seed(pick.seed)  # for what the operation initialises at random
            outputs = list(operation.apply(scene, pick) or ())
            if cache:
                trial.held = (before, cache.stats().entries)
            if not operation.ends:
                outputs += _first_runs(scene, cache, trial)
                outputs += scene.run_each() + scene.run_each()
        except Exception as error:  # noqa: BLE001 - to be compared with the uncached model's
            return error
    return outputs


def _first_runs(scene: Scene, cache: AdapterCache | None, trial: Trial) -> list[Tensor]:
    """Run each adapter once, and note what had to be derived again."""
    found = []
    active = list(scene.tuner.active_adapters)
    for adapter in scene.adapters:
        scene.activate(adapter)
        misses = cache.stats().misses if cache else 0
        found.append(scene.run())
        if cache:
            trial.again[adapter] = cache.stats().misses - misses
    scene.activate(*active)
    return found


def _compare(
    found: Sequence[Tensor | None] | Exception, expected: Sequence[Tensor | None] | Exception
) -> Verdict:
    if isinstance(expected, Exception):
        msg = f"the uncached model fails: {type(expected).__name__}: {expected}"
        raise RuntimeError(msg) from expected  # noqa: TRY004 - there is nothing to compare with
    if isinstance(found, Exception):
        return Verdict("fails", f"{type(found).__name__}: {found}".splitlines()[0])
    worst = 0.0
    stale = len(found) != len(expected)
    for one, other in zip(found, expected, strict=False):
        if one is None or other is None:
            stale = stale or one is not other
        elif one.shape != other.shape or one.dtype is not other.dtype:
            stale = True
        elif not torch.equal(one, other):
            stale = True
            worst = max(worst, float((one.double() - other.double()).abs().max()))
    return Verdict("stale", f"{worst:.2g}" if worst else "") if stale else Verdict("fresh")
