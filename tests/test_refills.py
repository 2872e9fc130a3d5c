"""Storages that are freed and filled again with their version counters preserved, as FSDP does."""

import contextlib
import random
import warnings

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from sharded import count_wrong
from torch import nn

import dora_cache
from dora_cache.reasons import Reason

X = torch.ones(3, 16)


def make(layers=2):
    torch.manual_seed(0)
    names = [str(index) for index in range(layers)]
    config = LoraConfig(use_dora=True, r=4, target_modules=names, init_lora_weights=False)
    return get_peft_model(nn.Sequential(*[nn.Linear(16, 16) for _ in names]), config).eval()


def refill(tensor, factor):
    """Do what FSDP2 does between two forwards; most allocators give the same address again."""
    storage, new = tensor.untyped_storage(), tensor.detach() * factor
    size = storage.nbytes()
    storage.resize_(0)
    storage.resize_(size)
    with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(tensor):
        tensor.copy_(new)


def write_preserving(tensor, factor):
    with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(tensor):
        tensor.mul_(factor)


def resize_typed(tensor, factor):
    """Do it by the older interface, which FSDP1 uses."""
    storage, new = tensor._typed_storage(), tensor.detach() * factor
    size = storage._size()
    storage._resize_(0)
    storage._resize_(size)
    tensor.data.copy_(new)


@pytest.fixture
def group():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def same_as_uncached(model, cache, x=X):
    with torch.no_grad():
        output = model(x)
        with cache.bypass():
            return torch.equal(output, model(x))


@pytest.mark.parametrize("write", [refill, write_preserving, resize_typed])
@pytest.mark.parametrize("part", ["lora_A", "lora_B", "lora_magnitude_vector", "base_layer"])
def test_a_refilled_storage_is_not_taken_for_what_it_was(write, part):
    """After the first refill what was stored goes, and from then on calls go past the cache."""
    model = make()
    owner = getattr(model.base_model.model[0], part)
    weight = (owner if part == "base_layer" else owner["default"]).weight
    with dora_cache.attach(model) as cache:
        for _ in range(5):
            assert same_as_uncached(model, cache)
            write(weight, 1.5)
        stats = cache.stats()
        assert stats.reasons[Reason.REFILLED.value] == 4
        assert stats.entries == 1  # the other layer's
        assert Reason.REFILLED.value in str(cache.report())


def test_a_new_parameter_is_cached_again():
    """The mark is the storage's, not the layer's."""
    model = make(1)
    layer = model.base_model.model[0]
    with dora_cache.attach(model) as cache:
        refill(layer.lora_B["default"].weight, 2.0)
        same_as_uncached(model, cache)
        assert cache.stats().misses == 0
        old = layer.lora_B["default"].weight
        layer.lora_B["default"].weight = nn.Parameter(old.detach().clone())
        assert same_as_uncached(model, cache)
        assert same_as_uncached(model, cache)
        assert cache.stats().hits == 1


def test_a_refill_while_a_value_is_derived_is_noticed():
    """The value goes to its caller and is not stored."""

    class Owner(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))
            self.during = lambda: None

        @dora_cache.cached("doubled", depends_on=lambda self: [self.weight])
        def doubled(self):
            found = self.weight.detach() * 2
            self.during()
            return found

    owner = Owner().eval()
    with dora_cache.attach(owner) as cache, torch.no_grad():
        owner.during = lambda: refill(owner.weight, 3.0)
        owner.doubled()
        assert cache.stats().entries == 0
        assert cache.stats().reasons[Reason.CHANGED.value] == 1
        owner.during = lambda: None
        assert torch.equal(owner.doubled(), torch.full((4,), 6.0))


def test_detaching_gives_pytorch_its_methods_back():
    """They are followed for as long as any cache is attached."""
    preserving = torch.autograd._unsafe_preserve_version_counter
    before = torch.UntypedStorage.resize_, preserving.__exit__
    first, second = dora_cache.attach(make()), dora_cache.attach(make())
    assert torch.UntypedStorage.resize_ is not before[0]
    first.detach()
    assert torch.UntypedStorage.resize_ is not before[0]
    second.detach()
    assert (torch.UntypedStorage.resize_, preserving.__exit__) == before
    assert "resize_" not in vars(torch.UntypedStorage)


def sharded(mesh, *, reshard=True):
    from torch.distributed.fsdp import fully_shard

    model = make()
    for layer in model.base_model.model:
        fully_shard(layer, mesh=mesh, reshard_after_forward=reshard)
    return fully_shard(model, mesh=mesh, reshard_after_forward=reshard)


def adam(model, factor):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = parameter.detach().clone()
    optimizer.step()


def in_place(name):
    def write(model, factor):
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if name in key:
                    parameter.mul_(factor)

    return write


def load(model, factor):
    state = {name: value * factor for name, value in model.state_dict().items()}
    model.load_state_dict(state)


WRITES = [in_place("lora_B"), in_place("base_layer"), in_place("magnitude"), adam, load]


@pytest.mark.parametrize("reshard", [True, False])
def test_fsdp2_is_right(group, reshard):
    """Under every counted write to the sharded parameters the output is the uncached model's."""
    random.seed(0)
    model, plain = sharded(group, reshard=reshard), sharded(group, reshard=reshard)
    with dora_cache.attach(model) as cache, torch.no_grad():
        for turn in range(60):
            x = torch.randn(1 + random.randrange(40), 16)
            assert torch.equal(model(x), plain(x)), turn
            write, factor = random.choice(WRITES), random.choice([0.5, 1.25])
            for one in (model, plain):
                write(one, factor)
                one.reshard()
        assert cache.stats().reasons[Reason.REFILLED.value] > 0


@pytest.mark.filterwarnings("ignore")
def test_fsdp1_is_right(group):
    """The older kind of sharding as well; in a group of one it does not shard."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    model, plain = (
        FullyShardedDataParallel(make(), use_orig_params=True, device_id=torch.device("cpu"))
        for _ in range(2)
    )
    with dora_cache.attach(model) as cache, torch.no_grad():
        for turn in range(10):
            assert torch.equal(model(X), plain(X)), turn
            for one in (model, plain):
                in_place("lora_B")(one, 1.25)
        assert cache.stats().lookups + cache.stats().bypasses > 0


def test_warming_a_sharded_model_says_why_not(group):
    """There is a warning with the reason, once, and no error; the model runs."""
    model = sharded(group)
    with dora_cache.attach(model) as cache:
        with pytest.warns(dora_cache.CacheWarning, match="sharded weights"):
            assert cache.warm() == 0
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            cache.warm()
        assert Reason.SHARDED.value in str(cache.report())
        assert same_as_uncached(model, cache)


def test_compiled_code_reads_no_buffer_of_refilled_storage():
    """Its buffers are void, so that the values are derived in the graph."""
    torch._dynamo.reset()
    model, plain = make(), make()
    with dora_cache.attach(model), torch.no_grad():
        compiled = torch.compile(model, backend="eager")
        for _ in range(3):
            with contextlib.suppress(dora_cache.CacheWarning):
                assert torch.equal(compiled(X), plain(X))
            for one in (model, plain):
                refill(one.base_model.model[0].lora_B["default"].weight, 1.5)
    torch._dynamo.reset()


def test_fsdp2_over_two_processes_is_right():
    """Each holds half of every weight, and gathers the other half anew for each forward."""
    assert count_wrong(2, "cpu", 40) == 0


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_fsdp2_over_two_gpus_is_right():
    """The same there, where a freed address comes back more often."""
    assert count_wrong(2, "cuda", 1000) == 0
