"""Where compiled code is entered, it notices what raises no event: without refresh()."""

import copy
import gc
import threading
import weakref
from contextlib import suppress

import pytest
import torch
from depth import first, thinned
from peft import get_peft_model
from peft.utils import hotswap
from test_compile import NUMERICS, Compiled, _fresh  # noqa: F401 - a fixture
from torch import nn
from torch._dynamo.testing import CompileCounter
from zoo import dora_config, dora_model, quiet, run, sample, shake

import dora_cache
from dora_cache.attributes import FACE
from dora_cache.core.facts import UncheckableError, read
from dora_cache.reasons import Reason
from dora_cache.recipes import RECIPES, dynamo, entry, load_recipes
from dora_cache.recipes import compiled as compiled_module
from dora_cache.recipes import holder as holder_module
from dora_cache.recipes.examples import make_model

EXAMPLES = [
    pytest.param(example, id=example.name)
    for recipe in load_recipes()
    if recipe.name in RECIPES
    for example in recipe.examples
]
SIZES = {
    "BOFT": (8, 8),
    "LoKr": (3, 5),  # which are no products: else compiled code derives the delta
    "VB-LoRA": (8, 8),
    "Super-Tuning": (32, 48),
}
LISTED = {
    # Of these more is listed than scalars that are attributes and tensors.
    "p-tuning, LSTM",
    "p-tuning, MLP",
    "prefix tuning, projected",
}


def in_place(layer):
    with torch.no_grad():
        layer.lora_magnitude_vector["first"].weight.mul_(1.5)


def base_in_place(layer):
    with torch.no_grad():
        layer.base_layer.weight.add_(0.5)


def other_data(layer):
    weight = layer.lora_magnitude_vector["first"].weight
    weight.data = weight.data * 1.5


def other_storage(layer):
    weight = layer.lora_magnitude_vector["first"].weight
    with torch.no_grad():
        weight.set_((weight * 1.5).untyped_storage(), 0, weight.shape, weight.stride())


def a_larger_storage(layer):
    weight = layer.lora_magnitude_vector["first"].weight
    with torch.no_grad():
        shape, stride = weight.shape, weight.stride()
        weight.resize_(1 << 16).fill_(1.5)
        weight.as_strided_(shape, stride)


def scaling(layer):
    layer.scaling["first"] = 7.5


def scaling_of_another_type(layer):
    layer.scaling["first"] = torch.tensor(0.75)


def scalings_past_setattr(layer):
    vars(layer)["scaling"] = dict.fromkeys(layer.scaling, 3.5)


def load_a_part(layer):
    part = layer.lora_magnitude_vector["first"]
    part.load_state_dict({name: 1.5 * value for name, value in part.state_dict().items()})


SILENT = [
    in_place,
    base_in_place,
    other_data,
    other_storage,
    a_larger_storage,
    scaling,
    scalings_past_setattr,
    load_a_part,
]


@pytest.mark.parametrize("kind", ["linear", "embedding", "conv2d"])
@pytest.mark.parametrize("numerics", NUMERICS)
def test_silent_changes_are_noticed(kind, numerics):
    """The next call is right, from the same graph, with the same addresses."""
    setup = Compiled(kind, numerics=numerics)
    before = setup.check()
    addresses = setup.addresses()
    for change in SILENT:
        change(setup.layer)
        after = setup.check()
        assert not torch.equal(before, after), change
        assert setup.buffer().values is not None
        before = after
    assert setup.addresses() == addresses
    assert setup.compilations == 1
    assert setup.cache.refresh() == 0


def test_a_scaling_that_becomes_a_tensor_is_followed():
    """And the tensor's own changes from then on, with no other graph."""
    setup = Compiled()
    setup.check()
    scaling_of_another_type(setup.layer)
    setup.check()
    assert setup.compilations == 2
    setup.layer.scaling["first"].fill_(4)
    setup.check()
    setup.layer.scaling["first"] = torch.tensor(4.0)
    setup.check()
    setup.layer.scaling["first"].fill_(2)
    setup.check()
    assert setup.compilations == 2


@pytest.mark.parametrize(
    "keep",
    [
        torch.compiler.skip_guard_on_inbuilt_nn_modules_unsafe,
        torch.compiler.skip_guard_on_all_nn_modules_unsafe,
        torch.compiler.skip_guard_on_globals_unsafe,
        torch.compiler.keep_portable_guards_unsafe,
    ],
    ids=lambda keep: keep.__name__,
)
def test_filters_of_guards_keep_the_check(keep):
    """Those that leave guards of global state in place."""
    setup = Compiled()
    counter = CompileCounter()
    setup.compiled = torch.compile(
        setup.model, backend=counter, fullgraph=True, options={"guard_filter_fn": keep}
    )
    setup.check()
    for write in (in_place, other_data):
        write(setup.layer)
        setup.check()
    setup.layer.scaling["first"] = 3.0
    setup.check()
    assert counter.frame_count == 1


def test_what_has_not_changed_is_not_derived(monkeypatch):
    """An equal scaling set again costs a look; a call without changes does not even that."""
    setup = Compiled()
    setup.check()
    buffer, looks, derived = setup.buffer(), [], []
    fill, derive = buffer.fill, buffer.derive
    monkeypatch.setattr(buffer, "fill", lambda: looks.append(1) or fill())
    monkeypatch.setattr(buffer, "derive", lambda layer: derived.append(1) or derive(layer))
    for _ in range(3):
        run(setup.compiled, setup.x)
    assert not looks
    setup.layer.scaling["first"] = float(str(setup.layer.scaling["first"]))
    for _ in range(3):
        setup.check()
    assert len(looks) == 1
    assert not derived


class Part(nn.Module):
    def __init__(self, size=8):
        super().__init__()
        self.layer = nn.Linear(size, size)

    def forward(self, x):
        return torch.tanh(self.layer(x))


class Stack:
    """A model of three blocks alike with DoRA, attached, and how often it compiled."""

    def __init__(self, **settings):
        torch.manual_seed(0)
        self.model = get_peft_model(
            nn.Sequential(Part(), Part(), Part()), dora_config(r=8), "first"
        )
        self.model.eval().requires_grad_(requires_grad=False)
        shake(self.model)
        self.x = torch.randn(2, 8)
        self.counter = CompileCounter()
        self.cache = dora_cache.attach(self.model, **settings)

    @property
    def blocks(self):
        return self.model.base_model.model

    def expected(self, x=None):
        with torch.compiler.set_stance("force_eager"):
            return run(copy.deepcopy(self.model), self.x if x is None else x)


def whole(stack):
    return torch.compile(stack.model, backend=stack.counter, fullgraph=True)


def method(stack):
    stack.model.compile(backend=stack.counter, fullgraph=True)
    return stack.model


def regional(stack):
    for block in stack.blocks:
        block.compile(backend=stack.counter, fullgraph=True)
    return stack.model


def wrapped(stack):
    for name, block in list(stack.blocks.named_children()):
        setattr(stack.blocks, name, torch.compile(block, backend=stack.counter, fullgraph=True))
    return stack.model


def function(stack):
    return torch.compile(lambda x: stack.model(x), backend=stack.counter, fullgraph=True)


def broken(stack):
    def between(*_):
        torch._dynamo.graph_break()

    stack.blocks[1].register_forward_hook(between)
    return torch.compile(stack.model, backend=stack.counter)


def dynamic(stack):
    return torch.compile(stack.model, backend=stack.counter, dynamic=True)


WAYS = [whole, method, regional, wrapped, function, broken, dynamic]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("numerics", NUMERICS)
def test_however_it_is_compiled(way, numerics):
    """Every layer's silent changes are noticed, whichever code runs it, and nothing compiles."""
    stack = Stack(numerics=numerics)
    model = way(stack)
    close = {"rtol": 0, "atol": 0} if numerics == "peft" else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(run(model, stack.x), stack.expected(), **close)
    before = stack.counter.frame_count
    for change in SILENT:
        for index in (2, 0, 1):
            change(stack.blocks[index].layer)
            torch.testing.assert_close(run(model, stack.x), stack.expected(), **close)
    assert stack.counter.frame_count == before
    torch.testing.assert_close(run(model, stack.x[:1]), stack.expected(stack.x[:1]), **close)


@pytest.mark.parametrize("way", [whole, method, regional])
def test_compiled_before_attaching(way):
    """The first calls run PEFT's code; after attaching, other code is compiled, which checks."""
    stack = Stack()
    stack.cache.detach()
    stack.counter = CompileCounter()
    for block in stack.blocks:  # PEFT's own has graph breaks
        assert block.layer.lora_magnitude_vector
    if way is whole:
        model = torch.compile(stack.model, backend=stack.counter)
    elif way is method:
        stack.model.compile(backend=stack.counter)
        model = stack.model
    else:
        for block in stack.blocks:
            block.compile(backend=stack.counter)
        model = stack.model
    assert torch.equal(run(model, stack.x), stack.expected())
    dora_cache.attach(stack.model)
    assert torch.equal(run(model, stack.x), stack.expected())
    before = stack.counter.frame_count
    for index in range(3):
        in_place(stack.blocks[index].layer)
        assert torch.equal(run(model, stack.x), stack.expected())
    assert stack.counter.frame_count == before


def test_inductor_and_its_mode_for_cuda_graphs():
    """The check is outside of what inductor makes, and of the graph that is replayed."""
    setup = Compiled()
    for mode in ("default", "reduce-overhead"):
        torch._dynamo.reset()
        compiled = torch.compile(setup.model, mode=mode, fullgraph=True)
        for change in (lambda _: None, in_place, other_data, scaling):
            change(setup.layer)
            for _ in range(3):
                torch.testing.assert_close(
                    run(compiled, setup.x), setup.plain(), rtol=1e-5, atol=1e-5
                )


def test_under_autocast_inference_mode_and_another_default_device():
    """What surrounds the call does not show in what is filled."""
    setup = Compiled()
    setup.check()
    in_place(setup.layer)
    with torch.inference_mode():
        first = setup.compiled(setup.x)
    assert torch.equal(first, setup.plain())
    assert not any(value.is_inference() for value in setup.buffer().values)
    in_place(setup.layer)
    with torch.device("meta"):
        second = run(setup.compiled, setup.x)
    assert torch.equal(second, setup.plain())
    compilations = setup.compilations
    in_place(setup.layer)
    setup.check()
    assert setup.compilations == compilations


@pytest.mark.parametrize("numerics", NUMERICS)
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_ten_adapters_in_turn(kind, numerics):
    """Switches, scalings, hotswaps and in-place writes: one compilation, without refresh()."""
    names = [f"adapter{number}" for number in range(10)]
    model, x = dora_model(kind, adapters=names[:1]), sample(kind)
    for index, name in enumerate(names[1:]):
        model.add_adapter(name, dora_config(kind, alpha=9 + index))
    shake(model.eval().requires_grad_(requires_grad=False))
    dora_cache.attach(model, numerics=numerics)
    layer, counter = model.base_model.model.layer, CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    last = None

    def check():
        nonlocal last
        found, expected = run(compiled, x), run(copy.deepcopy(model), x)
        if numerics == "peft":
            assert torch.equal(found, expected)
        else:
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert last is None or not torch.equal(found, last)
        last = found

    for turn in range(2):
        for index, name in enumerate(names):
            model.base_model.set_adapter(name, inference_mode=True)
            check()
            layer.scaling[name] *= 1.25  # by hand
            check()
            layer.set_scale(name, 0.5 + turn)
            check()
            state = {
                key: value * 1.1 for key, value in model.state_dict().items() if f".{name}." in key
            }
            hotswap.hotswap_adapter_from_state_dict(model, state, name, model.peft_config[name])
            check()
            for one in (name, names[index - 1 - turn]):  # the active one, and another
                with torch.no_grad():
                    layer.lora_magnitude_vector[one].weight.mul_(1.5)
                    layer.lora_A[one].weight.data = layer.lora_A[one].weight * 0.9
            check()
    assert counter.frame_count == 1


def test_a_change_by_another_layer_within_a_forward():
    """What one compiled block does to the weights of the next is noticed by it."""
    stack = Stack()
    for block in stack.blocks:
        block.compile(backend=stack.counter, fullgraph=True)
    run(stack.model, stack.x)
    before = run(stack.model, stack.x)

    def write(*_):
        in_place(stack.blocks[1].layer)

    handle = stack.blocks[0].register_forward_hook(write)
    with torch.no_grad():
        middle = stack.blocks[0](stack.x)
        found = stack.blocks[2](stack.blocks[1](middle))
    handle.remove()
    assert not torch.equal(found, before)
    assert torch.equal(found, stack.expected())


def test_threads():
    """Calls from many threads, after a write that each of them may be the first to notice."""
    stack = Stack()
    model = whole(stack)
    run(model, stack.x)
    for _ in range(10):
        for block in stack.blocks:
            in_place(block.layer)
        barrier, found = threading.Barrier(4), []

        def call(barrier=barrier, found=found):
            barrier.wait()
            found.append(run(model, stack.x))

        threads = [threading.Thread(target=call) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        expected = stack.expected()
        assert [torch.equal(one, expected) for one in found] == [True] * 4
    assert stack.counter.frame_count == 1


# Where it cannot be told, or not be filled


def test_a_failure_costs_a_compilation(monkeypatch):
    """A buffer that cannot be filled is void, and the graph derives; filled again once it can."""
    setup = Compiled()
    setup.check()
    buffer, fill = setup.buffer(), setup.buffer()._fill

    def fail(*_):
        msg = "no memory"
        raise RuntimeError(msg)

    monkeypatch.setattr(buffer, "_fill", fail)
    in_place(setup.layer)
    with pytest.warns(dora_cache.CacheWarning, match="no memory"):
        setup.check()
    assert buffer.values is None
    assert setup.compilations == 2
    monkeypatch.setattr(buffer, "_fill", fill)
    assert setup.cache.refresh() == 1
    setup.check()


def test_weights_that_lose_their_version_counter():
    """Data made under inference_mode cannot be checked: the graph derives."""
    setup = Compiled()
    setup.check()
    weight = setup.layer.lora_magnitude_vector["first"].weight
    with torch.inference_mode():
        other = weight * 1.5
    part = setup.layer.lora_magnitude_vector["first"]
    part._parameters["weight"] = other
    with torch.inference_mode():
        assert torch.equal(setup.compiled(setup.x), setup.model(setup.x))
        part._parameters["weight"].mul_(2)
        assert torch.equal(setup.compiled(setup.x), setup.model(setup.x))


def test_a_part_that_is_gone():
    """What a buffer was filled from is taken out by hand: no error of the check's own."""
    setup = Compiled(fullgraph=False)
    setup.check()
    del setup.layer.scaling["first"]
    with pytest.raises(KeyError):
        run(setup.model, setup.x)
    with pytest.raises(KeyError):
        run(setup.compiled, setup.x)
    setup.layer.scaling["first"] = 2.5
    setup.check()


def test_what_is_derived_while_something_is_written_is_not_used(monkeypatch):
    """A write while the check fills is noticed by the same check."""
    setup = Compiled()
    setup.check()
    buffer, derive = setup.buffer(), setup.buffer().derive
    weight, writes = setup.layer.lora_magnitude_vector["first"].weight, []

    def slowly(layer):
        values = derive(layer)
        if len(writes) < 2:
            writes.append(1)
            weight.mul_(1.5)
        return values

    monkeypatch.setattr(buffer, "derive", slowly)
    in_place(setup.layer)
    setup.check()
    assert len(writes) == 2
    assert setup.compilations == 1


def test_without_the_check_refresh_is_needed():
    """Who calls refresh() after such writes can switch it off: then there is no guard for it."""
    setup = Compiled(compiled_check=False)
    before = setup.check()
    in_place(setup.layer)
    assert torch.equal(run(setup.compiled, setup.x), before)
    assert setup.cache.refresh() == 1
    assert not torch.equal(setup.check(), before)
    assert not setup.cache._engine.buffers.entries
    assert setup.compilations == 1


def test_where_pytorch_has_no_such_guards_the_graph_derives(monkeypatch):
    """Another version of PyTorch makes it slower, not wrong, and the report says so."""
    monkeypatch.setattr(compiled_module, "entry_guards_work", lambda: False)
    setup = Compiled()
    with pytest.warns(dora_cache.CacheWarning, match="compiled_check=False"):
        setup.check()
    in_place(setup.layer)
    setup.check()
    assert setup.buffer() is None
    assert any("guards" in one.reason for one in setup.cache.declined)
    torch._dynamo.reset()
    other = Compiled(compiled_check=False)
    other.check()
    assert other.buffer().values is not None


def _broken_guards(monkeypatch):
    monkeypatch.setattr(dynamo.EntryGuard, "install", lambda self: None)


def _broken_constants(monkeypatch):
    monkeypatch.setattr(dynamo._Probe, "__eq__", lambda self, other: True)


def _failing_guards(monkeypatch):
    def fail(self):
        msg = "of this test"
        raise AttributeError(msg)

    monkeypatch.setattr(dynamo.EntryGuard, "install", fail)


def _guards_that_hold_nothing_back(monkeypatch):
    class Root:
        def add_epilogue_lambda_guard(self, *_):
            pass

        def check(self, _):
            return True

    monkeypatch.setattr("torch._C._dynamo.guards.RootGuardManager", Root)


@pytest.mark.parametrize(
    "change", [_broken_guards, _broken_constants, _failing_guards, _guards_that_hold_nothing_back]
)
def test_guards_that_notice_nothing_are_not_relied_on(monkeypatch, change):
    """They are tried on what they must notice, and leave no trace in the compiler's statistics."""
    try:
        dynamo.entry_guards_work.cache_clear()
        before = copy.deepcopy(torch._dynamo.utils.counters)
        assert dynamo.entry_guards_work()
        assert torch._dynamo.utils.counters == before
        dynamo.entry_guards_work.cache_clear()
        with monkeypatch.context() as patch:
            change(patch)
            assert not dynamo.entry_guards_work()
    finally:
        dynamo.entry_guards_work.cache_clear()


@pytest.mark.parametrize("stance", ["eager_then_compile", "fail_on_recompile", "force_eager"])
def test_they_are_tried_under_any_stance(stance):
    """What the user asks of the compiler does not decide whether it has such guards."""
    dynamo.entry_guards_work.cache_clear()
    with torch.compiler.set_stance(stance):
        assert dynamo.entry_guards_work()


@pytest.mark.parametrize("numerics", NUMERICS)
def test_scalings_for_which_there_is_no_room(numerics):
    """They are numbers in the graph, and one that is set by hand is noticed at once."""
    setup = Compiled(numerics=numerics, backend="null")
    setup.check()
    for value in (2.0, 3.0, 4.0, 2.0):
        setup.layer.scaling["first"] = value
        setup.check()


def test_a_part_with_a_hook_is_noticed_at_once():
    """The graph was made for a part without one."""
    setup = Compiled(fullgraph=False)
    setup.check()
    new = copy.deepcopy(setup.layer.lora_A["first"])
    new.register_forward_hook(lambda module, args, output: 3 * output)
    setup.layer.lora_A["first"] = new
    setup.check()


def test_a_part_that_requires_gradients_is_noticed_at_once():
    """The graph was made for one that does not."""
    setup = Compiled(fullgraph=False)
    setup.model.requires_grad_(requires_grad=False)
    x = setup.x.clone().requires_grad_()
    setup.compiled(x)
    for part in ("lora_A", "lora_B", "lora_magnitude_vector"):
        new = copy.deepcopy(getattr(setup.layer, part)["first"]).requires_grad_()
        getattr(setup.layer, part)["first"] = new
        setup.compiled(x).sum().backward()
        assert all(weight.grad is not None for weight in new.parameters())


def test_values_that_were_given_up_are_not_shown_again():
    """Weights are replaced time and again, so the graph derives; refresh() does not change that."""
    setup = Compiled("embedding", compiled_check=False)
    for _ in range(holder_module._SURPRISES + 2):
        weight = setup.layer.base_layer.weight
        setup.layer.base_layer.weight = nn.Parameter(1.25 * weight, requires_grad=False)
        setup.check()
    setup.cache.refresh()
    assert not setup.values()
    for change in (parameter_by_item, parameter_by_name):
        change(setup.layer)
        setup.check()


def test_layers_that_are_compiled_between_forward_and_backward():
    """Compiling one leaves alone what the backward of another has saved."""
    stack = Stack()
    for block in stack.blocks:
        block.layer.compile(backend=stack.counter)
    run(stack.model, stack.x)
    for name, weight in stack.model.named_parameters():
        weight.requires_grad_("lora_" in name)
    with quiet():
        stack.model(stack.x).square().sum().backward()
    assert all(block.layer.lora_A["first"].weight.grad is not None for block in stack.blocks)


# Leaving no trace


def test_a_weight_that_is_gone_is_not_kept_alive():
    """Neither by the check nor by compiled code, once the adapter or the cache is gone."""
    setup = Compiled()
    setup.check()
    weight = weakref.ref(setup.layer.lora_magnitude_vector["first"].weight.untyped_storage())
    setup.activate("second")
    setup.model.delete_adapter("first")
    gc.collect()
    assert weight() is None
    setup.check()
    checks = list(setup.cache._engine.buffers.entries.values())
    assert checks
    setup.cache.detach()
    assert not setup.cache._engine.buffers.entries
    gone = [weakref.ref(one) for one in checks]
    del checks
    gc.collect()
    assert [one() for one in gone] == [None] * len(gone)


def test_nothing_is_kept_of_the_tracing():
    """What a check was made by goes with it, and one check serves all layers of the code."""
    stack = Stack()
    model = whole(stack)
    run(model, stack.x)
    gc.collect()
    assert not entry._regions
    (check,) = stack.cache._engine.buffers.entries.values()
    assert len(check._living()) == len(stack.blocks) + 1  # and the model


@pytest.mark.parametrize("way", [whole, regional])
def test_the_same_memory_in_another_layout(way):
    """A weight transposed where it is keeps its version and address, and is noticed; and back."""
    stack = Stack()
    model = way(stack)
    before = run(model, stack.x)
    with torch._dynamo.config.patch(recompile_limit=64):
        for part in ("base_layer", "lora_A.first", "lora_A.first", "base_layer"):
            for block in reversed(stack.blocks):
                weight = block.layer.get_submodule(part).weight
                weight.data = weight.data.t()
                after = run(model, stack.x)
                assert not torch.equal(before, after)
                assert torch.equal(after, stack.expected())
                before = after


# Parts that are replaced


def another(module):
    new = copy.deepcopy(module)
    for weight in new.parameters():
        weight.data = torch.randn_like(weight)
    return new


def by_item(layer):
    layer.lora_A["first"] = another(layer.lora_A["first"])


def by_name(layer):
    layer.lora_B.first = another(layer.lora_B.first)


def container(layer):
    layer.lora_A = another(layer.lora_A)


def base_layer(layer):
    layer.base_layer = another(layer.base_layer)


def parameter_by_item(layer):
    table = layer.lora_embedding_A
    table["first"] = nn.Parameter(torch.randn_like(table["first"]), requires_grad=False)


def parameter_by_name(layer):
    table = layer.lora_embedding_B
    table.first = nn.Parameter(torch.randn_like(table.first), requires_grad=False)


@pytest.mark.parametrize(
    ("kind", "replace"),
    [
        ("linear", by_item),
        ("linear", by_name),
        ("linear", container),
        ("linear", base_layer),
        ("embedding", parameter_by_item),
        ("embedding", parameter_by_name),
    ],
)
@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("checked", [True, False])
def test_parts_that_are_replaced(kind, replace, checked, stored):
    """The next call runs with the new one; the graph remains, if the check is on.

    If there is a stored value as well, the event that voids it comes before the part is in place.
    """
    setup = Compiled(kind, compiled_check=checked)
    before = setup.check()
    if stored:
        run(setup.model, setup.x)
    replace(setup.layer)
    assert not torch.equal(setup.check(), before)
    setup.check()
    assert setup.compilations == 1 or not checked


def test_a_base_layer_that_is_replaced_past_setattr():
    """As torch.ao's conversions do it: it is compiled again."""
    setup = Compiled()
    before = setup.check()
    setup.layer._modules["base_layer"] = another(setup.layer.base_layer)
    assert not torch.equal(setup.check(), before)


# Kinds


def scalar_places(owner):
    """Return where a layer and its parts have scalars: each with how to set another."""
    for module in owner.modules():
        for name, value in list(module.__dict__.items()):
            if type(value) in SCALARS and not name.startswith("_"):
                yield module.__dict__, name, value
            elif type(value) is dict:
                for key, item in list(value.items()):
                    if type(item) in SCALARS:
                        yield value, key, item
                    elif type(item) is list and item and type(item[0]) in SCALARS:
                        yield value, key, item
                        yield item, 0, item[0]


SCALARS = (bool, int, float, str)
OTHERS = {bool: lambda x: not x, int: lambda x: x + 1, float: lambda x: x + 1.5, str: "{}x".format}
OTHERS[list] = lambda x: [*x[1:], OTHERS[type(x[0])](x[0])]


@pytest.mark.parametrize(
    "example",
    thinned(
        EXAMPLES,
        lambda example: (
            first(example)
            or example.name in LISTED
            or example.name.startswith("TrainableTokens")  # which have lists
        ),
    ),
)
def test_whatever_a_value_depends_on_is_watched(example):
    """Of each kind: each tensor written to, each scalar set by hand, if the listing shows it."""
    model, x = make_model(example, *SIZES.get(example.name, (8, 12)), adapters=("first",))
    with quiet():
        cache = dora_cache.attach(model)
    run(torch.compile(model, backend="eager", fullgraph=True), x)
    noticed = filled = 0
    for holder in cache._engine.buffers.holders():
        for buffer in holder.binding.buffers.values():
            filled += buffer.values is not None
            if buffer.values is None or not buffer.watch.complete:
                continue
            buffer.fill()  # tensors may be those of other layers, too
            assert buffer.watch.holds()
            before = read(buffer._dependencies(holder.owner))
            for table, key, value in scalar_places(holder.owner):
                table[key] = OTHERS[type(value)](value)
                changed = False
                with suppress(UncheckableError):  # the name of a part: the model is broken
                    changed = read(buffer._dependencies(holder.owner)).plain != before.plain
                assert not (changed and buffer.watch.holds()), (key, value)
                table[key] = value
                noticed += changed
            for tensor in before.tensors:
                assert buffer.watch.holds()
                with torch.no_grad():
                    tensor.add_(0)
                assert not buffer.watch.holds()
                buffer.fill()
                noticed += 1
    cache.detach()
    assert filled or example.name.startswith("LoKr")  # whose small factors the graph multiplies
    assert bool(noticed) is (filled > 0 and example.name not in LISTED)


SHARED = ("LoRA on", "p-tuning")
"""Kinds that reach a holder or a configuration in two ways."""


@pytest.mark.parametrize(
    ("example", "numerics"),
    [
        pytest.param(*one.values, numerics, id=f"{one.id}-{numerics}")
        for one in EXAMPLES
        if first(*one.values) and not one.id.startswith(SHARED)
        for numerics in one.values[0].numerics
    ],
)
def test_no_object_is_compared_with_itself(example, numerics):
    """Reached in two ways, it would be at each call: by an expression in Python, in each layer."""
    model, x = make_model(example, *SIZES.get(example.name, (8, 12)), adapters=("first",))
    compared = []

    def note(entries):
        compared.extend(one.name for one in entries if one.guard_type == "DUPLICATE_INPUT")
        return [True] * len(entries)

    with quiet():
        dora_cache.attach(model, numerics=numerics)
    inner = model.base_model.model
    run(torch.compile(inner, backend="eager", options={"guard_filter_fn": note}), x)
    paths = [name for name in compared if FACE in name and not name.startswith("type(")]
    # Tensors that layers share are compared, with PEFT alone as well.
    assert not [name for name in paths if "_parameters[" not in name and "_buffers[" not in name]


def test_what_compiled_code_derives_itself_has_a_reason():
    """A product of small factors is not stored for compiled code, and the report says so."""
    (example,) = next(one.values for one in EXAMPLES if one.id == "LoKr")
    model, x = make_model(example, 64, 64, adapters=("first",))
    with quiet(), dora_cache.attach(model) as cache:
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.equal(run(compiled, x), run(copy.deepcopy(model), x))
        assert cache.stats().reasons[Reason.IN_GRAPH.value] > 0
        assert not any(holder.binding.buffers for holder in cache._engine.buffers.holders())
