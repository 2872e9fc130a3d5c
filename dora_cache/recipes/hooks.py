"""The shapes of hooks that most recipes are made of, for PEFT's layers and other libraries'.

*Memoise a method*: the library derives the value in a method of its own (``get_delta_weight``), and
the recipe stores what that returns; see :func:`memo`.

*Guard a forward*: the library derives the value in the middle of ``forward``, or its value is
larger than needed. The recipe has a forward of its own for the usual case, and leaves every other
one to the library's; see :func:`guard`.

(The third shape, replacing a LoRA variant, has one user: ``dora``.)
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from dora_cache.attributes import SLOT
from dora_cache.core.decorator import cached
from dora_cache.core.facts import UncheckableError
from dora_cache.errors import ConfigError
from dora_cache.lifecycle import bring, plain_class
from dora_cache.reasons import Reason
from dora_cache.recipes.baking import DIRECT
from dora_cache.recipes.compiled import view_of, viewed
from dora_cache.recipes.fingerprints import changed
from dora_cache.recipes.peft_layers import (
    base_layer,
    derive_ahead,
    follow_layer,
    is_hooked,
    wants_gradients,
    why_uncached,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from dora_cache.core.binding import Binding
    from dora_cache.core.engine import Engine
    from dora_cache.recipes.examples import Example
    from dora_cache.recipes.peft_layers import Recipe

__all__ = [
    "Hook",
    "LayerRecipe",
    "UnusualError",
    "active_in",
    "check_unhooked",
    "derives",
    "guard",
    "memo",
    "optional_parameter",
    "own_parameter",
    "parameter",
]


class UnusualError(UncheckableError):
    """A layer is not as a recipe knows it; its library's own code runs, and nothing is stored."""

    usual = Reason.UNUSUAL_PART


@dataclass(frozen=True, slots=True)
class Hook:
    """A method of a layer's class, what stands in for it, and how to derive ahead of its use.

    Attributes:
        method: its name.
        function: what stands in for it.
        warm: called with a layer and an adapter's name, None if the layer's adapter has none;
            derives what the first forward with that adapter alone would, by the very same call.
            None: nothing can be derived ahead.
    """

    method: str
    function: Callable[..., Any]
    warm: Callable[[Any, Any], object] | None = None


def memo(
    owner: type,
    method: str,
    name: str,
    *,
    adapter: str | None,
    depends_on: Callable[..., Iterable[object]],
    warm: Callable[[Any, str], object] | None = None,
) -> Hook:
    """Return a hook that stores what a method of the library's returns.

    Args:
        owner: a class that has the method.
        method: its name.
        name: what the value is called, for people.
        adapter: the parameter of the method that carries the adapter's name; None if no parameter
            does.
        depends_on: called with the same arguments as the method; see :func:`dora_cache.cached`.
        warm: see :class:`Hook`. It must call the method exactly as the layer's forward does; by
            default with the adapter's name alone.
    """

    @functools.wraps(getattr(owner, method))
    def derive(self: Any, *args: Any, **kwargs: Any) -> Any:
        base = base_layer(self) if "base_layer" in self._modules else self
        with bring(base):
            return getattr(plain_class(type(self)), method)(self, *args, **kwargs)

    def default(layer: Any, adapter_name: str) -> object:
        return getattr(layer, method)(adapter_name)

    stored: Any = cached(name, adapter=adapter, depends_on=depends_on)(derive)
    return Hook(method, stored, warm or default)


def guard(
    forward: Callable[..., Tensor | None],
    *,
    warm: Callable[[Any, str], object] | None = None,
    keyword: str | None = None,
    idle: Callable[[Any], bool] | None = None,
    stored: bool = False,
) -> Hook:
    """Return a hook that puts a forward of one's own in front of the library's.

    It runs in the usual case: one input and no other arguments, no training or dropout, adapters
    enabled and not merged, no gradients wanted by any parameter of the layer, no tracing, no hooks
    on all modules, no ``bypass()``.
    The library's own forward runs otherwise, and the reason is counted, unless no adapter is at
    work in the layer: see :func:`derives`.

    Args:
        forward: called with the layer and its input; returns the layer's output. For the library's
            forward to run, it raises an :class:`UnusualError` with the reason, or returns None
            where that derives nothing (before it has called the base layer, whose hooks must run
            once).
        warm: see :class:`Hook`.
        keyword: a keyword argument that may come with the input, and is passed on.
        idle: called with the layer; whether its own forward derives nothing at present. By default
            whether PEFT has disabled or merged the layer's adapters.
        stored: whether the library's forward derives by a method whose results are stored, which
            counts the reasons then.
    """
    allowed = {keyword}

    def traced(view: Any, x: Any, args: Any, kwargs: Any) -> Tensor | None:
        if (
            args
            or (kwargs and kwargs.keys() != allowed)
            or torch.is_autocast_enabled(x.device.type)
            or wants_gradients(view)
        ):
            return None
        try:
            return forward(view, x, **kwargs)
        except UnusualError:
            return None

    def guarded(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            view = view_of(self)
            if view is not None:
                with suppress(UncheckableError):
                    result = traced(view, x, args, kwargs)
                    if result is not None:
                        return result
                    plain: Any = plain_class(type(self))
                    return plain.forward(view, x, *args, **kwargs)
        else:
            binding = self.__dict__.get(SLOT)
            if binding is not None and not (
                (self._disable_adapters or self.merged_adapters)  # some have the class's
                if idle is None
                else idle(self)
            ):
                if args or (kwargs and kwargs.keys() != allowed):
                    reason: Reason | None = Reason.UNUSUAL_INPUT
                else:
                    reason = why_uncached(self, binding)
                    if reason is None and wants_gradients(self):
                        reason = Reason.GRADIENTS
                if reason is None:
                    try:
                        result = forward(self, x, **kwargs)
                    except UnusualError as error:
                        reason = error.reason
                    else:
                        if result is not None:
                            return result
                        reason = Reason.UNUSUAL_PART
                if not stored and derives(self):
                    binding.passed_by(reason)
        return plain_class(type(self)).forward(self, x, *args, **kwargs)  # type: ignore[attr-defined]

    def direct(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        if args or (kwargs and kwargs.keys() != allowed):
            return None
        return forward(self, x, **kwargs)

    setattr(guarded, DIRECT, direct)
    guarded.__name__ = "forward"  # by which methods that are bound to it are pickled
    return Hook("forward", guarded, warm)


def derives(layer: Any) -> bool:
    """Whether an adapter is at work in a layer of PEFT's; True for other libraries' layers.

    None is while they are disabled or merged, or if the layer has none of the active ones.
    """
    if not isinstance(layer, BaseTunerLayer):
        return True
    if layer._disable_adapters or layer.merged_adapters:
        return False
    parts = [getattr(layer, name, ()) for name in layer.adapter_layer_names]
    return any(adapter in part for adapter in layer.active_adapters for part in parts)


def active_in(layer: Any, attribute: str) -> Sequence[str]:
    """Return the active adapters that a layer has, in order; at a fraction of PEFT's cost.

    Args:
        layer: the layer.
        attribute: the attribute that has a part, parameter or buffer for each adapter: a
            ModuleDict, ParameterDict or PEFT's BufferDict.

    Raises:
        UnusualError: the attribute is none of these, as when ``parametrize`` computes one of its
            members, or what it has for an active adapter is no parameter, as when that is pruned or
            a view of a flat one. Under :func:`guard` PEFT's forward runs then: call it before the
            base layer.
    """
    state = layer.__dict__
    there = layer._modules[attribute]
    kind = type(there)
    names: Mapping[str, object]
    if kind is nn.ParameterDict:
        names = there._parameters
    elif kind is nn.ModuleDict:
        names = there._modules
    elif kind is BufferDict:
        names = there._buffers
    else:
        msg = f"{attribute} is a {kind.__name__}"
        raise UnusualError(msg)
    active = state["_active_adapter"]
    if type(active) is str:
        active = (active,)
    found = tuple([name for name in active if name in names])
    if len(found) != len(active) and kind is nn.ParameterDict:
        for name in active:
            if name not in names and name in there._keys:
                msg = f"{attribute}[{name!r}] is no parameter of its own"
                raise UnusualError(msg)
    return found


def parameter(layer: Any, attribute: str, adapter: str) -> Any:
    """Return ``layer.attribute[adapter]``, of a ParameterDict; at a fraction of its cost.

    Raises:
        UnusualError: it is no parameter of its own, as when ``parametrize`` computes it.
    """
    try:
        return layer._modules[attribute]._parameters[adapter]
    except KeyError:
        msg = f"{attribute}[{adapter!r}] is no parameter"
        raise UnusualError(msg) from None


def check_unhooked(*modules: nn.Module) -> None:
    """Raise an :class:`UnusualError` if a part has hooks that PEFT's forward would run."""
    if is_hooked(*modules):
        msg = "a part of the adapter has hooks"
        raise UnusualError(msg, Reason.HOOKED)


def optional_parameter(layer: Any, attribute: str, adapter: str) -> Any:
    """Return ``layer.attribute[adapter]``, of a ParameterDict; None if that has no such key.

    Raises:
        UnusualError: it is no parameter of its own; see :func:`parameter`.
    """
    there = layer._modules[attribute]
    found = there._parameters.get(adapter)
    if found is None and (type(there) is not nn.ParameterDict or adapter in there._keys):
        msg = f"{attribute}[{adapter!r}] is no parameter"
        raise UnusualError(msg)
    return found


def own_parameter(module: nn.Module, name: str) -> Any:
    """Return ``module.name``, a parameter; None if it is None.

    Raises:
        UnusualError: it is something else: pruned, a buffer, a plain tensor, or computed.
    """
    state, parameters = module.__dict__, module._parameters
    found = parameters.get(name)
    if found is None and name not in parameters and state.get(name, state) is not None:
        msg = f"{name!r} of {type(module).__name__} is no parameter"
        raise UnusualError(msg)
    return found


@dataclass(frozen=True, eq=False)
class LayerRecipe:
    """How one kind of adapter layer is cached: most recipes are one of these.

    Attributes:
        name: what the adapter is called in the field.
        hooks: for each class of layers, what stands in for its methods. A layer goes by the first
            class in the list that it is an instance of.
        adapters: the layer's attribute that has a part or parameter for each adapter; None if each
            layer is of one adapter, which has no name.
        relies_on: the library's methods that the recipe was written for: see ``fingerprints.py``.
        fast: likewise ``hooks``, under ``numerics="fast"``; where a class is not here, ``hooks``
            holds.
        examples: models that the recipe is for.
        quantized: likewise ``hooks``, for classes of quantized layers by their path, as
            ``"package.module:Class"``, since their libraries need not be there; or why not.
        quantized_methods: the methods of theirs that the recipe was written for.
        declines: called with a layer; returns why it cannot be cached, or nothing.
        follow: binds a layer and follows what happens to it; by default as PEFT's layers are. See
            :func:`dora_cache.recipes.peft_layers.follow_layer`.

    Raises:
        ConfigError: there are no hooks, or one is of a method that its class does not have, or
            ``fast`` has a class that ``hooks`` has not; on attach, if a layer has no such
            ``adapters``.
    """

    name: str
    hooks: Mapping[type, Sequence[Hook]]
    adapters: str | None
    relies_on: Mapping[str, str]
    fast: Mapping[type, Sequence[Hook]] = field(default_factory=dict)
    examples: Sequence[Example] = ()
    quantized: Mapping[str, Sequence[Hook] | str] = field(default_factory=dict)
    quantized_methods: Mapping[str, str] = field(default_factory=dict)
    declines: Callable[[Any], str | None] = lambda _: None
    follow: Callable[[Engine, Any, Recipe, dict[str, Callable[..., Any]]], Binding] = follow_layer

    def __post_init__(self) -> None:
        """Check what would go unnoticed: a recipe that caches nothing raises nothing either."""
        named = self.adapters
        if named is not None and not (isinstance(named, str) and named.isidentifier()):
            msg = (
                f"LayerRecipe {self.name!r} has adapters={named!r}: give the name of the "
                'layer\'s attribute that has a part for each adapter, as adapters="lora_A"'
            )
            raise ConfigError(msg)
        _check_hooks(self.name, "hooks", self.hooks)
        if self.fast:
            _check_hooks(self.name, "fast", self.fast)
        for kind in self.fast:
            if kind not in self.hooks:
                msg = (
                    f"LayerRecipe {self.name!r} has fast hooks for {kind.__qualname__}, which is "
                    "not in its hooks: give hooks for it as well"
                )
                raise ConfigError(msg)

    def applies(self, layer: nn.Module) -> bool:
        """Whether the layer is of one of the classes."""
        return isinstance(layer, tuple(self.hooks)) or _path(layer) in self.quantized

    def apply(self, cache: Engine, layer: Any) -> bool:
        """Put the hooks in place, unless the layer's class has other methods than the known one."""
        plain = plain_class(type(layer))
        where = f"{plain.__module__}.{plain.__qualname__}"
        hooks: Sequence[Hook]
        reason: str | None
        found = self.quantized.get(_path(layer))
        if isinstance(found, str):
            hooks, reason = (), found
        elif found is not None:
            hooks, reason = found, self._changed(_path(layer))
        else:
            known = next(one for one in self.hooks if isinstance(layer, one))
            hooks = self.hooks[known]
            if cache.config.numerics == "fast":
                hooks = self.fast.get(known, hooks)
            reason = self.declines(layer)
            for method in {hook.method: None for hook in hooks} | self._methods(known):
                if getattr(plain, method, None) is not getattr(known, method):
                    library = {"peft": "PEFT"}.get(
                        package := known.__module__.partition(".")[0], package
                    )
                    reason = f"its {method}() is not that of {library}'s {known.__qualname__}"
        if reason:
            cache.decline(self.name, where, reason)
            return False
        if self.adapters is not None:
            self._check_adapters(layer, self.adapters)
        overrides = {hook.method: hook.function for hook in hooks}
        overrides.setdefault("forward", viewed(plain.forward))  # type: ignore[attr-defined]
        binding = self.follow(cache, layer, self, overrides)
        binding.warmers = partial(_warmers, self.adapters, hooks)
        return bool(_names(layer, self.adapters))

    def _changed(self, path: str) -> str | None:
        """Return which methods of a class of quantized layers are not as they were, or None."""
        of_class = {
            method: known
            for method, known in self.quantized_methods.items()
            if method.startswith(f"{path}.")
        }
        other = changed(of_class)
        if not other:
            return None
        return f"this PEFT has another {', '.join(other)} than the recipe was written for"

    def _methods(self, known: type) -> dict[str, None]:
        """Name the methods relied on that a class has, or inherits."""
        classes = {f"{base.__module__}:{base.__qualname__}" for base in known.__mro__}
        paths = [path.rpartition(".") for path in self.relies_on]
        return {method: None for where, _, method in paths if where in classes}

    def _check_adapters(self, layer: Any, attribute: str) -> None:
        if hasattr(getattr(layer, attribute, None), "keys"):
            return
        known = [*layer.adapter_layer_names, *layer.other_param_names]
        close = [one for one in known if one.lower() == attribute.lower()]
        close += difflib.get_close_matches(attribute, known, n=1)
        hint = f"did you mean {close[0]!r}? It has" if close else "it has"
        state = "has no such attribute" if not hasattr(layer, attribute) else "has no keys there"
        msg = (
            f"LayerRecipe {self.name!r} has adapters={attribute!r}, but a "
            f"{plain_class(type(layer)).__qualname__} {state}: {hint} {', '.join(known)}"
        )
        raise ConfigError(msg)


def _check_hooks(name: str, where: str, hooks: Any) -> None:
    example = f"{where}={{Layer: [memo(Layer, ...)]}}"
    if not isinstance(hooks, Mapping) or not hooks:
        msg = f"LayerRecipe {name!r} has no {where}: give {example}, with a class of layers"
        raise ConfigError(msg)
    for kind, some in hooks.items():
        if not isinstance(kind, type):
            msg = f"LayerRecipe {name!r} has {where} for {kind!r}: give a class, as {example}"
            raise ConfigError(msg)
        if not isinstance(some, Sequence) or not some:
            msg = f"LayerRecipe {name!r} has no {where} for {kind.__qualname__}: give {example}"
            raise ConfigError(msg)
        for hook in some:
            if not isinstance(hook, Hook):
                msg = (
                    f"LayerRecipe {name!r} has {hook!r} among its {where} for "
                    f"{kind.__qualname__}: give what memo(...) or guard(...) returns"
                )
                raise ConfigError(msg)
            if not callable(getattr(kind, hook.method, None)):
                close = difflib.get_close_matches(hook.method, dir(kind), n=1)
                hint = f": did you mean {close[0]!r}?" if close else ": give one that it has"
                msg = (
                    f"LayerRecipe {name!r} has a hook for the method {hook.method!r}, which "
                    f"{kind.__qualname__} does not have{hint}"
                )
                raise ConfigError(msg)


def _path(layer: Any) -> str:
    plain = plain_class(type(layer))
    return f"{plain.__module__}:{plain.__qualname__}"


def _names(layer: Any, attribute: str | None) -> list[str | None]:
    return [None] if attribute is None else list(getattr(layer, attribute).keys())


def _warmers(
    attribute: str | None, hooks: Sequence[Hook], layer: Any, _: object
) -> Iterator[tuple[str | None, Callable[[], object]]]:
    for adapter in _names(layer, attribute):
        for hook in hooks:
            if hook.warm is not None:
                yield adapter, partial(derive_ahead, hook.warm, layer, adapter)
