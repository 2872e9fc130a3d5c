"""The decorator ``@cached``: marks a method or function whose result is to be cached."""

from __future__ import annotations

import dis
import functools
import inspect
import itertools
import weakref
from types import CodeType, FunctionType, MethodType
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, Protocol, TypeVar, overload

import torch
from torch import nn

from dora_cache.attributes import SLOT
from dora_cache.core.keys import make_binder, module_attributes
from dora_cache.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator


__all__ = [
    "CacheInfo",
    "CachedFunction",
    "Derivation",
    "cached",
    "derivation_of",
    "derivations",
    "derivations_of",
    "misplaced_in",
    "owners_in",
    "weights_read_by",
]

P = ParamSpec("P")
R_co = TypeVar("R_co", covariant=True)
R = TypeVar("R")

MARK = "__dora_cache_derivation__"
"""Where a decorated function keeps its :class:`Derivation`."""


class Reader(Protocol):
    """Resolves calls in compiled code."""

    def read(self, derivation: Derivation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the value of a call; ``torch.compile`` traces this."""


class Resolver(Protocol):
    """Resolves the calls of one owner: what it has as its attribute ``SLOT``.

    That is a :class:`dora_cache.core.binding.Binding`. What stands in for an owner, in compiled
    code or for export, has a resolver of its own there: see :mod:`dora_cache.attributes`.

    Attributes:
        cache: looks values up.
    """

    cache: Any

    @property
    def reader(self) -> Reader | None:
        """Resolves calls that ``torch.compile`` traces; None: they are derived."""


class CountingCache(Protocol):
    """A cache that may hold values of a derivation."""

    def derivation_counts(self, derivation: Derivation) -> tuple[int, int, int]:
        """Return hits, misses and entries."""

    def invalidate_derivation(self, derivation: Derivation) -> int:
        """Drop its entries; return how many."""


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
        derivations[self.number] = self
        self.name = name
        self.function = function
        self.adapter = adapter
        self.depends_on = depends_on
        self.detach = detach
        self.binding: Resolver | None = None
        self.caches: weakref.WeakSet[CountingCache] = weakref.WeakSet()
        try:
            self.bind, self.parameters = make_binder(function)
        except ValueError:
            msg = (
                f"cached({name!r}): Python cannot tell which parameters {_name_of(function)} has: "
                "decorate a def that calls it"
            )
            raise ConfigError(msg) from None
        if adapter is None:
            self.adapter_index = None
        elif adapter in self.parameters:
            self.adapter_index = self.parameters.index(adapter)
        else:
            msg = (
                f"cached({name!r}, adapter={adapter!r}): {_name_of(function)} has no parameter "
                f"{adapter!r}; its parameters are {', '.join(self.parameters)}"
            )
            raise ConfigError(msg)

    def derive(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the function past the cache; what autograd takes for a constant has no graph."""
        if self.detach and torch.is_grad_enabled():
            with torch.no_grad():
                return self.function(*args, **kwargs)
        return self.function(*args, **kwargs)

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
        derivations[self.number] = self
        self.binding = None
        self.caches = weakref.WeakSet()

    def __repr__(self) -> str:
        return f"<derivation {self.name!r}: {_name_of(self.function)}>"


derivations: weakref.WeakValueDictionary[int, Derivation] = weakref.WeakValueDictionary()
"""All that there are, by number."""


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
    not write into the result. It works under ``@property``; a ``@classmethod`` has no owner to
    store values for, and what is under ``@staticmethod`` is a plain function, attached by itself.

    Args:
        name: what the value is called, in reports.
        adapter: the name of the parameter that carries the adapter's name, or a tuple of names
            where several adapters go into one value; events and ``invalidate(adapter=...)`` go by
            it. It may be the ``*args`` of the function.
        depends_on: called with the same arguments as the function, returns the tensors and plain
            scalars (numbers, strings, dtypes; lists and dicts of them) that the result depends on
            besides the arguments; of a mapping, keys and values count, and of a module all its
            state. Without it: the parameters, buffers and attributes of the owner
            and of its submodules; with an attribute among them that cannot be compared (an object
            of some class), every call goes past the cache.
        detach: the result is a constant to autograd (as DoRA's norm is): it is derived without a
            graph, and may be stored and used while its dependencies require gradients.

    Raises:
        ConfigError: what is decorated returns no tensors when it is called, as a coroutine function
            does not; an argument is of the wrong kind; ``adapter`` is no parameter of the function;
            or ``depends_on`` does not take the function's arguments.

    Example::

        class Rotation(nn.Module):
            @cached("rotation", adapter="adapter_name",
                    depends_on=lambda self, adapter_name: [self.weight[adapter_name]])
            def rotation(self, adapter_name: str) -> Tensor: ...
    """
    _check_arguments(name, adapter, depends_on)

    def decorate(function: Callable[P, R]) -> CachedFunction[P, R]:
        _check_function(name, function, depends_on)
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
                reader = binding.reader
                found: R = (
                    derivation.derive(args, kwargs)
                    if reader is None
                    else reader.read(derivation, args, kwargs)
                )
                return found
            result: R = binding.cache.lookup(derivation, binding, args, kwargs)
            return result

        def cache_info() -> CacheInfo:
            counts = [
                (0, 0, 0),
                *(cache.derivation_counts(derivation) for cache in derivation.caches),
            ]
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


def derivation_of(function: object) -> Derivation | None:
    """Return the derivation of a decorated function; None for anything else."""
    try:
        found = getattr(function, MARK, None)
    except Exception:  # noqa: BLE001 - any object, which may do anything when asked
        return None
    return found if isinstance(found, Derivation) else None


def derivations_of(kind: type) -> list[Derivation]:
    """Return the derivations of the decorated methods of a class, inherited ones included."""
    return [found for _, found, how in _decorated(kind) if how is None]


def misplaced_in(kind: type) -> list[tuple[str, Derivation, type, str]]:
    """Return decorated functions of a class whose values cannot be kept for its instances.

    Returns:
        Of each: where it is, the derivation, the kind of decorator that it is under, and why that
        does not work, with what to write instead.
    """
    owner = kind.__qualname__
    return [
        (f"{owner}.{name}", found, how, _MISPLACED[how].format(kind=owner, attribute=name))
        for name, found, how in _decorated(kind)
        if how is not None
    ]


def _decorated(kind: type) -> list[tuple[str, Derivation, type | None]]:
    """Return the decorated attributes of a class, and under what kind of decorator they fail."""
    found: dict[str, tuple[str, Derivation, type | None]] = {}
    for base in kind.__mro__:
        for attribute, value in vars(base).items():
            derivation = derivation_of(_called_by(value, f"{base.__qualname__}.{attribute}"))
            if derivation is not None:
                how = next((one for one in _MISPLACED if isinstance(value, one)), None)
                found.setdefault(attribute, (attribute, derivation, how))
    return list(found.values())


def _called_by(value: object, name: str) -> object:
    """Return the function that an attribute of a class calls when it is used.

    Args:
        value: what the class has there; perhaps a decorator's function that calls the real one.
        name: the qualified name of the attribute.
    """
    if type(value) is FunctionType and derivation_of(value) is None:
        for inner in _cells(value):
            found = derivation_of(inner)
            if found is not None and _name_of(found.function) == name:
                return inner
    if isinstance(value, property):
        return value.fget
    if isinstance(value, classmethod | staticmethod):
        return value.__func__
    if isinstance(value, functools.partialmethod | functools.cached_property):
        return value.func
    return value


_MISPLACED: dict[type, str] = {
    staticmethod: (
        "a static method belongs to no object: attach it by itself, with "
        "dora_cache.attach({kind}.{attribute})"
    ),
    classmethod: (
        "a class method has no object to keep values for: make it a method, or a function outside "
        "the class, attached by itself"
    ),
    functools.cached_property: (
        "functools.cached_property keeps the first value whatever happens to the weights: "
        "write @property over @cached"
    ),
    functools._lru_cache_wrapper: (
        "functools.lru_cache keeps the first value whatever happens to the weights: leave it out"
    ),
}


def weights_read_by(function: object) -> list[str]:
    """Return the names of tensors and modules that a function reads and that are no arguments."""
    if type(function) is not FunctionType:
        return []
    read = dict(zip(function.__code__.co_freevars, _cells(function), strict=False))
    codes = [function.__code__]
    while codes:
        code = codes.pop()
        codes += [one for one in code.co_consts if type(one) is CodeType]
        for step in dis.get_instructions(code):
            if step.opname == "LOAD_GLOBAL" and step.argval in function.__globals__:
                read.setdefault(step.argval, function.__globals__[step.argval])
    return [name for name, value in read.items() if isinstance(value, torch.Tensor | nn.Module)]


def _cells(function: FunctionType) -> list[object]:
    """Return what a function closes over; None where that is not there yet."""
    found: list[object] = []
    for cell in function.__closure__ or ():
        try:
            found.append(cell.cell_contents)
        except ValueError:
            found.append(None)
    return found


def owners_in(module: nn.Module, known: dict[type, bool] | None = None) -> Iterator[object]:
    """Yield the objects with decorated methods, and decorated functions, that a module holds.

    These are attributes, what is in lists, tuples, sets and dicts of these, and the objects whose
    methods are there; no modules.

    Args:
        module: whose attributes are looked at; not those of its submodules.
        known: which classes have decorated methods, to be handed from call to call.
    """
    known = {} if known is None else known
    seen: set[int] = set()
    waiting: list[Any] = module_attributes(module)
    while waiting:
        value = waiting.pop()
        kind = type(value)  # isinstance() would ask the object
        if issubclass(kind, _NO_OWNERS) or id(value) in seen:
            continue
        seen.add(id(value))
        if issubclass(kind, list | tuple | set | frozenset):
            waiting += value
        elif issubclass(kind, dict):
            waiting += value.values()
        elif kind is MethodType:
            waiting.append(value.__self__)
        elif kind is functools.partial:
            waiting.append(value.func)
        elif kind is FunctionType:
            if derivation_of(value) is not None:
                yield value
        else:
            if kind not in known:
                known[kind] = bool(_decorated(kind))
            if known[kind]:
                yield value


_NO_OWNERS = (torch.Tensor, nn.Module, str, bytes, int, float, type(None), type)


def _check_arguments(name: object, adapter: object, depends_on: object) -> None:
    if callable(name):
        msg = f'@cached needs a name: write @cached("{getattr(name, "__name__", "value")}")'
        raise ConfigError(msg)
    if not isinstance(name, str):
        msg = f'cached({name!r}): give the value\'s name as a string, such as cached("scale")'
        raise ConfigError(msg)
    if adapter is not None and not isinstance(adapter, str):
        msg = (
            f"cached({name!r}, adapter={adapter!r}): give the name of the parameter that carries "
            "the adapter's name, as a string"
        )
        raise ConfigError(msg)
    if depends_on is not None and (
        not callable(depends_on) or inspect.iscoroutinefunction(depends_on)
    ):
        msg = (
            f"cached({name!r}): depends_on is a {type(depends_on).__name__}"
            f"{' that has to be awaited' if callable(depends_on) else ''}: give a function that is "
            "called with the same arguments and returns the tensors, such as "
            "depends_on=lambda self: [self.weight]"
        )
        raise ConfigError(msg)


def _check_function(
    name: str, function: Callable[..., Any], depends_on: Callable[..., object] | None
) -> None:
    kind = type(function).__name__
    problem = None
    if isinstance(function, staticmethod | classmethod | property | functools.cached_property):
        problem = f"a {kind}: put @{kind} over @cached, and @cached on the function itself"
        if not isinstance(function, staticmethod | property):
            problem = f"a {kind}: {_MISPLACED[type(function)]}"
    elif isinstance(function, functools._lru_cache_wrapper):
        problem = f"a function with a cache of its own: {_MISPLACED[type(function)]}"
    elif isinstance(function, type):
        problem = f"the class {function.__name__}: decorate its methods"
    elif not inspect.isroutine(function):
        problem = f"a {kind}: decorate the function itself, or a def that calls it"
    elif inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        problem = "a coroutine function, which returns no tensor: decorate a plain one it calls"
    elif inspect.isgeneratorfunction(function):
        problem = "a generator function: return a tuple of tensors instead of yielding them"
    elif inspect.ismethod(function) and depends_on is None:
        problem = (
            "a bound method, and its object is none of its arguments: decorate the method in its "
            "class, or give depends_on"
        )
    if problem is not None:
        msg = f"cached({name!r}) takes a function or method; this is {problem}"
        raise ConfigError(msg)
    if depends_on is not None:
        _check_signature(name, function, depends_on)


def _check_signature(
    name: str, function: Callable[..., Any], depends_on: Callable[..., object]
) -> None:
    """See to it that ``depends_on`` can be called with the fewest arguments of the function."""
    try:
        taken = inspect.signature(depends_on)
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # written in C, perhaps: the first call will show
        return
    needed = [
        one
        for one in parameters
        if one.default is one.empty and one.kind not in {one.VAR_POSITIONAL, one.VAR_KEYWORD}
    ]
    named = {one.name: None for one in needed if one.kind is one.KEYWORD_ONLY}
    try:
        taken.bind(*(None for one in needed if one.kind is not one.KEYWORD_ONLY), **named)
    except TypeError as error:
        stars: dict[Any, str] = {
            inspect.Parameter.VAR_POSITIONAL: "*",
            inspect.Parameter.VAR_KEYWORD: "**",
        }
        names = ", ".join(f"{stars.get(one.kind, '')}{one.name}" for one in parameters)
        msg = (
            f"cached({name!r}): depends_on is called with the arguments of {_name_of(function)}, "
            f"and does not take them ({error}): write depends_on=lambda {names}: [...]"
        )
        raise ConfigError(msg) from None


def _name_of(function: object) -> str:
    return getattr(function, "__qualname__", None) or type(function).__name__
