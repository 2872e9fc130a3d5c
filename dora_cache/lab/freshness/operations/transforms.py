"""Those who follow the operations of a model, or replace its weights for one call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dora_cache.lab.freshness.operations.registry import operation
from dora_cache.lab.freshness.scene import Pick, quiet

if TYPE_CHECKING:
    from torch import Tensor

    from dora_cache.lab.freshness.scene import Scene


@operation("transforms", "torch.func.functional_call with other weights")
def _(scene: Scene, pick: Pick) -> list[Tensor]:
    state = scene.state(pick)
    with torch.no_grad():
        other: Tensor = torch.func.functional_call(scene.model, state, (scene.ids,))
    return [other, scene.run()]


@operation("transforms", "torch.func.grad over functional_call")
def _(scene: Scene, pick: Pick) -> list[Tensor]:
    state = {name: value.float() for name, value in scene.state(pick).items()}
    dtypes = {name: scene.model.get_parameter(name).dtype for name in state}

    def loss(state: dict[str, Tensor]) -> Tensor:
        cast = {name: value.to(dtypes[name]) for name, value in state.items()}
        result: Tensor = torch.func.functional_call(scene.model, cast, (scene.ids,))
        return result.float().square().sum()

    return [*torch.func.grad(loss)(state).values()] if state else []


@operation("transforms", "torch.vmap over the input")
def _(scene: Scene, pick: Pick) -> list[Tensor]:
    linear = scene.tuner.model.linear
    weight = linear.get_base_layer().weight
    x = torch.linspace(-1, 1, 48, device=scene.device).reshape(4, 12).to(weight.dtype)
    with torch.no_grad():
        return [torch.vmap(linear)(x)]


@operation("transforms", "forward-mode differentiation")
def _(scene: Scene, pick: Pick) -> list[Tensor]:
    linear = scene.tuner.model.linear
    weight = linear.get_base_layer().weight
    x = torch.linspace(-1, 1, 12, device=scene.device).reshape(1, 12).to(weight.dtype)
    return list(torch.func.jvp(linear, (x,), (torch.ones_like(x),)))


@operation("transforms", "torch.jit.trace, and a change of the weights", repeatable=False)
def _(scene: Scene, pick: Pick) -> list[Tensor]:
    with quiet(), torch.no_grad():
        traced = torch.jit.trace(scene.tuner.model, (scene.ids,), check_trace=False)
    before = traced(scene.ids)
    scene.change(pick)
    with torch.no_grad():
        return [before.detach(), traced(scene.ids)]


@operation("transforms", "torch.export, and a change of the weights", repeatable=False)
def _(scene: Scene, pick: Pick) -> list[Tensor]:
    linear = scene.tuner.model.linear
    x = torch.ones(2, 12, device=scene.device, dtype=linear.get_base_layer().weight.dtype)
    with quiet(), torch.no_grad():
        program = torch.export.export(linear, (x,), strict=False).module()
        before = program(x)
        for name, parameter in program.named_parameters():
            if f".{pick.adapter}" in name:
                parameter.mul_(pick.factor)
        return [before, program(x)]


@operation("transforms", "torch.compile, and a change of the weights", repeatable=False)
def _(scene: Scene, pick: Pick) -> list[Tensor]:
    compiled = torch.compile(scene.tuner.model, backend="eager")
    with quiet(), torch.no_grad():
        before = compiled(scene.ids)
        weights = scene.weights(pick)
        scene.step(torch.optim.SGD(weights, lr=0.1, fused=True), weights)
        return [before, compiled(scene.ids)]


@operation("transforms", "make_fx, and a change of the weights", repeatable=False)
def _(scene: Scene, pick: Pick) -> list[Tensor]:
    from torch.fx.experimental.proxy_tensor import make_fx

    linear = scene.tuner.model.linear
    x = torch.ones(2, 12, device=scene.device, dtype=linear.get_base_layer().weight.dtype)
    with quiet(), torch.no_grad():
        graph = make_fx(linear)(x)
        before = graph(x)
        scene.change(Pick(pick.adapter, layer="linear", factor=pick.factor))
        return [before, graph(x)]


@operation("transforms", "a forward hook on lora_B")
def _(scene: Scene, pick: Pick) -> list[Tensor]:
    handles = [
        layer.lora_B[pick.adapter].register_forward_hook(lambda _, __, result: result * 2)
        for layer in scene.layers(pick)
        if pick.adapter in layer.lora_B
    ]
    found = [scene.run(), scene.run()]
    for handle in handles:
        handle.remove()
    return found


@operation("transforms", "weights built under inference_mode", ends=True)
def _(scene: Scene, pick: Pick) -> list[Tensor]:
    with torch.inference_mode():
        for owner, name in scene.parts(pick):
            parts: Any = owner if isinstance(owner, nn.ParameterDict) else owner._parameters
            parts[name] = nn.Parameter(parts[name] * pick.factor, requires_grad=False)
        found = [scene.model(scene.ids).clone()]
        for weight in scene.weights(pick):
            weight.mul_(pick.factor)
        return [*found, scene.model(scene.ids).clone()]
