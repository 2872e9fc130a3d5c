"""numerics="fast" is at least as exact as PEFT: errors against the same model in float64."""

import copy

import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from zoo import quiet, run

import dora_cache

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def layer(rows, columns, rank, *, dtype, cast, bias, alpha, special, seed):
    """A DoRA layer whose rows are of the kind that ``special`` says."""
    torch.manual_seed(seed)
    with quiet():
        model = get_peft_model(
            nn.Sequential(nn.Linear(columns, rows, bias=bias)).to(dtype),
            LoraConfig(
                use_dora=True,
                r=rank,
                lora_alpha=alpha,
                target_modules=["0"],
                init_lora_weights=False,
            ),
            autocast_adapter_dtype=cast,
        )
    found = model.base_model.model[0]
    weight = found.get_base_layer().weight
    lora_a, lora_b = found.lora_A["default"].weight, found.lora_B["default"].weight
    magnitude = found.lora_magnitude_vector["default"].weight
    with torch.no_grad():
        if special == "zero rows":
            weight[::2] = 0
        elif special == "tiny norms":  # g B A all but cancels W
            weight.copy_(-found.scaling["default"] * (lora_b @ lora_a) * 0.999)
        elif special == "large":
            weight.mul_(100)
        norm = (
            weight.double() + found.scaling["default"] * lora_b.double() @ lora_a.double()
        ).norm(dim=1)
        spread = 1e-3 if special == "near one" else 0.3
        magnitude.copy_(norm * (1 + spread * torch.randn(rows).double()))
    return model.eval()


def error(found, exact):
    return (found.double() - exact).square().mean().sqrt().item()


def condition(found):
    """Return how much larger a relative error of ``s`` may be than one of ``W`` and ``g B A``."""
    weight = found.get_base_layer().weight.double()
    lora_a, lora_b = found.lora_A["default"].weight, found.lora_B["default"].weight
    delta = found.scaling["default"] * lora_b.double() @ lora_a.double()
    parts = weight.norm(dim=1) + delta.norm(dim=1)
    return (parts / (weight + delta).norm(dim=1)).max().item()


@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    rank=st.integers(1, 8),
    dtype=st.sampled_from(DTYPES),
    cast=st.booleans(),
    bias=st.booleans(),
    alpha=st.sampled_from([1, 8, 13]),
    special=st.sampled_from(["none", "near one", "tiny norms", "zero rows", "large"]),
    seed=st.integers(0, 2**16),
)
def test_error_is_at_most_pefts(rows, columns, rank, dtype, cast, bias, alpha, special, seed):
    """Root mean square over all outputs; up to one more rounding of what goes into them.

    That is the base layer's outputs and the scales, either of which may all but cancel.

    In a small layer few roundings decide, and PEFT's may happen to be exact.
    """
    model = layer(
        rows, columns, rank, dtype=dtype, cast=cast, bias=bias, alpha=alpha, special=special,
        seed=seed,
    )  # fmt: skip
    x = torch.randn(64, columns).to(dtype)
    exact = run(copy.deepcopy(model).double(), x.double())
    peft = run(model, x)
    assume(bool(exact.isfinite().all() and peft.isfinite().all()))
    with dora_cache.attach(model, numerics="fast"):
        fast = run(model, x)
    assert fast.dtype is peft.dtype
    size = exact.square().mean().sqrt().item()
    with model.disable_adapter():
        size += run(model, x).double().square().mean().sqrt().item()
    rounding = torch.finfo(dtype).eps * size / 4
    rounding += condition(model.base_model.model[0]) * torch.finfo(torch.float32).eps * size / 2
    assert error(fast, exact) <= error(peft, exact) + rounding
