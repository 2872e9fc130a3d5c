"""Convert what ``depends_on`` returns into tensors and plain values that can be compared."""

from __future__ import annotations

from collections import deque
from collections.abc import (
    ItemsView,
    Iterable,
    Iterator,
    KeysView,
    Mapping,
    Sequence,
    ValuesView,
)
from typing import Any

import torch
from torch import Tensor, nn

from dora_cache.core.facts import tensors_in
from dora_cache.core.keys import check_container, own_state
from dora_cache.errors import ConfigError

__all__ = ["Listed", "listed", "made_anew"]

_READY = frozenset(
    {
        Tensor,
        nn.Parameter,
        type(None),
        str,
        int,
        float,
        bool,
        torch.dtype,
        torch.device,
        torch.Size,
    }
)
"""Types of what :func:`dora_cache.core.facts.read` takes as it is."""

_INSTEAD = "return a list of tensors and plain values, such as [self.weight, self.scale]"


class Listed(list[object]):
    """Dependencies, as a list.

    Attributes:
        form: how they came: the ``"items"`` of what was returned, one by one; the keys and values
            of a ``"mapping"``; a bare ``"tensor"``; or None, in some other way.
        iterators: what of it could be read only once.
    """

    form: str | None = "items"
    iterators: Sequence[object] = ()

    def read_before(self, earlier: Listed) -> str | None:
        """Return the kind of an iterator that both were read from, the second one in vain."""
        for one in self.iterators:
            if any(one is other for other in earlier.iterators):
                return type(one).__name__
        return None


def listed(found: Any) -> Listed:
    """List what ``depends_on`` returned.

    Args:
        found: tensors and scalars in a list, tuple, mapping (its keys and values count) or anything
            else to iterate over; a tensor; or a module (all its state counts). Mappings and modules
            may be among the items as well.

    Raises:
        ConfigError: it is something else.
    """
    kind = type(found)
    if kind is list or kind is tuple:
        result = Listed(found)
    else:
        items, form = _items(found)
        result = Listed(items)
        result.form = form
        if isinstance(found, Iterator):
            result.iterators = [found]
    for item in result:
        if type(item) not in _READY:
            _open(result)
            break
    return result


def made_anew(before: Iterable[object], after: Iterable[object]) -> bool:
    """Whether some dependencies are other tensors than before over the same memory."""
    return any(
        one is not other
        and one.device == other.device
        and one.numel() > 0
        and one.data_ptr() == other.data_ptr()
        for one, other in zip(tensors_in(before), tensors_in(after), strict=False)
    )


def _items(found: Any) -> tuple[Iterable[object], str]:
    if isinstance(found, Tensor):
        return [found], "tensor"
    if isinstance(found, nn.Module):
        return [found], "module"
    if isinstance(found, Mapping):
        check_container(found)
        return [*found.keys(), *found.values()], "mapping"
    if isinstance(found, str | bytes):
        msg = f"it returned {found!r}, which is text: {_INSTEAD}"
        raise ConfigError(msg)
    if not isinstance(found, Iterable) or type(found).__module__ == "numpy":
        what = "None" if found is None else f"a {type(found).__name__}"
        msg = f"it returned {what}: {_INSTEAD}"
        raise ConfigError(msg)
    return found, "items"


def _open(result: Listed) -> None:
    """Replace the items of a list by what :func:`dora_cache.core.facts.read` takes."""
    iterators = list(result.iterators)
    opened = [_opened(item, iterators) for item in result]
    if any(new is not old for new, old in zip(opened, result, strict=True)):
        result[:] = opened
        result.form, result.iterators = None, iterators


def _opened(item: object, iterators: list[object]) -> object:
    """Return what :func:`dora_cache.core.facts.read` takes for an item; itself if it does already.

    Args:
        item: what is among the dependencies.
        iterators: takes what can be read only once.
    """
    if isinstance(item, Tensor | str | bytes):
        return item
    if isinstance(item, nn.Module):
        return [*own_state(item, whole=True)]
    if isinstance(item, Mapping):
        check_container(item)
        return [_opened(part, iterators) for part in (*item.keys(), *item.values())]
    if isinstance(item, list | tuple):
        parts = [_opened(part, iterators) for part in item]
        changed = any(new is not old for new, old in zip(parts, item, strict=True))
        return parts if changed else item
    if isinstance(item, Iterator):
        iterators.append(item)
    elif not isinstance(item, deque | KeysView | ValuesView | ItemsView):
        return item
    return [_opened(part, iterators) for part in item]
