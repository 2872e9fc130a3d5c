"""Models that are spread over processes: DDP, FSDP and tensor parallelism."""

import json
import multiprocessing
import os
import socket
import warnings
from pathlib import Path

import pytest
import sharded
import torch
import torch.distributed as dist
from field_setups import check, ids
from torch import nn
from torch.distributed.fsdp import fully_shard

import dora_cache
from dora_cache.core import refilled
from dora_cache.lab.field import setups
from dora_cache.lifecycle import optimizers, refills
from dora_cache.reasons import Reason
from dora_cache.recipes import RECIPES, load_recipes
from dora_cache.recipes.examples import make_model


@pytest.mark.parametrize("setup", setups("torch.distributed"), ids=ids)
@pytest.mark.filterwarnings("ignore:.*FSDP.*:UserWarning")
def test_setup(setup):
    check(setup)


@pytest.fixture
def launch(monkeypatch):
    """Run the checks in a group of processes; return what each found of each way of sharding."""
    path = [str(Path(sharded.__file__).parent), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, path)))  # what is preloaded

    def launch(world, *arguments, cuda=False):
        if not cuda:  # CUDA cannot be used in a forked process
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        return launched("spawn" if cuda else "forkserver", world, *arguments)

    return launch


def launched(method, world, *arguments, timeout=240):
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    # A server imports all there is to import once, and its forks need not.
    context = multiprocessing.get_context(method)
    context.set_forkserver_preload(["sharded"])
    results = context.Queue()
    processes = [
        context.Process(target=sharded.join, args=(rank, world, port, arguments, results))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    try:
        found = [results.get(timeout=timeout) for _ in processes]
        for process in processes:
            process.join(timeout)
    finally:
        for process in processes:
            process.kill()
    assert [status for status, _ in found] == [0] * world, found
    return [json.loads(line) for _, lines in found for line in lines]


def test_fsdp2_over_two_processes_hits_and_is_right(launch):
    """Each holds half of every weight, and gathers the other half anew for each forward."""
    for found in launch(2, "--turns", "40", "--ways", "resharding", "--others"):
        assert not found["wrong"]
        if "FSDP1" in found["way"]:
            assert set(found["reasons"]) == {Reason.REFILLED.value}
        elif found["way"] == "inference mode":
            assert set(found["reasons"]) == {Reason.UNVERSIONED.value}
        else:
            assert found["hits"] > 0


def test_fsdp2_over_four_processes_is_right(launch):
    """Some have no rows of a factor; and shards of two processes are kept between forwards."""
    for found in launch(4, "--turns", "20", "--ways", "resharding", "smaller group"):
        assert not found["wrong"]
        if found["way"] == "smaller group":
            assert set(found["reasons"]) == {Reason.REFILLED.value}
        else:
            assert not found["reasons"]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_fsdp2_over_two_gpus_hits_and_is_right(launch):
    """The same there, where a freed address comes back more often."""
    for found in launch(2, "--turns", "200", cuda=True):
        assert found["hits"] > 0
        assert not found["wrong"]


@pytest.fixture
def mesh():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def make(mesh, **settings):
    return sharded.make(mesh, 16, **settings)


X = torch.ones(3, 16)


def first(model):
    return model.base_model.model[0]


def same_as_uncached(model, cache):
    output = model(X)
    with cache.bypass():
        return torch.equal(output, model(X))


@pytest.mark.parametrize("way", sharded.HITTING)
def test_fsdp2_hits_and_is_right(mesh, way):
    """Under every kind of write to the parameters the output is the uncached model's."""
    found = sharded.check(mesh, 80, way, 16)
    assert not found["wrong"]
    assert not found["reasons"]
    assert found["hits"] > 0


def outputs(model, x):
    found = model(x)
    return getattr(found, "logits", found)


# FSDP2 refuses PEFT's attention layers itself: they take parameters out of the model's tree.
SHARDABLE = [
    recipe
    for recipe in load_recipes()
    if recipe.name in RECIPES and recipe.name != "LoRA on attention"
]


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
@pytest.mark.parametrize("recipe", SHARDABLE, ids=lambda recipe: recipe.name)
def test_every_recipe_hits_under_fsdp2(mesh, recipe):
    """And is right after writes to the shards."""
    (model, x), (plain, _) = (make_model(recipe.examples[0]) for _ in range(2))
    for one in (model, plain):
        fully_shard(one, mesh=mesh, reshard_after_forward=True)
    with dora_cache.attach(model) as cache, torch.no_grad():
        for turn in range(6):
            assert torch.equal(outputs(model, x), outputs(plain, x))
            if turn % 2:
                for one in (model, plain):
                    one.reshard()
                    for weight in one.parameters():
                        weight.mul_(1.03)
        stats = cache.stats()
        assert stats.hits == stats.misses > 0
        assert not stats.reasons


def blind_optimizers(patch):
    patch.setattr(optimizers, "_touched", lambda tensors: None)


def blind_to_versions(patch):
    patch.setattr(refills, "_source", lambda parameter: refilled.Source([torch.zeros(1)], 0))
    patch.setattr(refilled.Source, "equals", lambda self, other: True)


def blind_to_unsharded(patch):
    original = refilled.filled

    class Unversioned:
        def __init__(self, tensor):
            self.untyped_storage = tensor.untyped_storage
            self._version = 0

    patch.setattr(refilled.ambient, "storage_of", lambda one: one.untyped_storage()._cdata)
    patch.setattr(
        refills, "filled", lambda group, tensors: original(group, list(map(Unversioned, tensors)))
    )


@pytest.mark.parametrize("blind", [blind_optimizers, blind_to_versions, blind_to_unsharded])
def test_the_check_finds_seeded_bugs(mesh, monkeypatch, blind):
    """Without what notices a kind of write, outputs are wrong."""
    blind(monkeypatch)
    assert sharded.check(mesh, 80, "resharding", 16)["wrong"]


def test_a_shard_that_is_written_to_during_a_gathering(mesh):
    """Whatever the gathering has read, the next forwards are right."""
    model, plain = make(mesh), make(mesh)
    with dora_cache.attach(model), torch.no_grad():
        for _ in range(2):
            model(X)
        for one in (model, plain):
            sharded.between(one, 2)
        for _ in range(3):
            assert torch.equal(model(X), plain(X))
            for one in (model, plain):
                one.reshard()


def test_what_others_fill_in_is_not_taken_for_the_shards(mesh):
    """Until the next gathering calls go past the cache."""
    model = make(mesh)
    with dora_cache.attach(model) as cache, torch.no_grad():
        for _ in range(2):
            model(X)
        before, stats = model(X), cache.stats()
        first(model).unshard()
        weight = first(model).up.lora_B["default"].weight
        with torch.autograd._unsafe_preserve_version_counter(weight):
            weight.mul_(2)
        assert not torch.equal(model(X), before)
        assert cache.stats().reasons == {Reason.REFILLED.value: 1}
        assert torch.equal(model(X), before)
        assert cache.stats().hits == stats.hits + 7


def test_writes_while_nobody_follows_are_noticed(mesh):
    """A fused optimizer, which counts nothing, steps between two caches."""
    model, plain = make(mesh, way="kept"), make(mesh, way="kept")
    shards = [sharded.weights(one, "lora_B") for one in (model, plain)]
    with torch.no_grad():
        with dora_cache.attach(model):
            model(X)
        plain(X)
        for weights in shards:
            for weight in weights:
                weight.grad = torch.ones_like(weight)
            torch.optim.AdamW(weights, lr=0.1, fused=True).step()
        with dora_cache.attach(model):
            assert torch.equal(model(X), plain(X))
            for one in (model, plain):
                for block in one.base_model.model:
                    block.reshard()
            assert torch.equal(model(X), plain(X))


@pytest.mark.parametrize("way", ["resharding", "kept"])
def test_attaching_again(mesh, way):
    """What is still gathered is used as it is."""
    model = make(mesh, way=way)
    with torch.no_grad():
        for _ in range(2):
            with dora_cache.attach(model) as cache:
                for _ in range(3):
                    model(X)
                assert (cache.stats().hits, cache.stats().misses) == (8, 4)
                assert not cache.stats().reasons


def test_sharding_an_attached_model(mesh):
    """The cache goes on, with the parameters that are gathered."""
    torch.manual_seed(0)
    plain = make(mesh)
    model = sharded.plain_model(16)
    with dora_cache.attach(model) as cache, torch.no_grad():
        model(X)
        for block in model.base_model.model:
            fully_shard(block, mesh=mesh)
        for _ in range(3):
            assert torch.equal(model(X), plain(X))
        assert cache.stats().hits == 8
        assert not cache.stats().reasons


class Doubling(nn.Module):
    """A module whose own parameter a decorated method reads."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    @dora_cache.cached("doubled", depends_on=lambda self: [self.weight])
    def doubled(self):
        return self.weight.detach() * 2

    def forward(self, x):
        return x * self.doubled()


def test_a_decorated_module(mesh):
    """FSDP2 puts parameters into a module with methods of its own by another way."""
    model = fully_shard(Doubling().eval(), mesh=mesh, reshard_after_forward=True)
    with dora_cache.attach(model) as cache, torch.no_grad():
        for _ in range(3):
            assert torch.equal(model(torch.ones(4)), torch.full((4,), 2.0))
            model.reshard()
        assert (cache.stats().hits, cache.stats().misses) == (2, 1)
        model.weight.mul_(2)
        assert torch.equal(model(torch.ones(4)), torch.full((4,), 4.0))


def test_parts_that_are_sharded_by_themselves_give_the_reason(mesh):
    """A hit would not call them, and their hooks gather, in all processes or in none."""
    model = sharded.plain_model(16)
    for name, module in model.named_modules():
        if name.endswith("lora_A.default"):
            fully_shard(module, mesh=mesh)
    with dora_cache.attach(model) as cache, torch.no_grad():
        assert same_as_uncached(model, cache)
        assert set(cache.stats().reasons) == {Reason.HOOKED.value, Reason.BYPASS.value}


def test_compared_contents_show_uncounted_writes_at_once(mesh):
    """They are those of the gathered parameters."""
    model = make(mesh)
    with dora_cache.attach(model, guard="content") as cache, torch.no_grad():
        for _ in range(3):
            before = model(X)
        assert cache.stats().hits == 8
        for weight in sharded.weights(model, "lora_B"):
            weight.data.mul_(2)
        assert same_as_uncached(model, cache)
        assert not torch.equal(model(X), before)


class Shard(torch.Tensor):
    """A local tensor with an all-gather of its own."""

    fsdp_pre_all_gather = fsdp_post_all_gather = None


def test_tensors_with_an_all_gather_of_their_own_give_the_reason(mesh):
    """What that does is not known."""
    model = make(mesh)
    with dora_cache.attach(model) as cache, torch.no_grad():
        model(X)
        for group in (
            block._get_fsdp_state()._fsdp_param_group for block in model.base_model.model
        ):
            for parameter in group.fsdp_params:
                assert refills._source(parameter) is not None
                local = parameter.sharded_param._local_tensor
                parameter.sharded_param._local_tensor = local.as_subclass(Shard)
                assert refills._source(parameter) is None
                parameter.sharded_param._local_tensor = local
        assert same_as_uncached(model, cache)


def test_tensor_parallelism_fails_as_without_a_cache(mesh):
    """PEFT's own DoRA cannot add a DTensor to a tensor; the reason is counted."""
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    model = sharded.plain_model(16)
    parallelize_module(model, mesh, {"base_model.model.0.up.base_layer": ColwiseParallel()})
    with torch.no_grad():
        with pytest.raises(RuntimeError) as without:
            model(X)
        with dora_cache.attach(model) as cache:
            with pytest.raises(RuntimeError) as found:
                model(X)
            assert str(found.value) == str(without.value)
            assert cache.stats().reasons == {Reason.SHARDED.value: 1}


def test_warming_a_sharded_model_says_why_not(mesh):
    """There is a warning with the reason, once, and no error; the model runs."""
    model = make(mesh)
    with dora_cache.attach(model) as cache, torch.no_grad():
        with pytest.warns(dora_cache.CacheWarning, match="sharded weights"):
            assert cache.warm() == 0
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            cache.warm()
        assert Reason.SHARDED.value in str(cache.report())
        assert same_as_uncached(model, cache)


@pytest.mark.parametrize("way", ["resharding", "kept"])
def test_compiled_code_reads_no_buffer(mesh, way):
    """It could not tell what was gathered."""
    torch._dynamo.reset()
    model, plain = make(mesh, way=way), make(mesh, way=way)
    with dora_cache.attach(model) as cache, torch.no_grad():
        for block in model.base_model.model:
            block.compile(backend="eager")
        for _ in range(3):
            assert torch.equal(model(X), plain(X))
            for one in (model, plain):
                for block in one.base_model.model:
                    block.reshard()
                sharded.WRITES["lora_B in place"](one, 1.5)
        for holder in cache._engine.buffers.holders():
            assert not any(buffer.values for buffer in holder.binding.buffers.values())
    torch._dynamo.reset()
