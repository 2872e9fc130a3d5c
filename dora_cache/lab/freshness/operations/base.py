"""Changes of base weights and of the scaling."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from peft.helpers import rescale_adapter_scale
from torch import Tensor, nn

from dora_cache.lab.freshness.operations.registry import operation
from dora_cache.lab.freshness.scene import Pick

if TYPE_CHECKING:
    from collections.abc import Callable

    from dora_cache.lab.freshness.scene import Scene


# Base weights


def _bases(scene: Scene, pick: Pick) -> list[Any]:
    return [layer.get_base_layer() for layer in scene.layers(pick)]


@operation("base weights", "base weight in place")
def _(scene: Scene, pick: Pick) -> None:
    with torch.no_grad():
        for base in _bases(scene, pick):
            base.weight.mul_(pick.factor)


@operation("base weights", "base weight .data = new")
def _(scene: Scene, pick: Pick) -> None:
    for base in _bases(scene, pick):
        base.weight.data = base.weight.data * pick.factor


@operation("base weights", "base weight: a new Parameter")
def _(scene: Scene, pick: Pick) -> None:
    for base in _bases(scene, pick):
        base.weight = nn.Parameter(base.weight.detach() * pick.factor, requires_grad=False)


@operation("base weights", "base bias in place")
def _(scene: Scene, pick: Pick) -> None:
    with torch.no_grad():
        for base in _bases(scene, pick):
            if getattr(base, "bias", None) is not None:
                base.bias.add_(pick.factor)


@operation("base weights", "fused step on base weights")
def _(scene: Scene, pick: Pick) -> None:
    weights = [base.weight for base in _bases(scene, pick)]
    scene.step(torch.optim.SGD(weights, lr=0.1, fused=True), weights)


@operation("base weights", "a new base layer")
def _(scene: Scene, pick: Pick) -> None:
    linear = scene.tuner.model.linear
    old = linear.get_base_layer()
    new = nn.Linear(old.in_features, old.out_features).to(old.weight)
    new.load_state_dict({"weight": old.weight * pick.factor, "bias": old.bias})
    linear.base_layer = new.requires_grad_(requires_grad=False).eval()


@operation("base weights", "load_state_dict of the base weights")
def _(scene: Scene, pick: Pick) -> None:
    state = scene.model.state_dict()
    new = {name: value * pick.factor for name, value in state.items() if "base_layer" in name}
    scene.model.load_state_dict(new, strict=False)


# Scaling


def _scaling(name: str, change: Callable[[Any, Pick], object]) -> None:
    @operation("scaling", name)
    def _(scene: Scene, pick: Pick) -> None:
        for layer in scene.layers(pick):
            if pick.adapter in layer.scaling:
                change(layer, pick)


_scaling("set_scale", lambda layer, pick: layer.set_scale(pick.adapter, pick.factor))
_scaling("scale_layer", lambda layer, pick: layer.scale_layer(pick.factor))
_scaling("unscale_layer", lambda layer, _: layer.unscale_layer())
_scaling("unscale_layer by a factor", lambda layer, pick: layer.unscale_layer(pick.factor))
_scaling("scaling dict by hand", lambda layer, pick: layer.scaling.update({pick.adapter: 0.7}))


@operation("scaling", "scaling as a tensor, and written in place")
def _(scene: Scene, pick: Pick) -> list[Tensor]:
    for layer in scene.layers(pick):
        if pick.adapter in layer.scaling:
            layer.scaling[pick.adapter] = torch.tensor(1.5, device=scene.device)
    found = [scene.run()]
    for layer in scene.layers(pick):
        if pick.adapter in layer.scaling:
            layer.scaling[pick.adapter].mul_(pick.factor)
    return found


@operation("scaling", "rescale_adapter_scale")
def _(scene: Scene, pick: Pick) -> list[Tensor]:
    layers = scene.layers(Pick())
    if any(isinstance(g, Tensor) for layer in layers for g in layer.scaling.values()):
        return []  # PEFT refuses
    with rescale_adapter_scale(scene.model, pick.factor):
        return [scene.run(), scene.run()]
