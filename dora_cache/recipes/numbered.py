"""What compiled code of this process knows by number: it cannot refer to anything else."""

from __future__ import annotations

import itertools
import threading
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Hashable

    from dora_cache.core.engine import Engine

__all__ = ["Numbered", "TracedCall", "numbered"]


class TracedCall(NamedTuple):
    """A call of a decorated function, without its owner.

    Attributes:
        number: the derivation's.
        args: the other positional arguments; adapters by the names that views have for them.
        kwargs: keyword arguments, as pairs.
    """

    number: int
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]


class Numbered:
    """What compiled code of this process knows by number: it cannot refer to anything else."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.holders: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self.calls: dict[TracedCall, int] = {}
        self.forms: dict[object, int] = {}
        self.notes: dict[int, tuple[weakref.ref[Engine], str, Hashable]] = {}
        self.outputs: dict[tuple[int, int], list[tuple[Any, ...]]] = {}
        self.handles = itertools.count(1)

    def number(self, table: dict[Any, int], key: Any) -> int:
        """Return the number of something; the same one for what is equal."""
        with self.lock:
            return table.setdefault(key, len(table) + 1)


numbered = Numbered()
