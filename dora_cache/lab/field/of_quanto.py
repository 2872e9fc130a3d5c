"""Set-ups of optimum-quanto."""

from __future__ import annotations

from typing import Any

from dora_cache.lab.field.of_transformers import llama
from dora_cache.lab.field.quantized import adapted, loaded
from dora_cache.lab.field.setup import Built, SetUp

__all__ = ["SETUPS", "quantized"]


def quantized(width: int, kind: str) -> Any:
    """Return a small model whose linear layers have weights of a type of quanto's."""
    import optimum.quanto

    model = llama(width)
    optimum.quanto.quantize(model, weights=getattr(optimum.quanto, kind))
    optimum.quanto.freeze(model)
    return model


def _setup(kind: str) -> SetUp:
    def build(dora: bool, width: int) -> Built:  # noqa: FBT001
        return adapted(quantized(width, kind), dora)

    return SetUp(f"{kind} weights", "optimum.quanto", build)


def _by_transformers(dora: bool, width: int) -> Built:  # noqa: FBT001
    from transformers import QuantoConfig

    return adapted(loaded(width, quantization_config=QuantoConfig(weights="int8")), dora)


SETUPS = [
    *map(_setup, ("qint8", "qint4", "qint2", "qfloat8")),
    SetUp("qint8 weights, QuantoConfig", "optimum.quanto", _by_transformers),
]
