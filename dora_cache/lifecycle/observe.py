"""Hang behaviour on a module, reversibly: its class becomes a subclass of what it was.

A subclass, unlike a closure on the instance, survives nothing it should not: copies and pickles of
the module are of the original class, and detaching restores it.
"""

from __future__ import annotations

import copyreg
import functools
import weakref
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dora_cache.attributes import OBSERVER, OWN_ATTRIBUTES
from dora_cache.lifecycle.offloading import rebind

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["PLAIN", "Observer", "observe", "plain_class", "reduce_as_plain"]

PLAIN = "__dora_cache_plain__"
"""Where the class of an observed module has the one that it was made from."""

_LOAD_HOOKS = "_load_state_dict_post_hooks"


class Observer:
    """What to do when something happens to a module; every method may be left as it is.

    Attributes:
        mode_switched: called once the module's training mode has been set.
        moved: called once ``to()``, ``half()`` or their like have been through the module.
        loaded: called when ``load_state_dict`` has been through the module and its submodules.
        assigned: for attributes of the module by name, what to call once one has been set.
        changed: called once any other attribute of the module has been set, ``training`` aside.
        calls: for methods of the module by name, what to call once they have returned or raised:
            ``handler(module, *args, **kwargs)`` with the method's own arguments.
    """

    def __init__(
        self,
        *,
        mode_switched: Callable[[Any], object] = lambda _: None,
        moved: Callable[[Any], object] = lambda _: None,
        loaded: Callable[[Any], object] | None = None,
        assigned: Mapping[str, Callable[[Any], object]] | None = None,
        changed: Callable[[Any], object] = lambda _: None,
        calls: Mapping[str, Callable[..., object]] | None = None,
    ) -> None:
        self.mode_switched = mode_switched
        self.moved = moved
        self.loaded = loaded
        self.assigned = dict(assigned or {})
        self.changed = changed
        self.calls = dict(calls or {})

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        """Copy and pickle as None."""
        return type(None), ()


class _LoadHook:
    """Calls an observer after ``load_state_dict``: no method is called after the submodules'."""

    def __init__(self, loaded: Callable[[Any], object]) -> None:
        self.loaded = loaded

    def __call__(self, module: nn.Module, _: object) -> None:
        self.loaded(module)


# One subclass for each class and set of observed methods, shared by all modules of that class.
_subclasses: weakref.WeakKeyDictionary[type, weakref.WeakValueDictionary[tuple[Any, ...], type]] = (
    weakref.WeakKeyDictionary()
)


def observe(
    owner: object, observer: Observer, overrides: Mapping[str, Callable[..., Any]] | None = None
) -> Callable[[], None]:
    """Tell ``observer`` what happens to ``owner`` until the returned function is called.

    Args:
        owner: a module, or any object with a ``__dict__``.
        observer: what to do on which event.
        overrides: functions that stand in for methods of the class, as in a subclass.

    Returns:
        A function that gives the owner its class back.
    """
    plain = type(owner)
    methods = tuple(sorted(name for name in observer.calls if hasattr(plain, name)))
    overrides = dict(overrides or {})
    variants = _subclasses.setdefault(plain, weakref.WeakValueDictionary())
    key = (methods, *overrides.items())
    swapped = variants.get(key)
    if swapped is None:
        swapped = variants[key] = _subclass(plain, methods, overrides)
    owner.__dict__[OBSERVER] = observer
    object.__setattr__(owner, "__class__", swapped)  # frozen dataclasses object to less
    forward: Any = overrides.get("forward")
    if forward is not None and isinstance(owner, nn.Module):
        rebind(owner, plain.forward, forward)  # type: ignore[attr-defined]
    reference = weakref.ref(owner)
    hook = None
    if observer.loaded is not None and isinstance(owner, nn.Module):
        register: Any = owner.register_load_state_dict_post_hook
        hook = register(_LoadHook(observer.loaded))

    def restore() -> None:
        if hook is not None:
            hook.remove()
        living = reference()
        if living is not None:
            living.__dict__.pop(OBSERVER, None)
            if type(living) is swapped:
                object.__setattr__(living, "__class__", plain)
            if forward is not None and isinstance(living, nn.Module):
                rebind(living, forward, plain.forward)  # type: ignore[attr-defined]

    return restore


def plain_class(kind: type) -> type:
    """Return the class that an observed module had before, or the class itself."""
    plain: type = getattr(kind, PLAIN, kind)
    return plain


def _subclass(
    plain: type, methods: tuple[str, ...], overrides: Mapping[str, Callable[..., Any]]
) -> type:
    namespace: dict[str, Any] = {
        "__module__": plain.__module__,
        "__qualname__": plain.__qualname__,
        "__doc__": plain.__doc__,
        PLAIN: plain,
        "__reduce_ex__": _reduce_ex(plain),
    }
    if issubclass(plain, nn.Module):
        namespace |= {
            "__setattr__": _set_attribute(plain),
            "_apply": _after(plain, "_apply", lambda observer: observer.moved, pass_on=False),
            "_replicate_for_data_parallel": _cutting(plain, "_replicate_for_data_parallel"),
        }
    for name in ("__copy__", "__deepcopy__"):
        if hasattr(plain, name):
            namespace[name] = _cutting(plain, name)
    for name in methods:
        namespace[name] = _after(plain, name, _handler(name), pass_on=True)
    namespace |= overrides
    return type(plain)(plain.__name__, (plain,), namespace)


def _handler(name: str) -> Callable[[Observer], Callable[..., object]]:
    return lambda observer: observer.calls[name]


def _after(
    plain: type,
    name: str,
    handler: Callable[[Observer], Callable[..., object]],
    *,
    pass_on: bool,
) -> Callable[..., Any]:
    """Return a method that calls the original one, and then the observer even if it raised."""
    original = getattr(plain, name)

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(self, *args, **kwargs)
        finally:
            observer = self.__dict__.get(OBSERVER)
            if observer is not None:
                if pass_on:
                    _tell(handler(observer), self, *args, **kwargs)
                else:
                    _tell(handler(observer), self)

    return method


def _tell(handler: Callable[..., object], *args: Any, **kwargs: Any) -> None:
    """Call an observer's handler, which TorchDynamo cannot follow: outside compiled code."""
    if torch.compiler.is_dynamo_compiling():
        _tell_uncompiled(handler, *args, **kwargs)
    else:
        handler(*args, **kwargs)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _tell_uncompiled(handler: Callable[..., object], *args: Any, **kwargs: Any) -> None:
    handler(*args, **kwargs)


def _set_attribute(plain: Any) -> Callable[..., None]:
    original = plain.__setattr__

    def set_attribute(self: Any, name: str, value: object) -> None:
        switched = name == "training" and self.__dict__.get("training") != value
        original(self, name, value)
        observer = self.__dict__.get(OBSERVER)
        if observer is not None:
            if switched:
                _tell(observer.mode_switched, self)
            elif name in observer.assigned:
                _tell(observer.assigned[name], self)
            elif name != "training":
                _tell(observer.changed, self)

    return set_attribute


def reduce_as_plain(reduced: Any) -> Any:
    """Change what ``__reduce_ex__`` returned, so that a copy has the original class and no ties."""
    if not isinstance(reduced, tuple):
        return reduced
    function, args, *rest = reduced
    if isinstance(function, type):
        function = plain_class(function)
    args = tuple(plain_class(arg) if isinstance(arg, type) else arg for arg in args)
    if function is copyreg.__newobj__ and len(args) == 1:  # type: ignore[attr-defined]
        # pickle refuses a __newobj__ of another class than the object's.
        function, args = copyreg._reconstructor, (*args, object, None)  # type: ignore[attr-defined]
    if rest and isinstance(rest[0], dict):
        rest[0] = _without_ties(rest[0])
    elif rest and isinstance(rest[0], tuple):  # of an object with slots beside its attributes
        rest[0] = tuple(_without_ties(x) if isinstance(x, dict) else x for x in rest[0])
    return (function, args, *rest)


def _without_ties(attributes: dict[str, Any]) -> dict[str, Any]:
    attributes = dict(attributes)
    _cut_ties(attributes)
    return attributes


def _cut_ties(attributes: dict[str, Any]) -> None:
    for name in OWN_ATTRIBUTES:
        attributes.pop(name, None)
    hooks = attributes.get(_LOAD_HOOKS, {})
    if any(isinstance(hook, _LoadHook) for hook in hooks.values()):
        kept = [(key, hook) for key, hook in hooks.items() if not isinstance(hook, _LoadHook)]
        attributes[_LOAD_HOOKS] = OrderedDict(kept)


def _reduce_ex(plain: Any) -> Callable[..., Any]:
    return lambda self, protocol: reduce_as_plain(plain.__reduce_ex__(self, protocol))


def _cutting(plain: type, name: str) -> Callable[..., Any]:
    """Return a method that copies as the original one does, and cuts the copy's ties."""
    original = getattr(plain, name)

    @functools.wraps(original)
    def method(self: Any, *args: Any) -> Any:
        copy = original(self, *args)
        attributes = getattr(copy, "__dict__", None)
        if attributes is None or attributes is self.__dict__:  # no copy of this object
            return copy
        _cut_ties(attributes)
        if type(copy) is type(self):
            copy.__class__ = plain
        return copy

    return method
