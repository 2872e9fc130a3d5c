"""The decorator: mark a method or function as deriving a value worth keeping."""

from __future__ import annotations

import functools
import inspect
import itertools
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, Protocol, TypeVar, overload

import torch

from dora_cache.errors import ConfigError
from dora_cache.keys import make_binder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from dora_cache.binding import Binding
    from dora_cache.store import Store

__all__ = ["CacheInfo", "CachedFunction", "Derivation", "cached", "derivations_of"]

P = ParamSpec("P")
R_co = TypeVar("R_co", covariant=True)
R = TypeVar("R")

SLOT = "_dora_cache_binding"
"""Where an attached owner keeps its :class:`Binding`, in its ``__dict__``."""

MARK = "__dora_cache_derivation__"
"""Where a decorated function keeps its :class:`Derivation`."""


class CacheInfo(NamedTuple):
    """Counters of one decorated function over all living caches, as in ``functools``.

    ``maxsize`` is always None: caches are bounded in bytes, see ``AdapterCache.stats()``.
    """

    hits: int
    misses: int
    maxsize: None
    currsize: int


class CachedFunction(Protocol[P, R_co]):
    """What ``@cached`` returns: a function with the same parameters and result."""

    __name__: str
    __wrapped__: Callable[..., Any]

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co:
        """Return the stored value if it is still valid, else derive it."""

    @overload
    def __get__(self, instance: None, owner: type) -> CachedFunction[P, R_co]: ...
    @overload
    def __get__(self, instance: object, owner: type | None = None) -> Callable[..., R_co]: ...
    def __get__(self, instance: object, owner: type | None = None) -> Any:
        """Bind to an instance, as functions do."""

    def cache_info(self) -> CacheInfo:
        """Return hits, misses and entries of this function."""

    def cache_clear(self) -> None:
        """Drop every entry of this function, in every cache."""


class Derivation:
    """One decorated function: how its calls are keyed and what its values depend on.

    Attributes:
        name: what the value is called, for people.
        function: the undecorated function.
        adapter: the parameter that carries the adapter's name, if one does.
        depends_on: called with the same arguments; yields tensors and scalars.
        detach: whether autograd treats the value as a constant.
        bind: returns the arguments' values in the signature's order.
        binding: the cache's hold on a plain function (None for methods, whose owners have it).
        caches: the living caches that may hold values of it.
    """

    _numbers = itertools.count()

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        adapter: str | None,
        depends_on: Callable[..., Iterable[object]] | None,
        *,
        detach: bool,
    ) -> None:
        self.number = next(self._numbers)
        self.name = name
        self.function = function
        self.adapter = adapter
        self.depends_on = depends_on
        self.detach = detach
        self.binding: Binding | None = None
        self.caches: weakref.WeakSet[Store] = weakref.WeakSet()
        self.bind, self.parameters = make_binder(function)
        if adapter is None:
            self.adapter_index = None
        elif adapter in self.parameters:
            self.adapter_index = self.parameters.index(adapter)
        else:
            msg = (
                f"cached({name!r}, adapter={adapter!r}): {function.__qualname__} has no parameter "
                f"{adapter!r}; its parameters are {', '.join(self.parameters)}"
            )
            raise ConfigError(msg)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to one process, where functions are pickled by value."""
        return {
            name: value
            for name, value in vars(self).items()
            if name not in {"number", "binding", "caches"}
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take a number of its own: keys tell derivations apart by it."""
        vars(self).update(state)
        self.number = next(self._numbers)
        self.binding = None
        self.caches = weakref.WeakSet()

    def __repr__(self) -> str:
        return f"<derivation {self.name!r}: {self.function.__qualname__}>"


def cached(
    name: str,
    *,
    adapter: str | None = None,
    depends_on: Callable[..., Iterable[object]] | None = None,
    detach: bool = False,
) -> Callable[[Callable[P, R]], CachedFunction[P, R]]:
    """Mark a method or function whose result depends only on weights, not on the input.

    Until a cache is attached to its owner (``dora_cache.attach(model)``), the function behaves as
    if it were not decorated. Attached, its result is stored and returned again for the same
    arguments for as long as nothing it depends on has changed. Calls that cannot be checked go
    past the cache: in training mode, while gradients are wanted through the value, under tracing.

    Only tensors and tuples of tensors are stored; anything else is returned as it is. Callers must
    not write into the result.

    Args:
        name: what the value is called, in reports.
        adapter: the name of the parameter that carries the adapter's name, or a tuple of names
            where several adapters go into one value; events and ``invalidate(adapter=...)`` go by
            it. It may be the ``*args`` of the function.
        depends_on: called with the same arguments as the function, returns the tensors and plain
            scalars (numbers, strings, dtypes; lists and dicts of them) that the result depends on
            besides the arguments. Without it: the parameters, buffers and attributes of the owner
            and of its submodules; with an attribute among them that cannot be compared (an object
            of some class), every call goes past the cache.
        detach: the result is a constant to autograd (as DoRA's norm is): it is derived without a
            graph, and may be stored and used while its dependencies require gradients.

    Raises:
        ConfigError: ``adapter`` is no parameter of the function.

    Example::

        class Rotation(nn.Module):
            @cached("rotation", adapter="adapter_name",
                    depends_on=lambda self, adapter_name: [self.weight[adapter_name]])
            def rotation(self, adapter_name: str) -> Tensor: ...
    """

    def decorate(function: Callable[P, R]) -> CachedFunction[P, R]:
        if isinstance(function, staticmethod | classmethod) or not inspect.isroutine(function):
            msg = (
                f"cached({name!r}) takes a function or method, not {type(function).__name__}: "
                "put it under @staticmethod, or on the function itself"
            )
            raise ConfigError(msg)
        derivation = Derivation(name, function, adapter, depends_on, detach=detach)

        @functools.wraps(function)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            binding = derivation.binding
            if binding is None:
                if not args:
                    return function(*args, **kwargs)
                try:
                    binding = args[0].__dict__.get(SLOT)
                except AttributeError:  # an owner with slots cannot be attached
                    binding = None
                if binding is None:
                    return function(*args, **kwargs)
            if torch.compiler.is_dynamo_compiling():  # others' tracing the cache notices itself
                return function(*args, **kwargs)
            result: R = binding.cache.lookup(derivation, binding, args, kwargs)
            return result

        def cache_info() -> CacheInfo:
            counts = [(0, 0, 0), *(cache.counts(derivation) for cache in derivation.caches)]
            hits, misses, size = (sum(column) for column in zip(*counts, strict=True))
            return CacheInfo(hits, misses, None, size)

        def cache_clear() -> None:
            for cache in list(derivation.caches):
                cache.invalidate_derivation(derivation)

        setattr(wrapper, MARK, derivation)
        wrapper.cache_info = cache_info  # type: ignore[attr-defined]
        wrapper.cache_clear = cache_clear  # type: ignore[attr-defined]
        return wrapper  # type: ignore[return-value]

    return decorate


def derivations_of(kind: type) -> list[Derivation]:
    """Return the derivations of the decorated methods of a class, inherited ones included."""
    found: dict[str, Derivation] = {}
    for base in kind.__mro__:
        for attribute, value in vars(base).items():
            derivation = getattr(value, MARK, None)
            if derivation is not None:
                found.setdefault(attribute, derivation)
    return list(found.values())
