"""Models to measure, made from one another without copying a weight."""

from __future__ import annotations

import copy
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from peft import PeftModel

__all__ = ["plain_lora", "random_dora", "twin", "write_adapter"]

M = TypeVar("M", bound=nn.Module)

_DEFAULT_RANK = 8
_SHAKE = 0.05


def twin(model: M) -> M:
    """Return a model with modules of its own and the very same parameters and buffers.

    What one of the two is wrapped in, cached in or attached to does not concern the other; a write
    to a weight concerns both.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def plain_lora(model: PeftModel, adapters: Sequence[str]) -> PeftModel:
    """Return the base model of ``model`` with fresh plain LoRA adapters in the others' place.

    They have the ranks, dtypes and target modules of the originals and random weights. An original
    that is no LoRA or DoRA adapter is replaced by one on the same target modules, of its rank ``r``
    or 8.

    Args:
        model: stays as it is; base weights are shared with it.
        adapters: names of those to replace.

    Returns:
        A new model in eval mode, with adapters of the same names.
    """
    from peft import LoraConfig, get_peft_model

    base = twin(model).unload()
    configs = []
    for name in adapters:
        config = copy.deepcopy(model.peft_config[name])
        if isinstance(config, LoraConfig):
            config.use_dora = False
            config.init_lora_weights = False
            config.modules_to_save = None
        else:
            config = LoraConfig(
                r=getattr(config, "r", None) or _DEFAULT_RANK,
                target_modules=getattr(config, "target_modules", None) or "all-linear",
                task_type=config.task_type,
                init_lora_weights=False,
            )
        configs.append(config)
    with _seeded(0):
        wrapped = get_peft_model(base, configs[0], adapter_name=adapters[0])
        for name, config in zip(adapters[1:], configs[1:], strict=True):
            wrapped.add_adapter(name, config)
    for name in adapters:
        _cast(wrapped, name, _dtype(model, name))
    return wrapped.eval()


def random_dora(
    base: nn.Module,
    adapters: Sequence[str],
    *,
    rank: int = _DEFAULT_RANK,
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> PeftModel:
    """Wrap a Transformers model with random DoRA adapters on all its linear layers.

    Args:
        base: its modules are wrapped in place.
        adapters: one adapter is made for each of these names.
        rank: of every adapter.
        dtype: of the adapters' weights; by default what PEFT makes of them, which is float32 even
            where the model's are of half precision.
        seed: of their weights; the caller's random state is left as it was.

    Returns:
        The wrapped model, in eval mode.
    """
    from peft import LoraConfig, get_peft_model

    def config() -> LoraConfig:
        return LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            target_modules="all-linear",
            use_dora=True,
            init_lora_weights=False,
            task_type="CAUSAL_LM",
        )

    with _seeded(seed):
        wrapped = get_peft_model(base, config(), adapter_name=adapters[0])
        for name in adapters[1:]:
            wrapped.add_adapter(name, config())
        _shake_magnitudes(wrapped)
    if dtype is not None:
        for name in adapters:
            _cast(wrapped, name, dtype)
    return wrapped.eval()


@torch.no_grad()
def write_adapter(
    model: Any,
    folder: Path,
    *,
    rank: int = _DEFAULT_RANK,
    dora: bool = False,
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> None:
    """Write a random adapter on all linear layers, as PEFT's ``save_pretrained`` would.

    That is done without a PEFT model, which takes longer to make than the numbers do.

    Args:
        model: a Transformers model without adapters; it is only looked at.
        folder: is made.
        rank: of the adapter.
        dora: whether it has magnitudes; they are not those that PEFT begins with.
        dtype: of the weights; by default the model's.
        seed: of the weights.

    Raises:
        ValueError: the model has no ``nn.Linear`` other than its output layer.
    """
    from peft import LoraConfig
    from safetensors.torch import save_file

    last = model.get_output_embeddings()
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not last
    }
    if not layers:
        raise ValueError("the model has no linear layers to put adapters on")
    generator = torch.Generator(model.device).manual_seed(seed)
    tensors = {}

    def save(name: str, tensor: torch.Tensor) -> None:
        tensors[f"base_model.model.{name}"] = tensor.to("cpu", dtype or model.dtype)

    def uniform(*shape: int) -> torch.Tensor:
        """Return numbers that keep the size of what they are multiplied with, or make it less."""
        bound = shape[1] ** -0.5
        found = torch.empty(shape, device=model.device)
        return found.uniform_(-bound, bound, generator=generator)

    for name, module in layers.items():
        save(f"{name}.lora_A.weight", uniform(rank, module.in_features))
        save(f"{name}.lora_B.weight", uniform(module.out_features, rank))
        if dora:
            norms = torch.linalg.vector_norm(module.weight, dim=1, dtype=torch.float32)
            shake = torch.randn(norms.shape, device=norms.device, generator=generator)
            save(f"{name}.lora_magnitude_vector", norms * (1 + _SHAKE * shake))
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=sorted({name.rpartition(".")[2] for name in layers}),
        use_dora=dora,
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


@torch.no_grad()
def _shake_magnitudes(model: nn.Module) -> None:
    """Move the magnitudes as training would: PEFT makes them such that every scale is one."""
    for name, parameter in model.named_parameters():
        if "lora_magnitude_vector" in name:
            parameter.mul_(1 + _SHAKE * torch.randn(parameter.shape).to(parameter))


def _weights(model: nn.Module, adapter: str) -> Iterator[nn.Parameter]:
    """Yield an adapter's weights: PEFT names the adapter in their names."""
    for name, parameter in model.named_parameters():
        if adapter in name.split("."):
            yield parameter


def _dtype(model: nn.Module, adapter: str) -> torch.dtype:
    return next(_weights(model, adapter)).dtype


def _cast(model: nn.Module, adapter: str, dtype: torch.dtype) -> None:
    for parameter in _weights(model, adapter):
        parameter.data = parameter.data.to(dtype)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        yield
