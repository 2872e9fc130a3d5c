"""What the audit costs, and after how many forwards it notices an uncounted write."""

from __future__ import annotations

import statistics
import time
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from dora_cache.attachment import attach
from dora_cache.errors import CacheWarning
from dora_cache.lab.bench.measure import decode, logits, synchronize
from dora_cache.lab.models import twin

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor

__all__ = ["AuditCost", "measure_audit"]

_WARM_UP = 40  # forwards: every value's audit has run, so that kernels are compiled
_MOST = 2000


@dataclass(frozen=True, slots=True)
class AuditCost:
    """What was measured, with one adapter.

    Attributes:
        values: values held.
        forwards: forwards after ``p.data.copy_`` on all factors, until the output is right again.
        token_ms: milliseconds per token while decoding with the audit, the median.
        audits: audited uses per token.
        share: of the time per token that the audit takes on the host, launches included.
        ratio: time per token with the audit relative to that without, in turns; the median.
        ratio_quartiles: and the quartiles.
        warm_ms: milliseconds to derive the adapter's values with the audit.
        warm_ratio: relative to that without.
    """

    values: int
    forwards: int
    token_ms: float
    audits: float
    share: float
    ratio: float
    ratio_quartiles: tuple[float, float]
    warm_ms: float
    warm_ratio: float


def measure_audit(
    model: PeftModel, input_ids: Tensor, *, adapter: str, tokens: int = 32, rounds: int = 8
) -> AuditCost:
    """Measure the audit on one adapter of a causal language model.

    Args:
        model: in eval mode; its weights do not change.
        input_ids: a prompt, int64, shape (1, length), on the model's device.
        adapter: the adapter's name.
        tokens: new tokens in each turn.
        rounds: turns with and without the audit.
    """
    audited, plain = twin(model), twin(model)
    for one in (audited, plain):
        one.set_adapter(adapter, inference_mode=True)
    with attach(audited) as cache, attach(plain, audit=False) as other:
        warm = [_warm_ms(one, adapter, input_ids.device) for one in (cache, other) for _ in "123"]
        for one in (audited, plain):
            for _ in range(_WARM_UP):
                logits(one, input_ids)
        clock = _Clock(cache._engine.auditor)
        with_audit: list[float] = []
        ratios: list[float] = []
        for turn in range(rounds):
            order = ((audited, plain), (plain, audited))[turn % 2]
            steps = {id(one): decode(one, input_ids, tokens).step_ms for one in order}
            with_audit += steps[id(audited)]
            ratios += [a / b for a, b in zip(steps[id(audited)], steps[id(plain)], strict=True)]
        seconds, audits = clock.stop()
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return AuditCost(
            values=cache.stats().entries,
            forwards=_forwards_until_right(audited, cache, input_ids, adapter),
            token_ms=statistics.median(with_audit),
            audits=audits / (rounds * tokens),
            share=seconds * 1e3 / (rounds * tokens) / statistics.median(with_audit),
            ratio=middle,
            ratio_quartiles=(low, high),
            warm_ms=min(warm[:3]),
            warm_ratio=min(warm[:3]) / min(warm[3:]),
        )


class _Clock:
    """Times an auditor's work until :meth:`stop`."""

    def __init__(self, auditor: Any) -> None:
        self._auditor = auditor
        self._changed = auditor.changed
        self._seconds = 0.0
        self._calls = 0
        auditor.changed = self._timed

    def _timed(self, *args: Any) -> Any:
        began = time.perf_counter()
        found = self._changed(*args)
        self._seconds += time.perf_counter() - began
        self._calls += 1
        return found

    def stop(self) -> tuple[float, int]:
        """Return the seconds and the calls so far, and stop timing."""
        del self._auditor.changed
        return self._seconds, self._calls


def _warm_ms(cache: Any, adapter: str, device: torch.device) -> float:
    cache.invalidate()
    synchronize(device)
    began = time.perf_counter()
    cache.warm([adapter])
    synchronize(device)
    return 1e3 * (time.perf_counter() - began)


def _forwards_until_right(model: Any, cache: Any, input_ids: Tensor, adapter: str) -> int:
    factors = [
        weight
        for name, weight in model.named_parameters()
        if ("lora_A" in name or "lora_B" in name) and f".{adapter}." in name
    ]
    before = [weight.detach().clone() for weight in factors]
    for weight in factors:
        weight.data.copy_(weight.data * 1.25)
    with cache.bypass():
        expected = logits(model, input_ids)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CacheWarning)
            for turn in range(1, _MOST + 1):
                if torch.equal(logits(model, input_ids), expected):
                    return turn
    finally:  # the twins share their weights
        for weight, old in zip(factors, before, strict=True):
            weight.data.copy_(old)
        cache.invalidate()
    msg = f"not noticed in {_MOST} forwards"
    raise RuntimeError(msg)
