"""Adapters in models of diffusers whose weights are offloaded or cast by hooks."""

import pytest
import torch
from field_setups import check, ids

from dora_cache import attach
from dora_cache.core import moved
from dora_cache.lab.field import of_diffusers_hooks
from dora_cache.lab.field.of_diffusers_hooks import flux, running
from dora_cache.reasons import Reason

pytest.importorskip("diffusers")

WIDTH = 32
LAYER = "transformer_blocks.0.attn.to_q"


@pytest.mark.parametrize("setup", of_diffusers_hooks.SETUPS, ids=ids)
def test_setup(setup):
    check(setup)


@pytest.fixture
def moves(monkeypatch):
    """Groups move weights to other memory, as to another device."""
    from diffusers.hooks.group_offloading import ModuleGroup

    def onload(group, tensor, source, _):
        tensor.data = source.clone()

    def offload(group):
        for module in group.modules:
            for tensor in (*module.parameters(), *module.buffers()):
                tensor.data = tensor.data.clone()
        for tensor in (*group.parameters, *group.buffers):
            tensor.data = tensor.data.clone()

    monkeypatch.setattr(ModuleGroup, "_transfer_tensor_to_device", onload)
    monkeypatch.setattr(ModuleGroup, "_offload_to_memory", offload)


def grouped(level, **settings):
    model = flux(True, WIDTH)
    if level == "block_level":
        settings["num_blocks_per_group"] = 1
    model.enable_group_offload(torch.device("cpu"), offload_type=level, **settings)
    return model


def multiply(parameter):
    parameter.mul_(1.5)


def other_data(parameter):
    parameter.data = parameter.data * 1.5


PARTS = [
    "base_layer.weight",
    "base_layer.bias",
    "lora_A.default_0.weight",
    "lora_magnitude_vector.default_0.weight",
]


def name_of(model, part):
    """PEFT's name for the adapter is diffusers' choice."""
    adapter = next(iter(model.get_submodule(LAYER).lora_A))
    return f"{LAYER}.{part.replace('default_0', adapter)}"


@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("write", [multiply, other_data])
def test_a_write_between_moves_is_noticed(moves, level, part, write):
    model, whole = grouped(level), flux(True, WIDTH)
    run, expected = running(model).run, running(whole).run
    name = name_of(model, part)
    with torch.no_grad(), attach(model) as cache:
        for _ in range(2):
            before = run()
        assert torch.equal(before, expected())
        assert cache.stats().misses == cache.stats().entries
        for one in (model, whole):
            write(one.get_parameter(name))
        after = run()
        assert torch.equal(after, expected())
        assert not torch.equal(after, before)
        hits = cache.stats().hits
        assert torch.equal(run(), after)
        assert cache.stats().hits > hits


def test_a_write_within_the_forward_is_noticed(moves):
    """While the weights are in place."""
    model, whole = grouped("block_level"), flux(True, WIDTH)
    name = name_of(model, "base_layer.weight")

    def write(module, *_):
        module.weight.mul_(1.5)

    for one in (model, whole):
        one.get_submodule(name.rpartition(".")[0]).register_forward_pre_hook(write)
    run, expected = running(model).run, running(whole).run
    with torch.no_grad(), attach(model):
        for _ in range(3):
            assert torch.equal(run(), expected())


def test_a_write_that_is_told_of_is_noticed(moves):
    """As by PEFT's merge, through ``.data``; a cache is told of the tensor where it is now."""
    model, whole = grouped("block_level"), flux(True, WIDTH)
    run, expected = running(model).run, running(whole).run
    with torch.no_grad(), attach(model):
        for _ in range(2):
            run()
        for one in (model, whole):
            layer = one.get_submodule(LAYER)
            layer.merge()
            layer.unmerge()
            layer.merge()
        assert torch.equal(run(), expected())
        for one in (model, whole):
            one.get_submodule(LAYER).unmerge()
        for _ in range(2):
            assert torch.equal(run(), expected())


def test_the_order_of_bound_and_moved_weights(moves):
    """What has been read where the weights lay does not hold where others lie since."""
    model, whole = grouped("block_level"), flux(True, WIDTH)
    run, expected = running(model).run, running(whole).run
    group = model.transformer_blocks[0]._diffusers_hook.get_hook("group_offloading").group
    layer = model.get_submodule(LAYER)
    x = torch.randn(1, 3, WIDTH)
    with torch.no_grad(), attach(model) as cache:
        run()
        group.onload_()
        for _ in range(4):  # in place all the while, so that the layer is bound
            assert torch.equal(layer(x), whole.get_submodule(LAYER)(x))
        for one in (layer, whole.get_submodule(LAYER)):
            one.base_layer.weight.data = one.base_layer.weight.data * 1.5
        for _ in range(3):
            assert torch.equal(layer(x), whole.get_submodule(LAYER)(x))
        group.offload_()
        for _ in range(2):
            assert torch.equal(run(), expected())
        assert not cache.stats().reasons


@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
def test_a_file_that_is_written_is_noticed(tmp_path, level):
    from safetensors.torch import load_file, save_file

    model = grouped(level, offload_to_disk_path=str(tmp_path))
    run = running(model).run
    with torch.no_grad(), attach(model) as cache:
        for _ in range(2):
            before = run()
        assert cache.stats().hits > 0
        for file in tmp_path.glob("*.safetensors"):
            tensors = load_file(file)
            save_file({key: tensor * 1.25 for key, tensor in tensors.items()}, file)
        after = run()
        assert not torch.allclose(after, before)
        with cache.bypass():
            uncached = run()
        if level == "block_level":  # else PEFT's own reads memory that nothing was written to
            assert torch.equal(after, uncached)
        for _ in range(3):
            assert torch.equal(run(), after)


def test_weights_that_are_in_a_file_are_not_derived_from(tmp_path):
    """Between forwards there is memory in their place that nothing was written to."""
    model = grouped("block_level", offload_to_disk_path=str(tmp_path))
    run = running(model).run
    with torch.no_grad():
        expected = run()
        with attach(model) as cache:
            assert torch.equal(run(), expected)
            cache.invalidate()
            cache.warm()
            stats = cache.stats()
            assert stats.entries < stats.misses
            assert torch.equal(run(), expected)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16])
def test_casts_that_keep_every_number_keep_the_values(storage):
    model, whole = flux(True, WIDTH), flux(True, WIDTH)
    for one in (model, whole):
        one.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)
    run, expected = running(model).run, running(whole).run
    with torch.no_grad(), attach(model) as cache:
        for _ in range(40):
            assert torch.equal(run(), expected())
        assert cache.stats().misses == cache.stats().entries
        for one in (model, whole):
            one.get_parameter(name_of(model, "base_layer.weight")).mul_(1.5)
        for _ in range(2):
            assert torch.equal(run(), expected())


def test_casts_that_round_do_not_pass_for_the_same():
    """From bfloat16 to float16 and back, small and large numbers change."""
    one = torch.tensor([1.0, 1e-30, 3e38], dtype=torch.bfloat16)
    moved.put(one, 5)
    with moved.moving(lambda: [one]):
        one.data = one.data.to(torch.float16)
    assert moved.contents[id(one)].number != 5
    rounded = moved.contents[id(one)].number
    for dtype in (torch.float32, torch.float16, torch.float64, torch.float16):
        with moved.moving(lambda: [one]):
            one.data = one.data.to(dtype)
        assert moved.contents[id(one)].number == rounded
    with moved.moving(lambda: [one]):
        one.data = one.data.to(torch.bfloat16)
    assert moved.contents[id(one)].number not in {5, rounded}
    moved.let_go([one])


def test_detaching_stops_following():
    from diffusers.hooks.group_offloading import ModuleGroup

    before = (ModuleGroup.onload_, ModuleGroup.offload_, torch.nn.Module.to)
    model = flux(True, WIDTH)
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    with torch.no_grad(), attach(model):
        running(model).run()
        assert torch.nn.Module.to is not before[2]
        assert moved.contents
    assert (ModuleGroup.onload_, ModuleGroup.offload_, torch.nn.Module.to) == before
    assert not moved.contents


def test_hooks_of_users_beside_those_of_diffusers():
    from diffusers.hooks import HookRegistry, ModelHook

    class Doubling(ModelHook):
        def post_forward(self, module, output):
            return 2 * output

    model = grouped("leaf_level")
    part = next(iter(model.get_submodule(LAYER).lora_B.values()))
    HookRegistry.check_if_exists_or_initialize(part).register_hook(Doubling(), "doubling")
    run = running(model).run
    with torch.no_grad():
        expected = run()
        with attach(model) as cache:
            for _ in range(2):
                assert torch.equal(run(), expected)
            assert cache.stats().reasons == {Reason.HOOKED.value: 2}
