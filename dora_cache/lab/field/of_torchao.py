"""Set-ups of torchao: base weights that are tensors which wrap others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from dora_cache.lab.field.quantized import adapted, loaded, no_cuda
from dora_cache.lab.field.setup import Built, SetUp

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["SETUPS", "quantized"]

_INT4: Any = getattr(torch, "int4")  # noqa: B009 - the stubs lack it


def quantized(width: int, settings: Any) -> Any:
    """Return a small model whose projections are quantized, as transformers loads it."""
    from transformers import TorchAoConfig

    return loaded(width, quantization_config=TorchAoConfig(settings))


def _setup(name: str, make: Callable[[Any], Any], **more: Any) -> SetUp:
    def build(dora: bool, width: int) -> Built:  # noqa: FBT001
        import torchao.quantization

        return adapted(quantized(width, make(torchao.quantization)), dora)

    return SetUp(name, "torchao", build, **more)


def _on_cuda(make: Callable[[Any], Any]) -> Callable[[bool, int], Built]:
    def build(dora: bool, width: int) -> Built:  # noqa: FBT001
        import torchao.quantization
        from transformers import TorchAoConfig

        model = loaded(
            max(width, 256),
            quantization_config=TorchAoConfig(make(torchao.quantization)),
            dtype=torch.bfloat16,
            device_map="cuda",
        )
        return adapted(model, dora)

    return build


SETUPS = [
    _setup("int8 weights", lambda of: of.Int8WeightOnlyConfig()),
    _setup("int8 weights and activations", lambda of: of.Int8DynamicActivationInt8WeightConfig()),
    _setup(
        "4-bit weights (intx)",
        lambda of: of.IntxWeightOnlyConfig(weight_dtype=_INT4, granularity=of.PerGroup(32)),
    ),
    _setup(
        "4-bit weights, int8 activations",
        lambda of: of.Int8DynamicActivationIntxWeightConfig(
            weight_dtype=_INT4, weight_granularity=of.PerGroup(32)
        ),
    ),
    _setup("fp8 weights", lambda of: of.Float8WeightOnlyConfig()),
    SetUp(
        "fp8 weights and activations",
        "torchao",
        _on_cuda(lambda of: of.Float8DynamicActivationFloat8WeightConfig()),
        cannot=no_cuda,
        note="compute capability 8.9 or later",
    ),
]
