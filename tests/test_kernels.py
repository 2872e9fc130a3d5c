"""The kernels return what the separate operations do: to the bit, or to float32's rounding."""

import itertools

import pytest
import torch
from zoo import dora_model, run, sample

import dora_cache
from dora_cache.recipes import kernels

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def operands(dtypes, shape, *, bias, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)

    def random(dtype, *shape):
        return torch.randn(*shape, generator=generator, device="cuda").to(dtype)

    one, two, three, four = dtypes
    result, delta = random(one, *shape), random(two, *shape)
    scale = 1 + 0.05 * random(torch.float32, 1, shape[-1])
    return result, delta, scale.to(three), random(four, shape[-1]) if bias else None


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 7, 1025), (1, 4096), (64, 1536)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_bit_for_bit(shape, bias):
    """All combinations of dtypes; scalings that are exact and that are not."""
    for dtypes in itertools.product(DTYPES, repeat=4 if bias else 3):
        result, delta, scale, shift = operands((*dtypes, None)[:4], shape, bias=bias)
        for scaling in (1, 0.7, 2.0, -1.3):
            base = result if shift is None else result - shift
            expected = result + ((scale - 1) * base + scale * delta * scaling)
            found = kernels.combine(result, delta, scale, shift, scaling)
            assert found.dtype is expected.dtype
            assert torch.equal(found, expected), (dtypes, scaling)
            found = kernels.combine(result, delta, scale, shift, scaling, result.dtype)
            assert torch.equal(found, expected.to(result.dtype)), (dtypes, scaling)


def test_extreme_values():
    """Infinities, NaN, subnormal numbers and overflow come out as they do one by one."""
    values = torch.tensor([0.0, -0.0, 1e-45, 1e-40, 6e-8, 65504, 3e38, float("inf"), float("nan")])
    pairs = torch.cartesian_prod(values, values).T.cuda()
    for dtype in DTYPES:
        result, delta = pairs.to(dtype).reshape(2, 9, 9)
        scale = torch.linspace(-2, 2, 9, device="cuda").view(1, -1)
        for scaling in (1.0, 0.5, 3.0):
            expected = result + ((scale - 1) * result + scale * delta * scaling)
            found = kernels.combine(result.contiguous(), delta.contiguous(), scale, None, scaling)
            assert torch.equal(found.isnan(), expected.isnan())
            assert torch.equal(found.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("bias", [True, False])
def test_fast(bias):
    """Error against float64 no greater than that of the separate operations."""
    for dtypes in itertools.product(DTYPES, repeat=2):
        result, delta, scale, shift = operands(
            (*dtypes, torch.float32, torch.float32), (33, 1537), bias=bias
        )
        found = kernels.combine_fast(result, delta, scale, shift, 0.7)
        exact = scale.double() * (result.double() + 0.7 * delta.double())
        exact = exact if shift is None else exact + shift.double()
        torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-6)


def test_layers_use_them(monkeypatch):
    """They run in a layer, and a kernel that fails costs nothing but speed."""
    model = dora_model().to("cuda")
    x = sample("linear").to("cuda")
    expected = run(model, x)
    launched = []
    launch = kernels._launch
    monkeypatch.setattr(kernels, "_launch", lambda *args: launched.append(1) or launch(*args))
    with dora_cache.attach(model):
        for _ in range(3):
            assert torch.equal(run(model, x), expected)
        assert len(launched) == 3

        monkeypatch.setattr(kernels, "_kernels", lambda: None)
        assert torch.equal(run(model, x), expected)
        assert len(launched) == 3
    monkeypatch.setattr(kernels, "_kernels", lambda: object())  # a launch raises
    monkeypatch.setattr(kernels, "_compiled", {})
    with dora_cache.attach(model):
        try:
            with pytest.warns(dora_cache.CacheWarning, match="Triton kernel failed"):
                assert torch.equal(run(model, x), expected)
            assert kernels._broken
        finally:
            kernels._broken = False
