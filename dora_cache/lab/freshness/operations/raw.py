"""Writes that PyTorch does not notice."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dora_cache.lab.freshness.operations.registry import RAW, operation

if TYPE_CHECKING:
    from torch import Tensor

    from dora_cache.lab.freshness.scene import Pick, Scene


@operation("raw aliases", "p.data.mul_()", into=RAW)
def _(scene: Scene, pick: Pick) -> None:
    for weight in scene.weights(pick):
        weight.data.mul_(pick.factor)


@operation("raw aliases", "p.data.copy_()", into=RAW)
def _(scene: Scene, pick: Pick) -> None:
    for weight in scene.weights(pick):
        weight.data.copy_(weight.data * pick.factor)


@operation("raw aliases", "two elements exchanged through p.data", into=RAW)
def _(scene: Scene, pick: Pick) -> None:
    for weight in scene.weights(pick):
        flat = weight.data.view(-1)
        flat[:2] = flat[:2].flip(0).clone()


@operation("raw aliases", "a numpy array of the same memory", into=RAW)
def _(scene: Scene, pick: Pick) -> None:
    for weight in scene.weights(pick):
        if weight.device.type == "cpu":
            memory: Any = weight.detach().view(torch.uint8).numpy()
            memory[...] = (weight.detach() * pick.factor).view(torch.uint8).numpy()
        else:
            weight.data.mul_(pick.factor)


@operation("raw aliases", "the storage itself", into=RAW)
def _(scene: Scene, pick: Pick) -> None:
    for weight in scene.weights(pick):
        new = (weight.detach() * pick.factor).contiguous().untyped_storage()
        weight.untyped_storage().copy_(new)


@operation("raw aliases", "a second vector_to_parameters of one vector", into=RAW)
def _(scene: Scene, pick: Pick) -> list[Tensor]:
    weights = scene.weights(pick)
    if not weights or len({weight.dtype for weight in weights}) > 1:
        return []
    vector = nn.utils.parameters_to_vector(weights).detach().clone()
    nn.utils.vector_to_parameters(vector, weights)
    found = [scene.run()]
    vector.mul_(pick.factor)
    return found


@operation("raw aliases", "torch._foreach_lerp_, not counted on CUDA", into=RAW, device="cuda")
def _(scene: Scene, pick: Pick) -> None:
    weights: list[Tensor] = [*scene.weights(pick)]
    with torch.no_grad():
        torch._foreach_lerp_(weights, [weight * pick.factor for weight in weights], 0.5)
