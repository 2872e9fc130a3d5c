"""What is cached in one's own model, what is not and why, and what that makes of its speed.

::

    found = doctor.examine(peft_model, lambda model: model(input_ids).logits)
    print(found)
    assert found.healthy
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dora_cache.attachment import attach
from dora_cache.core.naming import shorten
from dora_cache.lab.bench import Spread
from dora_cache.lab.models import plain_lora
from dora_cache.lab.turns import take_turns
from dora_cache.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor

    from dora_cache.cache import AdapterCache
    from dora_cache.config import CacheConfig
    from dora_cache.report import CacheReport

__all__ = ["Diagnosis", "examine"]

UNCACHED, CACHED, LORA = "PEFT", "dora-cache", "plain LoRA"


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What two forwards with each adapter have shown; shows itself as text when printed.

    Attributes:
        cached: names of the layers of which values are held, by the kind of value.
        plain: names of PEFT's layers that have asked the cache for nothing, by their class: there
            is nothing to cache in them, or the forward did not run them.
        hits: lookups of the second forwards that were answered without deriving.
        misses: those that derived a value again.
        reasons: why calls of the second forwards went past the cache, or values were not kept, with
            counts.
        equal: whether the outputs have the bits of PEFT's own; None where ``numerics="fast"`` makes
            them differ.
        report: the cache's, after these forwards.
        times: seconds of a forward with the first adapter, round by round, by the way of running:
            ``"PEFT"``, ``"dora-cache"``, and ``"plain LoRA"`` of the same rank; all took turns.
        no_lora: why plain LoRA was not measured; None if it was.
    """

    cached: Mapping[str, Sequence[str]]
    plain: Mapping[str, Sequence[str]]
    hits: int
    misses: int
    reasons: Mapping[str, int]
    equal: bool | None
    report: CacheReport
    times: Mapping[str, Sequence[float]]
    no_lora: str | None = None

    @property
    def healthy(self) -> bool:
        """Whether every value is cached: the second forwards hit alone, and are right."""
        return not self._problems()

    def ratio(self, way: str, to: str) -> Spread:
        """Return how many times as long one way takes as another, within rounds.

        Args:
            way: one of the keys of ``times``.
            to: another one.
        """
        pairs = zip(self.times[way], self.times[to], strict=True)
        return Spread.quartiles(one / other for one, other in pairs)

    def __str__(self) -> str:
        """Return everything as text."""
        return "\n".join([
            *_listed("Cached:", self.cached),
            *_listed("Nothing to cache, or not run:", self.plain),
            "",
            str(self.report),
            "",
            *self._speed(),
            "",
            self._verdict(),
        ])  # fmt: skip

    def _speed(self) -> list[str]:
        lines = ["A forward, in ms (quartiles):"]
        for way, times in self.times.items():
            lines.append(f"  {way:<12}{Spread.quartiles(1e3 * one for one in times)}")
        text = f"dora-cache is {self.ratio(UNCACHED, CACHED)} times as fast as PEFT alone"
        if self.no_lora is None:
            text += f", and takes {self.ratio(CACHED, LORA)} times as long as plain LoRA"
        else:
            lines.append(f"  {LORA:<12}not measured: {self.no_lora}")
        return [*lines, f"{text}."]

    def _verdict(self) -> str:
        held = f"{format_bytes(self.report.stats.nbytes)} held"
        problems = self._problems()
        if not problems:
            equal = "" if self.equal is None else ", outputs equal PEFT's to the bit"
            return (
                f"Everything is cached: {self.hits:,} of {self.hits:,} lookups hit, {held}{equal}."
            )
        return f"Not everything is cached, {held}: {'; '.join(problems)}."

    def _problems(self) -> list[str]:
        found = []
        if self.equal is False:
            found.append("outputs differ from PEFT's, which is a fault of dora-cache: report it")
        if self.reasons:
            count = sum(self.reasons.values())
            found.append(f"for {count:,} calls the reasons above say what to do")
        if self.misses:
            text = f"{self.misses:,} of {self.hits + self.misses:,} lookups derived a value again"
            if self.report.stats.max_bytes is not None:
                text += f" (a cap of {format_bytes(self.report.working_set)} would hold all values)"
            found.append(text)
        if self.report.declined:
            found.append(f"{len(self.report.declined):,} are declined, as listed above")
        if not (found or self.hits):
            found.append("the forward made no lookup")
        return found


def examine(
    model: Any,
    run: Callable[[Any], Tensor],
    config: CacheConfig | None = None,
    *,
    adapters: Sequence[str] = (),
    rounds: int = 15,
    seconds: float = 2.0,
) -> Diagnosis:
    """Attach a cache to a model, run two forwards with each adapter, and time some more.

    The cache is detached in the end.

    Args:
        model: what :func:`dora_cache.attach` takes.
        run: called with the model, under ``no_grad()``; returns an output, the same each time.
        config: of the cache.
        adapters: names of the adapters of a ``PeftModel`` to make active in turn, the last one
            stays so; by default the one that is active.
        rounds: how often each way is timed, at most.
        seconds: for how long the ways take turns.

    Raises:
        NothingToCacheError: the model has nothing to cache.
    """
    lora, no_lora = _lora(model, adapters)
    hits = misses = 0
    reasons: Counter[str] = Counter()
    outputs = []
    with torch.no_grad(), attach(model, config) as cache:
        for _ in _each(model, adapters):
            run(model)
            before = cache.stats()
            outputs.append(run(model))
            after = cache.stats()
            hits += after.hits - before.hits
            misses += after.misses - before.misses
            reasons += Counter(after.reasons) - Counter(before.reasons)
        report = cache.report()
        cached, plain = _layers(cache, model)

        def uncached() -> Tensor:
            with cache.bypass():
                return run(model)

        equal = None
        if cache.config.numerics == "peft":
            expected = [uncached() for _ in _each(model, adapters)]
            equal = all(map(torch.equal, outputs, expected))
        for _ in _each(model, adapters[:1]):
            ways = {UNCACHED: uncached, CACHED: lambda: run(model)}
            if lora is not None:
                ways[LORA] = lambda: run(lora)
            times = take_turns(ways, rounds, seconds)
    return Diagnosis(
        cached=cached,
        plain=plain,
        hits=hits,
        misses=misses,
        reasons=dict(reasons),
        equal=equal,
        report=report,
        times=times,
        no_lora=no_lora,
    )


def _each(model: Any, adapters: Sequence[str]) -> Iterator[None]:
    """Make each adapter active in turn; without any, leave the one that is, once."""
    if not adapters:
        yield
    for adapter in adapters:
        model.set_adapter(adapter, inference_mode=True)
        yield


def _lora(model: Any, adapters: Sequence[str]) -> tuple[Any, str | None]:
    """Return the model with plain LoRA adapters instead, or None and why there is none."""
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        return None, "the model is no PeftModel"
    try:
        return plain_lora(model, list(adapters[:1]) or [model.active_adapters[0]]), None
    except Exception as error:  # noqa: BLE001 - whatever the model's own code makes of a copy
        return None, f"{type(error).__name__}: {error}"


def _layers(cache: AdapterCache, model: Any) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Return names of layers with values, by kind; of PEFT's without any lookup, by class."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    engine = cache._engine
    layers = engine.layers()
    owners = {binding.token: name for name, binding in layers}
    cached: defaultdict[str, list[str]] = defaultdict(list)
    for cell in engine.cells.held():
        name = owners.get(cell.owner)
        if name is not None and name not in cached[cell.kind]:
            cached[cell.kind].append(name)
    plain: defaultdict[str, list[str]] = defaultdict(list)
    asked = {cell.owner for cell in engine.cells}
    busy = {name for name, binding in layers if binding.reasons or binding.token in asked}
    modules = model.named_modules() if isinstance(model, nn.Module) else ()
    for name, module in modules:
        if isinstance(module, BaseTunerLayer) and not any(
            one == name or one.startswith(f"{name}.") for one in busy
        ):
            plain[type(module).__name__].append(name)
    return dict(cached), dict(plain)


def _listed(title: str, layers: Mapping[str, Sequence[str]]) -> list[str]:
    if not layers:
        return []
    return [title, *(f"  {kind} in {shorten(names)}" for kind, names in layers.items())]
