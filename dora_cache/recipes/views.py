"""Views: what stands for a layer where a recipe's forward is traced.

A view is a copy of the layer that shares its modules and parameters, and has those of the active
adapters alone, under names that are the same whatever the adapters are called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dora_cache.attributes import OBSERVER, SLOT

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Mapping, Sequence

    from dora_cache.recipes.entry import Place

__all__ = ["ACTIVE", "canonical", "form_of", "layout_of", "looks_of", "stand_in"]

ACTIVE = "active 0"
"""The name that views have for the first active adapter."""

_OF_MODULES = frozenset(vars(nn.Module()))


def canonical(names: Sequence[str]) -> dict[str, str]:
    """Return the names that views have for adapters, in order."""
    return {name: f"{ACTIVE[:-1]}{number}" for number, name in enumerate(names)}


def stand_in(
    owner: Any, canonical: Mapping[str, str], copied: list[tuple[nn.Module, nn.Module]]
) -> Any:
    """Return a copy that has the active adapters alone, by the names that views have for them.

    Args:
        owner: what is copied.
        canonical: these names, by the adapters' own.
        copied: gets the containers that the copy has others for, and these.
    """
    state = dict(owner.__dict__)
    named = {*getattr(owner, "adapter_layer_names", ()), *getattr(owner, "other_param_names", ())}
    state["_modules"] = dict(state["_modules"])
    for table in (state, state["_modules"]):
        for name, value in table.items():
            if name not in _OF_MODULES:
                renamed = _renamed(value, canonical, named=name in named)
                if renamed is not None:
                    table[name] = renamed
                    if isinstance(value, nn.Module):
                        # The layer is switched to another mode before its parts are.
                        renamed.__dict__["training"] = state["training"]
                        copied.append((value, renamed))
    state.pop(OBSERVER, None)
    first, *others = known = list(canonical.values())
    if "_active_adapter" in state:  # text where possible: the compiler checks lists at each call
        state["_active_adapter"] = known if others else first
    elif "active_adapter" in state:  # of a model
        state["active_adapter"] = first
    view = object.__new__(type(owner))
    view.__dict__.update(state)
    return view


def _renamed(value: Any, canonical: Mapping[str, str], *, named: bool) -> Any:
    """Return a container with the active adapters alone, under the names that views have for them.

    Args:
        value: an attribute of a layer.
        canonical: these names, by the adapters' own.
        named: whether the layer says that it has a part for each adapter.

    Returns:
        The container; None if the attribute is none that has a part for each adapter.
    """
    kind = type(value)
    if kind is dict:
        items, table = value, None
    elif isinstance(value, nn.Module):
        state = value.__dict__
        if isinstance(value, nn.ModuleDict):
            table = "_modules"
        elif isinstance(value, nn.ParameterDict):
            table = "_parameters"
        elif kind.__name__ == "BufferDict":
            table = "_buffers"
        else:
            return None
        items = state[table]
    else:
        return None
    if not named and not any(name in items for name in canonical):
        return None
    kept = {known: items[name] for name, known in canonical.items() if name in items}
    if table is None:
        return kept
    clone = object.__new__(kind)
    clone.__dict__.update(value.__dict__)
    clone.__dict__[table] = kept
    if "_keys" in clone.__dict__:
        clone.__dict__["_keys"] = {
            known: None for name, known in canonical.items() if name in value.__dict__["_keys"]
        }
    return clone


def form_of(
    view: Any, copies: set[int], *, shallow: bool
) -> tuple[list[Place], tuple[Tensor, ...], Hashable]:
    """Return where a view's tensors are, these, and what else compiled code is made for.

    Args:
        view: the view.
        copies: ids of the containers that are the view's own.
        shallow: whether modules and parameters are left out.
    """
    places: list[Place] = []
    tensors: list[Tensor] = []
    signs: list[object] = [type(view)]
    for path, module in () if shallow else _modules_in(view, (), set()):
        signs.append((path, type(module)))
        for kind in ("_parameters", "_buffers"):
            for name, tensor in module.__dict__[kind].items():
                if tensor is not None and type(tensor) in _EXACT:
                    if module is not view and id(module) not in copies:
                        places.append((module.__dict__[kind], None, name, tensor))
                    tensors.append(tensor)
                    signs.append((path, kind, name, *layout_of(tensor)))
    for name, value in view.__dict__.items():
        if name in _OF_COMPILERS:
            continue
        if type(value) in _PLAIN:
            signs.append((name, value))
        elif type(value) is dict and not name.endswith("alpha"):  # a part of scalings
            # No text: it may name the layer.
            signs += [(name, k, v) for k, v in value.items() if type(v) in _PLAIN - {str}]
    return places, tuple(tensors), tuple(signs)


def looks_of(view: Any, *, shallow: bool) -> list[object]:
    """Return what compiled code may have guards on, besides a view's form; to be compared.

    An update at the check of compiled code may come after those guards.

    Args:
        view: the view.
        shallow: whether modules and parameters are left out.
    """
    found: list[object] = []
    for value in view.__dict__.values():
        if type(value) is dict:
            found += [(name, _look(item)) for name, item in value.items()]
    for path, module in () if shallow else _modules_in(view, (), set()):
        tensors = (*module._parameters.items(), *module._buffers.items())
        found += [(path, name, _look(tensor)) for name, tensor in tensors]
        if module is not view:
            found += [(path, name, _look(item)) for name, item in module.__dict__.items()]
    return found


def _look(value: object) -> object:
    if isinstance(value, Tensor):
        return type(value), value.requires_grad, *layout_of(value)
    scalars = value if type(value) is tuple else (value,)
    if all(isinstance(one, (int, float, str, torch.dtype)) for one in scalars):
        return type(value), value
    # Else only whether it is there: hooks, forwards of a module's own.
    return type(value), bool(value) if isinstance(value, (dict, set)) else None


_EXACT = frozenset({Tensor, nn.Parameter, nn.Buffer})
_OF_COMPILERS = frozenset({"_is_torch_compile"})
_PLAIN = frozenset({bool, int, str, type(None), torch.dtype})


def _modules_in(
    module: nn.Module, path: tuple[str, ...], seen: set[int]
) -> Iterator[tuple[tuple[str, ...], nn.Module]]:
    if id(module) in seen:
        return
    seen.add(id(module))
    yield path, module
    for name, part in module._modules.items():
        # Those with a binding have holders of their own, and Dynamo can follow no LSTM.
        if part is not None and SLOT not in part.__dict__ and not isinstance(part, nn.RNNBase):
            yield from _modules_in(part, (*path, name), seen)


def layout_of(value: Tensor) -> tuple[Any, ...]:
    """Return a tensor's shape, strides, dtype and device."""
    return tuple(value.shape), value.stride(), value.dtype, value.device
