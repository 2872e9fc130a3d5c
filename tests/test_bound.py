"""Bound layers: whatever changes between two hits, the output is that of a twin without a cache."""

import contextlib
import copy
import gc
import inspect
import pickle
import sys
import warnings
import weakref
from types import SimpleNamespace

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from zoo import activate, dora_model, quiet, run, sample

import dora_cache
from dora_cache import triton_launch
from dora_cache.lab.layer import count_frames
from dora_cache.recipes.dora import bound, kernels
from dora_cache.recipes.dora.bound import Bound
from dora_cache.triton_launch import Launcher

BOTH = pytest.mark.parametrize("numerics", ["peft", "fast"])
PARTS = ("lora_A", "lora_B", "lora_magnitude_vector")


def make(**more):
    torch.manual_seed(1)
    model = dora_model(adapters=("first", "second"), lora_dropout=0.5, **more)
    activate(model, "first")
    return model


def layer_of(model):
    return next(part for part in model.modules() if hasattr(part, "lora_A"))


def part_of(layer, name):
    return layer.base_layer if name == "base_layer" else getattr(layer, name)["first"]


@pytest.fixture
def taken(monkeypatch):
    """What bound layers have returned."""
    found, plain = [], Bound.run

    def spy(self, layer, x):
        output = plain(self, layer, x)
        found.append(output is not None)
        return output

    monkeypatch.setattr(Bound, "run", spy)
    return found


def outputs(model, change, x):
    """Run a model before a change, within it, and after it."""

    def now():
        torch.manual_seed(2)  # for dropout
        return run(model, x).clone()

    found = [now() for _ in range(4)]
    with change(model, layer_of(model)):
        found += [now(), now(), now()]
    return [*found, now(), now(), now()]


def compare(change, taken, *, numerics="peft", visible=True, **more):
    """Do the same to a model whose layer is bound and to its twin, and compare the outputs."""
    x = sample("linear")
    expected = outputs(make(**more), change, x)
    assert torch.equal(expected[3], expected[4]) != visible
    model = make(**more)
    with dora_cache.attach(model, numerics=numerics):
        for _ in range(4):
            run(model, x)
        taken.clear()
        found = outputs(model, change, x)
        assert taken[:4] == [True] * 4
    loose = 1e-5 if numerics == "fast" else 0
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=loose, atol=loose)


CHANGES = {}


def change(*names, visible=True):
    """Enter a change into the table; with several names, once for each of them as an argument."""

    def enter(function):
        make_context = contextlib.contextmanager(function)
        title = function.__name__.replace("_", " ").strip()
        for name in names or (None,):
            given = {} if name is None else {"name": name}
            label = title if name is None else f"{title}: {name}"
            CHANGES[label] = (
                lambda model, layer, given=given: make_context(model, layer, **given),
                visible,
            )
        return function

    return enter


# The layer itself


@change()
def training_mode(model, layer):
    model.train()
    yield
    model.eval()


@change()
def training_set_past_its_setter(model, layer):
    for part in layer.modules():
        part.__dict__["training"] = True
    yield
    for part in layer.modules():
        part.__dict__["training"] = False


@change()
def adapters_disabled(model, layer):
    with model.disable_adapter():
        yield


@change()
def adapters_disabled_in_the_layer(model, layer):
    layer._disable_adapters = True
    yield
    layer._disable_adapters = False


@change()
def merged_and_unmerged(model, layer):
    model.merge_adapter()
    yield
    model.unmerge_adapter()


@change()
def said_to_be_merged(model, layer):
    layer.merged_adapters.append("first")
    yield
    layer.merged_adapters.clear()


@change()
def another_adapter(model, layer):
    model.set_adapter("second")
    yield
    model.set_adapter("first")


@change()
def two_adapters(model, layer):
    activate(model, "first", "second")
    yield
    activate(model, "first")


@change(visible=False)
def adapter_spelled_as_text(model, layer):
    layer._active_adapter = "first"
    yield
    layer._active_adapter = ["first"]


@change()
def an_unknown_adapter(model, layer):
    layer._active_adapter = ["third"]
    yield
    layer._active_adapter = ["first"]


@change("number", "whole number", "tensor")
def scaling(model, layer, name):
    before = layer.scaling["first"]
    layer.scaling["first"] = {"number": 2.5, "whole number": 2, "tensor": torch.tensor(2.5)}[name]
    yield
    layer.scaling["first"] = before


@change()
def scaling_by_method(model, layer):
    layer.scale_layer(1.5)
    yield
    layer.unscale_layer(1.5)


@change()
def no_variant(model, layer):
    variant = layer.lora_variant.pop("first")
    yield
    layer.lora_variant["first"] = variant


@change(visible=False)
def pefts_variant(model, layer):
    variant = layer.lora_variant["first"]
    layer.lora_variant["first"] = DoraLinearVariant()
    yield
    layer.lora_variant["first"] = variant


@change()
def another_variant(model, layer):
    class Twice(DoraLinearVariant):
        @staticmethod
        def forward(module, active_adapter, x, result, **kwargs):
            return 2 * DoraLinearVariant.forward(module, active_adapter, x, result, **kwargs)

    variant = layer.lora_variant["first"]
    layer.lora_variant["first"] = Twice()
    yield
    layer.lora_variant["first"] = variant


@change(visible=False)
def another_dictionary_of_variants(model, layer):
    layer.lora_variant = dict(layer.lora_variant)
    yield


@change(visible=False)
def no_cast_of_the_input(model, layer):
    layer.cast_input_dtype_enabled = False
    yield
    layer.cast_input_dtype_enabled = True


# Its parts


@change("lora_A", "lora_B", "lora_magnitude_vector", "base_layer")
def another_module(model, layer, name):
    part = part_of(layer, name)
    new = copy.deepcopy(part)
    with torch.no_grad():
        new.weight.mul_(1.5)
    if name == "base_layer":
        layer.base_layer = new
    else:
        getattr(layer, name)["first"] = new
    yield
    if name == "base_layer":
        layer.base_layer = part
    else:
        getattr(layer, name)["first"] = part


@change(*PARTS)
def another_container(model, layer, name):
    container = getattr(layer, name)
    setattr(layer, name, copy.deepcopy(container))
    with torch.no_grad():
        getattr(layer, name)["first"].weight.mul_(1.5)
    yield
    setattr(layer, name, container)


@change("lora_A", "lora_B", "lora_magnitude_vector", "base_layer")
def another_class(model, layer, name):
    part = part_of(layer, name)
    plain = type(part)

    class Twice(plain):
        def forward(self, *args, **kwargs):
            return 2 * super().forward(*args, **kwargs)

    part.__class__ = Twice
    yield
    part.__class__ = plain


@change("lora_A", "lora_B", "lora_magnitude_vector", "base_layer")
def a_hook(model, layer, name):
    with part_of(layer, name).register_forward_hook(lambda _, __, output: 1.5 * output):
        yield


@change("lora_A", "lora_B", "base_layer")
def a_hook_before(model, layer, name):
    with part_of(layer, name).register_forward_pre_hook(lambda _, args: (1.5 * args[0],)):
        yield


@change("lora_A", "lora_B", "lora_magnitude_vector", "base_layer")
def a_dictionary_of_hooks(model, layer, name):
    part = part_of(layer, name)
    before = part._forward_hooks
    part._forward_hooks = type(before)({0: lambda _, __, output: 1.5 * output})
    yield
    part._forward_hooks = before


@change("lora_A", "lora_B", "lora_magnitude_vector", "base_layer", visible=False)
def a_hook_of_backward(model, layer, name):
    part = part_of(layer, name)
    with (
        part.register_full_backward_hook(lambda *_: None),
        part.register_full_backward_pre_hook(lambda *_: None),
    ):
        yield


@change("lora_A", "lora_B", "lora_magnitude_vector", "base_layer")
def a_forward_of_its_own(model, layer, name):
    part = part_of(layer, name)
    plain = part.forward
    part.forward = lambda *args, **kwargs: 1.5 * plain(*args, **kwargs)
    yield
    del part.forward


@change("lora_A", "lora_B", "lora_magnitude_vector", "base_layer")
def compiled_by_itself(model, layer, name):
    part = part_of(layer, name)
    part._compiled_call_impl = lambda *args, **kwargs: 1.5 * part.forward(*args, **kwargs)
    yield
    del part._compiled_call_impl


@change("lora_A", "lora_B", "base_layer")
def a_hook_of_all_modules(model, layer, name):
    part = part_of(layer, name)
    with nn.modules.module.register_module_forward_hook(
        lambda module, _, output: 1.5 * output if module is part else None
    ):
        yield


@change()
def a_hook_before_all_modules(model, layer):
    with nn.modules.module.register_module_forward_pre_hook(
        lambda module, args: (1.5 * args[0],) if type(module) is nn.Linear else None
    ):
        yield


@change("Linear", "DoraLinearLayer")
def a_class_whose_forward_is_replaced(model, layer, name):
    kind = {"Linear": nn.Linear, "DoraLinearLayer": DoraLinearLayer}[name]
    plain = kind.forward
    kind.forward = lambda self, *args, **kwargs: 1.25 * plain(self, *args, **kwargs)
    yield
    kind.forward = plain


@change()
def a_function_that_is_replaced(model, layer):
    plain = nn.functional.linear

    def replaced(x, weight, bias=None):
        return plain(x, weight, bias) + (weight is layer.base_layer.weight)

    nn.functional.linear = replaced
    yield
    nn.functional.linear = plain


# Its parameters


@change("lora_A", "lora_B", "lora_magnitude_vector", "base_layer")
def a_write(model, layer, name):
    with torch.no_grad():
        part_of(layer, name).weight.mul_(2)
    yield
    with torch.no_grad():
        part_of(layer, name).weight.div_(2)


@change("lora_A", "lora_B", "lora_magnitude_vector", "base_layer")
def other_data(model, layer, name):
    weight = part_of(layer, name).weight
    before = weight.data
    weight.data = 2 * before
    yield
    weight.data = before


@change("lora_A", "lora_B", "lora_magnitude_vector", "base_layer")
def another_parameter(model, layer, name):
    part = part_of(layer, name)
    before = part.weight
    part.weight = nn.Parameter(2 * before.detach())
    yield
    part.weight = before


@change("lora_A", "lora_B", "lora_magnitude_vector", "base_layer")
def a_computed_parameter(model, layer, name):
    class Twice(nn.Module):
        def forward(self, weight):
            return 2 * weight

    part = part_of(layer, name)
    nn.utils.parametrize.register_parametrization(part, "weight", Twice().eval())
    yield
    nn.utils.parametrize.remove_parametrizations(part, "weight", leave_parametrized=False)


@change("lora_A", "lora_B")
def a_bias_of_the_adapter(model, layer, name):
    part = part_of(layer, name)
    part.bias = nn.Parameter(torch.ones(part.out_features))
    yield
    part.bias = None


@change()
def a_factor_that_is_broadcast(model, layer):
    part = part_of(layer, "lora_B")
    before = part.weight
    part.weight = nn.Parameter(before[:1].detach())
    yield
    part.weight = before


@change("write", "other", "none", "strided", "broadcast", "plain tensor")
def bias_of_the_base_layer(model, layer, name):
    base = layer.base_layer
    before = base.bias
    if name == "write":
        with torch.no_grad():
            before.add_(1)
    elif name == "plain tensor":
        del base.bias
        base.bias = torch.ones(8)
    else:
        base.bias = {
            "other": nn.Parameter(before.detach() + 1),
            "none": None,
            "strided": nn.Parameter((torch.ones(16) * 3)[::2]),
            "broadcast": nn.Parameter(torch.ones(1)),
        }[name]
    yield
    if name == "write":
        with torch.no_grad():
            before.sub_(1)
    elif name == "plain tensor":
        del base.bias
    base.bias = before


@BOTH
@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_between_two_hits(name, numerics, taken):
    """The output is the twin's before the change, within it and after it."""
    make_change, visible = CHANGES[name]
    compare(make_change, taken, numerics=numerics, visible=visible)


def align(base):
    add_hook_to_module(base, AlignDevicesHook(execution_device="cpu", io_same_device=True))


def write(base):
    calls = iter([None, None, None, base.weight])

    def hook(*_):
        weight = next(calls)
        if weight is not None:
            weight.mul_(1.25)

    base.register_forward_pre_hook(hook)


HOOKS = {
    "on the output": lambda base: base.register_forward_hook(lambda _, __, output: 1.5 * output),
    "on the input": lambda base: base.register_forward_pre_hook(lambda _, args: 1.5 * args[0]),
    "another shape": lambda base: base.register_forward_hook(lambda _, __, output: output[:, :1]),
    "a write in the last call": write,
    "accelerate's": align,
}


@BOTH
@pytest.mark.parametrize("name", HOOKS)
def test_a_layer_whose_base_has_hooks_is_bound(name, numerics, taken):
    """The base layer is called as a module, and the value looked up after that."""
    x = sample("linear")
    plain, model = make(), make()
    HOOKS[name](plain.base_model.model.layer.base_layer)
    HOOKS[name](model.base_model.model.layer.base_layer)
    loose = 1e-5 if numerics == "fast" else 0
    with dora_cache.attach(model, numerics=numerics) as cache:
        for _ in range(4):
            torch.testing.assert_close(run(model, x), run(plain, x), rtol=loose, atol=loose)
        assert taken[-2:] == [True] * 2
        assert cache.stats().hits == (2 if HOOKS[name] is write else 3)


@BOTH
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cast", [True, False])
@pytest.mark.parametrize("scaling", [1.5, 1.0, 1, 3, 1 / 3, -0.0])
def test_dtypes(numerics, bias, dtype, cast, scaling, taken):
    """Base weight and adapter in the same dtype, or in another one: PEFT's bits."""
    x = sample("linear", dtype)
    model = make(bias=bias, dtype=dtype, autocast_adapter_dtype=cast)
    layer_of(model).scaling["first"] = scaling
    expected = [run(model, one) for one in (x, x[0])]
    loose = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    with dora_cache.attach(model, numerics=numerics) as cache:
        for _ in range(4):
            for one, wanted in zip((x, x[0]), expected, strict=True):
                found = run(model, one)
                assert found.dtype is wanted.dtype
                tolerance = loose if numerics == "fast" else 0
                torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
        assert cache.stats().hits == 7
    assert taken[-5:] == [True] * 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_input_of_another_dtype_is_an_error_as_without_a_cache(dtype):
    """Also where the input is not to be cast; what works has PEFT's bits."""
    model = make(dtype=dtype)
    layer = layer_of(model)

    def outcome(x, enabled):
        layer.cast_input_dtype_enabled = enabled
        try:
            return run(layer, x)
        except RuntimeError as error:
            return str(error)
        finally:
            layer.cast_input_dtype_enabled = True

    cases = [
        (sample("linear", one), enabled)
        for one in (torch.float32, torch.bfloat16, torch.float64)
        for enabled in (True, False)
    ]
    cases += [(torch.randn(3, 5, 11).to(dtype), True), (sample("linear").to("meta"), True)]
    expected = [outcome(*case) for case in cases]
    assert sum(isinstance(one, str) for one in expected) > 2
    with dora_cache.attach(model):
        for _ in range(3):
            run(layer, sample("linear", dtype))
        for case, wanted in zip(cases, expected, strict=True):
            found = outcome(*case)
            assert type(found) is type(wanted)
            if isinstance(wanted, str):
                assert found == wanted
            elif wanted.device.type != "meta":
                assert torch.equal(found, wanted)


class Marked(torch.Tensor):
    """A subclass that follows operations."""


@BOTH
def test_inputs_of_other_kinds(numerics, taken):
    """Plain contiguous tensors of two or three dimensions alone take the short way."""
    model = make()
    x = sample("linear")
    with quiet():  # they are in beta, says PyTorch
        compressed = x[0].to_sparse_csr()
    cases = [
        x.transpose(0, 1),
        x[:, ::2],
        x[0, 0],
        x[:0],
        x[None],
        x.clone().requires_grad_(),
        nn.Parameter(x.clone()),
        x.clone().as_subclass(Marked),
        torch._neg_view(x.clone()),
        x[0].to_sparse(),
        compressed,
    ]
    short = [False] * 5 + [True, False, False, True, False, False]
    expected = [run(model, one) for one in cases]
    with dora_cache.attach(model, numerics=numerics):
        for _ in range(3):
            run(model, x)
        taken.clear()
        for one, wanted in zip(cases, expected, strict=True):
            found = run(model, one)
            assert type(found) is type(wanted)
            assert found.shape == wanted.shape
            loose = 1e-5 if numerics == "fast" else 0
            torch.testing.assert_close(found, wanted, rtol=loose, atol=loose)
    assert taken == short


class Counting(TorchDispatchMode):
    """Lists the operations that it sees."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations.append(str(func))
        return func(*args, **(kwargs or {}))


def jit_traced(model, x):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        traced = torch.jit.trace(layer_of(model), x, check_trace=False)
    return [traced(x), traced(x[:2]), any(one.filename.endswith("bound.py") for one in said)]


def followed(model, x):
    with Counting() as mode:
        output = model(x)
    return [output, any("norm" in name for name in mode.operations)]


def differentiated_forward(model, x):
    with forward_ad.dual_level():
        return list(forward_ad.unpack_dual(model(forward_ad.make_dual(x, torch.ones_like(x)))))


def with_another_weight(model, x):
    layer = layer_of(model)
    return [functional_call(layer, {"base_layer.weight": 2 * layer.base_layer.weight}, (x,))]


def mapped_over_weights(model, x):
    layer = layer_of(model)
    weight = layer.base_layer.weight
    both = torch.stack([weight, 2 * weight])
    return [torch.vmap(lambda one: functional_call(layer, {"base_layer.weight": one}, (x,)))(both)]


def with_another_default_dtype(model, x):
    torch.set_default_dtype(torch.float64)
    try:
        return [model(x)]
    finally:
        torch.set_default_dtype(torch.float32)


def under(context):
    def run_under(model, x):
        with context():
            return [model(x)]

    return run_under


@torch.enable_grad()
def gradients(model, x):
    model.zero_grad(set_to_none=True)
    leaf = x.clone().requires_grad_()
    model(leaf).sum().backward()
    return [leaf.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


@torch.enable_grad()
def gradients_of_weights_alone(model, x):
    model.zero_grad(set_to_none=True)
    model(x).sum().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


WAYS = {
    "inference mode": under(torch.inference_mode),
    "autocast": under(lambda: torch.autocast("cpu", dtype=torch.bfloat16)),
    "autocast, disabled": under(lambda: torch.autocast("cpu", enabled=False)),
    "another default device": under(lambda: torch.device("cpu")),
    "dispatch mode": followed,
    "vmap": lambda model, x: [torch.vmap(model)(x)],
    "vmap over weights": mapped_over_weights,
    "functional_call": with_another_weight,
    "jit.trace": jit_traced,
    "make_fx": lambda model, x: [torch.fx.experimental.proxy_tensor.make_fx(layer_of(model))(x)(x)],
    "forward mode": differentiated_forward,
    "default dtype": with_another_default_dtype,
    "gradients": gradients,
    "gradients of weights": gradients_of_weights_alone,
    "func.grad": lambda model, x: [torch.func.grad(lambda one: model(one).sum())(x)],
}


@pytest.mark.parametrize("way", WAYS)
def test_whoever_follows_operations_sees_them_all(way, taken):
    """Transforms, tracers, modes and gradients get what they get without a cache."""
    x = sample("linear")
    with torch.no_grad():
        expected = WAYS[way](make(), x)
    model = make()
    with dora_cache.attach(model), torch.no_grad():
        for _ in range(3):
            model(x)
        assert taken[-1]
        found = WAYS[way](model, x)
    assert expected
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert type(one) is type(other)
        if isinstance(other, torch.Tensor):
            assert torch.equal(one, other)
        else:
            assert one == other


def test_bypass(taken):
    """Within bypass() the layer is not used as it is bound; afterwards it is again."""
    model = make()
    x = sample("linear")
    with dora_cache.attach(model) as cache:
        for _ in range(3):
            run(model, x)
        taken.clear()
        hits = cache.stats().hits
        with cache.bypass():
            run(model, x)
        assert taken == [False]
        assert cache.stats().hits == hits
        run(model, x)
        assert taken == [False, True]


def test_copies_are_not_bound(taken):
    """Copies and pickles are PEFT's alone, and a shallow copy that shares the variants as well."""
    model = make()
    x = sample("linear")
    with dora_cache.attach(model):
        for _ in range(3):
            run(model, x)
        layer = layer_of(model)
        shallow = copy.copy(layer)
        carried = copy.copy(layer)
        carried.__class__ = type(layer)
        carried.__dict__.update(layer.__dict__)
        for one in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), shallow, carried):
            for _ in range(3):
                run(layer, x)
            assert taken[-1]
            taken.clear()
            for _ in range(2):
                assert torch.equal(run(one, x), run(copy.deepcopy(one), x))
                with torch.no_grad():
                    for parameter in one.parameters():
                        parameter.mul_(1.1)
            assert not any(taken)
        assert b"Bound" not in pickle.dumps(layer)
        assert not any("bound" in name for name in layer.state_dict())


@BOTH
def test_nothing_is_kept_alive(numerics):
    """A dropped value is freed though the layer is still bound to it; so is a deleted adapter's."""
    model = make()
    x = sample("linear")
    with dora_cache.attach(model, numerics=numerics) as cache:
        for _ in range(3):
            run(model, x)
        layer = layer_of(model)
        variant = layer.lora_variant["first"]
        entry = variant.bound.shortcut.entry
        values = [weakref.ref(tensor) for tensor in entry.tensors]
        del entry
        cache.invalidate()
        gc.collect()
        assert variant.bound is not None
        assert not any(value() is not None for value in values)
        run(model, x)
        parts = [weakref.ref(part_of(layer, name)) for name in PARTS]
        variant = weakref.ref(variant)
        with quiet():
            model.delete_adapter("first")
        gc.collect()
        assert variant() is None
        assert not any(part() is not None for part in parts)


def test_detaching_unbinds():
    """The variant that holds the bound form is freed without the garbage collector."""
    model = make()
    x = sample("linear")
    cache = dora_cache.attach(model)
    for _ in range(3):
        run(model, x)
    layer = layer_of(model)
    assert layer.lora_variant["first"].bound is not None
    variant = weakref.ref(layer.lora_variant["first"])
    cache.detach()
    assert variant() is None
    assert type(layer.lora_variant["first"]) is DoraLinearVariant


@BOTH
@pytest.mark.parametrize("bias", [True, False])
def test_a_hit_takes_few_python_functions(numerics, bias):
    """At most ten, the layer's forward included."""
    model = make(bias=bias)
    layer, x = layer_of(model), sample("linear")
    with dora_cache.attach(model, numerics=numerics), torch.no_grad():
        for _ in range(3):
            layer(x)
        counted = [count_frames(lambda: layer.forward(x)) for _ in range(5)]
    assert min(counted) - 1 <= 10  # without the lambda


# With kernels, played by PyTorch's operations


class Played:
    """Stands for a kernel's launch; adds up what a kernel would, or fails."""

    def __init__(self):
        self.launched = []
        self.works = True

    def combine(self, rows, tensors, numbers):
        result, delta, scale, bias, output = tensors
        assert rows == result.shape[0]
        base = result if bias is result else result - bias
        output.copy_(result + ((scale - 1) * base + scale * delta * numbers[0]))
        self.launched.append("combine")

    def combine_fast(self, rows, tensors, numbers):
        result, delta, scale, shift, output = tensors
        assert rows == result.shape[0]
        output.copy_(scale * (result + numbers[0] * delta) + (0 if shift is result else shift))
        self.launched.append("combine_fast")

    def few(self, x, result, first, last, scale, shift, scaling, output):
        delta = x @ first.T @ last.T
        output.copy_(scale * (result + scaling * delta) + (0 if shift is None else shift))
        self.launched.append("few")

    def launch(self, name):
        def launch(*args):
            if self.works:
                getattr(self, name)(*args)
            return self.works

        return launch


def stand_in(monkeypatch, name, result):
    """Have a function of the kernels' module return something; its arguments must fit."""
    signature = inspect.signature(getattr(kernels, name))

    def function(*args, **kwargs):
        signature.bind(*args, **kwargs)
        return result()

    monkeypatch.setattr(kernels, name, function)


@pytest.fixture
def played(monkeypatch):
    played = Played()
    monkeypatch.setattr(kernels, "available", lambda *_: True)
    stand_in(monkeypatch, "combiner", lambda: (played.launch("combine"), torch.float32))
    stand_in(monkeypatch, "fast_combiner", lambda: played.launch("combine_fast"))
    stand_in(monkeypatch, "few_rows", lambda: played.launch("few"))
    monkeypatch.setattr(bound, "cuda_device", lambda: -1)  # a CPU's number
    return played


@BOTH
@pytest.mark.parametrize("bias", [True, False])
def test_layers_launch_kernels(numerics, bias, played, monkeypatch):
    """On their own device, as long as the bias is as it was and the kernels work."""
    model = make(bias=bias)
    layer = layer_of(model)
    few, many = sample("linear"), torch.randn(4, 9, 12)
    loose = 1e-5 if numerics == "fast" else 0

    def check(x, *launched):
        with cache.bypass():
            expected = run(model, x)
        del played.launched[:]
        for _ in range(2):
            torch.testing.assert_close(run(model, x), expected, rtol=loose, atol=loose)
        assert played.launched[-1:] == list(launched)

    with dora_cache.attach(model, numerics=numerics) as cache:
        for _ in range(2):
            run(model, few)
        names = {"peft": ("combine", "combine"), "fast": ("few", "combine_fast")}[numerics]
        check(few, names[0])
        check(many, names[1])
        monkeypatch.setattr(bound, "cuda_device", lambda: 1)
        check(few)
        monkeypatch.setattr(bound, "cuda_device", lambda: -1)
        check(few, names[0])
        if bias and numerics == "peft":
            plain = layer.base_layer.bias
            layer.base_layer.bias = nn.Parameter(torch.ones(16)[::2])
            check(few)
            layer.base_layer.bias = nn.Parameter(torch.ones(1))
            check(few)
            layer.base_layer.bias = None
            check(few)
            layer.base_layer.bias = plain
            check(few, names[0])
        played.works = False
        check(few)
        check(many)


class Compiler:
    """Plays Triton: a kernel that is compiled at its first launch, and what launches it then."""

    launch_cooperative_grid = launch_pdl = False
    profile_scratch_size = 0

    def __init__(self, monkeypatch, version="3.5.1", scratch=0):
        monkeypatch.setattr(triton_launch, "raw_stream", lambda _: 7)
        monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__=version))
        self.compiled = []  # arguments of public launches
        self.launched = []  # of those past them
        self.packed_metadata = self.function = self.run = self
        self.global_scratch_size = scratch
        self.broken = False

    def __getitem__(self, grid):
        def launch(*args, **_):
            self.compiled.append((grid, args))
            return self

        return launch

    def __call__(self, *args):
        if self.broken:
            raise TypeError("function takes exactly 99 arguments")
        self.launched.append(args)

    def launch(self, *args):
        self(*args, "by the function in C")


@pytest.mark.parametrize(
    ("version", "scratch", "by"),
    [("3.5.1", 0, "its launcher"), ("3.6.0", 0, "C"), ("3.6.0", 64, "its launcher")],
)
def test_launcher(monkeypatch, version, scratch, by):
    """The public way first, and for what is not aligned, and once the other one has failed."""
    triton = Compiler(monkeypatch, version, scratch)
    launcher = Launcher(triton, 0, 3, (16,), (True,))
    tensor = torch.zeros(64)
    one, other = tensor[:16], tensor[32:]
    launcher.launch(2, (one, other), (0.5,))
    assert triton.compiled == [((2, 3, 1), (one, other, 16, 0.5, True))]
    launcher.launch(5, (one, other), (0.25,))
    given = one.data_ptr(), other.data_ptr(), 16, 0.25, True
    (launched,) = triton.launched
    if by == "C":
        flags = False, False, None, None
        usual = triton, None, None, None
        assert launched == (5, 3, 1, 7, triton, *flags, *usual, *given, "by the function in C")
    else:
        assert launched == (5, 3, 1, 7, triton, triton, None, None, None, *given)
    launcher.launch(2, (one, tensor[1:]), (0.5,))
    assert len(triton.compiled) == 2
    triton.broken = True
    launcher.launch(2, (one, other), (0.5,))
    triton.broken = False
    launcher.launch(2, (one, other), (0.5,))
    assert len(triton.compiled) == 4
    assert len(triton.launched) == 1


def test_launcher_learns_from_aligned_tensors_alone(monkeypatch):
    """What was compiled for others is slower, or wrong where it is the other way round."""
    triton = Compiler(monkeypatch)
    launcher = Launcher(triton, 0, 1, (), ())
    tensor = torch.zeros(64)
    for one in (tensor[1:], tensor, tensor):
        launcher.launch(1, (one,))
    assert (len(triton.compiled), len(triton.launched)) == (2, 1)


@BOTH
def test_a_layer_that_cannot_be_bound_runs_as_others(numerics, monkeypatch):
    """A failure costs one warning and the speed, never an output."""

    def fail(*_):
        raise RuntimeError("of this test")

    for name in ("_Exact", "_Fast"):
        monkeypatch.setattr(bound, name, fail)
    x, model = sample("linear"), make()
    expected = run(model, x)
    with dora_cache.attach(model, numerics=numerics) as cache:
        with pytest.warns(dora_cache.CacheWarning, match="binding a layer .* of this test"):
            found = [run(model, x) for _ in range(5)]
        assert cache.stats().hits >= 4
    loose = 1e-5 if numerics == "fast" else 0
    for one in found:
        torch.testing.assert_close(one, expected, rtol=loose, atol=loose)
