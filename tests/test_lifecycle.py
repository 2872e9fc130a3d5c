"""What each operation does to the entries: dropped if it touches them, warm if it does not."""

import copy
import gc

import pytest
import torch
from peft import get_peft_model
from peft.tuners.lora.layer import LoraLayer
from peft.utils import hotswap
from peft.utils.hotswap import hotswap_adapter_from_state_dict as imported_before
from peft.utils.save_and_load import get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from zoo import (
    Block,
    activate,
    dora_config,
    dora_model,
    loha_config,
    oft_config,
    quiet,
    run,
    sample,
    shake,
)

import dora_cache

ADAPTERS = ("first", "second")
TRAIN, AVERAGE = nn.Module.train, torch.optim.swa_utils.AveragedModel.update_parameters
OLORA = LoraLayer.olora_init


class Setup:
    """An attached model with two adapters, warm, and its plain copy as the oracle."""

    def __init__(self, kind="linear", dtype=torch.float32, make=None, **settings):
        if make is None:
            self.model = dora_model(kind, dtype=dtype, adapters=ADAPTERS)
        else:
            with quiet():
                self.model = get_peft_model(Block(nn.Linear(12, 8)), make(), adapter_name="first")
                self.model.add_adapter("second", make())
            shake(self.model)
            self.model.eval()
        self.x = sample(kind, dtype)
        self.cache = dora_cache.attach(self.model, **settings)
        self.warm()

    @property
    def layer(self):
        return self.model.base_model.model.layer

    def warm(self):
        for adapter in self.adapters():
            self.activate(adapter)
            run(self.model, self.x)

    def adapters(self):
        return [name for name in (*ADAPTERS, "third") if name in self.model.peft_config]

    def activate(self, *adapters):
        activate(self.model, *adapters)

    def check(self):
        """Every adapter's output equals the plain model's, cold or warm."""
        oracle = copy.deepcopy(self.model)
        for adapter in self.adapters():
            for model in (self.model, oracle):
                activate(model, adapter)
            expected = run(oracle, self.x)
            for _ in range(2):
                assert torch.equal(run(self.model, self.x), expected), adapter

    def warm_adapters(self):
        """The adapters that can be served without deriving anything."""
        found = set()
        for adapter in self.adapters():
            self.activate(adapter)
            before = self.cache.stats().misses
            run(self.model, self.x)
            if self.cache.stats().misses == before:
                found.add(adapter)
        return found


@pytest.fixture(autouse=True)
def _quiet():
    with quiet():
        yield


def weights(setup, adapter="first"):
    return [p for name, p in setup.model.named_parameters() if f".{adapter}" in name]


def in_place(setup):
    with torch.no_grad():
        for parameter in weights(setup):
            parameter.mul_(1.25)


def in_inference_mode(setup):
    with torch.inference_mode():
        for parameter in weights(setup):
            parameter.mul_(1.25)


def new_data(setup):
    for parameter in weights(setup):
        parameter.data = parameter.data * 1.25


def new_parameters(setup):
    for module in setup.model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if any(parameter is wanted for wanted in weights(setup)):
                setattr(module, name, nn.Parameter(parameter.detach() * 1.25))


def new_parameters_at_the_same_address(setup):
    for module in setup.model.modules():
        for name in [
            n for n, p in module.named_parameters(recurse=False) if p in set(weights(setup))
        ]:
            values = getattr(module, name).detach() * 1.25
            delattr(module, name)
            setattr(module, name, nn.Parameter(values))


def swap_tensors(setup):
    for parameter in weights(setup):
        torch.utils.swap_tensors(parameter, nn.Parameter(parameter.detach() * 1.25))


def load_state_dict(setup, **options):
    state = {
        key: value * 1.25 for key, value in setup.model.state_dict().items() if ".first" in key
    }
    setup.model.load_state_dict(state, strict=False, **options)


def load_adapter_state(setup):
    state = get_peft_model_state_dict(setup.model, adapter_name="first")
    state = {key: value * 1.25 for key, value in state.items()}
    set_peft_model_state_dict(setup.model, state, adapter_name="first")


def step(optimizer_class, **options):
    def operation(setup):
        setup.activate("first")
        parameters = weights(setup)
        optimizer = optimizer_class(parameters, lr=0.05, **options)
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        for parameter in parameters:
            parameter.grad = None

    return operation


def average(setup):
    averaged = torch.optim.swa_utils.AveragedModel(copy.deepcopy(setup.model))
    with torch.no_grad():
        for target, source in zip(setup.model.parameters(), averaged.parameters(), strict=True):
            if any(target is wanted for wanted in weights(setup)):
                target.lerp_(source * 2, 0.5)


CHANGES_TO_FIRST = {
    "in place under no_grad": in_place,
    "in place under inference_mode": in_inference_mode,
    "p.data = new": new_data,
    "new Parameter": new_parameters,
    "Parameter deleted and made again": new_parameters_at_the_same_address,
    "swap_tensors": swap_tensors,
    "load_state_dict": load_state_dict,
    "load_state_dict(assign=True)": lambda setup: load_state_dict(setup, assign=True),
    "set_peft_model_state_dict": load_adapter_state,
    "SGD step": step(torch.optim.SGD, foreach=False),
    "AdamW step, foreach": step(torch.optim.AdamW, foreach=True),
    "AdamW step, fused": step(torch.optim.AdamW, fused=True),
    "moving average": average,
}


@pytest.mark.parametrize("settings", [{}, {"backend": "lru", "max_bytes": "1KiB"}], ids=str)
@pytest.mark.parametrize("kind", ["linear", "embedding", "conv2d"])
@pytest.mark.parametrize("change", CHANGES_TO_FIRST)
def test_changing_one_adapter_leaves_the_other_warm(change, kind, settings):
    """However adapter "first" is written to, it is fresh at once and "second" stays warm."""
    setup = Setup(kind, **settings)
    CHANGES_TO_FIRST[change](setup)
    assert setup.warm_adapters() == {"second"}
    setup.check()


@pytest.mark.parametrize("imported", [False, True])
@pytest.mark.parametrize("lacking", [False, True])
def test_hotswap_voids_every_adapter(imported, lacking):
    """PEFT's hotswap, which may write to adapters of similar names too, voids them all."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.other(self.layer(x))

    config = dora_config()
    config.target_modules = {"layer", "other"}
    model = get_peft_model(Two(), config, adapter_name="style")
    model.add_adapter("style2", config)
    shake(model)
    model.eval()
    x = torch.randn(3, 4)
    left_out = ".other." if lacking else "nothing"
    state = {
        k: v * 2 for k, v in model.state_dict().items() if ".style." in k and left_out not in k
    }
    with dora_cache.attach(model) as cache:
        cache.warm()
        swap = imported_before if imported else hotswap.hotswap_adapter_from_state_dict
        swap(model, state, "style", model.peft_config["style"])
        for adapter in ("style", "style2"):
            activate(model, adapter)
            assert torch.equal(run(model, x), run(copy.deepcopy(model), x))


def test_hotswap_is_unwrapped_on_detach():
    """PEFT's module has its own functions again when the last cache is detached."""
    gc.collect()  # caches that other tests left attached
    setup, other = Setup(), Setup()
    assert hotswap.hotswap_adapter_from_state_dict is not imported_before
    setup.cache.detach()
    assert hotswap.hotswap_adapter_from_state_dict is not imported_before
    other.cache.detach()
    assert hotswap.hotswap_adapter_from_state_dict is imported_before


@pytest.mark.parametrize("make", [loha_config, oft_config])
@pytest.mark.parametrize("change", CHANGES_TO_FIRST)
def test_the_other_recipes_follow_the_same_changes(change, make):
    """LoHa and OFT adapters are as fresh, and as warm, as DoRA's."""
    setup = Setup(make=make)
    CHANGES_TO_FIRST[change](setup)
    assert setup.warm_adapters() == {"second"}
    setup.check()


def scaling_set(setup):
    setup.layer.set_scale("first", 2.5)


def scaling_multiplied(setup):
    setup.activate("first")
    setup.layer.scale_layer(2.0)


def scaling_by_hand(setup):
    setup.layer.scaling["first"] *= 3


def scaling_as_tensor(setup):
    setup.layer.scaling["first"] = torch.tensor(setup.layer.scaling["first"])
    setup.warm()
    setup.layer.scaling["first"].fill_(4.0)


@pytest.mark.parametrize(
    "change", [scaling_set, scaling_multiplied, scaling_by_hand, scaling_as_tensor]
)
def test_scaling_by_every_route_is_seen(change):
    """A new scaling, by method, by hand or in a tensor, is followed for its adapter alone."""
    setup = Setup()
    change(setup)
    assert setup.warm_adapters() == {"second"}
    setup.check()
    setup.activate("first")
    setup.layer.unscale_layer()
    setup.check()


def base_in_place(setup):
    with torch.no_grad():
        setup.layer.get_base_layer().weight.mul_(1.5)


def merge_and_unmerge(setup):
    setup.activate("first")
    setup.model.merge_adapter()
    setup.model.unmerge_adapter()


def safe_merge_and_unmerge(setup):
    setup.activate("second")
    setup.model.merge_adapter(safe_merge=True)
    setup.model.unmerge_adapter()


def plain_lora_merge_and_unmerge(setup):
    setup.model.add_adapter("third", dora_config(use_dora=False))
    shake(setup.model.base_model.model.layer.lora_B["third"])
    setup.warm()
    # Plain LoRA writes into W.data: neither version counter nor address change.
    setup.model.merge_adapter(["third"])
    setup.model.unmerge_adapter()
    setup.model.delete_adapter("third")


@pytest.mark.parametrize(
    "change",
    [base_in_place, merge_and_unmerge, safe_merge_and_unmerge, plain_lora_merge_and_unmerge],
)
def test_base_weight_changes_void_every_adapter(change):
    """What is derived from W is derived again after W was written to, merges included."""
    setup = Setup()
    change(setup)
    setup.model.eval()
    assert setup.warm_adapters() == set()
    setup.check()


def test_merged_models_are_pefts():
    """While an adapter is merged, outputs are those of plain PEFT."""
    setup = Setup()
    setup.activate("first")
    setup.model.merge_adapter()
    assert torch.equal(run(setup.model, setup.x), run(copy.deepcopy(setup.model), setup.x))
    with setup.model.disable_adapter():
        oracle = copy.deepcopy(setup.model)
        assert torch.equal(run(setup.model, setup.x), run(oracle, setup.x))


def test_switching_adapters_drops_nothing():
    """set_adapter and disabling adapters keep every adapter's entries warm."""
    setup = Setup()
    entries = setup.cache.stats().entries
    for _ in range(3):
        setup.model.set_adapter("second")
        setup.model.set_adapter("first")
        with setup.model.disable_adapter():
            run(setup.model, setup.x)
    assert setup.cache.stats().entries == entries
    assert setup.cache.stats().invalidations == 0
    assert setup.warm_adapters() == {"first", "second"}


@pytest.mark.parametrize("make", [None, loha_config, oft_config])
def test_deleting_an_adapter_frees_its_entries(make):
    """delete_adapter frees that adapter's entries and leaves the others warm."""
    setup = Setup(make=make)
    entries = setup.cache.stats().entries
    setup.activate("second")
    setup.model.delete_adapter("first")
    setup.model.eval()
    assert setup.cache.stats().entries == entries // 2
    assert setup.warm_adapters() == {"second"}
    setup.check()


@pytest.mark.parametrize("make", [None, loha_config, oft_config])
def test_an_adapter_made_again_under_its_old_name_is_new(make):
    """An adapter deleted and added again under the same name never gets the old values."""
    setup = Setup(make=make)
    setup.activate("second")
    setup.model.delete_adapter("first")
    torch.manual_seed(5)
    setup.model.add_adapter("first", dora_config(alpha=9) if make is None else make())
    setup.model.eval()
    assert setup.warm_adapters() == {"second"}
    setup.check()


@pytest.mark.parametrize("make", [None, loha_config, oft_config])
def test_adapters_added_later_are_cached(make):
    """An adapter added after attaching is cached, and the others stay warm."""
    setup = Setup(make=make)
    setup.model.add_adapter("third", dora_config() if make is None else make())
    setup.model.eval()
    assert {"first", "second"} <= setup.warm_adapters()
    assert setup.warm_adapters() == {"first", "second", "third"}
    setup.check()


def test_an_adapter_that_takes_its_part_out_of_the_base_weight_voids_the_others():
    """OLoRA's initialisation writes the base weight through .data, which every adapter shares."""
    setup = Setup()
    config = dora_config()
    config.init_lora_weights = "olora"
    setup.model.add_adapter("third", config)
    setup.model.eval()
    assert setup.warm_adapters() == set()
    setup.check()


def test_loading_adapters_from_disk(tmp_path):
    """load_adapter under a new name is cached; onto an existing name it is seen."""
    setup = Setup()
    other = dora_model(adapters=("saved",))
    other.save_pretrained(tmp_path)
    setup.model.load_adapter(tmp_path / "saved", adapter_name="third")
    setup.model.eval()
    setup.check()
    assert "third" in setup.warm_adapters()
    in_place_third = [p for n, p in setup.model.named_parameters() if ".third" in n]
    with torch.no_grad():
        for parameter in in_place_third:
            parameter.zero_().add_(0.5)
    setup.check()
    setup.model.load_adapter(tmp_path / "saved", adapter_name="third")
    setup.model.eval()
    assert "third" not in setup.warm_adapters()
    setup.check()


def test_steps_in_eval_mode_leave_the_other_adapter_warm():
    """A training loop on "second" that never leaves eval mode keeps "first" warm throughout."""
    setup = Setup()
    setup.model.set_adapter("second")
    optimizer = torch.optim.AdamW(
        [p for p in setup.model.parameters() if p.requires_grad], lr=0.05, fused=True
    )
    for _ in range(3):
        setup.model(setup.x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert setup.warm_adapters() == {"first"}
        setup.check()
        setup.model.set_adapter("second")


def test_an_old_policy_that_training_copies_through_data_is_seen():
    """While "second" trains, "first" is blended with it through .data: it is fresh in eval mode."""
    setup = Setup(make=lambda: dora_config(r=4))
    old, new = weights(setup, "first"), weights(setup, "second")
    setup.model.set_adapter("second")
    optimizer = torch.optim.AdamW(new, lr=0.05)
    for _ in range(3):
        setup.model.train()
        setup.model(setup.x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        for target, source in zip(old, new, strict=True):
            target.data.copy_(0.5 * target.data + 0.5 * source.data)
        setup.model.eval()
        setup.check()
        setup.model.set_adapter("second")


def by_method(setup):
    setup.model.train()
    yield
    setup.model.eval()


def by_submodule(setup):
    setup.layer.train()
    yield
    setup.layer.eval()


def by_attribute(setup):
    setup.layer.training = True
    yield
    setup.layer.training = False


def containers(setup):
    return [getattr(setup.layer, name) for name in setup.layer.adapter_layer_names]


def by_container(setup):
    for container in containers(setup):
        container.train()
    yield
    for container in containers(setup):
        container.eval()


def by_container_and_model(setup):
    for container in containers(setup):
        container.train()
    yield
    setup.model.eval()


def by_model_and_container(setup):
    setup.model.train()
    setup.layer.training = False
    setup.warm()
    yield
    for container in containers(setup):
        container.train(False)


SWITCHES = [
    by_method,
    by_submodule,
    by_attribute,
    by_container,
    by_container_and_model,
    by_model_and_container,
]


@pytest.mark.parametrize("make", [None, loha_config, oft_config])
@pytest.mark.parametrize("switch", SWITCHES)
def test_mode_switches_void_every_adapter(switch, make):
    """A switch from train to eval, of containers as well, voids all: writes to any are seen."""
    setup = Setup(make=make)
    setup.model.set_adapter("second")
    for parameter in setup.model.parameters():
        parameter.requires_grad_(False)
    for _ in switch(setup):
        for parameter in weights(setup, "first"):
            parameter.data.mul_(1.25)
    assert setup.warm_adapters() == set()
    setup.check()


@pytest.mark.parametrize("kind", ["embedding", "conv2d"])
def test_switches_of_containers_void_other_kinds_of_dora(kind):
    """The parameters of an embedding's adapters are in containers of another type."""
    setup = Setup(kind)
    for _ in by_container(setup):
        for parameter in weights(setup, "first"):
            parameter.data.mul_(1.25)
    assert setup.warm_adapters() == set()
    setup.check()


def test_a_switch_of_one_adapters_part_voids_that_adapter():
    """What is switched is one adapter's lora_A: the other's values stay."""
    setup = Setup()
    part = setup.layer.lora_A["first"]
    part.train()
    part.weight.data.mul_(1.25)
    part.eval()
    assert setup.warm_adapters() == {"second"}
    setup.check()


def test_a_switch_of_modules_without_weights_voids_nothing():
    """Dropout that is switched on and off, as for Monte Carlo estimates, has no weights."""
    setup = Setup()
    for _ in range(2):
        setup.layer.lora_dropout.train()
        setup.layer.lora_dropout.eval()
    assert setup.cache.stats().invalidations == 0
    assert setup.warm_adapters() == {"first", "second"}


def test_a_switch_of_a_module_with_a_tied_weight_voids_every_adapter():
    """A module outside the attached part that has a layer's base weight is a way to write to it."""
    setup = Setup()
    tied = nn.Linear(12, 8)
    tied.weight = setup.layer.get_base_layer().weight
    tied.weight.data.mul_(1.25)
    tied.eval()
    assert setup.warm_adapters() == set()
    setup.check()


def test_a_switch_within_a_switch_is_followed():
    """A train() of one's own that switches a module it does not contain switches that one too."""

    class Holder(nn.Module):
        def __init__(self, held):
            super().__init__()
            self.held = [held]

        def train(self, mode=True):
            super().train(mode)
            self.held[0].train(mode)
            return self

    setup = Setup()
    holder = nn.Sequential(Holder(setup.layer.lora_A))
    holder.train()
    for parameter in weights(setup):
        parameter.data.mul_(1.25)
    holder.eval()
    assert setup.warm_adapters() == set()
    setup.check()


def test_a_switch_that_raises_is_one_nevertheless():
    """What was switched before the error may be used, so its values go."""

    class Failing(nn.Module):
        def train(self, mode=True):
            raise RuntimeError

    setup = Setup()
    setup.layer.lora_A.train()
    for parameter in weights(setup):
        parameter.data.mul_(1.25)
    with pytest.raises(RuntimeError):
        nn.ModuleList([setup.layer.lora_A, Failing()]).eval()
    setup.check()


def test_switches_are_unwrapped_on_detach():
    """nn.Module and AveragedModel have their own functions again after the last detach."""
    gc.collect()  # caches that other tests left attached
    setup, other = Setup(), Setup()
    setup.cache.detach()
    assert nn.Module.train is not TRAIN
    other.cache.detach()
    assert nn.Module.train is TRAIN
    assert torch.optim.swa_utils.AveragedModel.update_parameters is AVERAGE
    assert LoraLayer.olora_init is OLORA


def test_a_wrapper_that_others_put_on_top_stays():
    """A later wrapper of another library is not thrown away by detaching."""
    gc.collect()  # caches that other tests left attached
    setup = Setup()
    ours = nn.Module.train

    def theirs(self, mode=True):
        return ours(self, mode)

    nn.Module.train = theirs
    try:
        setup.cache.detach()
        assert nn.Module.train is theirs
        assert not setup.model.eval().training
    finally:
        nn.Module.train = TRAIN


def test_a_switch_in_compiled_code_breaks_no_graph():
    """While a cache is attached, code that switches a mode still compiles as a whole graph."""

    class Switching(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x):
            self.layer.eval()
            return self.layer(x)

    setup = Setup()
    torch._dynamo.reset()
    torch.compile(Switching(), fullgraph=True, backend="eager")(torch.ones(1, 2))
    setup.check()


def test_a_switch_to_the_same_mode_is_none():
    """eval() on a model in eval mode drops nothing."""
    setup = Setup()
    setup.model.eval()
    setup.layer.training = False
    assert setup.cache.stats().invalidations == 0


@pytest.mark.parametrize("mode", ["model", "layer"])
def test_training_mode_goes_past_the_cache(mode):
    """While any layer is in training mode, its forward is PEFT's own."""
    setup = Setup()
    (setup.model if mode == "model" else setup.layer).train()
    before = setup.cache.stats().lookups
    run(setup.model, setup.x)
    assert setup.cache.stats().lookups == before


@pytest.mark.parametrize("make", [None, loha_config])
def test_moves_free_what_they_replace(make):
    """A change of dtype drops the entries at once; a move that moves nothing keeps them."""
    setup = Setup(make=make)
    entries = setup.cache.stats().entries
    setup.model.to("cpu")
    setup.model.float()
    assert setup.cache.stats().entries == entries
    setup.model.double()
    assert setup.cache.stats().entries == 0
    setup.x = setup.x.double()
    setup.check()
    setup.model.bfloat16()
    setup.x = setup.x.bfloat16()
    setup.check()


def test_an_in_place_write_into_a_stored_value_is_noticed():
    """A caller who writes into what the cache returned does not spoil it for the others."""

    class Owner(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3), requires_grad=False)

        @dora_cache.cached("double")
        def double(self):
            return self.weight * 2

    owner = Owner().eval()
    with dora_cache.attach(owner):
        owner.double().zero_()
        assert torch.equal(owner.double(), torch.full((3,), 2.0))


def test_content_guard_catches_writes_through_aliases():
    """guard="content" sees what no version counter shows."""
    setup = Setup(guard="content")
    for parameter in weights(setup):
        parameter.data.mul_(1.25)
    assert setup.warm_adapters() == {"second"}
    setup.check()
    magnitude = setup.layer.lora_magnitude_vector["first"].weight
    magnitude.detach().numpy()[:2] = magnitude.detach().numpy()[[1, 0]]
    setup.check()


def test_invalidate_handles_writes_through_aliases():
    """Under guard="version", invalidate(adapter) is the call after a write through an alias."""
    setup = Setup()
    for parameter in weights(setup):
        parameter.data.mul_(1.25)
    assert setup.cache.invalidate(adapter="first") == 1
    assert setup.warm_adapters() == {"second"}
    setup.check()
    assert setup.cache.invalidate(adapter="unknown") == 0
    assert setup.cache.invalidate() == 2
    assert setup.warm_adapters() == set()


def test_invalidate_by_module():
    """invalidate(module=...) drops what belongs to that part of the model."""
    setup = Setup()
    assert setup.cache.invalidate(module=setup.layer.lora_A) == 0
    assert setup.cache.invalidate(module=setup.layer, adapter="first") == 1
    assert setup.cache.invalidate(module=setup.model) == 1


def test_bypass_is_pefts_own_forward_and_keeps_entries():
    """bypass() goes past the cache, nests, and leaves entries warm."""
    setup = Setup()
    entries = setup.cache.stats().entries
    with setup.cache.bypass(), setup.cache.bypass():
        before = setup.cache.stats()
        run(setup.model, setup.x)
        after = setup.cache.stats()
    assert after.lookups == before.lookups
    assert after.bypasses == before.bypasses + 1
    assert setup.cache.stats().entries == entries
    assert setup.warm_adapters() == {"first", "second"}


@pytest.mark.parametrize("make", [None, loha_config, oft_config])
@pytest.mark.parametrize("numerics", ["peft", "fast"])
def test_warm_derives_what_the_first_forward_needs(make, numerics):
    """After warm(), no forward derives anything; warming again derives nothing."""
    setup = Setup(make=make, numerics=numerics)
    setup.cache.invalidate()
    assert setup.cache.warm(adapters=["first"]) == 1
    assert setup.warm_adapters() == {"first"}
    setup.cache.invalidate()
    assert setup.cache.warm() == 2
    assert setup.cache.warm() == 0
    assert setup.warm_adapters() == {"first", "second"}
    with pytest.raises(dora_cache.AdapterNotFoundError, match="'first', 'second'"):
        setup.cache.warm(adapters=["third"])
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        setup.model.train()
        setup.cache.warm()


@pytest.mark.parametrize("numerics", ["peft", "fast"])
def test_compiled_models_follow_their_weights(numerics):
    """A compiled model has what refresh() found changed; see test_compile.py."""
    setup = Setup(numerics=numerics)
    setup.activate("first")
    compiled = torch.compile(setup.model, backend="eager")
    with torch.no_grad():
        compiled(setup.x)
        in_place(setup)
        assert setup.cache.refresh() == 1
        expected = run(copy.deepcopy(setup.model), setup.x)
        torch.testing.assert_close(compiled(setup.x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [loha_config, oft_config])
def test_attaching_breaks_no_graph(make):
    """What compiles with fullgraph=True in PEFT still does attached, and follows its weights."""
    setup = Setup(make=make)
    setup.activate("first")
    compiled = torch.compile(setup.model, backend="eager", fullgraph=True)
    with torch.no_grad():
        compiled(setup.x)
        in_place(setup)
        assert torch.equal(compiled(setup.x), run(copy.deepcopy(setup.model), setup.x))


def test_transformed_and_faked_calls_go_past_the_cache():
    """Under vmap, grad, jit tracing, forward-mode AD and fake tensors nothing stored is used."""
    setup = Setup()
    setup.activate("first")
    before = setup.cache.stats()
    torch.func.vmap(lambda x: setup.model(x))(torch.randn(2, 3, 12))
    torch.func.grad(lambda x: setup.model(x).sum())(torch.randn(3, 12))
    torch.jit.trace(setup.model.base_model.model, setup.x, check_trace=False)
    with torch.autograd.forward_ad.dual_level():
        setup.model(setup.x)
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        setup.model(mode.from_tensor(setup.x))
    after = setup.cache.stats()
    assert after.lookups == before.lookups
    assert after.bypasses > before.bypasses
    setup.check()


def test_inference_tensors_as_weights_go_past_the_cache():
    """Weights without a version counter cannot be checked, so nothing is stored for them."""
    with torch.inference_mode():
        model = dora_model()
    x = sample("linear")
    with torch.inference_mode():
        expected = model(x)
        with dora_cache.attach(model) as cache:
            assert torch.equal(model(x), expected)
            assert torch.equal(model(x), expected)
            stats = cache.stats()
    assert stats.lookups == 0
    assert stats.bypasses == 2


def test_a_merge_into_a_shared_base_weight_is_seen():
    """A plain LoRA layer that shares its base weight with a DoRA layer voids it by merging."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.other = nn.Linear(6, 6), nn.Linear(6, 6)
            self.other.weight = self.layer.weight

        def forward(self, x):
            return self.layer(x)

    model = get_peft_model(Tied(), dora_config(), adapter_name="first")
    config = dora_config(use_dora=False)
    config.target_modules = {"other"}
    model.add_adapter("plain", config)
    shake(model)
    model.eval()
    activate(model, "first")
    x = torch.randn(3, 6)
    with dora_cache.attach(model):
        run(model, x)
        other = model.base_model.model.other
        for change in (lambda: other.merge(adapter_names=["plain"]), other.unmerge):
            change()
            assert torch.equal(run(model, x), run(copy.deepcopy(model), x))


def test_a_step_whose_own_hook_clears_the_gradients_is_seen():
    """A fused step is followed even if the optimizer's hook has cleared the gradients by then."""
    setup = Setup()
    setup.activate("first")
    parameters = weights(setup)
    optimizer = torch.optim.AdamW(parameters, lr=0.05, fused=True)
    optimizer.register_step_post_hook(lambda stepped, *_: stepped.zero_grad())
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert setup.warm_adapters() == {"second"}
    setup.check()


def test_hooks_on_an_adapters_modules_go_past_the_cache():
    """While a hook may change what PEFT derives, PEFT derives it; afterwards the cache serves."""
    setup = Setup()
    setup.activate("first")
    handle = setup.layer.lora_B["first"].register_forward_hook(
        lambda module, args, output: output + args[0].sum(-1, keepdim=True)
    )
    oracle = run(copy.deepcopy(setup.model), setup.x)
    assert torch.equal(run(setup.model, setup.x), oracle)
    handle.remove()
    setup.check()
    assert setup.warm_adapters() == {"first", "second"}


def test_values_derived_under_a_mode_are_not_kept():
    """What is computed under somebody's dispatch mode is used neither before nor after it."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Doubling(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            return result * 2 if "mm" in str(func) else result

    setup = Setup()
    setup.cache.invalidate()
    with torch.no_grad(), Doubling():
        setup.model(setup.x)
    setup.check()


def test_stateful_base_weights_are_followed():
    """A base weight that is computed, or a plain tensor, is as fresh as a parameter."""
    setup = Setup()
    base = setup.layer.get_base_layer()
    weight = base.weight.detach().clone()
    del base.weight
    base.weight = weight
    setup.check()
    weight.mul_(2)
    setup.check()
    base.weight = weight * 3
    setup.check()
