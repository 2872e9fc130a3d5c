"""Set-ups of HQQ."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from dora_cache.lab.field.of_bitsandbytes import quantized
from dora_cache.lab.field.quantized import adapted
from dora_cache.lab.field.setup import Built, SetUp
from dora_cache.reasons import Reason

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

__all__ = ["SETUPS", "in_hqq"]


def in_hqq(layer: nn.Linear, bits: int = 4, **settings: Any) -> nn.Module:
    """Return a linear layer quantized by HQQ, which computes in the layer's dtype.

    Args:
        layer: its weights are taken away.
        bits: for each weight.
        **settings: of ``BaseQuantizeConfig``.
    """
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    made: nn.Module = HQQLinear(
        layer,
        BaseQuantizeConfig(nbits=bits, group_size=32, **settings),
        compute_dtype=layer.weight.dtype,
        device=str(layer.weight.device),
    )
    return made


def _build(bits: int, dtype: torch.dtype) -> Callable[[bool, int], Built]:
    def build(dora: bool, width: int) -> Built:  # noqa: FBT001
        model = quantized(width, lambda layer: in_hqq(layer.to(dtype), bits)).to(dtype)
        return adapted(model, dora)

    return build


SETUPS = [
    *(SetUp(f"{bits} bit", "hqq", _build(bits, torch.bfloat16)) for bits in (8, 4, 2)),
    SetUp(
        "4 bit, computing in float32",
        "hqq",
        _build(4, torch.float32),
        Reason.UNVERSIONED,
        note="HQQ makes the zero points under inference mode, and converts them to other dtypes",
    ),
]
