"""Changes of an adapter's weights."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import torch
from peft.utils.save_and_load import get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dora_cache.lab.freshness.operations.registry import operation
from dora_cache.lab.freshness.scene import quiet

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from dora_cache.lab.freshness.scene import Pick, Scene


@operation("nothing", "no operation")
def _(scene: Scene, pick: Pick) -> None:
    pass


def _optimizer(name: str, make: Callable[..., torch.optim.Optimizer], **more: Any) -> None:
    @operation("weights", name, **more)
    def _(scene: Scene, pick: Pick) -> None:
        weights = scene.weights(pick)
        if weights:
            scene.step(make(weights), weights)


_optimizer("SGD step, for-loop", lambda w: torch.optim.SGD(w, lr=0.1, foreach=False))
_optimizer("SGD step with momentum, foreach", lambda w: torch.optim.SGD(w, 0.1, 0.9, foreach=True))
_optimizer("SGD step, fused", lambda w: torch.optim.SGD(w, lr=0.1, fused=True))
_optimizer("Adam step, for-loop", lambda w: torch.optim.Adam(w, lr=0.1, foreach=False))
_optimizer("AdamW step, foreach", lambda w: torch.optim.AdamW(w, lr=0.1, foreach=True))
_optimizer("AdamW step, fused", lambda w: torch.optim.AdamW(w, lr=0.1, fused=True))
_optimizer("Adagrad step", lambda w: torch.optim.Adagrad(w, lr=0.1))
_optimizer("RMSprop step", lambda w: torch.optim.RMSprop(w, lr=0.1))
_optimizer(
    "AdamW step, capturable",
    lambda w: torch.optim.AdamW(w, lr=0.1, capturable=True),
    device="cuda",
)


class _PastTheCounter(torch.optim.Optimizer):
    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__(params, {})

    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.data.sub_(parameter.grad, alpha=0.1)


_optimizer("step of one's own optimizer, through .data", _PastTheCounter)


@operation("weights", "L-BFGS step with a closure")
def _(scene: Scene, pick: Pick) -> None:
    weights = [weight for weight in scene.weights(pick) if weight.requires_grad]
    if not weights:
        return
    optimizer = torch.optim.LBFGS(weights, lr=0.1, max_iter=2)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = scene.model(scene.ids).float().square().mean()
        if loss.requires_grad:
            loss.backward()
        return loss

    optimizer.step(closure)
    scene.model.zero_grad(set_to_none=True)


@operation("weights", "step of a compiled optimizer", repeatable=False)
def _(scene: Scene, pick: Pick) -> None:
    weights = scene.weights(pick)
    optimizer = torch.optim.Adam(weights, lr=0.1)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    with quiet():
        torch.compile(optimizer.step, backend="aot_eager")()
    scene.model.zero_grad(set_to_none=True)


@operation("weights", "in place under no_grad")
def _(scene: Scene, pick: Pick) -> None:
    with torch.no_grad():
        for weight in scene.weights(pick):
            weight.mul_(pick.factor)


@operation("weights", "in place under inference_mode")
def _(scene: Scene, pick: Pick) -> None:
    with torch.inference_mode():
        for weight in scene.weights(pick):
            weight.mul_(pick.factor)


@operation("weights", "in place through a view")
def _(scene: Scene, pick: Pick) -> None:
    with torch.no_grad():
        for weight in scene.weights(pick):
            weight.view(-1)[:2].mul_(pick.factor)


@operation("weights", "in place through detach()")
def _(scene: Scene, pick: Pick) -> None:
    for weight in scene.weights(pick):
        weight.detach().mul_(pick.factor)


@operation("weights", "in place by torch._foreach_mul_")
def _(scene: Scene, pick: Pick) -> None:
    weights: list[Tensor] = [*scene.weights(pick)]
    if weights:
        with torch.no_grad():
            torch._foreach_mul_(weights, pick.factor)


@operation("weights", "an EMA: AveragedModel.update_parameters")
def _(scene: Scene, pick: Pick) -> None:
    trained = scene.copied()
    trained.change(pick)
    average = get_ema_multi_avg_fn(0.5)
    averaged = AveragedModel(nn.Linear(1, 1), multi_avg_fn=average)
    averaged.module = scene.model  # it would be a copy
    averaged.n_averaged.fill_(1)
    averaged.update_parameters(trained.model)


@operation("weights", "copy_ from an averaged model")
def _(scene: Scene, pick: Pick) -> None:
    weights = scene.weights(pick)
    averages = [nn.Parameter(weight.detach() * pick.factor) for weight in weights]
    with torch.no_grad():
        for weight, average in zip(weights, averages, strict=True):
            weight.copy_(average)


@operation("weights", "nn.init")
def _(scene: Scene, pick: Pick) -> None:
    generator = torch.Generator().manual_seed(pick.seed)
    for weight in scene.weights(pick):
        if weight.device.type == "cpu":
            nn.init.uniform_(weight, 0.1, 0.9, generator=generator)
        else:
            nn.init.constant_(weight, 0.3)


@operation("weights", "p.data = new")
def _(scene: Scene, pick: Pick) -> None:
    for weight in scene.weights(pick):
        weight.data = weight.data * pick.factor


@operation("weights", "p.data freed, then taken anew")
def _(scene: Scene, pick: Pick) -> None:
    # Frees memory and takes it again at once, so that an address comes back.
    for weight in scene.weights(pick):
        shape, dtype = weight.shape, weight.dtype
        values = (weight.detach() * pick.factor).tolist()
        weight.data = weight.data.new_empty(0)
        weight.data = torch.tensor(values, dtype=dtype, device=scene.device).reshape(shape)


def _refill(scene: Scene, pick: Pick, *, free: bool) -> None:
    """Change weights without counting it; with ``free``, as FSDP2 does between two forwards."""
    for weight in scene.weights(pick):
        storage = weight.untyped_storage()
        kept = storage.clone()
        if free:
            storage.resize_(0)
            storage.resize_(kept.nbytes())
        with torch.no_grad(), torch.autograd.grad_mode._unsafe_preserve_version_counter(weight):
            storage.copy_(kept)
            weight.mul_(pick.factor)


# Not in the state machine, where weights may lie in shared memory: PyTorch frees that twice.
@operation("weights", "storage freed, taken anew and filled, not counted", repeatable=False)
def _(scene: Scene, pick: Pick) -> None:
    _refill(scene, pick, free=True)


@operation("weights", "written with the version counter preserved")
def _(scene: Scene, pick: Pick) -> None:
    _refill(scene, pick, free=False)


@operation("weights", "p.set_() to other memory")
def _(scene: Scene, pick: Pick) -> None:
    with torch.no_grad():
        for weight in scene.weights(pick):
            weight.set_(weight * pick.factor)  # type: ignore[call-overload]


@operation("weights", "a new Parameter")
def _(scene: Scene, pick: Pick) -> None:
    for owner, name in scene.parts(pick):
        weights: Any = owner if isinstance(owner, nn.ParameterDict) else owner._parameters
        old = weights[name]
        new = nn.Parameter(old.detach() * pick.factor, requires_grad=old.requires_grad)
        if weights is owner:
            owner[name] = new
        else:
            setattr(owner, name, new)


@operation("weights", "a new module in the adapter's place")
def _(scene: Scene, pick: Pick) -> None:
    for layer in scene.layers(pick):
        if pick.adapter in layer.lora_B and pick.kind in {None, "B"}:
            old = layer.lora_B[pick.adapter]
            if isinstance(old, nn.Linear):
                new = nn.Linear(old.in_features, old.out_features, bias=False).to(old.weight)
                new.load_state_dict({"weight": old.weight.detach() * pick.factor})
                layer.lora_B[pick.adapter] = new.eval()


@operation("weights", "torch.utils.swap_tensors")
def _(scene: Scene, pick: Pick) -> None:
    gc.collect()  # a graph in a reference cycle, of a backward pass that failed, holds its leaves
    for weight in scene.weights(pick):
        new = nn.Parameter(weight.detach() * pick.factor, requires_grad=weight.requires_grad)
        torch.utils.swap_tensors(weight, new)


@operation("weights", "load_state_dict")
def _(scene: Scene, pick: Pick) -> None:
    scene.model.load_state_dict(scene.state(pick), strict=False)


@operation("weights", "load_state_dict(assign=True)")
def _(scene: Scene, pick: Pick) -> None:
    scene.model.load_state_dict(scene.state(pick), strict=False, assign=True)


@operation("weights", "load_state_dict by swapping tensors")
def _(scene: Scene, pick: Pick) -> None:
    gc.collect()  # as above
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        scene.model.load_state_dict(scene.state(pick), strict=False)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@operation("weights", "set_peft_model_state_dict")
def _(scene: Scene, pick: Pick) -> None:
    if pick.adapter in scene.adapters:
        full = get_peft_model_state_dict(scene.model, adapter_name=pick.adapter)
        state = {name: value * pick.factor for name, value in full.items()}
        set_peft_model_state_dict(scene.model, state, adapter_name=pick.adapter)


@operation("weights", "vector_to_parameters")
def _(scene: Scene, pick: Pick) -> None:
    weights = scene.weights(pick)
    if weights and len({weight.dtype for weight in weights}) == 1:
        vector = nn.utils.parameters_to_vector(weights).detach() * pick.factor
        nn.utils.vector_to_parameters(vector, weights)


@operation("weights", "share_memory_")
def _(scene: Scene, pick: Pick) -> None:
    for weight in scene.weights(pick):
        weight.share_memory_()
        with torch.no_grad():
            weight.mul_(pick.factor)


@operation("weights", "weight_norm on a layer's lora_B", repeatable=False)
def _(scene: Scene, pick: Pick) -> list[Tensor]:
    for layer in scene.layers(pick):
        if pick.adapter in layer.lora_B:
            part = torch.nn.utils.parametrizations.weight_norm(layer.lora_B[pick.adapter])
            with torch.no_grad():
                part.parametrizations.weight.original0.mul_(pick.factor)
    found = [scene.run()]
    for layer in scene.layers(pick):
        if pick.adapter in layer.lora_B:
            with torch.no_grad():
                original = layer.lora_B[pick.adapter].parametrizations.weight.original1
                original.add_(pick.factor)
    return found


@operation("weights", "pruning of lora_A", repeatable=False)
def _(scene: Scene, pick: Pick) -> list[Tensor]:
    for layer in scene.layers(pick):
        if pick.adapter in layer.lora_A:
            prune.l1_unstructured(layer.lora_A[pick.adapter], "weight", 0.5)
    found = [scene.run()]
    for layer in scene.layers(pick):
        if pick.adapter in layer.lora_A:
            with torch.no_grad():
                layer.lora_A[pick.adapter].weight_orig.mul_(pick.factor)
    return found
