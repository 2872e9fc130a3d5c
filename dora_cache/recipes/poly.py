"""Poly (https://arxiv.org/abs/2202.13914): each task's mixture of low-rank adapters.

A batch of one task finds its mixture stored, by the task; batches of several are PEFT's, unless
``numerics="fast"``, which stores a mixture for each task and puts them together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from peft import PolyConfig
from peft.tuners.poly.layer import Linear

from dora_cache.core.decorator import cached
from dora_cache.reasons import Reason
from dora_cache.recipes.examples import BOTH, TARGETS, Example
from dora_cache.recipes.hooks import (
    LayerRecipe,
    UnusualError,
    active_in,
    check_unhooked,
    guard,
    own_parameter,
    parameter,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

__all__ = ["RECIPE"]

_INTEGERS = (torch.int64, torch.int32)


def _depends_on(layer: Any, adapter: str, *_: object) -> Iterator[object]:
    yield parameter(layer, "poly_lora_A", adapter)
    yield parameter(layer, "poly_lora_B", adapter)
    router = layer._modules["poly_router"]._modules[adapter]
    yield own_parameter(router, "module_logits")
    yield router.n_tasks
    yield router.n_splits
    yield router.n_skills
    yield layer.r[adapter]
    yield layer.in_features
    yield layer.out_features


@cached("Poly mixture", adapter="adapter", depends_on=_depends_on)
def _mixture(layer: Any, adapter: str, task: str, batch: str) -> tuple[Tensor, Tensor]:
    """Derive the factors that PEFT has for a batch of one task.

    Args:
        layer: the layer.
        adapter: the adapter.
        task: the number of the task. (A string, for a quick lookup.)
        batch: the size of the batch. The same task in a larger one may differ in the last bit.

    Returns:
        A and B, of shapes (batch, in, r) and (batch, r, out).
    """
    tasks = torch.full((int(batch),), int(task))
    weights = layer.poly_router[adapter](task_ids=tasks, input_ids=None)
    size, rank = weights.shape[0], layer.r[adapter]
    left = torch.einsum("bqs,qsdr->bqdr", (weights, layer.poly_lora_A[adapter]))
    right = torch.einsum("bqs,qsrd->bqrd", (weights, layer.poly_lora_B[adapter]))
    return (
        left.reshape(size, layer.in_features, rank),
        right.transpose(1, 2).reshape(size, rank, layer.out_features),
    )


@cached("Poly mixture", adapter="adapter", depends_on=_depends_on)
def _task(layer: Any, adapter: str, task: str) -> tuple[Tensor, Tensor]:
    """Derive a task's A and ``B / r``, of shapes (1, in, r) and (1, r, out)."""
    left, right = _mixture.__wrapped__(layer, adapter, task, "1")
    return left, right / layer.r[adapter]


def _forward(layer: Any, x: Tensor, task_ids: Any = None) -> Tensor | None:
    adapters = active_in(layer, "poly_lora_A")
    if torch.compiler.is_dynamo_compiling():
        return _by_index(layer, adapters, x, task_ids)
    tasks = _tasks(layer, adapters, x, task_ids)
    if not tasks:
        return None
    if min(tasks) != max(tasks):
        msg = "several tasks in one batch"
        raise UnusualError(msg, Reason.UNUSUAL_INPUT)
    dtype = x.dtype
    task, batch = str(tasks[0]), str(len(tasks))
    result: Tensor = layer.base_layer(x)
    for adapter in adapters:
        left, right = _mixture(layer, adapter, task, batch)
        x = x.to(left.dtype)
        result += x.bmm(left).bmm(right) / layer.r[adapter]
    return result.to(dtype)


def _forward_fast(layer: Any, x: Tensor, task_ids: Any = None) -> Tensor | None:
    adapters = active_in(layer, "poly_lora_A")
    if torch.compiler.is_dynamo_compiling():
        return _by_index(layer, adapters, x, task_ids)
    tasks = _tasks(layer, adapters, x, task_ids)
    if not tasks:
        return None
    dtype = x.dtype
    result: Tensor = layer.base_layer(x)
    for adapter in adapters:
        if min(tasks) == max(tasks):
            mixture = _task(layer, adapter, str(tasks[0]))
            left, right = (part.expand(len(tasks), -1, -1) for part in mixture)
        else:
            each = {task: _task(layer, adapter, str(task)) for task in set(tasks)}
            left, right = (torch.cat([each[task][i] for task in tasks]) for i in (0, 1))
        x = x.to(left.dtype)
        if result.dtype is left.dtype:
            result = torch.baddbmm(result, x.bmm(left), right)
        else:
            result = result + x.bmm(left).bmm(right).to(result.dtype)
    return result.to(dtype)


@cached("Poly mixtures", adapter="adapter", depends_on=_depends_on)
def _mixtures(layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
    """Derive every task's factors, as a batch of one has them: (tasks, in, r), (tasks, r, out)."""
    tasks = range(layer.poly_router[adapter].n_tasks)
    found = [_mixture.__wrapped__(layer, adapter, str(task), "1") for task in tasks]
    return torch.cat([left for left, _ in found]), torch.cat([right for _, right in found])


def _by_index(layer: Any, adapters: Any, x: Tensor, task_ids: Any) -> Tensor | None:
    """Return the output in compiled code, which cannot look at the tasks."""
    _check(layer, adapters, x, task_ids)
    dtype = x.dtype
    result: Tensor = layer.base_layer(x)
    for adapter in adapters:
        left, right = _mixtures(layer, adapter)
        x = x.to(left.dtype)
        result += x.bmm(left[task_ids]).bmm(right[task_ids]) / layer.r[adapter]
    return result.to(dtype)


def _tasks(layer: Any, adapters: Any, x: Tensor, task_ids: Any) -> list[int]:
    """Return the tasks of a batch; none if there are no adapters.

    Raises:
        UnusualError: PEFT may have something to say, or draws weights.
    """
    if not adapters:
        return []
    _check(layer, adapters, x, task_ids)
    tasks: list[int] = task_ids.tolist()
    for adapter in adapters:
        router = layer._modules["poly_router"]._modules[adapter]
        if not all(0 <= task < router.n_tasks for task in tasks):
            msg = "a task that there is not"
            raise UnusualError(msg, Reason.UNUSUAL_INPUT)
    return tasks


def _check(layer: Any, adapters: Any, x: Tensor, task_ids: Any) -> None:
    """Check what does not depend on the tasks.

    Raises:
        UnusualError: PEFT may have something to say, or draws weights.
    """
    if (
        type(task_ids) is not torch.Tensor
        or task_ids.dtype not in _INTEGERS
        or task_ids.shape != x.shape[:1]
        or x.dim() != 3  # noqa: PLR2004 - (batch, tokens, in)
        or not len(x)
    ):
        msg = "task_ids that do not fit the input"
        raise UnusualError(msg, Reason.UNUSUAL_INPUT)
    routers = layer._modules["poly_router"]._modules
    for adapter in adapters:
        router = routers[adapter]
        check_unhooked(router)
        if router.training:
            msg = "a router is in training"
            raise UnusualError(msg, Reason.TRAINING)


def _warm(layer: Any, adapter: str) -> None:
    for task in range(layer.poly_router[adapter].n_tasks):
        _mixture(layer, adapter, str(task), "1")


def _warm_fast(layer: Any, adapter: str) -> None:
    for task in range(layer.poly_router[adapter].n_tasks):
        _task(layer, adapter, str(task))


def _give_tasks(_: object, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Say that everything is the second task, as a hook before a layer's forward."""
    return args, {"task_ids": torch.ones(len(args[0]), dtype=torch.long), **kwargs}


def _prepare(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, Linear):
            module.register_forward_pre_hook(_give_tasks, with_kwargs=True)


def _config(*_: int, **more: Any) -> PolyConfig:
    return PolyConfig(
        r=8, n_tasks=4, n_skills=4, init_weights=False, target_modules=TARGETS, **more
    )


RECIPE = LayerRecipe(
    name="Poly",
    hooks={Linear: [guard(_forward, warm=_warm, keyword="task_ids")]},
    fast={Linear: [guard(_forward_fast, warm=_warm_fast, keyword="task_ids")]},
    adapters="poly_lora_A",
    relies_on={
        "peft.tuners.poly.layer:Linear.forward": "11a9c0001cc6",
        "peft.tuners.poly.router:PolyRouter.forward": "16f99defde77",
        "peft.tuners.poly.layer:PolyLayer.update_layer": "2b30b9c038c4",
    },
    examples=[
        Example("Poly", _config, prepare=_prepare, numerics=BOTH),
        Example("Poly, splits", lambda *_: _config(n_splits=4), prepare=_prepare),
    ],
)
