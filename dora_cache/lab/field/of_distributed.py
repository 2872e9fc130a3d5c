"""Set-ups of ``torch.distributed``, in a process group of this process alone."""

from __future__ import annotations

import warnings
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from peft import get_peft_model
from torch import distributed

from dora_cache.lab.field.of_transformers import config, llama, running
from dora_cache.lab.field.setup import Built, SetUp, moved_magnitudes
from dora_cache.reasons import Reason

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["SETUPS"]

_groups: list[object] = []  # models of set-ups that use the process group


def _cannot() -> str | None:
    if not distributed.is_available():
        return "PyTorch is built without torch.distributed"
    if distributed.is_initialized() and not _groups:
        return "there is a process group already"
    return None


def _leave(token: object) -> None:
    _groups.remove(token)
    if not _groups:
        distributed.destroy_process_group()


def _build(wrap: Callable[[Any], Any], dora: bool, width: int) -> Built:  # noqa: FBT001
    """Return a model that is distributed by ``wrap``, which returns what runs."""
    token = object()
    if not _groups:
        store = distributed.HashStore()  # type: ignore[attr-defined]
        distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    _groups.append(token)
    try:
        model = moved_magnitudes(get_peft_model(llama(width), config(dora)).eval())
        built = running(wrap(model))
    except BaseException:
        _leave(token)
        raise
    built.undo.callback(_leave, token)
    return built


def _ddp(model: Any) -> Any:
    return torch.nn.parallel.DistributedDataParallel(model).eval()


def _fsdp2(model: Any, *, reshard: bool) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    for block in model.get_base_model().model.layers:
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
    return fully_shard(model, mesh=mesh, reshard_after_forward=reshard)


def _fsdp1(model: Any, *, use_orig_params: bool) -> Any:
    from torch.distributed.fsdp import FullyShardedDataParallel

    if not use_orig_params:  # it takes no other mixture
        model.requires_grad_(False)  # noqa: FBT003
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it does not shard in a group of one, and is deprecated
        return FullyShardedDataParallel(
            model, use_orig_params=use_orig_params, device_id=torch.device("cpu")
        ).eval()


def _setup(name: str, wrap: Callable[[Any], Any], **others: Any) -> SetUp:
    return SetUp(name, "torch.distributed", partial(_build, wrap), cannot=_cannot, **others)


_FLAT = "views of the flat parameter are made anew for each forward"

SETUPS = [
    _setup("DDP", _ddp),
    _setup("FSDP2", partial(_fsdp2, reshard=True)),
    _setup("FSDP2, not resharding", partial(_fsdp2, reshard=False)),
    _setup("FSDP1", partial(_fsdp1, use_orig_params=True), reason=Reason.REFILLED, note=_FLAT),
    _setup(
        "FSDP1, flat parameters",
        partial(_fsdp1, use_orig_params=False),
        reason=Reason.REFILLED,
        note=_FLAT,
    ),
]
