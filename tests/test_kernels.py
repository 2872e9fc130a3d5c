"""The kernels return what the separate operations do: to the bit, or to float32's rounding."""

import itertools

import pytest
import torch
from zoo import dora_model, run, sample

import dora_cache
from dora_cache import triton_launch
from dora_cache.recipes.dora import kernels

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def in_place(launch, result, delta, scale, shift, scaling):
    """Launch a kernel so that it writes to the result, as a bound layer does."""
    rows = result.numel() // result.shape[-1]
    tensors = (result, delta, scale, result if shift is None else shift, result)
    assert launch(rows, tensors, (float(scaling),))
    return result


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
            of_shift = None if shift is None else shift.dtype
            launch, dtype = kernels.combiner(0, shape[-1], *dtypes[:3], of_shift, result.dtype)
            assert dtype is result.dtype
            found = in_place(launch, result.clone(), delta, scale, shift, scaling)
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
        launch = kernels.fast_combiner(0, 1537, *dtypes, result.dtype, shift=bias)
        again = in_place(launch, result, delta, scale, shift, 0.7)
        assert torch.equal(again, found.to(result.dtype))


@pytest.mark.parametrize("bias", [True, False])
def test_a_few_rows(bias):
    """Ranks and widths that fill no block, all dtypes: right to float32's rounding."""
    shapes = itertools.product((1, 3, 32), (1, 5, 16, 256), (1, 48, 1025), (1, 17, 4096))
    for dtypes, (rows, rank, width, columns) in zip(
        itertools.cycle(itertools.product(DTYPES, repeat=3)), shapes, strict=False
    ):
        of_result, of_x, of_factors = dtypes
        generator = torch.Generator("cuda").manual_seed(rows * rank)

        def random(dtype, *shape, generator=generator):
            return torch.randn(*shape, generator=generator, device="cuda").to(dtype)

        result, x = random(of_result, rows, columns), random(of_x, rows, width)
        first, last = random(of_factors, rank, width), random(of_factors, columns, rank)
        scale, shift = 1 + 0.05 * random(torch.float32, 1, columns), random(torch.float32, columns)
        delta = x.double() @ first.double().T @ last.double().T
        exact = scale.double() * (result.double() + 0.7 * delta) + bias * shift.double()
        shift = shift if bias else None
        launch = kernels.few_rows(x, of_result, first, last, scale, shift)
        assert launch(x, result, first, last, scale, shift, 0.7, result)
        loose = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[of_result]
        spread = 1 + delta.abs().max().item()  # sums cancel
        torch.testing.assert_close(result.double(), exact, rtol=loose, atol=1e-5 * spread)


def test_weights_that_are_left_to_matrix_products():
    """Those of a high rank, and what is not laid out as the kernels read it."""
    scale, x = torch.ones(1, 8, device="cuda"), torch.ones(2, 6, device="cuda")
    for rank, layout in ((300, None), (2, "first"), (2, "last"), (2, "negative")):
        first, last = torch.ones(rank, 6, device="cuda"), torch.ones(8, rank, device="cuda")
        first = first.T.contiguous().T if layout == "first" else first
        first = torch._neg_view(first) if layout == "negative" else first
        last = last.T.contiguous().T if layout == "last" else last
        assert kernels.few_rows(x, x.dtype, first, last, scale, None) is None
    first, last = torch.ones(2, 6, device="cuda"), torch.ones(8, 2, device="cuda")
    assert kernels.few_rows(x, x.dtype, first, last, scale, None) is not None


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("numerics", ["peft", "fast"])
def test_nobody_records_a_launch(numerics):
    """Where operations are recorded, PyTorch's run: a launch would be missing from the record."""
    model = dora_model().to("cuda")
    x = sample("linear").to("cuda")
    with dora_cache.attach(model, numerics=numerics), torch.no_grad():
        expected = run(model, x)
        traced = torch.jit.trace(model.base_model.model, x, check_trace=False)
        recorded = torch.fx.experimental.proxy_tensor.make_fx(model.base_model.model)(x)
        torch.full((1 << 20,), torch.nan, device="cuda")  # what is not written would show
        for again in (traced, recorded):
            for _ in range(2):
                torch.testing.assert_close(again(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scaling", [1, 0.7, -1.0])
def test_norms(scaling):
    """As exact as float32; also where the factors all but cancel the weight."""
    shapes = itertools.product((1, 33, 4096), (7, 128, 1500), (1, 5, 16, 64))
    for dtypes, (rows, columns, rank) in zip(
        itertools.cycle(itertools.product(DTYPES, repeat=2)), shapes, strict=False
    ):
        generator = torch.Generator("cuda").manual_seed(rows + columns)
        first, last = (
            torch.randn(*shape, generator=generator, device="cuda").to(dtypes[1])
            for shape in ((rank, columns), (rows, rank))
        )
        weight = torch.randn(rows, columns, generator=generator, device="cuda")
        weight[::3] = -scaling * (last[::3].float() @ first.float())
        weight = weight.to(dtypes[0])
        found = kernels.norms(weight, first, last, scaling)
        exact = weight.double() + scaling * (last.double() @ first.double())
        exact = torch.linalg.vector_norm(exact, dim=1)
        loose = 1e-5 * torch.linalg.vector_norm(weight.double(), dim=1).max().item()
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=loose)
    assert kernels.norms(weight.T, first, last, 1.0) is None
    assert kernels.norms(weight.double(), first, last, 1.0) is None


def test_a_launcher_that_has_changed():
    """What is no public interface of Triton's costs only time when it changes."""
    result, delta, scale, _ = operands((*DTYPES, None), (3, 512), bias=False)
    expected = kernels.combine(result, delta, scale, None, 0.7)
    launch, _ = kernels.combiner(0, 512, *DTYPES, None)

    def changed(*_):
        raise TypeError("function takes exactly 99 arguments")

    assert launch._compiled is not None
    launch._compiled = (changed, ())
    for _ in range(3):
        assert torch.equal(kernels.combine(result, delta, scale, None, 0.7), expected)
    assert launch._compiled is None
    assert not triton_launch.broken


def test_layers_use_them(monkeypatch):
    """They run in a layer, and a kernel that fails costs nothing but speed."""
    model = dora_model().to("cuda")
    x = sample("linear").to("cuda")
    expected = run(model, x)
    launched = []
    launch = kernels.Launch.__call__
    monkeypatch.setattr(
        kernels.Launch, "__call__", lambda *args: launched.append(args[0].name) or launch(*args)
    )
    with dora_cache.attach(model, numerics="fast"):
        for _ in range(4):
            torch.testing.assert_close(run(model, x), expected, rtol=1e-4, atol=1e-4)
    # To derive; before the layer is bound; and by two kernels since.
    assert launched == ["norms", *["combine_fast"] * 2, *["project", "expand"] * 2]
    launched.clear()
    with dora_cache.attach(model):
        for _ in range(4):
            assert torch.equal(run(model, x), expected)
    assert launched == ["combine"] * 4
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "_kernels", lambda: None)
        with dora_cache.attach(model):
            for _ in range(4):
                assert torch.equal(run(model, x), expected)
    assert len(launched) == 4

    def fail(*_):
        raise RuntimeError("no compiler")

    with dora_cache.attach(model):
        for _ in range(3):
            run(model, x)
        monkeypatch.setattr(kernels.Launch, "launch", fail)
        try:
            with pytest.warns(dora_cache.CacheWarning, match="Triton kernel 'combine' failed"):
                assert torch.equal(run(model, x), expected)
            assert set(triton_launch.broken) == {"combine"}
            assert torch.equal(run(model, x), expected)
        finally:
            triton_launch.broken.clear()
