"""The DoRA recipe against PEFT's own uncached forward."""

import contextlib

import pytest
import torch
from peft.helpers import DoraCaching
from torch import nn
from zoo import CASES, KINDS, activate, dora_model, run, sample

import dora_cache

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
MODES = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "gradients": contextlib.nullcontext,
}


def same(left, right):
    return left.dtype == right.dtype and torch.equal(left, right)


@pytest.mark.parametrize("adapters", [("first",), ("first", "second"), ("second", "first")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kind", "bias"), CASES)
def test_output_is_bit_equal_on_first_and_later_forwards(kind, bias, dtype, adapters):
    """Every layer kind, dtype, bias and adapter order gives PEFT's bits, cold and warm."""
    for cast in (True, False):
        model = dora_model(
            kind, bias=bias, dtype=dtype, adapters=("first", "second"), autocast_adapter_dtype=cast
        )
        activate(model, *adapters)
        x = sample(kind, dtype)
        for context in MODES.values():
            with context():
                expected = model(x)
                with dora_cache.attach(model) as cache:
                    assert same(model(x), expected)
                    assert same(model(x), expected)
                    stats = cache.stats()
                assert stats.hits == len(adapters)
                assert stats.misses == len(adapters)
                assert stats.bypasses == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_inputs_of_every_shape(bias, dtype):
    """Where the layer folds three dimensions into two, and where it does not: PEFT's bits."""
    model = dora_model(bias=bias, dtype=dtype)
    x = torch.randn(2, 6, 12).to(dtype)
    shapes = [
        x,
        x[:, :1],  # one token of a prompt: not contiguous
        x.transpose(0, 1),
        x[:0],
        x[0],
        x[0, 0],
        x.reshape(2, 2, 3, 12),
        x[:, ::2],
        torch.empty(6, 12, 2, dtype=dtype).copy_(x.permute(1, 2, 0)).permute(2, 0, 1),
    ]
    expected = [run(model, one) for one in shapes]
    with dora_cache.attach(model):
        for _ in range(2):
            for one, wanted in zip(shapes, expected, strict=True):
                found = run(model, one)
                assert found.shape == wanted.shape
                assert same(found, wanted)
    with dora_cache.attach(model, numerics="fast"):
        for one, wanted in zip(shapes, expected, strict=True):
            assert run(model, one).shape == wanted.shape


@pytest.mark.parametrize("numerics", ["peft", "fast"])
def test_what_hangs_on_the_base_layer_runs(numerics):
    """Hooks on it, and a forward of its own (as device maps give it), are not passed by."""
    model = dora_model()
    x = sample("linear")
    base = model.base_model.model.layer.base_layer
    with dora_cache.attach(model, numerics=numerics):
        run(model, x)
        plain = base.forward
        base.forward = lambda x: plain(x) + 1
        own = run(model, x)
        del base.forward
        with base.register_forward_hook(lambda _, __, result: result + 1):
            hooked = run(model, x)
        with base.register_forward_pre_hook(lambda _, args: (2 * args[0],)):
            doubled = run(model, x)
        with nn.modules.module.register_module_forward_hook(
            lambda module, _, result: result + 1 if module is base else result
        ):
            of_all = run(model, x)
    torch.testing.assert_close(own, hooked)
    torch.testing.assert_close(own, of_all)
    with base.register_forward_hook(lambda _, __, result: result + 1):
        torch.testing.assert_close(hooked, run(model, x))
    with base.register_forward_pre_hook(lambda _, args: (2 * args[0],)):
        torch.testing.assert_close(doubled, run(model, x))


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_output_is_bit_equal_under_autocast(kind, dtype, low):
    """A value derived under one autocast state is never used under another."""
    model = dora_model(kind, dtype=dtype, adapters=("first", "second"))
    activate(model, "first", "second")
    x = sample(kind, dtype)
    states = [
        contextlib.nullcontext,
        lambda: torch.autocast("cpu", dtype=low),
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        lambda: torch.autocast("cpu", enabled=False),
    ]
    expected = []
    for state in states:
        with state():
            expected.append(run(model, x))
    with dora_cache.attach(model):
        for _ in range(2):
            for state, wanted in zip(states, expected, strict=True):
                with state():
                    assert same(run(model, x), wanted)


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize(("kind", "bias"), CASES)
def test_gradients_in_eval_mode_are_bit_equal(kind, bias, warm):
    """With gradients enabled, every gradient is PEFT's, that of the magnitude included."""
    model = dora_model(kind, bias=bias, adapters=("first", "second"))
    activate(model, "first", "second")
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    x = sample(kind)
    if x.is_floating_point():
        x.requires_grad_()

    def gradients():
        model.zero_grad(set_to_none=True)
        x.grad = None
        model(x).square().sum().backward()
        found = {name: p.grad for name, p in model.named_parameters()}
        return found | {"input": x.grad}

    expected = gradients()
    with dora_cache.attach(model) as cache:
        if warm:
            run(model, x)
            gradients()
        found = gradients()
        assert cache.stats().hits > 0 if warm else cache.stats().stores > 0
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        assert (gradient is None) == (found[name] is None), name
        assert gradient is None or torch.equal(gradient, found[name]), name


def test_values_filled_in_inference_mode_serve_with_gradients():
    """An entry filled under inference_mode is no inference tensor, so autograd can use it."""
    model = dora_model()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    x = sample("linear").requires_grad_()
    model(x).sum().backward()
    expected, x.grad = x.grad, None
    with dora_cache.attach(model) as cache:
        with torch.inference_mode():
            model(x.detach())
        model(x).sum().backward()
        assert cache.stats().hits == 1
    assert torch.equal(x.grad, expected)


class _Touches(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the operations that read a given tensor's memory."""

    def __init__(self, tensor):
        super().__init__()
        self.storage = tensor.untyped_storage()._cdata
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for arg in torch.utils._pytree.tree_leaves((args, kwargs)):
            if isinstance(arg, torch.Tensor) and arg.untyped_storage()._cdata == self.storage:
                self.operations.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("numerics", ["peft", "fast"])
@pytest.mark.parametrize("kind", ["linear", "conv1d_transformers", "embedding", "conv2d"])
def test_a_hit_does_not_touch_the_base_weight(kind, numerics, monkeypatch):
    """A hit reads the base weight only in the base layer's own forward."""
    # Calls under a dispatch mode go past the cache; this one only watches.
    monkeypatch.setattr("dora_cache.core.engine.untraceable", lambda: False)
    model = dora_model(kind)
    layer = model.base_model.model.layer
    x = sample(kind)

    def touches(function):
        with torch.no_grad(), _Touches(layer.get_base_layer().weight) as mode:
            function()
        return mode.operations

    base = touches(lambda: layer.get_base_layer()(x))
    assert len(touches(lambda: layer(x))) > len(base)
    with dora_cache.attach(model, numerics=numerics):
        run(model, x)
        assert touches(lambda: layer(x)) == base


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_scale_is_stored(kind):
    """What is held for one layer and adapter is one number for each output."""
    model = dora_model(kind)
    outputs = model.base_model.model.layer.lora_magnitude_vector["first"].weight.numel()
    with dora_cache.attach(model) as cache:
        run(model, sample(kind))
        assert cache.stats().entries == 1
        assert cache.stats().nbytes == outputs * 4


@pytest.mark.parametrize("numerics", ["peft", "fast"])
def test_inputs_of_one_dimension(numerics):
    """PEFT adds a dimension to them, and so does the cache."""
    layer = dora_model().base_model.model.layer
    x = torch.randn(12)
    expected = run(layer, x)
    with dora_cache.attach(layer, numerics=numerics):
        for _ in range(3):
            found = run(layer, x)
            assert found.shape == expected.shape
            torch.testing.assert_close(found, expected)
            assert numerics == "fast" or torch.equal(found, expected)


@pytest.mark.parametrize("numerics", ["peft", "fast"])
def test_bias_in_the_adapter_is_followed(numerics):
    """A bias of lora_B enters PEFT's norm, so it enters the cached scale and its stamp."""
    model = dora_model(dtype=torch.float64)
    lora_b = model.base_model.model.layer.lora_B["first"]
    lora_b.bias = nn.Parameter(torch.randn(8, dtype=torch.float64))
    x = sample("linear", torch.float64)
    with dora_cache.attach(model, numerics=numerics) as cache:
        for _ in range(2):
            with cache.bypass():
                expected = run(model, x)
            torch.testing.assert_close(run(model, x), expected)
            torch.testing.assert_close(run(model, x), expected)
            with torch.no_grad():
                lora_b.bias.add_(1)


def test_scaled_embeddings_are_followed():
    """Embeddings that scale their output scale DoRA's part as PEFT does."""

    class ScaledEmbedding(nn.Embedding):
        embed_scale = 3.0

        def forward(self, x):
            return super().forward(x) * self.embed_scale

    original = KINDS["embedding"].make
    object.__setattr__(KINDS["embedding"], "make", lambda bias: ScaledEmbedding(17, 8))
    try:
        model = dora_model("embedding")
    finally:
        object.__setattr__(KINDS["embedding"], "make", original)
    x = sample("embedding")
    expected = run(model, x)
    with dora_cache.attach(model):
        assert same(run(model, x), expected)
        assert same(run(model, x), expected)
    with dora_cache.attach(model, numerics="fast"):
        torch.testing.assert_close(run(model, x), expected)


def test_dropout_in_training_is_pefts():
    """In training mode PEFT's own code runs, dropout included, and nothing is stored."""
    model = dora_model(lora_dropout=0.5).train()
    x = sample("linear")
    torch.manual_seed(3)
    expected = model(x)
    with dora_cache.attach(model) as cache:
        torch.manual_seed(3)
        assert same(model(x), expected)
        stats = cache.stats()
    assert stats.lookups == stats.stores == 0


def test_pefts_own_cache_has_no_influence():
    """DoraCaching may be on or off, before or during; results come from the weights."""
    model = dora_model()
    x = sample("linear")
    with dora_cache.attach(model), DoraCaching():
        first = run(model, x)
        with torch.no_grad():
            model.base_model.model.layer.lora_A["first"].weight.mul_(2)
        second = run(model, x)
    assert same(second, run(model, x))
    assert not same(first, second)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kind", "bias"), CASES)
def test_fast_numerics_are_no_less_accurate(kind, bias, dtype):
    """Against float64, numerics="fast" errs no more than PEFT, to the rounding of the output."""
    model = dora_model(kind, bias=bias, dtype=dtype, adapters=("first", "second"))
    activate(model, "first", "second")
    x = sample(kind, dtype)
    plain = run(model, x)
    with dora_cache.attach(model, numerics="fast") as cache:
        fast = run(model, x)
        assert same(run(model, x), fast)
        assert cache.stats().hits == 2
    wide = model.double()
    exact = run(wide, x.double() if x.is_floating_point() else x)
    peft_error = (plain.double() - exact).norm()
    fast_error = (fast.double() - exact).norm()
    rounding = torch.finfo(dtype).eps * exact.norm()
    if dtype is torch.float64:  # errors are measured by PEFT's output itself, with its roundings
        rounding *= 8
    assert fast.dtype == plain.dtype
    assert fast_error <= peft_error + rounding


@pytest.mark.parametrize("kind", ["linear", "embedding", "conv2d"])
def test_fast_numerics_have_the_gradients_of_the_input(kind):
    """With gradients, numerics="fast" gives the gradients PEFT gives, to rounding."""
    model = dora_model(kind, dtype=torch.float64)
    x = sample(kind, torch.float64)

    def gradients():
        model.zero_grad(set_to_none=True)
        model(x).square().sum().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    expected = gradients()
    with dora_cache.attach(model, numerics="fast"):
        run(model, x)
        found = gradients()
    torch.testing.assert_close(found, expected)
