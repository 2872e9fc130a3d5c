"""Deriving a value, and making an entry of it: where memory runs out, without gradients, timed."""

from __future__ import annotations

import time
from contextlib import contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any

import torch

from dora_cache.backends import Entry, Ready
from dora_cache.reasons import Reason
from dora_cache.results import storable

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator
    from contextlib import AbstractContextManager

    from dora_cache.cells import Pending
    from dora_cache.facts import Reading

__all__ = ["derive", "timed"]


def derive(
    pending: Pending,
    function: Callable[[], Any],
    reading: Reading,
    relieve: Callable[[Collection[torch.device], bool], None],
    *,
    on_device: bool,
) -> tuple[Any, Entry | None]:
    """Derive a value, and make an entry of it if it can be stored.

    If the device's memory does not suffice, all goes that may be evicted there, and the value is
    derived once more. Then everything there goes, what is pinned and what compiled code reads
    included, and the value is derived as if there were no cache, and not stored. If memory does not
    suffice for that, nor would it without a cache.

    Args:
        pending: told why there is no entry.
        function: derives the value.
        reading: of the dependencies.
        relieve: evicts what is on some devices; everything there, if the second argument is true.
        on_device: whether to measure what deriving takes on a CUDA device as well.

    Returns:
        The value, and the entry or None.
    """
    devices = {tensor.device for tensor in reading.tensors}
    # No attempt is made in an exception's handler: the exception holds what it came from, and with
    # it the memory of the failed attempt.
    for everything in (False, True):
        with suppress(torch.OutOfMemoryError):
            began = Ready.begin(reading.tensors) if on_device else None
            value, cost = timed(function)
            break
        relieve(devices, everything)
    else:
        pending.unstored = Reason.OUT_OF_MEMORY
        return timed(function)[0], None
    for last in (False, True):
        with suppress(torch.OutOfMemoryError), _plainly():
            kept = storable(value, pending.facts.storages)
            break
        if last:
            pending.unstored = Reason.OUT_OF_MEMORY
            return value, None
        relieve(devices, False)  # noqa: FBT003
    if kept is None:
        pending.unstored = Reason.UNSTORABLE
        return value, None
    tensors = kept if isinstance(kept, tuple) else (kept,)
    return value, Entry(kept, pending.facts, cost, Ready.now(tensors, began))


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """Derive a value, and say how many seconds that took.

    Without autocast's own cache of weights that it has cast: it does not notice writes, and lives
    shorter than the value.
    """
    began = time.perf_counter()
    caching = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with _plainly():
            value = function()
    finally:
        torch.set_autocast_cache_enabled(caching)
    return value, time.perf_counter() - began


def _plainly() -> AbstractContextManager[object]:
    """Return a context without gradients and without inference mode; where it is so, an empty one.

    To enter an inference mode costs more than most of what is done within.
    """
    if torch.is_inference_mode_enabled():
        return _outside_inference_mode()
    return torch.no_grad() if torch.is_grad_enabled() else _NOTHING


@contextmanager
def _outside_inference_mode() -> Iterator[None]:
    with torch.inference_mode(mode=False), torch.no_grad():
        yield


_NOTHING: AbstractContextManager[object] = nullcontext()
