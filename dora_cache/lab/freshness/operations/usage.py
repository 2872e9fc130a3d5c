"""Ways to use a model: dtypes, devices, autocast, modes, gradients, copies."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.utils.checkpoint import checkpoint

from dora_cache.lab.freshness.operations.registry import operation

if TYPE_CHECKING:
    from torch import Tensor

    from dora_cache.lab.freshness.scene import Pick, Scene


# dtype, device, autocast


def _move(dtype: torch.dtype, name: str) -> None:
    @operation("dtype and device", name)
    def _(scene: Scene, pick: Pick) -> None:
        scene.model.to(dtype)


_move(torch.bfloat16, "to bfloat16")
_move(torch.float64, "to float64")
_move(torch.float32, "to float32")


@operation("dtype and device", "to float64 and back")
def _(scene: Scene, pick: Pick) -> list[Tensor]:
    dtype = next(scene.tuner.model.parameters()).dtype
    scene.model.double()
    found = [scene.run()]
    scene.model.to(dtype)
    return found


@operation("dtype and device", "one layer to bfloat16 and back")
def _(scene: Scene, pick: Pick) -> None:
    layer = scene.tuner.model.linear
    dtype = layer.get_base_layer().weight.dtype
    layer.to(torch.bfloat16)
    layer.to(dtype)


@operation("dtype and device", "to the CPU and back, with a change there", device="cuda")
def _(scene: Scene, pick: Pick) -> None:
    scene.model.to("cpu")
    with torch.no_grad():
        for weight in scene.weights(pick):
            weight.mul_(pick.factor)
    scene.model.to(scene.device)


def _autocast(dtype: torch.dtype, name: str) -> None:
    @operation("dtype and device", name)
    def _(scene: Scene, pick: Pick) -> list[Tensor]:
        with torch.autocast(scene.device.type, dtype=dtype), torch.no_grad():
            # The embedding's output keeps its dtype: there, no coarser rounding hides a difference.
            return [scene.run(), scene.run(), scene.tuner.model.embedding(scene.ids)]


_autocast(torch.bfloat16, "a forward under autocast, bfloat16")
_autocast(torch.float16, "a forward under autocast, float16")


@operation("dtype and device", "another default dtype")
def _(scene: Scene, pick: Pick) -> list[Tensor]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return [scene.run()]
    finally:
        torch.set_default_dtype(before)


# Modes


def _train(scene: Scene, pick: Pick, *, fused: bool) -> None:
    weights = [weight for weight in scene.model.parameters() if weight.requires_grad]
    if not weights:
        return
    optimizer = torch.optim.SGD(weights, lr=0.1, fused=fused)
    torch.manual_seed(pick.seed)
    loss = scene.model(scene.ids).float().square().mean()
    if loss.requires_grad:
        loss.backward()
        optimizer.step()
    scene.model.zero_grad(set_to_none=True)


@operation("modes", "train(), a step, eval()")
def _(scene: Scene, pick: Pick) -> None:
    scene.model.train()
    _train(scene, pick, fused=False)
    scene.model.eval()


@operation("modes", "train(), a fused step, train(False)")
def _(scene: Scene, pick: Pick) -> None:
    scene.model.train()
    _train(scene, pick, fused=True)
    scene.model.train(mode=False)


@operation("modes", "a step without leaving eval mode")
def _(scene: Scene, pick: Pick) -> None:
    _train(scene, pick, fused=True)


@operation("modes", "training the other adapter in a loop")
def _(scene: Scene, pick: Pick) -> list[Tensor]:
    if pick.other not in scene.adapters:
        return []
    before = list(scene.tuner.active_adapters)
    found = []
    for _ in range(2):
        scene.activate(pick.other)
        scene.model.train()
        _train(scene, pick, fused=True)
        scene.model.eval()
        if set(before) <= set(scene.adapters):
            scene.activate(*before)
            found.append(scene.run())
    return found


@operation("modes", ".training by hand on every module")
def _(scene: Scene, pick: Pick) -> None:
    for mode in (True, False):
        for module in scene.model.modules():
            module.training = mode
        if mode:
            _train(scene, pick, fused=True)


def _copy_in_silence(scene: Scene, pick: Pick) -> None:
    # As libraries copy an old policy or an average: not to the adapter that trains.
    for weight in scene.weights(pick):
        weight.data.copy_(weight.data * pick.factor)


@operation("modes", "train(), p.data.copy_() to an adapter that does not train, eval()")
def _(scene: Scene, pick: Pick) -> None:
    before = list(scene.tuner.active_adapters)
    if pick.other in scene.adapters:
        scene.activate(pick.other)
    scene.model.train()
    _train(scene, pick, fused=True)
    _copy_in_silence(scene, pick)
    scene.model.eval()
    scene.activate(*before)


@operation("modes", ".training by hand on layers, and p.data.copy_() in between")
def _(scene: Scene, pick: Pick) -> None:
    for layer in scene.layers(pick):
        layer.training = True
    _copy_in_silence(scene, pick)
    for layer in scene.layers(pick):
        layer.training = False


@operation("modes", "train() on containers in layers, p.data.copy_(), eval()")
def _(scene: Scene, pick: Pick) -> None:
    containers = [
        getattr(layer, name) for layer in scene.layers(pick) for name in layer.adapter_layer_names
    ]
    for container in containers:
        container.train()
    _copy_in_silence(scene, pick)
    for container in containers:
        container.eval()


@operation("modes", "train() on one layer, a forward, eval()")
def _(scene: Scene, pick: Pick) -> list[Tensor]:
    for layer in scene.layers(pick):
        layer.train()
    torch.manual_seed(pick.seed)
    found = [scene.run()]
    _train(scene, pick, fused=True)
    scene.model.eval()
    return found


@operation("modes", "a forward in training mode")
def _(scene: Scene, pick: Pick) -> list[Tensor]:
    scene.model.train()
    torch.manual_seed(pick.seed)
    found = [scene.run()]
    scene.model.eval()
    return found


@operation("modes", "a forward under inference_mode")
def _(scene: Scene, pick: Pick) -> list[Tensor]:
    with torch.inference_mode():
        return [scene.model(scene.ids).clone(), scene.model(scene.ids).clone()]


# Gradients


def _gradients(scene: Scene, result: Tensor) -> list[Tensor | None]:
    if not result.requires_grad:
        return [result]
    result.float().square().sum().backward()
    found = [None if p.grad is None else p.grad.clone() for p in scene.model.parameters()]
    scene.model.zero_grad(set_to_none=True)
    return [result.detach(), *found]


@operation("gradients", "backward in eval mode")
def _(scene: Scene, pick: Pick) -> list[Tensor | None]:
    return _gradients(scene, scene.model(scene.ids))


@operation("gradients", "backward in eval mode, every parameter trainable")
def _(scene: Scene, pick: Pick) -> list[Tensor | None]:
    wanted = [(weight, weight.requires_grad) for weight in scene.model.parameters()]
    scene.model.requires_grad_(requires_grad=True)
    found = _gradients(scene, scene.model(scene.ids))
    for weight, before in wanted:
        weight.requires_grad_(before)
    return found


@operation("gradients", "backward after a forward under inference_mode")
def _(scene: Scene, pick: Pick) -> list[Tensor | None]:
    with torch.inference_mode():
        scene.model(scene.ids)
    return _gradients(scene, scene.model(scene.ids))


@operation("gradients", "backward twice through one graph")
def _(scene: Scene, pick: Pick) -> list[Tensor | None]:
    result = scene.model(scene.ids)
    if not result.requires_grad:
        return [result]
    loss = result.float().square().sum()
    loss.backward(retain_graph=True)
    return _gradients(scene, result)


@operation("gradients", "gradient checkpointing")
def _(scene: Scene, pick: Pick) -> list[Tensor | None]:
    found: list[Tensor | None] = []
    for cold in (False, True):
        if cold:  # nothing derived before holds any more
            with torch.no_grad():
                for weight in scene.weights(pick):
                    weight.mul_(pick.factor)
        for reentrant in (False, True):
            # Reentrant checkpoints need an input with a gradient: start from the embeddings.
            model = scene.tuner.model
            x = model.embedding(scene.ids).unflatten(-1, (3, 3)).detach().requires_grad_()
            y = checkpoint(model.conv, x, use_reentrant=reentrant)
            z = checkpoint(model.linear, torch.tanh(y.flatten(1)), use_reentrant=reentrant)
            found += _gradients(scene, z)
    return found


@operation("gradients", "no_grad inside, gradients outside")
def _(scene: Scene, pick: Pick) -> list[Tensor | None]:
    first = scene.run()
    return [first, *_gradients(scene, scene.model(scene.ids)), scene.run()]


# Copies


@operation("copies", "deepcopy, and a change of the copy")
def _(scene: Scene, pick: Pick) -> list[Tensor]:
    other = scene.copied()
    found = [other.run()]
    other.change(pick)
    return [*found, other.run(), scene.run()]


@operation("copies", "deepcopy, and a change of the original")
def _(scene: Scene, pick: Pick) -> list[Tensor]:
    other = scene.copied()
    scene.change(pick)
    return [other.run(), scene.run()]


@operation("copies", "saved and loaded, and a change of the copy")
def _(scene: Scene, pick: Pick) -> list[Tensor]:
    other = scene.unpickled()
    found = [other.run()]
    other.change(pick)
    return [*found, other.run(), scene.run()]


@operation("copies", "to a deep copy in another dtype")
def _(scene: Scene, pick: Pick) -> list[Tensor]:
    other = scene.copied()
    other.model.double()
    return [other.run(), scene.run()]
