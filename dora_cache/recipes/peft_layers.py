"""What all recipes for PEFT layers share: events, and attaching to layers, parts and models."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from dora_cache.ambient import untraceable
from dora_cache.attributes import SLOT
from dora_cache.core.facts import UncheckableError, is_plain
from dora_cache.core.keys import own_state
from dora_cache.lifecycle import Observer, observe, plain_class, stays_in_place, weights_in_place
from dora_cache.reasons import Reason
from dora_cache.recipes.compiled import viewed
from dora_cache.recipes.holder import Holder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from peft.tuners.tuners_utils import BaseTunerLayer

    from dora_cache.core.binding import Binding, Warmers
    from dora_cache.core.engine import Engine

__all__ = [
    "Recipe",
    "base_layer",
    "derive_ahead",
    "drops",
    "follow_layer",
    "follow_model",
    "follow_module",
    "follow_part",
    "follow_whole",
    "is_hooked",
    "layers_in",
    "wants_gradients",
    "weights_of",
    "why_training",
    "why_uncached",
]


class Recipe(Protocol):
    """How one kind of adapter layer is cached."""

    @property
    def name(self) -> str:
        """What the adapter is called in the field, e.g. ``"DoRA"``."""

    @property
    def relies_on(self) -> Mapping[str, str]:
        """The library's methods that it was written for, and their fingerprints."""

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

    Within ``bypass()``, in training mode, under tracing, and with hooks on all modules. If several
    apply, the first of these is returned; a lookup has the same order.
    """
    if binding.cache.bypassing:
        return Reason.BYPASS
    if layer.__dict__["training"]:
        reason = binding.why_training(layer)
        if reason is not None:
            return reason
    if untraceable():
        return Reason.TRACED
    return Reason.HOOKED if _has_any_global_hook() else None  # type: ignore[no-untyped-call]


def why_training(
    layer: Any, binding: Binding, drops_out: Callable[[Any], bool] | None = None
) -> Reason | None:
    """Return why a layer whose ``training`` is True does more than inference, or None.

    A forward that wants gradients is remembered in ``binding.trains``.

    Transformers and Diffusers put layers into models in eval mode, and leave ``training`` True in
    the layers. So what counts is a switch to training mode since the layer was attached, a forward
    that wants gradients, and dropout.

    Args:
        layer: the layer.
        binding: its binding.
        drops_out: whether dropout is at work in it; by default as in PEFT's layers.
    """
    if binding.trains:
        return Reason.TRAINING
    if wants_gradients(layer):
        binding.trains = True
        return Reason.GRADIENTS
    return Reason.DROPOUT if (drops_out or _drops_out)(layer) else None


def _drops_out(layer: Any) -> bool:
    """Whether an active adapter's dropout is at work in a layer whose ``training`` is True."""
    state = layer.__dict__
    active = state.get("_active_adapter", ())
    if isinstance(active, str):
        active = (active,)
    for name, parts in state["_modules"].items():
        if name.endswith("_dropout"):
            for adapter in active:
                part = parts._modules.get(adapter)
                if part is not None and drops(part):
                    return True
    return any(state.get(name, {}).get(adapter) for name in _DROPOUT_RATES for adapter in active)


_DROPOUT_RATES = "rank_dropout", "module_dropout"


def drops(dropout: nn.Module) -> bool:
    """Whether a dropout module is in training mode; without dropout, PEFT has an Identity."""
    return dropout.training and type(dropout) is not nn.Identity


def wants_gradients(layer: nn.Module) -> bool:
    """Whether gradients would flow to a parameter of the layer."""
    if not torch.is_grad_enabled():
        return False
    for module in layer.modules():  # parameters() takes three times as long
        for parameter in module._parameters.values():
            if parameter is not None and parameter.requires_grad:
                return True
    return False


def weights_of(base: nn.Module) -> Sequence[Any]:
    """Return what determines a base layer's weight: itself, or what it is dequantized from.

    Read at every hit, so straight from the dictionaries.
    """
    state = base.__dict__
    parameters = state["_parameters"]
    weight = parameters.get("weight")
    kind = type(weight)
    if "W_q" in parameters:  # HQQ
        found = [parameters["W_q"]]
        for value in state["meta"].values():
            found += value.values() if type(value) is dict else (value,)
        return found
    if kind is nn.Parameter:
        return weights_in_place(base, ("weight",)) if weight.is_meta else (weight,)
    if isinstance(weight, Tensor) and not is_plain(kind):  # torchao, quanto: it names its parts
        return (weight,)
    if kind.__name__ == "Params4bit":
        return [weight, *_fields(weight.quant_state)]
    if kind.__name__ == "Int8Params":  # the module takes the scales over in its first forward
        scales = getattr(state.get("state"), "SCB", None)
        return [weight, weight.SCB if scales is None else scales]
    found = [*base.parameters(), *base.buffers()]
    weight = state.get("weight", weight)
    if isinstance(weight, Tensor):
        found.append(weight)
    if "parametrizations" in base._modules:  # computed from these by code that may have a state
        found.extend(own_state(base))
    return found


def _fields(state: Any) -> list[object]:
    """Return the fields of a quantization state of bitsandbytes, and of the one of its scales."""
    if state is None:  # not quantized yet
        return [None]
    fields = state.__dict__
    inner = fields.get("state2")
    if inner is None:
        return list(fields.values())
    return [value for value in fields.values() if value is not inner] + _fields(inner)


def derive_ahead(derive: Callable[[Any, Any], object], layer: Any, adapter: str | None) -> None:
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
    holder = Holder(binding, _active_in)

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

    def switched(layer: BaseTunerLayer) -> None:
        binding.trains = layer.training
        # Of every adapter: training may write to others than those that it trains.
        cache.event(binding)

    def changed(*_: object, **__: object) -> None:
        # Eager calls compare what they depend on. What compiled code reads is filled again here:
        # with compiled_check=False nothing compares it where the code is entered.
        cache.revalidate(binding)

    observer = Observer(
        mode_switched=switched,
        moved=changed,
        loaded=changed,
        assigned={"scaling": changed},
        changed=holder.changed,
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
    binding.infers = why_training
    binding.undo.callback(observe(layer, observer, overrides))
    return binding


def _active_in(layer: Any) -> Sequence[str]:
    """Return the active adapters of a layer, of those that it has; for compiled code.

    Raises:
        UncheckableError: its adapters are disabled, or merged.
    """
    if layer._disable_adapters or layer.merged_adapters:
        msg = "adapters are disabled or merged"
        raise UncheckableError(msg)
    parts = [getattr(layer, name, ()) for name in layer.adapter_layer_names]
    return [name for name in layer.active_adapters if any(name in part for part in parts)]


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

    def active(_: object) -> Sequence[str]:
        owner: Any = parent.owner
        return (adapter,) if adapter in owner.active_adapters else ()

    holder = Holder(binding, active)
    binding.warmers = warmers
    binding.infers = lambda *_: parent.why_training(parent.owner)
    parent.adopt(binding)
    # The layer's event is passed on; the part's own switches are followed as any module's.
    observer = Observer(moved=lambda _: cache.revalidate(binding), changed=holder.changed)
    binding.undo.callback(observe(part, observer, overrides))


def follow_module(
    cache: Engine,
    layer: nn.Module,
    _: Recipe,
    overrides: dict[str, Callable[..., Any]],
    **events: Any,
) -> Binding:
    """Bind a layer of another library than PEFT, and follow its mode, moves and loading.

    A layer bound before is returned as it is.

    Args:
        cache: the cache.
        layer: the layer.
        overrides: methods that stand in for the layer's own.
        **events: what else to follow; see :class:`dora_cache.lifecycle.Observer`.
    """
    bound: Binding | None = layer.__dict__.get(SLOT)
    if bound is not None and bound.cache is cache:
        return bound
    binding = cache.bind(layer)
    holder = Holder(binding, lambda _: ("",))

    def switched(layer: nn.Module) -> None:
        binding.trains = layer.training
        cache.event(binding)

    def changed(_: nn.Module) -> None:
        cache.revalidate(binding)

    observer = Observer(
        **{
            "mode_switched": switched,
            "moved": changed,
            "loaded": changed,
            "changed": holder.changed,
            **events,
        }
    )
    binding.undo.callback(observe(layer, observer, overrides))
    return binding


def follow_whole(
    cache: Engine,
    model: nn.Module,
    overrides: dict[str, Callable[..., Any]] | None = None,
    calls: dict[str, Callable[..., object]] | None = None,
) -> Binding:
    """Bind a PeftModel, so that compiled code does not go by its adapters' names.

    Args:
        cache: the cache.
        model: the model; one bound before is returned as it is.
        overrides: methods that stand in for the model's own.
        calls: what else to follow; see :class:`dora_cache.lifecycle.Observer`.
    """
    bound: Binding | None = model.__dict__.get(SLOT)
    if bound is not None and bound.cache is cache:
        return bound
    binding = cache.bind(model)
    binding.infers = lambda *_: None  # no value is the model's own
    holder = Holder(binding, lambda model: (model.active_adapter,), shallow=True)
    plain: Any = plain_class(type(model))
    observer = Observer(mode_switched=holder.changed, changed=holder.changed, calls=calls)
    overrides = {"forward": viewed(plain.forward)} | (overrides or {})
    binding.undo.callback(observe(model, observer, overrides))
    return binding


def layers_in(model: nn.Module) -> Iterable[nn.Module]:
    """Return the modules of a model, where all PEFT layers are."""
    return list(model.modules())


def follow_model(
    cache: Engine, model: nn.Module, apply: Callable[[Engine, nn.Module], bool]
) -> None:
    """Follow what PEFT does to a model beyond the layers that recipes have bound.

    Args:
        cache: the cache.
        model: the model.
        apply: applies every recipe that fits to one layer.
    """
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    from dora_cache.recipes.hotswap import follow_hotswap
    from dora_cache.recipes.merging import follow_merges

    follow_hotswap(cache)
    follow_merges(cache)
    # Merging writes into base weights past their version counters, and layers may share them.
    other = _Other(apply)
    for part in list(model.modules()):
        if isinstance(part, PeftModel):
            follow_whole(cache, part)
        elif isinstance(part, BaseTunerLayer):
            follow_layer(cache, part, other)


class _Other:
    """Stands in for a recipe where a layer has nothing to cache, until an adapter is added."""

    name = "other"
    relies_on: dict[str, str] = {}  # noqa: RUF012

    def __init__(self, apply: Callable[[Engine, nn.Module], bool]) -> None:
        self._apply = apply

    def applies(self, layer: nn.Module) -> bool:  # noqa: ARG002
        return True

    def apply(self, cache: Engine, layer: nn.Module) -> bool:
        return self._apply(cache, layer)
