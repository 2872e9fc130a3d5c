"""What all recipes for PEFT layers share: events, and the two ways to hang a cache on a layer."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from dora_cache.ambient import untraceable
from dora_cache.decorator import SLOT, cached
from dora_cache.facts import UncheckableError
from dora_cache.keys import own_state
from dora_cache.lifecycle import Observer, observe, stays_in_place, weights_in_place
from dora_cache.reasons import Reason

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

    from dora_cache.binding import Binding, Warmers
    from dora_cache.engine import Engine

__all__ = [
    "Recipe",
    "base_layer",
    "derive_ahead",
    "follow_layer",
    "follow_part",
    "follow_tuner",
    "is_hooked",
    "memoised",
    "weights_of",
    "why_uncached",
]


class Recipe(Protocol):
    """How one kind of adapter layer is cached."""

    @property
    def name(self) -> str:
        """What the adapter is called in the field, e.g. ``"DoRA"``."""

    @property
    def relies_on(self) -> Mapping[str, str]:
        """The methods of PEFT's that it was written for, and their fingerprints."""

    def applies(self, layer: nn.Module) -> bool:
        """Whether ``layer`` is of the kind."""

    def apply(self, cache: Engine, layer: Any) -> bool:
        """Cache what can be cached in a layer that :meth:`applies`, adapters added since included.

        Called on attach, and again whenever an adapter is added to the layer.

        Returns:
            Whether anything in the layer is cached.
        """


def base_layer(layer: nn.Module) -> nn.Module:
    """Return the innermost base layer, as ``get_base_layer()`` does, at a tenth of its cost."""
    base = layer._modules.get("base_layer")
    if base is None:
        return layer.get_base_layer()  # type: ignore[operator]
    while True:
        inner = base._modules.get("base_layer")
        if inner is None:
            return base
        base = inner


def is_hooked(*modules: nn.Module) -> bool:
    """Whether calling one of these modules is more than its class's forward.

    That is so with hooks, its own or those of all modules, and with a ``forward`` set on the
    instance, unless all that it does is to move inputs to where the weights are. What a recipe
    would do in the module's place may not be done then.
    """
    if _has_any_global_hook():  # type: ignore[no-untyped-call]
        return True
    for module in modules:
        state = module.__dict__
        if state["_forward_hooks"] or state["_forward_pre_hooks"]:
            return True
        if "forward" in state and not stays_in_place(module):
            return True
    return False


def why_uncached(layer: nn.Module, binding: Binding) -> Reason | None:
    """Return why PEFT's own forward has to run at present, or None; gradients are another matter.

    In training mode, within ``bypass()``, under tracing, and with hooks on all modules.
    """
    if layer.__dict__["training"]:
        return Reason.TRAINING
    if binding.cache.bypassing:
        return Reason.BYPASS
    if untraceable():
        return Reason.TRACED
    return Reason.HOOKED if _has_any_global_hook() else None  # type: ignore[no-untyped-call]


def weights_of(base: nn.Module) -> Sequence[Any]:
    """Return what determines a base layer's weight: itself, or what it is dequantized from."""
    weight = base._parameters.get("weight")
    if type(weight) is nn.Parameter:
        return weights_in_place(base, ("weight",)) if weight.is_meta else (weight,)
    found: list[Any] = [*base.parameters(), *base.buffers()]
    weight = vars(base).get("weight", weight)
    if isinstance(weight, Tensor):
        found.append(weight)
    if "parametrizations" in base._modules:  # computed from these by code that may have a state
        found.extend(own_state(base))
    state = getattr(weight, "quant_state", None) or getattr(base, "quant_state", None)
    for owner in (weight, state, getattr(state, "state2", None)):
        attributes = vars(owner).values() if hasattr(owner, "__dict__") else ()
        found.extend(value for value in attributes if isinstance(value, Tensor))
    return found


def derive_ahead(derive: Callable[[Any, str], object], layer: Any, adapter: str) -> None:
    """Derive a value of an adapter ahead of its first use.

    An adapter that is there in part only (adding or deleting it may have failed half-way) cannot be
    derived; the first forward with it says so in PEFT's own words.
    """
    with suppress(UncheckableError, KeyError, AttributeError):
        derive(layer, adapter)


def follow_layer(
    cache: Engine,
    layer: BaseTunerLayer,
    recipe: Recipe,
    overrides: dict[str, Callable[..., Any]] | None = None,
) -> Binding:
    """Bind a tuner layer and follow what happens to it; a layer bound before is returned as it is.

    Args:
        cache: the cache.
        layer: the tuner layer.
        recipe: applied again whenever an adapter is added to the layer.
        overrides: methods that stand in for the layer's own.
    """
    bound: Binding | None = layer.__dict__.get(SLOT)
    if bound is not None and bound.cache is cache:
        return bound
    binding = cache.bind(layer)

    def base_written(layer: BaseTunerLayer, *_: object, **__: object) -> None:
        # merge and unmerge write through .data, which version counters do not see.
        base = base_layer(layer)
        cache.touched([*base.parameters(), *base.buffers()])
        changed()

    def added(layer: BaseTunerLayer, *args: Any, **kwargs: Any) -> None:
        cache.event(binding, kwargs["adapter_name"] if "adapter_name" in kwargs else args[0])
        recipe.apply(cache, layer)

    def deleted(_: BaseTunerLayer, adapter_name: str) -> None:
        cache.adapter_deleted(binding, adapter_name)

    def switched(_: BaseTunerLayer) -> None:
        # Of every adapter: training may write to others than those that it trains.
        cache.event(binding)

    def changed(*_: object, **__: object) -> None:
        # Eager calls compare what they depend on. Compiled code does not: its buffers are refilled.
        cache.revalidate(binding)

    observer = Observer(
        mode_switched=switched,
        moved=changed,
        loaded=changed,
        assigned={"scaling": changed},
        calls={
            "set_scale": changed,
            "scale_layer": changed,
            "unscale_layer": changed,
            "merge": base_written,
            "unmerge": base_written,
            "update_layer": added,
            "delete_adapter": deleted,
        },
    )
    binding.undo.callback(observe(layer, observer, overrides))
    return binding


def follow_part(
    cache: Engine,
    parent: Binding,
    part: nn.Module,
    adapter: str,
    overrides: dict[str, Callable[..., Any]],
    warmers: Warmers,
) -> None:
    """Bind a module that belongs to one adapter of a layer; a no-op if it is bound already."""
    if part.__dict__.get(SLOT) is not None:
        return
    binding = cache.bind(part, adapter=adapter)
    binding.warmers = warmers
    parent.adopt(binding)
    # The layer's event is passed on; the part's own switches are followed as any module's.
    observer = Observer(moved=lambda _: cache.revalidate(binding))
    binding.undo.callback(observe(part, observer, overrides))


def follow_tuner(cache: Engine, tuner: BaseTuner, rescan: Callable[[], object]) -> None:
    """Call ``rescan`` whenever a tuner has put adapters into the model.

    A no-op if the cache follows it already, as part of another model.
    """
    bound = tuner.__dict__.get(SLOT)
    if bound is not None and bound.cache is cache:
        return
    observer = Observer(calls={"inject_adapter": lambda *_, **__: rescan()})
    cache.bind(tuner).undo.callback(observe(tuner, observer))


def memoised(
    method: Callable[..., Any],
    name: str,
    *,
    adapter: str | None = None,
    depends_on: Callable[..., Iterable[object]],
) -> Callable[..., Any]:
    """Return an override of ``method`` that is cached, for ``follow_layer`` and ``follow_part``."""
    override: Callable[..., Any] = cached(name, adapter=adapter, depends_on=depends_on)(method)
    return override
