"""What a set-up is, and how it is tried out: outputs compared, hits counted, reasons named."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from dora_cache.attachment import attach

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from dora_cache.reasons import Reason

__all__ = ["Built", "Found", "SetUp", "moved_magnitudes", "setups", "try_out"]


@dataclass(slots=True)
class Built:
    """A model of a set-up, with one adapter, ready to run.

    Attributes:
        model: what ``dora_cache.attach`` is called with.
        run: runs the same forward each time; returns the output. Called under ``no_grad()``.
        reference: returns the output that ``run`` must give, where PEFT cannot run the set-up
            without a cache; None: ``run`` itself, without a cache.
        undo: undoes what the set-up has changed beyond the model.
    """

    model: Any
    run: Callable[[], Tensor]
    reference: Callable[[], Tensor] | None = None
    undo: ExitStack = field(default_factory=ExitStack)


@dataclass(frozen=True, slots=True)
class SetUp:
    """One way in which people run adapters.

    Attributes:
        name: what it is called, e.g. ``"int8 weights"``.
        library: the package that it is a set-up of, as it is imported.
        build: called with ``dora``, whether the adapter is DoRA or else plain LoRA of the same
            rank; and with ``width``, the size of the model's layers. Seeds the random numbers, so
            that two calls give equal models.
        reason: why it is not cached; None if it is.
        cannot: returns why the set-up cannot run on this machine, or None.
        note: what else a reader of the table should know.
    """

    name: str
    library: str
    build: Callable[[bool, int], Built]
    reason: Reason | None = None
    cannot: Callable[[], str | None] = lambda: None
    note: str = ""

    @property
    def missing(self) -> str | None:
        """Why this machine cannot run it, or None."""
        if importlib.util.find_spec(self.library.partition(".")[0]) is None:
            return f"{self.library} is not installed"
        return self.cannot()


@dataclass(frozen=True, slots=True)
class Found:
    """What trying a set-up has found.

    Attributes:
        equal: whether every output had the bits of the uncached one.
        hits: of the second and third forward.
        misses: of these.
        reasons: why calls of these went past the cache, or values were not kept; with counts.
        report: the cache's.
    """

    equal: bool
    hits: int
    misses: int
    reasons: dict[str, int]
    report: str


def moved_magnitudes(model: Any) -> Any:
    """Change DoRA's magnitudes, as training does: those that PEFT begins with give scales of 1."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude_vector" in name:
                steps = torch.linspace(0.8, 1.3, parameter.numel(), device=parameter.device)
                parameter.mul_(steps.to(parameter.dtype).view_as(parameter))
    return model


def setups(library: str | None = None) -> list[SetUp]:
    """Return the set-ups of one library or of all, in the order of the modules that list them."""
    import dora_cache.lab.field as package

    found: list[SetUp] = []
    for module in pkgutil.iter_modules(package.__path__):
        if module.name.startswith("of_"):
            found += importlib.import_module(f"{package.__name__}.{module.name}").SETUPS
    return [one for one in found if library is None or one.library == library]


def try_out(setup: SetUp, width: int = 64, **settings: Any) -> Found:
    """Run a set-up with and without a cache, and compare.

    Args:
        setup: the set-up.
        width: the size of the model's layers.
        **settings: of the cache, as ``attach`` takes them.
    """
    built = setup.build(True, width)  # noqa: FBT003
    with built.undo, torch.no_grad():
        expected = (built.reference or built.run)()
        with attach(built.model, **settings) as cache:
            outputs = [built.run()]
            before = cache.stats()
            outputs += [built.run(), built.run()]
            after = cache.stats()
            report = str(cache.report())
            if built.reference is None:
                with cache.bypass():
                    outputs.append(built.run())
        reasons = {
            reason: count - before.reasons.get(reason, 0)
            for reason, count in after.reasons.items()
            if count > before.reasons.get(reason, 0)
        }
        return Found(
            all(torch.equal(output, expected) for output in outputs),
            after.hits - before.hits,
            after.misses - before.misses,
            reasons,
            report,
        )
