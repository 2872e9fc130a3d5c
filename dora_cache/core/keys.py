"""Keys of calls: the same key however the arguments are written."""

from __future__ import annotations

import enum
import inspect
import itertools
import threading
import weakref
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dora_cache.ambient import global_forward_hooks, parametrizations_cached
from dora_cache.attributes import OWN_ATTRIBUTES
from dora_cache.reasons import Reason

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator

__all__ = [
    "ALL_ADAPTERS",
    "PLAIN_KEYS",
    "Adapters",
    "UnkeyableError",
    "check_container",
    "concerns",
    "freeze",
    "make_binder",
    "module_attributes",
    "own_state",
    "state_names",
]

ALL_ADAPTERS = None
"""In place of an adapter's name: every adapter, and values that belong to none."""

Adapters = str | tuple[str, ...] | None
"""Whose a value is: one adapter's, that of several together, or no adapter's."""


def concerns(adapter: str | None, owners: Adapters) -> bool:
    """Whether an event for ``adapter`` concerns a value that belongs to ``owners``."""
    if adapter is ALL_ADAPTERS or adapter == owners:
        return True
    return type(owners) is tuple and adapter in owners


class UnkeyableError(TypeError):
    """An argument cannot be part of a key."""


PLAIN_KEYS = frozenset(
    {type(None), str, bytes, torch.dtype, torch.device, torch.layout, torch.memory_format}
)
"""Types whose values are keys as they are."""
_WITH_TYPE = frozenset({bool, int})


# By identity: modules may define an equality of their own.
_module_numbers: dict[int, tuple[weakref.ref[nn.Module], int]] = {}
_numbering = threading.Lock()
_numbers = itertools.count()


def freeze(value: object, dependencies: list[object]) -> Hashable:
    """Turn an argument into something hashable that equals only its like.

    Equal numbers of different types get different keys (``1``, ``1.0`` and ``True`` may derive
    different dtypes). Tensors and modules are keyed by identity, and appended to ``dependencies``
    for the stamp: tensors as they are, modules with all their state.

    Raises:
        UnkeyableError: an argument of a type whose equality says nothing sure.
    """
    kind = type(value)
    if kind in PLAIN_KEYS:
        return value
    if kind in _WITH_TYPE:
        return (kind, value)
    if kind is float:
        return (kind, value.hex())  # type: ignore[attr-defined]  # tells -0.0 from 0.0; NaN is NaN
    if kind is complex:
        return (kind, value.real.hex(), value.imag.hex())  # type: ignore[attr-defined]
    if isinstance(value, Tensor):
        dependencies.append(value)
        return (Tensor, id(value))
    if isinstance(value, nn.Module):
        dependencies.extend(own_state(value, whole=True))
        # An id may be another module's once this one is gone; such a number never is.
        return (nn.Module, _number(value))
    if isinstance(value, enum.Enum):  # members of two enumerations may be equal
        return (kind, value.value if value.name is None else value.name)
    if isinstance(value, tuple | list):
        check_container(value)
        return (kind, tuple(freeze(item, dependencies) for item in value))
    if isinstance(value, dict):
        check_container(value)
        pairs = value.items()  # in order, which a function may go by
        return (kind, tuple((freeze(k, dependencies), freeze(v, dependencies)) for k, v in pairs))
    if isinstance(value, set | frozenset):
        return (kind, frozenset(freeze(item, dependencies) for item in value))
    msg = f"an argument of type {kind.__name__} cannot be part of a key"
    raise UnkeyableError(msg)


def check_container(value: object) -> None:
    """Check that a list, tuple or dict is what it contains, and nothing more.

    Raises:
        UnkeyableError: it has attributes of its own, or makes up missing items.
    """
    attributes = getattr(value, "__dict__", {}).keys() - {"_metadata"}  # which state_dict() adds
    if attributes or isinstance(value, defaultdict):
        msg = f"a {type(value).__name__} is more than its items: pass a plain list, tuple or dict"
        raise UnkeyableError(msg)


def _number(module: nn.Module) -> int:
    address = id(module)
    known = _module_numbers.get(address)
    if known is None or known[0]() is not module:
        with _numbering:
            known = _module_numbers.get(address)
            if known is None or known[0]() is not module:
                known = weakref.ref(module, lambda gone: _forget(address, gone)), next(_numbers)
                _module_numbers[address] = known
    return known[1]


def _forget(address: int, gone: weakref.ref[nn.Module]) -> None:
    known = _module_numbers.get(address)
    if known is not None and known[0] is gone:
        del _module_numbers[address]


def _modules_of(owner: nn.Module) -> Iterator[nn.Module]:
    """Yield a module and its submodules, each once; equal ones are not one, as for PyTorch."""
    seen: set[int] = set()
    waiting: list[nn.Module | None] = [owner]
    while waiting:
        module = waiting.pop()
        if module is not None and id(module) not in seen:
            seen.add(id(module))
            yield module
            waiting += reversed(module._modules.values())


_MODULE_ATTRIBUTES = frozenset({*vars(nn.Module()), *OWN_ATTRIBUTES})


def own_state(owner: nn.Module, *, whole: bool = False) -> Iterator[object]:
    """Yield the parameters, buffers, and attributes of a module and of its submodules.

    What PyTorch itself keeps in every module (its mode, its hooks) is left out. Where these matter,
    a reason comes out, so that reading it fails, as reading an attribute does that cannot be read.

    Args:
        owner: the module.
        whole: whether it is called as a whole, so that its own mode and hooks matter too; not so of
            the owner of a method that is called.
    """
    if global_forward_hooks():
        yield Reason.HOOKED
    for module in _modules_of(owner):
        yield _number(module)
        if parametrizations_cached() and "parametrizations" in module._modules:
            yield Reason.UNSIGNABLE  # within parametrize.cached(), which does not notice writes
        if whole or module is not owner:
            if module.training:
                yield Reason.TRAINING
            if module._forward_hooks or module._forward_pre_hooks:
                yield Reason.HOOKED
        yield from module._parameters.values()
        yield from module._buffers.values()
        for name, value in vars(module).items():
            if name not in _MODULE_ATTRIBUTES:
                yield name
                yield value


def state_names(owner: nn.Module) -> Iterator[str]:
    """Yield the name of each thing that :func:`own_state` yields, if all of it can be signed.

    A submodule's have its name in front, with a dot; the module itself has an empty name.
    """
    for prefix, module in owner.named_modules():
        yield prefix
        attributes = [name for name in vars(module) if name not in _MODULE_ATTRIBUTES]
        twice = [name for name in attributes for _ in range(2)]
        for name in (*module._parameters, *module._buffers, *twice):
            yield f"{prefix}.{name}" if prefix else name


def module_attributes(module: nn.Module) -> list[object]:
    """Return the attributes of a module that are its own: no parts, and nothing of PyTorch's."""
    return [value for name, value in vars(module).items() if name not in _MODULE_ATTRIBUTES]


def make_binder(function: Callable[..., Any]) -> tuple[Callable[..., tuple[Any, ...]], list[str]]:
    """Compile the signature of ``function`` into a fast binder.

    Returns:
        A function that takes the same arguments and returns their values in the signature's order
        with defaults filled in (``*args`` as one tuple, ``**kwargs`` as one dict), and the names in
        that order. Wrong arguments raise ``TypeError``, as the function itself would.
    """
    parameters = inspect.signature(function).parameters.values()
    declared, namespace = [], {}
    kinds = [parameter.kind for parameter in parameters]
    stars: dict[Any, str] = {
        inspect.Parameter.VAR_POSITIONAL: "*",
        inspect.Parameter.VAR_KEYWORD: "**",
    }
    for index, parameter in enumerate(parameters):
        kind = parameter.kind
        if kind is parameter.KEYWORD_ONLY and not {
            parameter.KEYWORD_ONLY,
            parameter.VAR_POSITIONAL,
        } & set(kinds[:index]):
            declared.append("*")
        default = ""
        if parameter.default is not parameter.empty:
            namespace[f"_default{index}"] = parameter.default
            default = f"=_default{index}"
        declared.append(f"{stars.get(kind, '')}{parameter.name}{default}")
        next_kind = kinds[index + 1] if index + 1 < len(kinds) else None
        if kind is parameter.POSITIONAL_ONLY and next_kind is not parameter.POSITIONAL_ONLY:
            declared.append("/")
    names = [parameter.name for parameter in parameters]
    source = f"lambda {', '.join(declared)}: ({''.join(f'{name}, ' for name in names)})"
    return eval(source, namespace), names  # noqa: S307 - made of a signature's own names
