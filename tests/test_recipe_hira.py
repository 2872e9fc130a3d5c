"""HiRA: kinds of layers that the examples leave out."""

from functools import partial

import pytest
import torch
from peft import HiraConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

from dora_cache.recipes.examples import TARGETS, Base, Example, conv2d, make_model
from dora_cache.testing import check_recipe

TRANSPOSED = Base(
    "Conv1D", lambda inputs, outputs: Conv1D(outputs, inputs), lambda i, n: torch.randn(1, n, i)
)
CONV3D = Base(
    "Conv3d",
    lambda inputs, outputs: nn.Conv3d(inputs, outputs, (2, 2, 1)),
    lambda i, n: torch.randn(1, i, 2, 2, 1 + n),
)


def check(base, numerics, dtype=torch.float32, **more):
    """Check a model of one layer with two adapters."""

    def config(*_):
        return HiraConfig(
            r=2, target_modules=TARGETS, init_weights=False, fan_in_fan_out=base is TRANSPOSED
        )

    example = Example("HiRA", config, base, **more)
    make = partial(make_model, example, dtype=dtype, adapters=("a", "b"), layers=1)
    check_recipe(make, numerics=numerics)


@pytest.mark.parametrize("numerics", ["peft", "fast"])
@pytest.mark.parametrize("base", [TRANSPOSED, CONV3D], ids=lambda base: base.name)
def test_other_layers(base, numerics):
    """Conv1D, whose weight is transposed, and Conv3d keep every promise."""
    check(base, numerics)


def test_adapters_in_half_precision():
    """PEFT sets such parameters anew when it derives; the values are stored all the same."""
    check(conv2d, "peft", torch.bfloat16, prepare=lambda model: model.bfloat16())
