"""The audit: writes that PyTorch does not count are noticed within a bounded number of uses."""

import warnings
import weakref

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from zoo import quiet

import dora_cache
from dora_cache.core import audit as audit_module
from dora_cache.core.audit import EVERY, LEAST, MOST, SMALL, Audit, _period

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
DEVICES = ["cpu", pytest.param("cuda", marks=CUDA)]
BOUND = {"cpu": EVERY, "cuda": 3 * EVERY}  # a device's finding is read at a later audit


def make(device="cpu", layers=5, width=16, adapters=("default",)):
    torch.manual_seed(0)
    names = [str(index) for index in range(layers)]
    config = LoraConfig(use_dora=True, r=4, target_modules=names, init_lora_weights=False)
    model = get_peft_model(nn.Sequential(*[nn.Linear(width, width) for _ in names]), config)
    for adapter in adapters[1:]:
        model.add_adapter(adapter, config)
    return model.eval().to(device)


def forwards_until_right(model, cache, x, most):
    with torch.no_grad():
        for turn in range(1, most + 1):
            output = model(x)
            with cache.bypass():
                expected = model(x)
            if torch.equal(output, expected):
                return turn
    return None


def doubled_often(owner):
    for _ in range(EVERY + 2):
        found = owner.doubled()
    return found


def data_copy(tensor):
    tensor.data.copy_(tensor.data * 1.5)


def numpy_write(tensor):
    tensor.data.cpu()
    array = tensor.detach().numpy()
    array *= np.float32(1.5)


def exchange(tensor):
    flat = tensor.data.view(-1)
    flat[[0, 1]] = flat[[1, 0]]


def byte(tensor):
    tensor.untyped_storage()[1] = (tensor.untyped_storage()[1] + 1) % 256


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("part", ["lora_A", "lora_B", "lora_magnitude_vector", "base_layer"])
@pytest.mark.parametrize("uses", [2, 33, 70])
def test_an_uncounted_write_is_noticed_within_the_bound(device, part, uses):
    """Whatever was written, and however often the values had been used before."""
    model = make(device)
    x = torch.randn(2, 16, device=device)
    with dora_cache.attach(model) as cache, torch.no_grad():
        for _ in range(uses):
            model(x)
        owner = getattr(model.base_model.model[3], part)
        data_copy((owner if part == "base_layer" else owner["default"]).weight)
        with pytest.warns(dora_cache.CacheWarning, match="cache.invalidate"):
            turns = forwards_until_right(model, cache, x, BOUND[device] + 1)
        assert turns is not None
        assert cache.report().uncounted == 1


@pytest.mark.parametrize("write", [data_copy, numpy_write, exchange, byte])
@pytest.mark.filterwarnings("ignore::dora_cache.CacheWarning")
def test_every_kind_of_uncounted_write(write):
    """Contents are compared, down to the byte and its place."""
    model, x = make(), torch.randn(2, 16)
    with dora_cache.attach(model) as cache, torch.no_grad():
        model(x)
        weight = model.base_model.model[1].lora_A["default"].weight
        write(weight)
        for _ in range(EVERY + 1):
            model(x)
        assert cache.report().uncounted == 1
        assert forwards_until_right(model, cache, x, 1) == 1


@pytest.mark.filterwarnings("ignore::dora_cache.CacheWarning")
def test_everything_goes_with_what_is_caught():
    """A write of one adapter's weights is rarely alone: other layers' and adapters' values go."""
    model, x = make(adapters=("default", "b")), torch.randn(2, 16)
    with dora_cache.attach(model) as cache, torch.no_grad():
        cache.warm()
        assert cache.stats().entries == 10
        for layer in model.base_model.model:
            data_copy(layer.lora_B["default"].weight)
            data_copy(layer.lora_B["b"].weight)
        assert forwards_until_right(model, cache, x, EVERY + 1)
        assert cache.report().uncounted == 1
        model.set_adapter("b")
        assert forwards_until_right(model, cache, x, 1) == 1


@pytest.mark.parametrize("device", DEVICES)
def test_a_large_weight_is_compared_in_its_turn(device):
    """Less often than small ones, within a bound as well."""
    assert _period(SMALL[device] * MOST, device) == MOST
    least = LEAST[device]
    assert _period(3 * SMALL[device], device) == 4 * least
    assert _period(SMALL[device] - 1, device) == least
    if device == "cpu":
        model, x = make(layers=1, width=512), torch.randn(1, 512)
        weight = model.base_model.model[0].base_layer.weight
        period = _period(weight.nbytes, "cpu")
        assert period > 1
        with dora_cache.attach(model) as cache, torch.no_grad():
            model(x)
            data_copy(weight)
            with pytest.warns(dora_cache.CacheWarning, match="audit"):
                assert forwards_until_right(model, cache, x, period * EVERY + 1)


def test_a_write_while_a_value_is_derived_is_noticed():
    """What a value is derived from is hashed before it is derived."""

    class Owner(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        @dora_cache.cached("doubled", depends_on=lambda self: [self.weight])
        def doubled(self):
            found = self.weight.detach() * 2
            self.weight.data.mul_(3)
            return found

    owner = Owner().eval()
    with dora_cache.attach(owner) as cache, torch.no_grad():
        with pytest.warns(dora_cache.CacheWarning, match="doubled"):
            doubled_often(owner)
        assert cache.report().uncounted >= 1  # each time that the audit comes to it


@pytest.mark.parametrize("depends_on", [None, lambda self: [self.weight]])
def test_values_are_watched_as_well(depends_on):
    """A caller's write into a value, past its version counter, does not reach later callers."""

    class Owner(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        @dora_cache.cached("doubled", depends_on=depends_on)
        def doubled(self):
            return self.weight.detach() * 2

    owner = Owner().eval()
    with dora_cache.attach(owner), torch.no_grad():
        owner.doubled().data.fill_(7.0)
        with pytest.warns(dora_cache.CacheWarning, match="doubled"):
            found = doubled_often(owner)
        assert torch.equal(found, torch.full((4,), 2.0))


@pytest.mark.parametrize(
    "depends_on",
    [
        lambda self: [self.weight],
        lambda self: (self.weight,),
        lambda self: self.parameters(),
        lambda self: {"weight": self.weight},
        lambda self: self.weight,
        lambda self: [[self.weight]],
        lambda self: self,
    ],
    ids=["list", "tuple", "iterator", "mapping", "tensor", "nested", "module"],
)
def test_every_form_of_dependencies_is_audited(depends_on):
    """Nothing is found without a write, and a write is found, however depends_on returns them."""

    class Owner(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        @dora_cache.cached("doubled", depends_on=depends_on)
        def doubled(self):
            return self.weight.detach() * 2

    owner = Owner().eval()
    with dora_cache.attach(owner) as cache, torch.no_grad():
        for _ in range(3 * EVERY):
            owner.doubled()
        assert (cache.stats().misses, cache.stats().hits) == (1, 3 * EVERY - 1)
        owner.weight.data.mul_(3)
        with pytest.warns(dora_cache.CacheWarning, match="doubled"):
            found = doubled_often(owner)
        assert torch.equal(found, torch.full((4,), 6.0))


@pytest.mark.parametrize("backend", ["dict", "lru", "budget", "cpu"])
def test_counted_writes_and_events_are_no_finding(backend):
    """What version counters or events show is not what the audit is for."""
    model, x = make(adapters=("default", "b")), torch.randn(2, 16)
    settings = {} if backend in {"dict", "cpu"} else {"max_bytes": 10_000}
    with dora_cache.attach(model, backend=backend, **settings) as cache, torch.no_grad():
        for turn in range(3 * EVERY):
            model(x)
            weight = model.base_model.model[turn % 5].lora_B["default"].weight
            if turn % 5 == 0:
                weight.mul_(1.01)
            if turn % 7 == 0:
                optimizer = torch.optim.SGD([weight], lr=0.01, fused=True)
                weight.grad = torch.ones_like(weight)
                optimizer.step()
            if turn % 11 == 0:
                weight.data.mul_(1.01)
                cache.invalidate(adapter="default")
            if turn % 13 == 0:
                model.merge_adapter(["b"])
                model.unmerge_adapter()
            assert forwards_until_right(model, cache, x, 1) == 1
        assert cache.report().uncounted == 0


def test_hits_and_misses_are_lookups_also_where_something_is_caught():
    """The call that finds a difference goes on as a miss and is counted once."""
    model, x = make(), torch.randn(2, 16)
    with dora_cache.attach(model) as cache, torch.no_grad():
        for turn in range(4 * EVERY):
            model(x)
            if turn == EVERY:
                data_copy(model.base_model.model[2].lora_A["default"].weight)
        warnings.simplefilter("ignore")
        stats = cache.stats()
        assert stats.hits + stats.misses == 5 * 4 * EVERY
        assert stats.misses > 5


@pytest.mark.parametrize("settings", [{"audit": False}, {"guard": "content"}])
def test_it_can_be_switched_off(settings):
    """With audit=False nothing is hashed; guard="content" compares at each use anyway."""
    model, x = make(), torch.randn(2, 16)
    with dora_cache.attach(model, **settings) as cache, torch.no_grad():
        model(x)
        data_copy(model.base_model.model[2].lora_A["default"].weight)
        turns = forwards_until_right(model, cache, x, 2 * EVERY)
        assert turns == (None if "audit" in settings else 1)
        assert cache.report().uncounted == 0


def test_a_base_weight_is_hashed_once_for_all_adapters(monkeypatch):
    """Adapters of a layer share the hash of a large weight."""
    hashed = []
    digest = audit_module.digest
    monkeypatch.setattr(
        audit_module,
        "digest",
        lambda tensor: hashed.append(tensor.numel()) or digest(tensor),
    )
    model = make(layers=1, width=512, adapters=("default", "b", "c"))
    with dora_cache.attach(model) as cache:
        cache.warm()
        assert hashed.count(512 * 512) == 1


def test_an_audit_that_fails_costs_a_warning_and_nothing_else(monkeypatch):
    """A failure inside the cache never breaks an inference."""

    def fail(*_):
        raise RuntimeError("broken")

    model, x = make(), torch.randn(2, 16)
    monkeypatch.setattr(Audit, "_add", fail)
    with dora_cache.attach(model) as cache, torch.no_grad():
        with pytest.warns(dora_cache.CacheWarning, match="the audit failed"):
            model(x)
        assert forwards_until_right(model, cache, x, 1) == 1
        assert cache.stats().hits == 5


def test_it_keeps_nothing_alive():
    """Digests go with the values that they belong to, and all of them on detach."""
    model, x = make(layers=1, width=512), torch.randn(1, 512)
    cache = dora_cache.attach(model)
    with torch.no_grad():
        model(x)
    (audit,) = (weakref.ref(cell.audit) for cell in cache._engine.cells.held())
    assert len(cache._engine.auditor._large._known) == 1
    cache.detach()
    assert audit() is None
    assert not cache._engine.auditor._large._known


def test_digests_of_large_weights_go_with_the_weights(monkeypatch):
    """A server that adds and deletes large adapters does not gather them."""
    monkeypatch.setattr(audit_module, "_PRUNED", 4)
    large = audit_module._Large()
    for _ in range(20):
        large.of(torch.ones(1 << 16))
    assert len(large._known) <= 4


def test_values_that_no_cap_has_room_for_do_not_hash_large_weights_again(monkeypatch):
    """A base weight is hashed once, however often the value is derived."""
    hashed = []
    digest = audit_module.digest
    monkeypatch.setattr(
        audit_module,
        "digest",
        lambda tensor: hashed.append(tensor.numel()) or digest(tensor),
    )
    model, x = make(layers=1, width=512), torch.randn(1, 512)
    with dora_cache.attach(model, backend="lru", max_bytes=100) as cache, torch.no_grad():
        for _ in range(5):
            model(x)
        assert cache.stats().rejections == 5
        assert hashed.count(512 * 512) == 1


@CUDA
def test_nothing_waits_for_the_device():
    """A use that is audited synchronises nothing."""
    model = make("cuda")
    x = torch.randn(2, 16, device="cuda")
    with dora_cache.attach(model), torch.no_grad():
        model(x), model(x)
        try:
            with quiet():  # it warns that it is a prototype
                torch.cuda.set_sync_debug_mode("error")
            for _ in range(3 * EVERY):
                model(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@CUDA
@pytest.mark.parametrize("triton", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_device_hashes_tell_contents_apart(triton, dtype, monkeypatch):
    """Equal contents compare equal; one element more, less, or elsewhere does not."""
    if not triton:
        monkeypatch.setattr(audit_module, "_kernel", lambda: None)
    flag = torch.zeros(1, dtype=torch.int64).pin_memory()
    for size in (1, 3, 1024, 70_001):
        tensor = (torch.rand(size, device="cuda") * 200).to(dtype)
        digest = audit_module._DeviceDigest([tensor])
        digest.compare([tensor], flag, 5)
        torch.cuda.synchronize()
        assert int(flag) == 0
        tensor.view(torch.uint8)[-1] ^= 1
        digest.compare([tensor], flag, 5)
        torch.cuda.synchronize()
        assert int(flag) == 5
        flag.zero_()


@CUDA
@pytest.mark.parametrize("triton", [True, False])
def test_device_hashes_of_several_tensors(triton, monkeypatch):
    """Of many sizes, some empty, some added later; a change in any is found, and none in others."""
    if not triton:
        monkeypatch.setattr(audit_module, "_kernel", lambda: None)
    flag = torch.zeros(1, dtype=torch.int64).pin_memory()
    sizes = (5, 0, 40_000, 1, 16_384)
    tensors = [torch.randn(size, device="cuda") for size in sizes]
    digest = audit_module._DeviceDigest(tensors[:3], spare=16)
    assert digest.extend(tensors[3:])
    assert not digest.extend(tensors)
    for changed in (None, 0, 2, 3, 4):
        if changed is not None:
            tensors[changed][-1] += 1
        digest.compare(tensors, flag, 7)
        torch.cuda.synchronize()
        assert int(flag) == (0 if changed is None else 7)
        flag.zero_()
        if changed is not None:
            tensors[changed][-1] -= 1
            digest = audit_module._DeviceDigest(tensors[:3], spare=16)
            assert digest.extend(tensors[3:])
