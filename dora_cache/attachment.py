"""Attach a cache to a model."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dora_cache.attributes import SLOT
from dora_cache.cache import AdapterCache
from dora_cache.config import CacheConfig
from dora_cache.core.decorator import (
    Derivation,
    derivation_of,
    derivations_of,
    misplaced_in,
    owners_in,
    weights_read_by,
)
from dora_cache.core.engine import Engine
from dora_cache.errors import AdapterNotFoundError, ConfigError, NothingToCacheError
from dora_cache.lifecycle import (
    Observer,
    follow_arrivals,
    follow_modes,
    follow_optimizers,
    follow_refills,
    follow_registrations,
    follow_writers,
    observe,
)
from dora_cache.recipes import RECIPES, Recipes
from dora_cache.recipes.baking import bake

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


__all__ = ["attach"]


def attach(
    target: nn.Module | object | Callable[..., Any],
    config: CacheConfig | None = None,
    **settings: Any,
) -> AdapterCache:
    """Cache what a model derives from its weights alone, until ``detach()``.

    The model's outputs stay what they are (with ``numerics="peft"``, bit for bit), and no weight or
    entry of its ``state_dict()`` changes. Copies and pickles of the model are of the plain model.

    Args:
        target: any ``nn.Module`` that contains PEFT layers, or modules or other objects with
            ``@cached`` methods; a ``LycorisNetwork``, or a model that one is applied to, which
            covers all that are; a Diffusers pipeline, or another object whose ``components`` hold
            such modules by name; an object with ``@cached`` methods, or a ``@cached`` function.
        config: the settings; by default those of the environment.
        **settings: single settings instead of ``config``, e.g. ``backend="lru"``,
            ``max_bytes="256MiB"`` (see :class:`CacheConfig`).

    Returns:
        The handle, for statistics, invalidation, warming, bypass and detaching; as a context
        manager it detaches on exit.

    Raises:
        ConfigError: a setting is wrong, or both ``config`` and settings are given; or a decorated
            method cannot be cached as it is written.
        BackendError: the backend cannot be made.
        AlreadyAttachedError: part of the model is attached already.
        NothingToCacheError: the model has nothing to cache.
    """
    if config is not None and settings:
        msg = (
            "give either a CacheConfig or single settings, not both: "
            "CacheConfig(...) takes the same settings"
        )
        raise ConfigError(msg)
    if config is not None and not isinstance(config, CacheConfig):
        msg = (
            f"config is a {type(config).__name__}: give a CacheConfig, "
            'CacheConfig.from_file("cache.toml"), or backend="lru", max_bytes="256MiB"'
        )
        raise ConfigError(msg)
    cache = Engine(config or CacheConfig(**settings), _devices(target))
    cache.bake = partial(bake, cache)
    cache.parts = {name: weakref.ref(part) for name, part in _parts(target).items()}
    try:
        if not _attach(cache, target, Recipes()):
            raise NothingToCacheError(_nothing(target, cache))
        follow_modes(cache)
        follow_optimizers(cache)
        follow_registrations(cache)
        follow_refills(cache)
        follow_writers(cache)
    except BaseException:
        cache.close()
        raise
    return AdapterCache(cache)


def _attach(cache: Engine, target: object, recipes: Recipes) -> int:
    derivation = derivation_of(target)
    if derivation is not None and not hasattr(target, "__self__"):
        names = [] if derivation.depends_on else weights_read_by(derivation.function)
        if names:
            msg = (
                f"{derivation.name!r} reads {', '.join(names)}, and no argument says whether that "
                f"changes: give @cached(..., depends_on=lambda ...: [{', '.join(names)}])"
            )
            raise ConfigError(msg)
        cache.bind_function(derivation)
        return 1
    if not isinstance(target, nn.Module):
        if derivations_of(type(target)):
            return _attach_owner(cache, target)
        components = _components(target)
        if not components:
            return _attach_owner(cache, target)
        models = list(components.values())
    else:
        models = [target]
    found = sum(_attach_module(cache, model, recipes) for model in models)
    follow_arrivals(cache, models, partial(_attach_module, recipes=recipes))
    return found


def _attach_module(cache: Engine, model: nn.Module, recipes: Recipes) -> int:
    found = recipes.apply(cache, model)
    known: dict[type, bool] = {}
    for name, module in list(model.named_modules()):
        if not _is_taken(cache, module):  # else a recipe has it already
            found += _attach_owner(cache, module)
        for owner in list(owners_in(module, known)):
            derivation = derivation_of(owner)
            if derivation is None:
                found += 0 if _is_taken(cache, owner) else _attach_owner(cache, owner)
            elif derivation.binding is None:
                where = f"an attribute of {name or type(module).__name__}"
                cache.decline(derivation.name, where, _BY_ITSELF)
    return found


_BY_ITSELF = "a function belongs to no object: attach it by itself, with dora_cache.attach(it)"


def _is_taken(cache: Engine, owner: object) -> bool:
    binding = getattr(owner, "__dict__", {}).get(SLOT)
    return binding is not None and binding.cache is cache


def _attach_owner(cache: Engine, owner: object) -> int:
    """Attach an object with decorated methods; return 0 if it has none."""
    for where, derivation, how, instead in misplaced_in(type(owner)):
        if how is not staticmethod:
            msg = f"the values of {where} cannot be kept: {instead}"
            raise ConfigError(msg)
        if derivation.binding is None:
            cache.decline(derivation.name, where, instead)
    derivations = derivations_of(type(owner))
    if not derivations:
        return 0
    if not isinstance(owner, nn.Module):
        for derivation in derivations:
            if derivation.depends_on is None:
                msg = (
                    f"{type(owner).__name__} is no nn.Module, so what {derivation.name!r} depends "
                    "on cannot be listed: give @cached(..., depends_on=lambda self, ...: [...])"
                )
                raise ConfigError(msg)
    binding = cache.bind(owner)
    binding.warmers = _warmers
    if isinstance(owner, nn.Module) and "parametrizations" in owner._modules:
        return 1  # parametrize has swapped the class itself, and goes by its being the last to
    observer = Observer(
        mode_switched=lambda _: cache.event(binding),
        moved=lambda _: cache.revalidate(binding),
    )
    try:
        binding.undo.callback(observe(owner, observer))
    except Exception as error:
        if isinstance(owner, nn.Module):
            kind = type(owner).__name__
            msg = (
                f"{kind} cannot be attached, since no subclass can be made of its class "
                f"({type(error).__name__}: {error}): give what its __init_subclass__ or metaclass "
                "takes defaults, or keep the decorated methods in a module of another class"
            )
            raise ConfigError(msg) from error
        # An enum's member, for one. An object has no events to hear of, and a copy has no cache.
    return 1


def _warmers(
    owner: object, wanted: list[str] | None
) -> Iterator[tuple[str | None, Callable[[], object]]]:
    """Call the methods that need no argument, or none but the name of an adapter."""
    for derivation in derivations_of(type(owner)):
        name = derivation.adapter
        for adapter in [None] if name is None else wanted or ():
            arguments = {} if name is None else {name: adapter}
            try:
                derivation.bind(owner, **arguments)
            except TypeError:  # it needs arguments that only a call can give
                continue
            yield adapter, partial(_derive, owner, derivation, arguments)


def _derive(owner: object, derivation: Derivation, arguments: dict[str, Any]) -> None:
    binding = owner.__dict__[SLOT]
    try:
        binding.cache.lookup(derivation, binding, (owner,), arguments)
    except (AttributeError, KeyError) as error:
        msg = f"{type(owner).__name__} derives no {derivation.name!r} for {arguments}: {error}"
        raise AdapterNotFoundError(msg) from error


def _devices(target: object) -> list[torch.device]:
    """Return the devices of the target's weights, the first parameter's first.

    Weights on no device at all (meta tensors) count if there are no others: they are offloaded.
    """
    models = _parts(target).values()
    found = dict.fromkeys(
        tensor.device for model in models for tensor in (*model.parameters(), *model.buffers())
    )
    return [device for device in found if device.type != "meta"] or list(found)


def _parts(target: object) -> dict[str, nn.Module]:
    """Return the models that are attached, by what the names of their modules begin with."""
    return {"": target} if isinstance(target, nn.Module) else _components(target)


def _components(target: object) -> dict[str, nn.Module]:
    """Return the modules among an object's ``components``, each once; empty if it has none.

    Pipelines of Diffusers are no modules, and have their models, tokenizers and the like there.
    """
    try:
        components = getattr(target, "components", None)
    except Exception:  # noqa: BLE001 - a property may raise anything; then there are none
        return {}
    if not isinstance(components, Mapping):
        return {}
    found: dict[int, tuple[str, nn.Module]] = {}
    for name, part in components.items():
        if isinstance(part, nn.Module):
            found.setdefault(id(part), (str(name), part))
    return dict(found.values())


def _nothing(target: object, cache: Engine) -> str:
    if isinstance(target, type):
        return f"{target.__name__} is a class: attach an object of it"
    if derivation_of(target) is not None:
        return (
            f"{getattr(target, '__qualname__', target)} is a method of an object: attach the "
            "object, with all its methods"
        )
    if cache.declined:
        return "; ".join(f"{one.kind} of {one.where}: {one.reason}" for one in cache.declined)
    name = type(target).__name__
    components = _components(target)
    if not isinstance(target, nn.Module) and not components:
        inside = _modules_inside(target)
        if inside:
            choice = " or ".join(f"dora_cache.attach({one})" for one in inside)
            return f"{name} is no nn.Module, but holds one: write {choice}"
    where = f" in its components {', '.join(components)}" if components else ""
    return (
        f"{name} has nothing to cache{where}: it needs PEFT layers of a kind that "
        f"recomputes ({', '.join(RECIPES)}; plain LoRA derives nothing), LyCORIS modules (of a "
        "LycorisNetwork, or of a model that one is applied to) or methods marked "
        "@dora_cache.cached"
    )


def _modules_inside(target: object) -> list[str]:
    """Say how to write the modules that an object holds, ``.model`` alone if that is one."""
    if isinstance(target, list | tuple | set | frozenset | Mapping):
        inside = target.values() if isinstance(target, Mapping) else target
        found = any(isinstance(one, nn.Module) for one in inside)
        return ["torch.nn.ModuleList([...])"] if found else []
    try:
        model = getattr(target, "model", None)
    except Exception:  # noqa: BLE001 - as above
        model = None
    if isinstance(model, nn.Module):
        return ["obj.model"]
    attributes = getattr(target, "__dict__", {})
    return [f"obj.{name}" for name, one in attributes.items() if isinstance(one, nn.Module)]
