"""LyCORIS' own modules."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from field_setups import check, ids
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

import dora_cache
from dora_cache.lab.field import setups
from dora_cache.lifecycle import plain_class
from dora_cache.reasons import Reason

pytest.importorskip("lycoris")

from lycoris.modules.base import LycorisBaseModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.tlora import TLoraModule, clear_timestep_mask, set_timestep_mask

from dora_cache.lab.field.of_lycoris import Net, applied, network
from dora_cache.recipes import load_recipes, lycoris_modules
from dora_cache.recipes.fingerprints import changed

KINDS = {
    "locon": {"dora_wd": True, "use_tucker": True, "use_scalar": True},
    "loha": {"dora_wd": True, "use_tucker": True, "use_scalar": True},
    "lokr": {"dora_wd": True, "use_tucker": True, "use_scalar": True, "decompose_both": True},
    "glora": {"use_scalar": True},
    "diag-oft": {"constraint": 0.01, "rescaled": True},
    "boft": {"constraint": 0.01, "rescaled": True},
    "ia3": {"train_norm": True},
}
kinds = pytest.mark.parametrize("algo", KINDS)


@pytest.mark.parametrize("setup", setups("lycoris"), ids=ids)
def test_setup(setup):
    check(setup)


@torch.no_grad()
def run(model):
    return model(model.sample())


def uncached(cache, model):
    with cache.bypass():
        return run(model)


def reasons(cache):
    return cache.stats().reasons


def forwards(made):
    """The classes of a network's modules, and the functions that its layers' forwards lead to."""
    found = []
    for lora in made.loras:
        method = lora.org_module[0].forward
        while method is not None:
            found.append((type(lora), method.__func__))
            method = vars(method.__self__).get("org_forward")
    return found


def plain(made):
    """What :func:`forwards` returns if nothing is attached."""
    found = []
    for lora in made.loras:
        method = lora.org_module[0].forward
        while method is not None:
            found.append((LohaModule, plain_class(type(method.__self__)).forward))
            method = vars(method.__self__).get("org_forward")
    return found


# Freshness


def written(lora):
    """Yield what a forward of a module goes by, as what doubles it and what halves it again."""
    tensors = [*lora.named_parameters(), *lora.named_buffers()]
    base = lora.org_module[0]
    tensors += [(f"org {name}", parameter) for name, parameter in base.named_parameters()]
    for name, tensor in tensors:
        if tensor.is_floating_point():
            some = tensor.view(-1)[: (tensor.numel() + 1) // 2]  # OFT undoes what scales all of it
            yield name, some.mul_
    for name in ("multiplier", "scale", "constraint"):
        if name in vars(lora):
            yield name, (lambda by, name=name: setattr(lora, name, getattr(lora, name) * by))


NO_EFFECT = {"alpha", "dtype_tensor"}


@kinds
def test_whatever_is_written_to_is_noticed(algo):
    """Parameters, buffers, numbers, and the weights of the layers, of every module in turn."""
    model, made = applied(algo, **KINDS[algo])
    with dora_cache.attach(made) as cache, torch.no_grad():
        for lora in made.loras:
            for name, scale in written(lora):
                before = run(model)
                scale(2)
                output = run(model)
                assert torch.equal(output, uncached(cache, model)), (lora.lora_name, name)
                if name not in NO_EFFECT and "org " not in name:
                    assert not torch.equal(output, before), (lora.lora_name, name)
                scale(0.5)
                assert torch.equal(run(model), before), (lora.lora_name, name)


@pytest.mark.parametrize("algo", ["locon", "loha", "lokr"])
@pytest.mark.parametrize("name", ["wd", "wd_on_out"])
def test_switches_of_the_weight_decomposition_are_noticed(algo, name):
    """They are plain attributes."""
    model, made = applied(algo, dora_wd=True)
    lora = next(one for one in made.loras if one.org_module[0] is model.up)
    with dora_cache.attach(made) as cache, torch.no_grad():
        if name == "wd_on_out":  # another shape, so that it can be used for rows and columns
            lora.dora_scale = nn.Parameter(torch.tensor(1.5))
        before = run(model)
        setattr(lora, name, not getattr(lora, name))
        output = run(model)
        assert not torch.equal(output, before)
        assert torch.equal(output, uncached(cache, model))


def test_a_parameter_that_is_replaced_is_noticed():
    """So are the layer's weight, and a part."""
    model, made = applied("locon")
    lora = made.loras[0]
    with dora_cache.attach(made) as cache, torch.no_grad():
        for owner, name in ((lora.org_module[0], "weight"), (lora.lora_up, "weight")):
            before = run(model)
            setattr(owner, name, nn.Parameter(2 * getattr(owner, name)))
            output = run(model)
            assert not torch.equal(output, before)
            assert torch.equal(output, uncached(cache, model))
        lora.lora_down = copy.deepcopy(lora.lora_down)
        lora.lora_down.weight.mul_(2)
        output = run(model)
        assert torch.equal(output, uncached(cache, model))


def test_a_mask_of_timesteps_is_noticed():
    """It is kept by the module, by the number of a group."""
    torch.manual_seed(0)
    layer = nn.Linear(16, 16)
    lora = TLoraModule("layer", layer, lora_dim=4, mask_group_id=7).eval()
    lora.apply_to()
    x = torch.randn(3, 16)
    with dora_cache.attach(lora) as cache, torch.no_grad():
        lora.q_layer.weight.add_(1)
        outputs = []
        try:
            for mask in (None, torch.tensor([[1.0, 0, 0, 0]]), torch.tensor([[1.0, 1, 0, 0]])):
                if mask is not None:
                    set_timestep_mask(mask, 7)
                outputs += [layer(x), layer(x)]
                with cache.bypass():
                    assert torch.equal(outputs[-1], layer(x))
                assert torch.equal(outputs[-1], outputs[-2])
            mask[:] = 1
            assert torch.equal(layer(x), outputs[0])
        finally:
            clear_timestep_mask(7)
        assert len({output.sum().item() for output in outputs}) == 3
        assert cache.stats().hits >= 3


@kinds
def test_loading_merging_and_regularizing_are_noticed(algo):
    """They write through .data, which no version counter shows."""
    model, made = applied(algo, **KINDS[algo])
    other = network(Net(32), algo, seed=5, **KINDS[algo])
    other.apply_to()
    state = {name: value.clone() for name, value in other.state_dict().items()}
    with dora_cache.attach(made) as cache:
        for act in (
            lambda: made.load_state_dict(state),
            lambda: made.apply_max_norm_regularization(0.3, "cpu"),
            lambda: made.merge_to(0.5),
            lambda: made.merge_to(0.5, precise=algo in {"locon", "loha", "lokr"}),
            lambda: made.set_multiplier(0.3),
            lambda: setattr(made.loras[0], "org_weight", made.loras[0].org_weight * 2),
        ):
            run(model)
            with torch.no_grad():
                act()
            assert torch.equal(run(model), uncached(cache, model))


@pytest.mark.parametrize("algo", ["locon", "loha", "lokr", "glora"])
def test_loading_sets_the_scalar_past_its_version(algo):
    """Even if nothing else is loaded."""
    model, made = applied(algo, use_scalar=True)
    with dora_cache.attach(made) as cache:
        before = run(model)
        made.load_state_dict({}, strict=False)
        output = run(model)
        assert not torch.equal(output, before)
        assert torch.equal(output, uncached(cache, model))


def test_regularizing_writes_past_a_version():
    """T-LoRA scales its singular values through .data."""
    torch.manual_seed(0)
    layer = nn.Linear(16, 16)
    lora = TLoraModule("layer", layer, lora_dim=4).eval()
    lora.apply_to()
    x = torch.randn(3, 16)
    with dora_cache.attach(lora) as cache, torch.no_grad():
        lora.q_layer.weight.add_(1)
        before = layer(x)
        lora.apply_max_norm(0.1)
        output = layer(x)
        assert not torch.equal(output, before)
        with cache.bypass():
            assert torch.equal(output, layer(x))


def test_a_merge_of_another_network_is_noticed():
    """One that is not attached writes to the weights that the attached one's values go by."""
    model, made = applied("loha", dora_wd=True)
    other = network(model, "locon", seed=5)
    with dora_cache.attach(made) as cache, torch.no_grad():
        before = run(model)
        other.merge_to(1.0)
        output = run(model)
        assert not torch.equal(output, before)
        assert torch.equal(output, uncached(cache, model))
        for act in (other.onfly_merge, other.onfly_restore):
            act()
            assert torch.equal(run(model), uncached(cache, model))
        hits = cache.stats().hits
        run(model)
        assert cache.stats().hits == hits + len(made.loras)


OPERATIONS = {
    "multiplier": lambda model, nets, n: nets[n % 2].set_multiplier(0.1 * n),
    "write": lambda model, nets, n: nets[n % 2].loras[n % 3].hada_w2_a.mul_(1 + 0.1 * n),
    "scalar": lambda model, nets, n: nets[n % 2].loras[n % 3].scalar.add_(0.1),
    "base": lambda model, nets, n: (model.up, model.conv)[n % 2].weight.mul_(1.1),
    "base data": lambda model, nets, n: nets[0].loras[n % 3].merge_to(0.1 * n),
    "precise": lambda model, nets, n: nets[n % 2].loras[1 + n % 2].merge_to(0.1, precise=True),
    "onfly": lambda model, nets, n: nets[n % 2].onfly_merge(0.1 * n),
    "norm": lambda model, nets, n: nets[n % 2].apply_max_norm_regularization(0.2, "cpu"),
    "restore": lambda model, nets, n: nets[n % 2].restore(),
    "apply": lambda model, nets, n: (nets[n % 2].restore(), nets[n % 2].apply_to()),
    "one back": lambda model, nets, n: nets[n % 2].loras[n % 3].restore(),
    "load": lambda model, nets, n: nets[n % 2].load_state_dict(nets[1 - n % 2].state_dict(), False),
    "mode": lambda model, nets, n: nets[n % 2].train(n % 3 == 0),
    "bypass": lambda model, nets, n: setattr(nets[0].loras[n % 3], "bypass_mode", n % 2 == 0),
    "double": lambda model, nets, n: [one.double().float() for one in nets],
    "run": lambda model, nets, n: None,
}


def two_networks():
    torch.manual_seed(0)
    model = Net(16).eval()
    nets = [network(model, "loha", seed=n, dora_wd=n == 0) for n in range(2)]
    for one in nets:
        one.apply_to()
    return model, nets


@settings(max_examples=25, deadline=None)
@given(
    operations=st.lists(
        st.tuples(st.sampled_from(list(OPERATIONS)), st.integers(1, 6)), min_size=1, max_size=12
    ),
    which=st.sampled_from(["model", "first", "second"]),
)
def test_outputs_are_those_of_a_twin_without_a_cache(operations, which):
    """Two networks on one model, whichever is attached, and whatever is done to them."""
    model, nets = two_networks()
    twin, others = two_networks()
    target = {"model": model, "first": nets[0], "second": nets[1]}[which]
    with dora_cache.attach(target):
        for name, n in operations:
            for it, its in ((model, nets), (twin, others)):
                with torch.no_grad():
                    OPERATIONS[name](it, its, n)
            assert torch.equal(run(model), run(twin)), name
            assert torch.equal(run(model), run(twin)), name
    assert torch.equal(run(model), run(twin))
    assert forwards(nets[0]) == plain(nets[0])
    assert forwards(nets[1]) == plain(nets[1])


# Attaching and detaching


@pytest.mark.parametrize("early", [False, True], ids=["applied first", "attached first"])
def test_detaching_leaves_classes_and_forwards_as_they_were(early):
    """Of the modules and of the layers that they were applied to."""
    model = Net(32).eval()
    made = network(model, "loha")
    if early:
        cache = dora_cache.attach(made)
        made.apply_to()
    else:
        made.apply_to()
        before = forwards(made)
        cache = dora_cache.attach(made)
        assert forwards(made) != before
    run(model), run(model)
    assert cache.stats().hits == len(made.loras)
    cache.detach()
    assert forwards(made) == plain(made)
    assert (LohaModule, LohaModule.forward) in forwards(made)
    assert all(not name.startswith("_dora") for lora in made.loras for name in vars(lora))
    assert all("_load_state_dict_post_hooks" in vars(lora) for lora in made.loras)
    made.restore()
    assert not any("_lycoris_wrappers" in vars(lora.org_module[0]) for lora in made.loras)


def test_a_model_leads_to_all_networks_that_are_applied_to_it():
    """A network leads to its own modules alone."""
    model, nets = two_networks()
    expected = run(model)
    for target, count in ((model, 2), (nets[0], 1), (nets[1], 1), (nn.ModuleList(nets), 2)):
        with dora_cache.attach(target) as cache:
            assert cache.warm() == count * len(nets[0].loras)
            assert torch.equal(run(model), expected)
            assert cache.stats().hits == count * len(nets[0].loras)
    with dora_cache.attach(nets[0]), pytest.raises(dora_cache.AlreadyAttachedError):
        dora_cache.attach(model)
    assert torch.equal(run(model), expected)


def test_a_model_that_no_network_is_applied_to_has_nothing_to_cache():
    """The error says what to attach."""
    model, made = applied("loha")
    made.restore()
    with pytest.raises(dora_cache.NothingToCacheError, match="a LycorisNetwork"):
        dora_cache.attach(model)


@pytest.mark.parametrize("first", [0, 1])
def test_networks_are_restored_in_any_order(first):
    """Each is taken out of the chain of forwards while the other stays cached."""
    model, nets = two_networks()
    twin, others = two_networks()
    with dora_cache.attach(model) as cache:
        for n in (first, 1 - first):
            assert torch.equal(run(model), run(twin))
            nets[n].restore()
            others[n].restore()
            before = cache.stats()
            assert torch.equal(run(model), run(twin))
            left = 0 if n == 1 - first else len(nets[0].loras)
            assert cache.stats().hits == before.hits + left


def test_only_what_a_network_adapts_is_followed():
    """A layer is left as it is, but for the method that it calls."""
    model, _ = applied("loha")
    classes = [type(part) for part in model.modules()]
    with dora_cache.attach(model):
        assert [type(part) for part in model.modules()] == classes


@pytest.mark.parametrize("how", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
@pytest.mark.parametrize("whole", [True, False], ids=["model", "network"])
def test_copies_start_cold(how, whole):
    """They have plain modules, and can be attached themselves."""
    model, made = applied("loha", dora_wd=True)
    expected = run(model)
    with dora_cache.attach(made) as cache:
        run(model)
        if whole:
            copied = how(model)
            loras = list(lycoris_modules.layers_in(copied))
        else:
            other, loras = how((model, made))
            copied, loras = other, loras.loras
        stats = cache.stats()
        assert {type(lora) for lora in loras} == {LohaModule}
        assert torch.equal(run(copied), expected)
        assert cache.stats() == stats
        with dora_cache.attach(copied) as its:
            assert torch.equal(run(copied), expected)
            assert torch.equal(run(copied), expected)
            assert its.stats().hits == len(made.loras)
        assert cache.stats() == stats
        with torch.no_grad():
            loras[0].hada_w1_a.mul_(2)
        assert not torch.equal(run(copied), expected)
        assert torch.equal(run(model), expected)


def test_compiled_models_run_its_own_forward():
    """As with all kinds but DoRA."""
    model, made = applied("loha", dora_wd=True)
    expected = run(model)
    with dora_cache.attach(made) as cache:
        run(model)
        compiled = torch.compile(model, backend="eager")
        with torch.no_grad():
            assert torch.equal(compiled(model.sample()), expected)
            made.loras[0].hada_w1_a.mul_(2)
            output = compiled(model.sample())
        assert not torch.equal(output, expected)
        assert torch.equal(output, uncached(cache, model))


@pytest.mark.parametrize("first", ["attached", "hooked"])
def test_layers_with_hooks_of_accelerate_are_cached(first):
    """These have a forward of their own, which calls the module's."""
    accelerate = pytest.importorskip("accelerate")
    model, made = applied("loha")
    expected = run(model)

    def hook():
        for lora in made.loras:
            accelerate.hooks.add_hook_to_module(lora.org_module[0], accelerate.hooks.ModelHook())

    if first == "hooked":
        hook()
    with dora_cache.attach(model) as cache:
        if first == "attached":
            hook()
        assert torch.equal(run(model), expected)
        assert torch.equal(run(model), expected)
        assert cache.stats().hits == len(made.loras)
    for lora in made.loras:
        assert lora.org_module[0]._old_forward.__func__ is LohaModule.forward
    assert torch.equal(run(model), expected)


def test_adapters_of_both_libraries_in_one_model():
    """PEFT's on a layer, and LyCORIS' on the layers inside, those of PEFT's adapter included."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(r=2, use_dora=True, target_modules=["up"], init_lora_weights=False)
    model = get_peft_model(Net(32), config).eval()
    made = network(model, "loha", dora_wd=True)
    made.apply_to()
    net = model.base_model.model
    with dora_cache.attach(model) as cache, torch.no_grad():
        for act in (lambda: None, net.up.base_layer.weight.neg_, lambda: made.merge_to(0.5)):
            act()
            output = run(net)
            assert torch.equal(output, uncached(cache, net))
        before = cache.stats()
        assert torch.equal(run(net), output)
        assert cache.stats().hits >= before.hits + len(made.loras)
        assert cache.stats().misses == before.misses


def test_hooks_of_the_layer_run_once():
    """The module takes the place of the layer's forward, not of its hooks."""
    model, made = applied("loha")
    calls = []
    model.up.register_forward_hook(lambda *_: calls.append(1))
    with dora_cache.attach(made):
        run(model), run(model)
    assert len(calls) == 2


def test_a_parametrized_weight_is_kept():
    """Until one of what it is derived from changes; detaching gives the parametrization back."""
    torch.manual_seed(0)
    layer = nn.Linear(16, 8).eval()
    lora = LohaModule.parametrize(layer, "weight", lora_dim=2).eval()
    with torch.no_grad():
        lora.hada_w2_a.add_(1)
        expected = layer.weight
        with dora_cache.attach(layer) as cache:
            assert torch.equal(layer.weight, expected)
            assert torch.equal(layer.weight, expected)
            assert cache.stats().hits == 1
            layer.parametrizations.weight.original.mul_(2)
            changed_weight = layer.weight
            assert not torch.equal(changed_weight, expected)
            with cache.bypass():
                assert torch.equal(layer.weight, changed_weight)
        assert torch.equal(layer.weight, changed_weight)
    assert type(lora) is LohaModule
    assert lora.forward.__func__ is LycorisBaseModule.parametrize_forward


# Where LyCORIS' own forward runs


def test_in_training_mode_its_own_forward_runs():
    """With all that is random in it. A network has a mode of its own."""
    model, made = applied("loha", rank_dropout=0.5, module_dropout=0.2)
    with dora_cache.attach(made) as cache:
        expected = run(model)
        made.train()
        outputs = [run(model) for _ in range(8)]
        assert any(not torch.equal(output, outputs[0]) for output in outputs[1:])
        assert reasons(cache) == {Reason.TRAINING.value: 8 * len(made.loras)}
        made.eval()
        assert torch.equal(run(model), expected)


@pytest.mark.parametrize("dropout", ["rank_dropout", "module_dropout", None])
def test_a_network_that_is_never_put_into_a_mode_is_cached_without_dropout(dropout):
    """Networks begin in training mode, and many people leave them there."""
    model, made = applied("loha", **({} if dropout is None else {dropout: 0.5}))
    made.train()
    with dora_cache.attach(made) as cache:
        run(model)
        output = run(model)
        if dropout is None:
            assert cache.stats().hits == len(made.loras)
            assert torch.equal(output, uncached(cache, model))
        else:
            assert reasons(cache) == {Reason.DROPOUT.value: 2 * len(made.loras)}


def test_gradients_are_those_of_its_own_forward():
    """Those of the modules' parameters, and of the layer's weight."""
    model, made = applied("diag-oft", rescaled=True)
    grads = []
    with dora_cache.attach(made) as cache:
        for bypass in (True, False):
            model.zero_grad(), made.zero_grad()
            with cache.bypass() if bypass else torch.enable_grad():
                model(model.sample()).square().sum().backward()
            parameters = (*model.named_parameters(), *made.named_parameters())
            grads.append(
                {name: one.grad.clone() for name, one in parameters if one.grad is not None}
            )
        assert reasons(cache)[Reason.GRADIENTS.value] == len(made.loras)
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


@kinds
def test_gradients_of_the_layers_flow_past_frozen_modules(algo):
    """Some kinds derive from the layer's weight itself, others from it as a constant."""
    model, made = applied(algo, **KINDS[algo])
    made.requires_grad_(False)
    grads = []
    with dora_cache.attach(made) as cache:
        run(model), run(model)
        for bypass in (True, False):
            model.zero_grad()
            with cache.bypass() if bypass else torch.enable_grad():
                model(model.sample()).square().sum().backward()
            grads.append({name: one.grad.clone() for name, one in model.named_parameters()})
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


def test_frozen_modules_hit_while_the_input_wants_gradients():
    """What flows through a stored weight is what flows through a derived one."""
    model, made = applied("loha", dora_wd=True)
    made.requires_grad_(False)
    model.requires_grad_(False)
    grads = []
    with dora_cache.attach(made) as cache:
        for _ in range(2):
            x = model.sample().requires_grad_()
            model(x).square().sum().backward()
            grads.append(x.grad)
        assert cache.stats().hits == len(made.loras)
        with cache.bypass():
            x = model.sample().requires_grad_()
            model(x).square().sum().backward()
    assert torch.equal(grads[0], x.grad)
    assert torch.equal(grads[1], x.grad)


def test_a_pruned_factor_is_left_to_lycoris():
    """It is no parameter any longer, and what computes it is not known."""
    model, made = applied("loha")
    prune.l1_unstructured(made.loras[0], "hada_w1_a", amount=0.5)
    expected = run(model)
    with dora_cache.attach(made) as cache:
        assert torch.equal(run(model), expected)
        assert torch.equal(run(model), expected)
        assert reasons(cache) == {Reason.UNUSUAL_PART.value: 2}
        assert cache.stats().hits == len(made.loras) - 1


@pytest.mark.parametrize(
    ("algo", "why"), [("dylora", "draws a rank"), ("full", "a weight of its own")]
)
def test_kinds_that_derive_nothing_that_lasts_are_declined(algo, why):
    """The report says so."""
    _, made = applied(algo)
    made.loras.append(LohaModule("other", nn.Linear(4, 4)))
    with pytest.warns(dora_cache.CacheWarning, match=why):
        cache = dora_cache.attach(made)
    with cache:
        assert [one.where.rpartition(".")[2] for one in cache.declined] == [
            type(made.loras[0]).__name__
        ]
        assert why in str(cache.report())


def test_a_method_that_lycoris_changes_declines_the_recipe(monkeypatch):
    """LyCORIS' new one runs."""
    original = LohaModule.get_weight
    monkeypatch.setattr(LohaModule, "get_weight", lambda self, shape: 2 * original(self, shape))
    model, made = applied("loha")
    expected = run(model)
    with (
        pytest.warns(dora_cache.CacheWarning, match="this lycoris has another .*get_weight"),
        pytest.raises(dora_cache.NothingToCacheError),
    ):
        dora_cache.attach(made)
    assert torch.equal(run(model), expected)


def test_the_fingerprints_are_those_of_this_lycoris():
    """The recipe is not declined with the version that the tests run with."""
    (recipe,) = [one for one in load_recipes() if one.name == "LyCORIS"]
    assert changed(recipe.relies_on) == []


def test_models_of_peft_need_no_lycoris():
    """It is not imported for a model that cannot have its modules."""
    code = """
import sys, torch, dora_cache
from peft import LoraConfig, get_peft_model
net = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)),
                     LoraConfig(r=2, use_dora=True, target_modules=["0"]))
dora_cache.attach(net.eval())
print("lycoris" in sys.modules, "dora_cache.recipes.lycoris_modules" in sys.modules)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "False"]
