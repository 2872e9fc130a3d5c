"""Storages that are freed and filled again while version counters stay as they were.

FSDP does this with each unsharded parameter: the tensor, its version and its storage remain, and
the allocator often gives the same address again. Nothing that a tensor shows would differ. So the
two operations that make it possible are followed, and what they have touched is of unknown content.

FSDP2 fills an unsharded parameter from this process's shard and those of the others. So its
all-gathers are followed as well: while the shard is the same as at the last one, so is the content.
That a shard was written to in another process alone does not show here; the audit finds it.

Processes need not decide alike: FSDP's hooks run the all-gathers at the modules' boundaries whether
or not a call hits between them, and deriving from unsharded parameters, plain tensors, runs none.
"""

from __future__ import annotations

import functools
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dora_cache.core.refilled import (
    Source,
    fill_begins,
    filled,
    is_filling,
    is_refilled,
    mark_refilled,
    renew_contents,
)
from dora_cache.lifecycle.followers import Followers, wrap

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from contextlib import ExitStack

    from dora_cache.core.engine import Engine

__all__ = ["follow_refills"]

_Preserving: Any = torch.autograd.grad_mode._unsafe_preserve_version_counter
_resize: Callable[..., Any] = torch.UntypedStorage.resize_
_exit: Callable[..., Any] = _Preserving.__exit__
_GATHERING = "torch.distributed.fsdp._fully_shard._fsdp_param_group"
_gathering: list[type] = []  # the class that is followed, once it is
_following: list[bool] = []  # something, once the two operations are


def follow_refills(cache: Engine) -> None:
    """Use no storage whose content is not known, until the cache detaches."""
    _followers.add(cache)


def _begin(undo: ExitStack) -> None:
    setattr(torch.UntypedStorage, "resize_", _resizing)  # noqa: B010 - typed as a method
    undo.callback(_restore)
    _Preserving.__exit__ = _preserving
    undo.callback(setattr, _Preserving, "__exit__", _exit)
    if not _following:  # neither refills, nor writes to what they read
        renew_contents()
        _following.append(True)
        undo.callback(_following.clear)
    group = getattr(sys.modules.get(_GATHERING), "FSDPParamGroup", None)
    if group is not None and not _gathering:
        _gathering.append(group)
        undo.callback(_gathering.clear)
        wrap(undo, group, "unshard", _unsharding)
        wrap(undo, group, "wait_for_unshard", _waiting)


_followers = Followers(_begin)


def _restore() -> None:
    # The method is inherited from the C type, so that deleting the override brings it back.
    if vars(torch.UntypedStorage).get("resize_") is _resizing:
        del torch.UntypedStorage.resize_


@functools.wraps(_resize)
def _resizing(self: torch.UntypedStorage, size: int) -> Any:
    try:
        return _resize(self, size)
    finally:
        _refilled([self])


@functools.wraps(_exit)
def _preserving(self: Any, *args: Any) -> Any:
    try:
        return _exit(self, *args)
    finally:
        _refilled(self.tensors)


def _refilled(tensors: Iterable[Tensor | torch.UntypedStorage]) -> None:
    new = []
    for one in tensors:
        try:
            if mark_refilled(one):
                new.append(one)
        except (RuntimeError, NotImplementedError):  # no storage: nothing is derived from it
            continue
    if new:  # what was marked before has nothing derived from it that could be used
        for cache in _followers:
            cache.touched(new)
        if not _gathering and _GATHERING in sys.modules:
            _followers.again()


def _unsharding(original: Callable[..., Any]) -> Callable[..., Any]:
    """Follow the start of an all-gather, which reads the shards."""

    @functools.wraps(original)
    def unshard(self: Any, *args: Any, **kwargs: Any) -> Any:
        begins = _gathering and not _is_begun(self)
        sources = [_source(parameter) for parameter in self.fsdp_params] if begins else []
        found = original(self, *args, **kwargs)
        if begins and _is_begun(self):  # else the parameters are unsharded already
            fill_begins(self, sources)
        return found

    return unshard


def _waiting(original: Callable[..., Any]) -> Callable[..., Any]:
    """Follow the end of an all-gather, which fills the unsharded parameters.

    In a group of one process it reads the shards only then.
    """

    @functools.wraps(original)
    def wait_for_unshard(self: Any, *args: Any, **kwargs: Any) -> Any:
        ends = _gathering and _is_begun(self) and is_filling(self)
        if ends:
            fill_begins(self, [_source(parameter) for parameter in self.fsdp_params])
        found = original(self, *args, **kwargs)
        if ends:
            with suppress(AttributeError, RuntimeError):  # then the contents are unknown
                filled(self, [parameter._unsharded_param for parameter in self.fsdp_params])
        return found

    return wait_for_unshard


def _is_begun(group: Any) -> bool:
    """Whether an all-gather has begun that has not been waited for."""
    return getattr(group, "_all_gather_result", None) is not None


def _source(parameter: Any) -> Source | None:
    """Return what FSDP2 fills an unsharded parameter from; None if it is more than the shards.

    That is so where tensors have an all-gather of their own, as those of 8-bit training have; and
    with resharding to a smaller group, where shards of the unsharded parameter itself are gathered.
    """
    try:
        whole, flat = parameter.sharded_param, parameter._sharded_param_data
        local = whole._local_tensor
        if (
            parameter.sharded_state.name != "SHARDED"
            or parameter.is_dtensor
            or type(flat) is not Tensor
            or type(local) not in {Tensor, nn.Parameter}
        ):
            return None
        # Operations on a DTensor count its own version, those on its local tensor that one's.
        source = Source([flat, local], id(whole), whole._version)
    except (AttributeError, RuntimeError, NotImplementedError):
        return None
    # One storage, of known content: FSDP2 keeps the flat tensor and DTensor's over the same memory.
    return None if len(source.storages) != 1 or any(map(is_refilled, source.storages)) else source
