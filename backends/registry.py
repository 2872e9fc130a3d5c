"""Backends by name: the built-in ones, registered ones, and those of installed packages."""

from __future__ import annotations

import difflib
import inspect
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

import torch

from dora_cache.backends.budget import BudgetBackend
from dora_cache.backends.cpu import CPUBackend
from dora_cache.backends.dict import DictBackend
from dora_cache.backends.lru import LRUBackend
from dora_cache.backends.null import NullBackend
from dora_cache.backends.protocol import Backend
from dora_cache.errors import (
    BackendError,
    ConfigError,
    DoraCacheError,
    UnknownBackendError,
    warn_once,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = [
    "ENTRY_POINT_GROUP",
    "BackendInfo",
    "available",
    "check_options",
    "create",
    "host_sizes",
    "register",
]

ENTRY_POINT_GROUP = "dora_cache.backends"
"""Entry points of this group name a callable that returns a :class:`Backend`."""

_BUILT_IN: dict[str, Callable[..., Backend]] = {
    "dict": DictBackend,
    "lru": LRUBackend,
    "budget": BudgetBackend,
    "cpu": CPUBackend,
    "null": NullBackend,
}
_registered: dict[str, Callable[..., Backend]] = {}
_looked_up: set[str] = set()


@dataclass(frozen=True, slots=True)
class BackendInfo:
    """A backend that can be selected by name.

    Attributes:
        name: what to write as ``backend=``.
        origin: ``"built in"``, ``"registered"``, or the installed distribution it comes from.
        options: the settings it takes, e.g. ``("max_bytes",)``.
        required: those of them that must be given.
        summary: the first line of its documentation.
    """

    name: str
    origin: str
    options: tuple[str, ...]
    required: tuple[str, ...]
    summary: str


def register(name: str, factory: Callable[..., Backend]) -> None:
    """Make ``factory`` selectable as ``backend=name`` in this process.

    ``factory`` is called with the settings that its signature names: ``max_bytes`` and
    ``device_bytes`` (ints) if given, and everything from ``options``.

    Raises:
        ConfigError: ``name`` is a built-in backend's, or registered already for another factory;
            or ``factory`` cannot be called.
    """
    if not callable(factory):
        msg = f"register({name!r}, ...) takes a callable that returns a backend, not {factory!r}"
        raise ConfigError(msg)
    if name in _BUILT_IN or _registered.get(name, factory) is not factory:
        msg = f"there is a backend {name!r} already: register yours under another name"
        raise ConfigError(msg)
    _registered[name] = factory


def available() -> dict[str, BackendInfo]:
    """Return every backend that can be selected, by name; one that fails to import says so.

    Warns of installed ones whose name another one has.
    """
    found = {name: _describe(name, factory, "built in") for name, factory in _BUILT_IN.items()}
    for point in entry_points(group=ENTRY_POINT_GROUP):
        if point.name in found or point.name in _registered:
            _tell_hidden(point.name)
            continue
        origin = _origin(point)
        try:
            found[point.name] = _describe(point.name, point.load(), origin)
        except Exception as error:  # noqa: BLE001 - a broken package must not hide the others
            found[point.name] = BackendInfo(point.name, origin, (), (), f"fails to load: {error}")
    for name, factory in _registered.items():
        found[name] = _describe(name, factory, "registered")
    return found


def check_options(name: str, options: Mapping[str, object]) -> None:
    """Check that ``create(name, **options)`` would be given what the backend takes.

    Raises:
        UnknownBackendError: there is no such backend.
        ConfigError: an option is unknown to the backend, or one that it needs is missing.
    """
    _check(name, _factory(name), options)


def host_sizes(name: str) -> frozenset[str]:
    """Return which of a backend's sizes are of host memory (its ``host_sizes``, if it has one)."""
    return frozenset(getattr(_factory(name), "host_sizes", ()))


def create(name: str, **options: Any) -> Backend:
    """Make a new backend.

    Raises:
        UnknownBackendError: there is no such backend.
        ConfigError: an option is unknown to the backend, one that it needs is missing, or the
            backend's constructor refuses one (with a ``TypeError`` or ``ValueError``).
        BackendError: the constructor fails otherwise, or what was made lacks methods of
            :class:`Backend`.
    """
    factory = _factory(name)
    _check(name, factory, options)
    if name not in _looked_up:  # once, since it reads what every installed package says of itself
        _looked_up.add(name)
        _tell_hidden(name)
    try:
        backend = factory(**options)
    except (DoraCacheError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        kind = ConfigError if isinstance(error, TypeError | ValueError) else BackendError
        raise kind(_cannot_make(name, factory, options, error)) from error
    missing = [
        part for part in _CONTRACT if inspect.getattr_static(backend, part, _MISSING) is _MISSING
    ]
    if missing:
        msg = f"backend {name!r} is no Backend: {type(backend).__name__} lacks {', '.join(missing)}"
        raise BackendError(msg)
    return backend


_CONTRACT = tuple(name for name in vars(Backend) if name == "__len__" or not name.startswith("_"))
_MISSING = object()


def _cannot_make(
    name: str, factory: Callable[..., Backend], options: Mapping[str, object], error: Exception
) -> str:
    given = ", ".join(f"{key}={_shown(value)}" for key, value in options.items())
    parameters, anything = _parameters(factory)
    takes = ", ".join(parameters) + (", and others" if parameters else "any") * anything
    return (
        f"backend {name!r} cannot be made with {given or 'no settings'}: {type(error).__name__}: "
        f"{error}; give other settings (it takes {takes or 'none'})"
    )


def _shown(value: object) -> str:
    """Show a number; anything else may be a password."""
    return repr(value) if isinstance(value, int | float | None) else "..."


def _origin(point: EntryPoint) -> str:
    return point.dist.name if point.dist else "entry point"


def _tell_hidden(name: str) -> None:
    """Warn of installed backends that cannot be selected, because another one has their name."""
    factory = _BUILT_IN.get(name) or _registered.get(name)
    points = list(entry_points(group=ENTRY_POINT_GROUP, name=name))
    for point in points if factory is not None else points[1:]:
        if name in _BUILT_IN:
            why = "that is the name of a built-in one"
        elif factory is None:
            why = f"{_origin(points[0])} has one of that name as well"
        elif _is(point, factory):
            continue
        else:
            why = "another one is registered under that name"
        warn_once(
            f"the backend {name!r} of {_origin(point)} ({point.value}) is not used, since {why}: "
            "give its entry point another name, or write "
            f"dora_cache.backends.register('another-name', ...) with what {point.value} names"
        )


def _is(point: EntryPoint, factory: object) -> bool:
    """Whether an entry point is what was registered: a package may do both."""
    try:
        return point.load() is factory
    except Exception:  # noqa: BLE001 - a broken package
        return False


def _factory(name: str) -> Callable[..., Backend]:
    factory = _BUILT_IN.get(name) or _registered.get(name)
    if factory is not None:
        return factory
    for point in entry_points(group=ENTRY_POINT_GROUP, name=name):
        try:
            loaded: Callable[..., Backend] = point.load()
            if not callable(loaded):
                raise TypeError(f"{type(loaded).__name__} is not callable")
        except Exception as error:
            msg = f"backend {name!r} is installed, but fails to load ({point.value}): {error}"
            raise BackendError(msg) from error
        return loaded
    names = sorted({*_BUILT_IN, *_registered, *entry_points(group=ENTRY_POINT_GROUP).names})
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    msg = f"no backend {name!r}: {hint}choose one of {', '.join(map(repr, names))}"
    raise UnknownBackendError(msg)


def _parameters(factory: Callable[..., Backend]) -> tuple[dict[str, inspect.Parameter], bool]:
    """Return the keyword parameters of a factory, and whether it takes any others as well."""
    named, anything = {}, False
    try:
        signature = inspect.signature(factory)
    except ValueError:  # some built-in types have none
        return {}, True
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            anything = True
        elif parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            named[name] = parameter
    return named, anything


def _check(name: str, factory: Callable[..., Backend], options: Mapping[str, object]) -> None:
    parameters, anything = _parameters(factory)
    required = [key for key, value in parameters.items() if value.default is value.empty]
    for key in required:
        if options.get(key) is None:
            example = '"256MiB"' if key.endswith("bytes") else "..."
            msg = f"backend {name!r} needs {key}: give for example {key}={example}"
            raise ConfigError(msg)
    for key in options:
        if key in parameters or anything:
            continue
        takes = ", ".join(parameters) or "no settings"
        others = [info.name for info in available().values() if key in info.options]
        hint = f"; {key} goes with {' or '.join(map(repr, others))}" if others else ""
        msg = f"backend {name!r} takes no {key} (it takes {takes}){hint}"
        raise ConfigError(msg)


def _describe(name: str, factory: Callable[..., Backend], origin: str) -> BackendInfo:
    parameters, _ = _parameters(factory)
    required = [key for key, value in parameters.items() if value.default is value.empty]
    lines = (inspect.getdoc(factory) or "").strip().splitlines()
    summary = lines[0] if lines else ""
    return BackendInfo(name, origin, tuple(parameters), tuple(required), summary)
