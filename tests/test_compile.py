"""torch.compile: whole graphs, buffers that follow every event, and no recompilations for it."""

import copy
import gc
import pickle
import threading
import warnings
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.helpers import rescale_adapter_scale
from peft.utils import hotswap
from peft.utils.hotswap import hotswap_adapter_from_state_dict as hotswap_imported_early
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from torch import nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from zoo import activate, balanced, dora_config, dora_model, quiet, run, sample, shake

import dora_cache
from dora_cache import backends
from dora_cache.attributes import SLOT
from dora_cache.backends.lru import LRUBackend
from dora_cache.reasons import Reason
from dora_cache.recipes import buffer as buffer_module
from dora_cache.recipes.buffer import Buffer
from dora_cache.recipes.dynamo import traced_writes_show

KINDS = ["linear", "embedding", "conv2d"]
EVERY_KIND = [*KINDS, "conv1d_transformers", "conv1d", "conv3d"]
NUMERICS = ["peft", "fast"]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Compiled:
    """A compiled model with adapters "first" and "second" and a cache, and how often it compiled.

    The first is active and, as when loaded for inference, requires no gradients.
    """

    def __init__(
        self,
        kind="linear",
        *,
        fullgraph=True,
        dtype=torch.float32,
        device="cpu",
        config=None,
        **more,
    ):
        self.kind = kind
        model = dora_model(kind, dtype=dtype, adapters=("first", "second"), **config or {})
        self.model, self.x = model.to(device), sample(kind, dtype).to(device)
        self.activate("first")
        self.cache = dora_cache.attach(self.model, **more)
        self.counter = CompileCounter()
        self.compiled = torch.compile(self.model, backend=self.counter, fullgraph=fullgraph)

    @property
    def layer(self):
        return self.model.base_model.model.layer

    @property
    def compilations(self):
        return self.counter.frame_count

    def activate(self, *adapters):
        self.model.base_model.set_adapter(list(adapters), inference_mode=True)

    def buffer(self, adapter="first"):
        """Return what compiled code reads of an adapter, or None."""
        buffers = self.layer.__dict__[SLOT].buffers.values()
        return next((one for one in buffers if one.adapters == (adapter,)), None)

    def values(self, adapter="first"):
        """Return the tensors in it; none if it is void."""
        buffer = self.buffer(adapter)
        values = None if buffer is None else buffer.values
        if values is None:
            return ()
        return (values,) if isinstance(values, torch.Tensor) else values

    def addresses(self, adapter="first"):
        return [value.data_ptr() for value in self.values(adapter)]

    def parameters(self, adapter="first"):
        named = self.model.named_parameters()
        return [weight for name, weight in named if f".{adapter}" in name]

    def plain(self):
        """Return the output of PEFT's own code, with nothing looked up or filled by the way."""
        return run(copy.deepcopy(self.model), self.x)

    def check(self):
        """Return the compiled output, which must be PEFT's: to the bit where that is promised."""
        output = run(self.compiled, self.x)
        expected = self.plain()
        if self.cache.config.numerics == "peft":
            assert torch.equal(output, expected)
        else:
            torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
        return output


# Whole graphs, and the same numbers


@pytest.mark.parametrize("numerics", NUMERICS)
@pytest.mark.parametrize("kind", EVERY_KIND)
def test_layers_compile_as_whole_graphs_right_after_attaching(kind, numerics):
    """One graph, without a forward before, and PEFT's numbers."""
    setup = Compiled(kind, numerics=numerics)
    setup.check()
    assert setup.compilations == 1
    assert setup.values()


def test_peft_itself_does_not_compile_as_a_whole_graph():
    """What all of this is for; if it passes one day, recipes can be simpler."""
    model = dora_model("embedding")
    with pytest.raises(torch._dynamo.exc.Unsupported):
        run(torch.compile(model, backend="eager", fullgraph=True), sample("embedding"))


@pytest.mark.parametrize("cast", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_low_precision_is_that_of_the_eager_model(kind, cast):
    """On bf16 weights too the bits are PEFT's, with adapters in float32 and in bf16."""
    config = {"autocast_adapter_dtype": cast}
    setup = Compiled(kind, dtype=torch.bfloat16, config=config)
    assert setup.check().dtype is run(setup.model, setup.x).dtype


def _error(model, x, backend):
    """Return by how much a compiled model differs from itself, relative to its output."""
    expected = run(model, x)
    output = run(torch.compile(model, backend=backend, fullgraph=True), x)
    return ((output - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize(
    ("kind", "numerics", "dtype"),
    [
        ("linear", "peft", torch.float32),
        ("linear", "fast", torch.bfloat16),
        ("embedding", "fast", torch.float32),
        ("conv2d", "peft", torch.float32),
    ],
)
def test_inductor_is_as_close_as_it_is_for_lora(kind, numerics, dtype):
    """What inductor changes in DoRA's numbers is what it changes in plain LoRA's."""
    x = sample(kind, dtype)
    lora = _error(dora_model(kind, dtype=dtype, use_dora=False), x, "inductor")
    model = dora_model(kind, dtype=dtype)
    activate(model, "first")
    with dora_cache.attach(model, numerics=numerics):
        # Two roundings of the output's type, where LoRA happens to come out exact.
        assert _error(model, x, "inductor") <= max(lora, 2 * torch.finfo(dtype).eps)


def test_inductor_follows_the_buffers():
    """Inductor's code reads the buffers anew, also in the mode for CUDA graphs."""
    setup = Compiled()
    counter = CompileCounterWithBackend("inductor")
    setup.compiled = torch.compile(setup.model, backend=counter, fullgraph=True)
    graphed = torch.compile(setup.model, mode="reduce-overhead", fullgraph=True)
    for change in (lambda: None, lambda: _step(setup), lambda: setup.layer.set_scale("first", 3)):
        change()
        expected = setup.plain()
        torch.testing.assert_close(run(setup.compiled, setup.x), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(run(graphed, setup.x), expected, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("numerics", NUMERICS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.filterwarnings("ignore:TensorFloat32", "ignore:The CUDA Graph is empty")
def test_compiled_for_a_gpu(mode, kind, numerics):
    """Whole graphs, CUDA graphs too; right after every change, and compiled once."""
    setup = Compiled(kind, numerics=numerics, device="cuda")
    traced_writes_show()  # once in a process, which compiles
    compiled = torch.compile(setup.model, mode=mode, fullgraph=True)
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    changes = [lambda: None, lambda: _step(setup), lambda: setup.layer.set_scale("first", 3)]
    changes += [lambda: _load(setup)]
    if kind != "embedding":  # which PEFT cannot hotswap
        changes += [lambda: _hotswap(setup)]
    for change in changes:
        with quiet():
            change()
        expected = setup.plain()
        for _ in range(4):  # CUDA graphs are recorded at the second call
            torch.testing.assert_close(run(compiled, setup.x), expected, rtol=1e-4, atol=1e-5)
        assert graphs["unique_graphs"] == before + 1


@pytest.mark.parametrize("numerics", NUMERICS)
def test_frozen_weights(numerics):
    """Where the compiler makes constants of weights, PEFT's code is compiled, for each adapter."""
    setup = Compiled(numerics=numerics)
    setup.check()
    with torch._inductor.config.patch(freezing=True):
        frozen = torch.compile(setup.model, fullgraph=True)
        for change in (
            lambda: None,
            lambda: setup.activate("second"),
            lambda: setup.layer.set_scale("second", 3),
            lambda: setup.activate("first"),
        ):
            change()
            torch.testing.assert_close(run(frozen, setup.x), setup.plain(), rtol=1e-5, atol=1e-5)
    assert setup.cache.stats().reasons[Reason.FROZEN.value] > 0
    setup.check()


def test_buffers_have_addresses_that_cuda_graphs_rely_on():
    """They are marked, so that graphs do not copy them first."""
    setup = Compiled()
    setup.check()
    for value in setup.values():
        assert value._dynamo_static_input_type == "unguarded"


@pytest.mark.parametrize("numerics", NUMERICS)
def test_two_active_adapters_keep_their_order(numerics):
    """Several active adapters work upon each other's results, as in PEFT."""
    setup = Compiled(numerics=numerics)
    setup.activate("second", "first")
    setup.check()
    setup.activate("first", "second")
    setup.check()


def test_repeated_blocks_share_compiled_code():
    """Blocks compiled one by one compile once, as with plain LoRA: no guard tells them apart."""

    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x):
            return torch.tanh(self.layer(x))

    compilations = []
    for use_dora in (False, True):
        torch._dynamo.reset()
        base = nn.Sequential(*[Part() for _ in range(10)])
        model = get_peft_model(base, dora_config(use_dora=use_dora)).eval()
        shake(model)
        if use_dora:
            dora_cache.attach(model)
        x = torch.randn(2, 8)
        expected = run(model, x)
        counter = CompileCounter()
        for part in model.base_model.model:
            part.compile(backend=counter, fullgraph=True)
        assert torch.equal(run(model, x), expected)
        compilations.append(counter.frame_count)
    assert compilations == [1, 1]


# Changes


def _step(setup, fused=False):
    weights = setup.parameters()
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    torch.optim.AdamW(weights, lr=0.1, fused=fused).step()


def _train(setup):
    setup.model.train()
    for weight in setup.parameters():
        weight.requires_grad_(requires_grad=True)
    setup.model(setup.x).sum().backward()
    _step(setup, fused=True)
    for weight in setup.parameters():
        weight.requires_grad_(requires_grad=False)
    setup.model.eval()


def _others(setup, adapter="first"):
    """Return other weights for an adapter, by their names in the model."""
    weights = setup.model.state_dict().items()
    return {name: 1.5 * value for name, value in weights if f".{adapter}" in name}


def _load(setup, **more):
    setup.model.load_state_dict(_others(setup), strict=False, **more)


def _load_adapter(setup):
    weights = get_peft_model_state_dict(setup.model, adapter_name="first")
    weights = {name: 1.5 * value for name, value in weights.items()}
    set_peft_model_state_dict(setup.model, weights, adapter_name="first")


def _load_base(setup):
    weights = setup.model.state_dict().items()
    weights = {name: 1.5 * value for name, value in weights if "base_layer" in name}
    setup.model.load_state_dict(weights, strict=False)


def _merge_and_unmerge(setup):
    setup.model.merge_adapter(["second"])
    setup.model.unmerge_adapter()


def _rescale(setup):
    setup.layer.scaling = {name: 2 * value for name, value in setup.layer.scaling.items()}


def _hotswap(setup, swap=None):
    swap = swap or hotswap.hotswap_adapter_from_state_dict
    swap(setup.model, _others(setup), "first", dora_config(setup.kind, alpha=17))


def _invalidate(setup):
    for weight in setup.parameters():
        weight.data.mul_(1.5)  # which nothing counts
    setup.cache.invalidate(adapter="first")


EVENTS = {
    "optimizer": _step,
    "fused optimizer": lambda setup: _step(setup, fused=True),
    "training": _train,
    "load_state_dict": _load,
    "load_state_dict, assigned": lambda setup: _load(setup, assign=True),
    "load_state_dict of the base": _load_base,
    "set_peft_model_state_dict": _load_adapter,
    "merge and unmerge": _merge_and_unmerge,
    "set_scale": lambda setup: setup.layer.set_scale("first", 3),
    "scale_layer": lambda setup: setup.layer.scale_layer(3),
    "unscale_layer": lambda setup: setup.layer.unscale_layer(3),
    "a new scaling": _rescale,
    "hotswap": _hotswap,
    "invalidate": _invalidate,
}


def _happen(event, kind, numerics):
    if event == "hotswap" and kind == "embedding":
        pytest.skip("PEFT cannot hotswap embeddings")
    setup = Compiled(kind, numerics=numerics)
    before, addresses = setup.check(), setup.addresses()
    with quiet():
        EVENTS[event](setup)
    after = setup.check()
    assert setup.compilations == 1
    assert setup.addresses() == addresses
    scaled_embedding = kind == "embedding" and event in {"scale_layer", "unscale_layer"}
    if event != "merge and unmerge" and not scaled_embedding:  # PEFT scales no embeddings
        assert not torch.allclose(before, after, rtol=1e-3)
    setup.cache.detach()


@pytest.mark.parametrize("event", EVENTS)
def test_events_fill_buffers_again(event):
    """After an event the next compiled call is right, from the same graph and addresses."""
    for numerics in NUMERICS:
        _happen(event, "linear", numerics)


@pytest.mark.parametrize("event", ["attribute", "scale", "mode"])
def test_events_within_compiled_code(event):
    """TorchDynamo traces what sets them off, and cannot follow who hears of them."""
    setup = Compiled()
    setup.check()

    def forward(x):
        if event == "attribute":
            setup.layer.note = 3
        elif event == "scale":
            setup.layer.set_scale("first", 3.0)
        else:
            setup.layer.train()
            setup.layer.eval()
        return setup.model(x)

    found = run(torch.compile(forward, backend="aot_eager"), setup.x)
    assert torch.equal(found, setup.plain())
    setup.check()


@pytest.mark.parametrize("event", ["fused optimizer", "load_state_dict", "merge and unmerge"])
def test_events_fill_buffers_of_other_layers(event):
    """The same, on embeddings and convolutions."""
    for kind in ("embedding", "conv2d"):
        _happen(event, kind, "fast")


@pytest.mark.parametrize("numerics", NUMERICS)
def test_refresh_fills_what_changed_in_silence(numerics):
    """Changes that no event reports are found by refresh(), which counts them."""
    setup = Compiled(numerics=numerics)
    setup.check()
    weights = setup.parameters()
    assert setup.cache.refresh() == 0
    with torch.no_grad():
        weights[0].mul_(1.5)
    assert setup.cache.refresh() == 1
    setup.check()
    weights[1].data = weights[1].data * 1.5
    assert setup.cache.refresh() == 1
    setup.check()
    setup.layer.lora_B["first"].weight = nn.Parameter(torch.randn(8, 4), requires_grad=False)
    assert setup.cache.refresh() == 1
    setup.check()
    setup.layer.base_layer.weight = nn.Parameter(torch.randn(8, 12), requires_grad=False)
    assert setup.cache.refresh() == 1
    setup.check()
    setup.layer.scaling["first"] = 0.25
    assert setup.cache.refresh() == 1
    setup.check()
    assert setup.cache.refresh() == 0
    assert setup.compilations == 1


def test_rescale_adapter_scale():
    """PEFT's context manager puts other dictionaries in the scaling's place."""
    setup = Compiled()
    before = setup.check()
    with rescale_adapter_scale(setup.model, 3):
        assert not torch.equal(setup.check(), before)
    assert torch.equal(setup.check(), before)
    assert setup.compilations == 1


def test_refresh_is_a_method_of_open_caches():
    """On a cache that is detached it is the usual error; without compiled code it does nothing."""
    setup = Compiled()
    run(setup.model, setup.x)
    with torch.no_grad():
        setup.parameters()[0].mul_(2)
    assert setup.cache.refresh() == 0
    setup.cache.detach()
    with pytest.raises(dora_cache.DetachedError):
        setup.cache.refresh()


def test_new_parameters_are_noticed():
    """So are other objects in the parameters' places, with nothing said and with refresh()."""
    setup = Compiled()
    setup.check()
    setup.layer.lora_A["first"].weight = nn.Parameter(torch.randn(4, 12), requires_grad=False)
    setup.check()
    setup.layer.lora_A["first"].weight = nn.Parameter(torch.randn(4, 12), requires_grad=False)
    setup.cache.refresh()
    setup.check()
    assert setup.compilations == 1


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        ("linear", "lora_magnitude_vector.first"),
        ("linear", "base_layer"),
        ("conv2d", "lora_A.first"),
    ],
)
def test_functional_call(kind, part):
    """Weights put in place for one call are used by it and by no other, inside a graph and out."""
    setup = Compiled(kind)
    setup.check()
    name = f"base_model.model.layer.{part}.weight"
    weights = {name: 1.5 * setup.model.get_parameter(name).detach()}
    other = copy.deepcopy(setup.model)
    other.load_state_dict(weights, strict=False)
    expected = run(other, setup.x)

    def call(weights, x):
        return torch.func.functional_call(setup.model, weights, (x,))

    inside = torch.compile(call, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(inside(weights, setup.x), expected)
        setup.check()
        for _ in range(2):
            weights = {f"_orig_mod.{key}": weight for key, weight in weights.items()}
            outside = torch.func.functional_call(setup.compiled, weights, (setup.x,))
            assert torch.equal(outside, expected)
            weights = {name: next(iter(weights.values())).clone()}
            setup.check()
    assert setup.compilations <= 8


def test_weights_that_come_and_go():
    """If they are never the same objects, each call derives, and nothing is compiled again."""
    setup = Compiled()
    for _ in range(10):
        setup.layer.base_layer.weight = nn.Parameter(torch.randn(8, 12), requires_grad=False)
        setup.check()
    assert setup.compilations == 1


def test_weights_that_come_and_go_without_the_check():
    """If they are never the same objects, it is given up to buffer, before compiling is."""
    setup = Compiled(compiled_check=False)
    for _ in range(10):
        setup.layer.base_layer.weight = nn.Parameter(torch.randn(8, 12), requires_grad=False)
        setup.check()
    assert setup.compilations <= 6
    assert not setup.values()
    assert setup.cache.stats().nbytes == 0


def test_computed_weights():
    """What a parametrized base weight is computed from cannot be checked: the graph derives."""

    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    setup = Compiled()
    nn.utils.parametrize.register_parametrization(setup.layer.base_layer, "weight", Double())
    setup.check()
    with torch.no_grad():
        setup.layer.base_layer.parametrizations.weight.original.mul_(1.5)
    setup.check()
    assert not setup.values()


def test_a_lookup_of_the_layer_fills_its_buffer():
    """Whatever made an eager forward derive anew is then also in compiled code."""
    setup = Compiled()
    setup.check()
    run(setup.model, setup.x)
    with torch.no_grad():
        setup.layer.lora_magnitude_vector["first"].weight.mul_(2)
    run(setup.model, setup.x)
    setup.check()
    assert setup.compilations == 1


def test_hotswap_imported_before_attaching_is_right_after_a_recompilation():
    """Nothing tells when it has written its last; so nothing is filled until it is traced."""
    setup = Compiled()
    setup.check()
    _hotswap(setup, hotswap_imported_early)
    assert not setup.values()
    setup.check()
    assert setup.compilations == 2
    _hotswap(setup, hotswap_imported_early)
    setup.cache.refresh()
    setup.check()
    assert setup.compilations == 2
    for _ in range(8):
        _hotswap(setup, hotswap_imported_early)
        setup.check()
    assert setup.compilations <= 6


def test_hotswap_of_a_prepared_model():
    """PEFT's way to hotswap other ranks and scalings into compiled models, with tensor scalings."""
    setup = Compiled()
    prepare_model_for_compiled_hotswap(setup.model, target_rank=8, check_compiled="ignore")
    setup.check()
    addresses = setup.addresses()
    for rank in (6, 8):
        config = dora_config(r=rank, alpha=11)
        other = get_peft_model(nn.ModuleDict({"layer": nn.Linear(12, 8)}), config, "first")
        shake(other)
        hotswap.hotswap_adapter_from_state_dict(
            setup.model,
            {name: value for name, value in other.state_dict().items() if ".first." in name},
            "first",
            config,
        )
        setup.check()
    assert setup.compilations == 1
    assert setup.addresses() == addresses


def test_events_of_one_adapter_leave_the_others_buffers():
    """Only what an event concerns is derived again."""
    setup = Compiled()
    setup.check()
    setup.activate("second")
    setup.check()
    stamps = [setup.buffer(name).facts for name in ("first", "second")]
    _step(setup)
    setup.activate("first")
    setup.layer.set_scale("first", 3)
    assert setup.buffer("first").facts is not stamps[0]
    assert setup.buffer("second").facts is stamps[1]


@pytest.mark.parametrize("counted", [True, False])
def test_what_comes_while_a_buffer_is_filled_wins(monkeypatch, counted):
    """What was derived before an event, or a write that is counted, is not published."""
    setup = Compiled()
    setup.check()
    buffer, derive, calls = setup.buffer(), setup.buffer().derive, []

    def slowly(layer):
        values = derive(layer)
        calls.append(values)
        if len(calls) == 1:
            writer = threading.Thread(target=write)
            writer.start()
            writer.join()
        return values

    def write():
        weight = setup.parameters()[0]
        if counted:
            with torch.no_grad():
                weight.mul_(2)
            return
        weight.data.mul_(2)
        with setup.cache._engine.mutex.held():
            buffer.void()

    monkeypatch.setattr(buffer, "derive", slowly)
    setup.cache.invalidate()
    assert len(calls) == 2
    setup.check()


@pytest.mark.parametrize("many", [4])
def test_switching_adapters_compiles_once_for_each(many):
    """As with plain LoRA, and never again when they are switched back."""
    compilations = []
    for use_dora in (False, True):
        torch._dynamo.reset()
        names = [f"adapter{number}" for number in range(many)]
        model = dora_model(adapters=names, use_dora=use_dora)
        cache = dora_cache.attach(model) if use_dora else None
        counter = CompileCounter()
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        x = sample("linear")
        counts = []
        for name in [*names, *reversed(names), *names]:
            model.base_model.set_adapter(name, inference_mode=True)
            assert torch.equal(run(compiled, x), run(copy.deepcopy(model), x))
            counts.append(counter.frame_count)
        compilations.append(counts)
        if cache is not None:
            assert cache.refresh() == 0
    assert compilations[0] == compilations[1]
    assert compilations[1][-1] <= many


def test_a_move_makes_new_buffers():
    """After a change of dtype the values are of the new one, and the old bytes are gone."""
    setup = Compiled()
    setup.check()
    before = setup.cache.stats().nbytes
    setup.model.double()
    setup.x = setup.x.double()
    setup.check()
    assert [value.dtype for value in setup.values()] == [torch.float64]
    assert setup.cache.stats().nbytes == 2 * before


# Where buffers are not read


@pytest.mark.parametrize("numerics", NUMERICS)
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        *[(kind, {"backend": "lru", "max_bytes": 20}) for kind in KINDS],
        ("linear", {"backend": "null"}),
        ("linear", {"guard": "content"}),
    ],
)
def test_without_buffers_the_graph_derives(kind, numerics, settings):
    """Without room for them, and where contents are to be compared: whole graphs, never stale."""
    setup = Compiled(kind, numerics=numerics, **settings)
    setup.check()
    for weight in setup.parameters():
        weight.data.mul_(1.5)
    setup.check()
    assert setup.compilations == 1
    assert not setup.values()
    assert setup.cache.stats().nbytes <= 4  # the scaling
    setup.layer.set_scale("first", 3)
    setup.check()


@pytest.mark.parametrize("numerics", NUMERICS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_flow_as_in_peft(kind, numerics):
    """In eval mode with gradients wanted, the norm is a constant and the magnitude is live."""
    setup = Compiled(kind, numerics=numerics)
    setup.model.base_model.set_adapter("first")

    def gradients(model):
        setup.model.zero_grad()
        model(setup.x).pow(2).sum().backward()
        named = setup.model.named_parameters()
        return {name: weight.grad.clone() for name, weight in named if weight.grad is not None}

    found = gradients(setup.compiled)
    with setup.cache.bypass():
        torch.testing.assert_close(found, gradients(setup.model))
    assert len(found) == 3
    assert setup.compilations == 1
    _step(setup)
    setup.check()


@pytest.mark.parametrize("numerics", NUMERICS)
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_is_that_of_the_eager_model(kind, numerics):
    """PEFT derives other values under autocast; then the graph derives them."""
    setup = Compiled(kind, numerics=numerics)
    setup.check()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = run(setup.compiled, setup.x)
        expected = run(setup.model, setup.x)
        assert output.dtype is expected.dtype
        rounded = 0.01 if expected.dtype is torch.bfloat16 else 1e-5
        tolerance = 0 if numerics == "peft" else rounded
        torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)
    assert setup.cache.stats().reasons[Reason.AUTOCAST.value] > 0
    setup.check()


def test_buffers_filled_under_autocast_are_as_without():
    """An event's surroundings do not show in what is filled."""
    setup = Compiled()
    setup.check()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        setup.layer.set_scale("first", 3)
    setup.check()
    assert setup.compilations == 1


def test_training_runs_pefts_own_code():
    """With its graph breaks; buffers are not read, and are right after training."""
    setup = Compiled(fullgraph=False)
    setup.check()
    setup.model.train()
    torch.testing.assert_close(setup.compiled(setup.x), setup.model(setup.x))
    _step(setup, fused=True)
    torch.testing.assert_close(setup.compiled(setup.x), setup.model(setup.x))
    setup.model.eval()
    setup.check()


def an_old_policy(setup):
    setup.model.train()
    for weight in setup.parameters("second"):
        weight.data.mul_(1.5)
    setup.model.eval()


def containers(setup):
    parts = [getattr(setup.layer, name) for name in ("lora_A", "lora_B", "lora_magnitude_vector")]
    for part in parts:
        part.train()
    for weight in setup.parameters("second"):
        weight.data.mul_(1.5)
    for part in parts:
        part.eval()


@pytest.mark.parametrize("numerics", NUMERICS)
@pytest.mark.parametrize("write", [an_old_policy, containers])
def test_writes_in_silence_while_another_adapter_trains(write, numerics):
    """A switch to eval mode fills every adapter's buffer: at its address, not compiled again."""
    setup = Compiled(numerics=numerics)
    outputs = {}
    for adapter in ("first", "second"):
        setup.activate(adapter)
        outputs[adapter] = setup.check()
    setup.activate("first")
    setup.check()
    compilations = setup.compilations
    addresses = setup.addresses("second")
    write(setup)
    setup.activate("second")
    assert not torch.equal(setup.check(), outputs["second"])
    assert setup.addresses("second") == addresses
    assert setup.compilations == compilations


def test_nothing_is_derived_in_vain(monkeypatch):
    """Steps in training mode, and merging, void buffers; leaving that state fills them, once."""
    setup = Compiled()
    setup.check()
    buffer, derive, calls = setup.buffer(), setup.buffer().derive, []
    monkeypatch.setattr(buffer, "derive", lambda layer: calls.append(layer) or derive(layer))
    setup.model.train()
    _step(setup)
    _step(setup, fused=True)
    setup.model.merge_adapter()
    assert not calls
    setup.model.unmerge_adapter()
    assert not calls
    setup.model.eval()
    assert len(calls) == 1
    setup.check()
    assert setup.compilations == 1


def test_merged_and_disabled_adapters():
    """Neither reads buffers; both are right, and so is what comes after."""
    setup = Compiled()
    setup.check()
    setup.model.merge_adapter()
    torch.testing.assert_close(run(setup.compiled, setup.x), setup.plain())
    setup.model.unmerge_adapter()
    setup.check()
    with setup.model.disable_adapter():
        setup.check()
    setup.check()


def test_inference_mode():
    """Buffers filled under inference_mode serve outside of it, too."""
    setup = Compiled()
    with torch.inference_mode():
        first = setup.compiled(setup.x)
    assert torch.equal(setup.check(), first)
    x = setup.x.clone().requires_grad_()
    setup.compiled(x).sum().backward()
    assert x.grad is not None
    torch._dynamo.reset()
    other = Compiled()
    with torch.inference_mode():
        other.compiled(other.x)
    assert not any(value.is_inference() for value in other.values())


def test_a_forward_set_on_an_adapters_module():
    """PEFT calls it, which compiled code would not if it read the module's weight."""
    setup = Compiled(fullgraph=False)
    part = setup.layer.lora_B["first"]
    plain = part.forward
    part.forward = lambda x: 2 * plain(x)
    setup.check()


def test_hooks_on_an_adapters_modules():
    """They may change what PEFT derives, so PEFT's own code runs."""
    setup = Compiled(fullgraph=False)
    setup.layer.lora_B["first"].register_forward_hook(lambda module, args, output: 2 * output)
    setup.check()
    assert not setup.values()


def test_exported_programs_derive():
    """torch.export runs PEFT's code: nothing that was filled is baked in, weights are inputs."""
    setup = Compiled("conv2d")
    setup.check()
    for strict in (False, True):
        with torch.no_grad(), quiet():  # PEFT's own cache is a side effect to a strict export
            program = torch.export.export(setup.model, (setup.x,), strict=strict)
        assert not program.constants
        exported = program.module()
        weights = {name: 1.5 * value for name, value in exported.state_dict().items()}
        exported.load_state_dict(weights)
        other = copy.deepcopy(setup.model)
        other.load_state_dict(weights, strict=False)  # "second" is no part of the program
        torch.testing.assert_close(run(exported, setup.x), run(other, setup.x))


def test_traced_programs_derive():
    """So do torch.jit.trace and make_fx: they record the derivation."""
    setup = Compiled()
    setup.check()
    traced = torch.jit.trace(setup.model.base_model.model, setup.x, check_trace=False)
    recorded = torch.fx.experimental.proxy_tensor.make_fx(
        lambda x, weight: torch.func.functional_call(
            setup.model.base_model.model,
            {"layer.lora_magnitude_vector.first.weight": weight},
            (x,),
        )
    )(setup.x, torch.randn(8))
    weight = setup.layer.lora_magnitude_vector["first"].weight
    with torch.no_grad():
        weight.mul_(2)
        torch.testing.assert_close(traced(setup.x), setup.plain())
        torch.testing.assert_close(recorded(setup.x, weight), setup.plain())


# Bytes, and leaving no trace


def test_buffers_count_towards_the_cap():
    """Entries make room for buffers, buffers for nothing, and the sum is never above the cap."""
    cap = 96  # buffers and entries of this layer have 32 bytes, and the scaling 4
    setup = Compiled(backend="lru", max_bytes=cap)
    setup.cache.warm()
    assert setup.cache.stats().nbytes == 64
    setup.check()
    assert setup.cache.stats().nbytes == 36 + 32
    setup.activate("second")
    setup.check()
    stats = setup.cache.stats()
    assert (stats.nbytes, stats.entries, stats.evictions) == (68, 0, 2)
    for adapter in ("first", "second", "first"):
        setup.activate(adapter)
        run(setup.model, setup.x)
        assert setup.cache.stats().nbytes == 68
        setup.check()
    assert balanced(setup.cache).rejections == 3
    setup.model.delete_adapter("second")
    assert setup.cache.stats().nbytes == 36


def test_backends_that_copy_on_use_leave_room_for_buffers():
    """A hot tier on the device may grow at a lookup; the sum stays within the cap."""

    class Copying(LRUBackend):
        copied = 0

        @property
        def nbytes(self):
            return super().nbytes + self.copied

        def get(self, key):
            entry = super().get(key)
            self.copied = 0 if entry is None else entry.nbytes
            return entry

        def removed(self, key, entry):
            super().removed(key, entry)
            self.copied = 0

    backends.register("copying", Copying)
    setup = Compiled(backend="copying", max_bytes=96)
    setup.check()
    for _ in range(3):
        run(setup.model, setup.x)
        assert setup.cache.stats().nbytes <= 96


def test_a_cap_that_some_buffers_fit():
    """The other layers derive in the graph, and all are right."""
    setup = Compiled(backend="lru", max_bytes=40)
    setup.check()
    setup.activate("second")
    setup.check()
    stats = setup.cache.stats()
    assert stats.nbytes == 36
    assert stats.reasons[Reason.CAP.value] > 0
    assert stats.bypasses == 0  # those values are derived, and not kept
    assert setup.values("first")
    assert not setup.values("second")
    setup.layer.set_scale("second", 5)
    setup.check()


@pytest.mark.parametrize("cap", [0, 4, 7, 8, 40])
def test_a_cap_that_some_scalings_fit(cap):
    """All of a layer's are tensors, or none; writes that raise no event are noticed either way."""
    setup = Compiled(backend="lru", max_bytes=cap)
    setup.activate("first", "second")
    setup.check()
    view = setup.layer.__dict__[SLOT].holder.view
    assert {isinstance(one, torch.Tensor) for one in view.scaling.values()} == {cap >= 8}
    for _ in range(2):
        with torch.no_grad():
            for weight in setup.parameters():
                weight.mul_(1.5)
        setup.check()
        assert setup.compilations == 1
    setup.layer.scaling["second"] = 5.0
    setup.check()
    assert setup.cache.stats().nbytes <= cap


def test_parts_that_are_announced_and_never_come():
    """A part may be overwritten, or deleted, before compiled code looks at the layer again."""
    setup = Compiled()
    setup.check()
    layer = setup.layer
    for _ in range(2):
        layer.lora_A["first"] = copy.deepcopy(layer.lora_A["first"])
    layer.lora_A["other"] = copy.deepcopy(layer.lora_A["first"])
    del layer.lora_A["other"]
    for part in list(layer.lora_magnitude_vector.values()):
        layer.lora_magnitude_vector["first"] = part
        torch.nn.Module.register_parameter(part, "weight", part.weight)
    kept = copy.deepcopy(layer.lora_B["first"])
    layer.lora_B["first"] = kept
    layer.lora_B["first"] = copy.deepcopy(kept)
    setup.check()
    holder = setup.buffer()._holder
    assert holder.watch.holds()
    layer.lora_B._modules["first"] = kept  # by hand: it had been announced
    kept.weight.data = kept.weight * 2
    assert not holder.watch.holds()
    setup.check()
    del kept
    layer.lora_B["first"] = copy.deepcopy(layer.lora_B["first"])
    setup.check()
    gc.collect()
    setup.parameters()[0].data = setup.parameters()[0] * 2
    setup.check()
    assert holder.watch.holds()
    assert not holder._coming


def test_detaching_gives_pefts_code_back():
    """Compiled code then runs PEFT's, and no tensor is left."""
    setup = Compiled(fullgraph=False)
    setup.check()
    buffer = setup.buffer()
    values = [weakref.ref(value) for value in setup.values()]
    setup.cache.detach()
    assert setup.cache.stats().nbytes == 0
    assert not setup.layer._load_state_dict_post_hooks
    assert buffer.values is None
    before = setup.compilations
    with torch.no_grad():
        setup.parameters()[0].mul_(1.5)
    setup.check()
    assert setup.compilations > before
    torch._dynamo.reset()
    gc.collect()
    assert [value() for value in values] == [None] * len(values)
    with dora_cache.attach(setup.model):
        setup.check()


def test_copies_and_pickles_carry_nothing():
    """They are PEFT's plain model; the original's buffers and hooks are not theirs."""
    setup = Compiled()
    setup.check()
    for other in (copy.deepcopy(setup.model), pickle.loads(pickle.dumps(setup.model))):
        layer = other.base_model.model.layer
        assert [vars(variant) for variant in layer.lora_variant.values()] == [{}, {}]
        assert not layer._load_state_dict_post_hooks
        assert not any(isinstance(item, Buffer) for item in gc.get_referents(vars(layer)))
        other.load_state_dict(other.state_dict())
    assert setup.layer._load_state_dict_post_hooks
    _load(setup)
    setup.check()


def test_a_shallow_copy_of_a_layer_reads_no_buffer():
    """It shares the original's dictionaries, may be given other weights, and is PEFT's."""
    for numerics in NUMERICS:
        setup = Compiled(numerics=numerics, fullgraph=False)
        setup.check()
        layer = copy.copy(setup.layer)
        if numerics == "peft":
            layer._modules = {**layer._modules, "base_layer": nn.Linear(12, 8)}
        expected = run(layer, setup.x)
        output = run(torch.compile(layer, backend="eager"), setup.x)
        assert torch.equal(output, expected)


def test_a_buffer_that_cannot_be_filled_costs_no_output(monkeypatch):
    """One warning, and the graph derives; when it works again, it is used again."""
    setup = Compiled()

    def fail(*_):
        msg = "no memory"
        raise RuntimeError(msg)

    monkeypatch.setattr(buffer_module, "_alike", fail)
    with pytest.warns(dora_cache.CacheWarning, match="no memory"):
        setup.check()
    assert not setup.values()
    monkeypatch.undo()
    torch._dynamo.reset()
    setup.check()
    assert setup.values()
    monkeypatch.setattr(setup.buffer(), "derive", fail)
    setup.layer.set_scale("first", 3)
    assert not setup.values()


def test_weights_that_cannot_be_checked():
    """Weights made under inference_mode have no version counter: the graph derives."""
    with torch.inference_mode():
        setup = Compiled()
    with torch.inference_mode():
        output = setup.compiled(setup.x)
        assert torch.equal(output, setup.model(setup.x))
    assert not setup.values()


def test_the_cache_dies_with_its_model():
    """Compiled code and registries keep neither alive."""
    setup = Compiled()
    setup.check()
    cache = weakref.ref(setup.cache)
    layer = weakref.ref(setup.layer)
    del setup
    torch._dynamo.reset()
    gc.collect()
    assert layer() is None
    assert cache() is None


def test_generate_with_a_static_cache():
    """A whole decoder compiles once for each shape, as LoRA's does, and says the same."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    prompt = torch.randint(0, 64, (1, 5))
    compilations = []
    for use_dora in (False, True):
        torch._dynamo.reset()
        config = LoraConfig(
            use_dora=use_dora, r=4, target_modules="all-linear", init_lora_weights=False
        )
        model = get_peft_model(LlamaForCausalLM(shape), config).eval()
        shake(model)
        cache = dora_cache.attach(model) if use_dora else None

        def generate(model=model):
            return model.generate(
                prompt,
                max_new_tokens=6,
                do_sample=False,
                pad_token_id=0,
                cache_implementation="static",
                disable_compile=True,  # or transformers compiles the forward by itself
            )

        counter = CompileCounter()
        decoder = model.base_model.model
        eager, decoder.forward = (
            decoder.forward,
            torch.compile(decoder.forward, backend=counter, fullgraph=True),
        )
        first = generate()
        if cache is not None:
            model.base_model.model.model.layers[0].mlp.up_proj.set_scale("default", 9)
            second = generate()
        decoder.forward = eager
        compilations.append(counter.frame_count)
        if cache is not None:
            assert torch.equal(generate(), second)
            model.base_model.model.model.layers[0].mlp.up_proj.set_scale("default", 1)
        else:
            assert torch.equal(generate(), first)
    assert compilations[0] == compilations[1]


# Adapters that go


def warned(action):
    """Return the cache's warnings about something; pytest's filter would hide them."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        action()
    return [str(one.message) for one in seen if one.category is dora_cache.CacheWarning]


@pytest.mark.parametrize("active", ["first", "second"])
def test_deleting_an_adapter_that_compiled_code_has_used_warns_of_nothing(active):
    """Its buffer goes with it, whether it was active or not, and the other one's stays."""
    setup = Compiled()
    for adapter in ("first", "second", active):
        setup.activate(adapter)
        setup.check()
    bytes_of_both = setup.cache.stats().nbytes
    assert warned(lambda: quietly_delete(setup.model, "first")) == []
    (buffers,) = [one.buffers for one in setup.cache._engine.bindings.values() if one.buffers]
    assert [one.adapters for one in buffers.values()] == [("second",)]
    assert setup.cache.stats().nbytes < bytes_of_both
    assert warned(setup.cache.refresh) == []
    setup.activate("second")
    setup.check()


def quietly_delete(model, adapter):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Adapter .* was active which is now deleted")
        model.delete_adapter(adapter)


@pytest.mark.parametrize("use_dora", [True, False])
def test_an_adapter_made_again_under_a_deleted_ones_name_warns_of_nothing(use_dora):
    """Compiled code gets the new one's values, or none where the new one has none."""
    setup = Compiled()
    setup.check()
    setup.activate("second")

    def replace():
        setup.model.delete_adapter("first")
        setup.model.add_adapter("first", dora_config(alpha=9, use_dora=use_dora))
        setup.model.eval()

    assert warned(replace) == []
    assert warned(setup.cache.refresh) == []
    setup.activate("first")
    setup.check()
    if use_dora:
        assert setup.values()
    else:
        assert setup.buffer() is None


def test_an_adapter_taken_out_by_hand_frees_its_buffer():
    """What PEFT does not report is noticed when the buffer is to be filled, without a warning."""
    setup = Compiled()
    setup.check()
    setup.activate("second")
    held = setup.cache.stats().nbytes
    for part in (setup.layer.lora_A, setup.layer.lora_B, setup.layer.lora_magnitude_vector):
        del part["first"]
    assert warned(setup.cache.refresh) == []
    assert setup.cache.stats().nbytes < held
    setup.check()
