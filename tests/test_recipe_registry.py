"""Recipes are found, checked against the PEFT that is there, and declined rather than wrong."""

import dataclasses
import types
from functools import partial
from importlib.metadata import EntryPoint

import pytest
import torch
from peft import DeftConfig, PeftType, VeraConfig, get_peft_model
from peft.tuners.fourierft.layer import FourierFTLinear
from peft.tuners.loha import layer as loha_layer
from peft.tuners.loha.layer import LoHaLayer
from torch import nn
from zoo import dora_model, quiet, run, sample

import dora_cache
from dora_cache import recipes
from dora_cache.lab.coverage import NOTHING_TO_CACHE
from dora_cache.recipes import fingerprints, load_recipes
from dora_cache.recipes.examples import TARGETS, make_model
from dora_cache.recipes.fingerprints import changed, fingerprint
from dora_cache.recipes.hooks import Hook, LayerRecipe, guard, memo
from dora_cache.testing import check_recipe

BY_NAME = {recipe.name: recipe for recipe in load_recipes()}


def loha_example():
    return BY_NAME["LoHa"].examples[0]


# Changes in PEFT


def test_the_fingerprints_are_those_of_this_peft():
    """No recipe is declined with the version of PEFT that the tests run with."""
    assert {r.name: changed(r.relies_on) for r in load_recipes() if changed(r.relies_on)} == {}


def test_a_method_that_peft_changes_declines_the_recipe(monkeypatch):
    """The recipe does not go by what it knew of the old method; PEFT's new one runs."""
    original = LoHaLayer.get_delta_weight

    def get_delta_weight(self, adapter_name, *, apply_rank_dropout=False):
        return original(self, adapter_name, apply_rank_dropout=apply_rank_dropout) * self.factor

    monkeypatch.setattr(LoHaLayer, "get_delta_weight", get_delta_weight)
    monkeypatch.setattr(LoHaLayer, "factor", 2.0, raising=False)
    model, x = make_model(loha_example())
    expected = run(model, x)
    with (
        pytest.warns(dora_cache.CacheWarning, match="LoHa .*get_delta_weight"),
        pytest.raises(dora_cache.NothingToCacheError),
    ):
        dora_cache.attach(model)
    assert torch.equal(run(model, x), expected)
    monkeypatch.setattr(LoHaLayer, "factor", 3.0)
    assert not torch.equal(run(model, x), expected)


def test_the_other_recipes_go_on(monkeypatch):
    """Only the recipe that relies on the changed method is declined."""
    monkeypatch.setattr(LoHaLayer, "get_delta_weight", lambda *_, **__: None)
    model = dora_model()
    with dora_cache.attach(model) as cache:
        run(model, sample("linear"))
        assert cache.stats().stores == 1
        assert cache.declined == []


def test_a_decorator_on_a_method_is_a_change(monkeypatch):
    """A wrapper that names what it wraps does not pass for it."""
    import functools

    original = FourierFTLinear.forward

    @functools.wraps(original)
    def wrapper(self, *args, **kwargs):
        return original(self, *args, **kwargs)

    path = "peft.tuners.fourierft.layer:FourierFTLinear.forward"
    before = fingerprint(path)
    monkeypatch.setattr(FourierFTLinear, "forward", wrapper)
    assert fingerprint(path) not in {before, "unknown", "gone"}


def test_what_is_gone_or_cannot_be_read_is_a_change(monkeypatch):
    """A method that has been removed, or is not written in Python, matches no fingerprint."""
    assert fingerprint("peft.tuners.loha.layer:LoHaLayer.no_such_method") == "gone"
    assert fingerprint("peft.no_such_module:f") == "gone"
    monkeypatch.setattr(loha_layer, "make_weight", len)
    assert fingerprint("peft.tuners.loha.layer:make_weight") == "unknown"
    assert changed({"peft.tuners.loha.layer:make_weight": "0123456789ab"})


def test_comments_docstrings_and_layout_do_not_count():
    """A fingerprint stands for what a method does."""
    spaces = [
        'def f(x):\n    """Say it."""\n    return g(x, 1)  # why\n',
        "def f(x):\n    return g(\n        x,\n        1)\n",
    ]
    other = "def f(x):\n    return g(x, 2)\n"
    texts = []
    for source in [*spaces, other]:
        code = compile(source, "<made>", "exec").co_consts[0]
        fingerprints._source.cache_clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fingerprints.inspect, "getsource", lambda _, s=source: s)
            texts.append(fingerprints._source(code))
    fingerprints._source.cache_clear()
    assert texts[0] == texts[1] != texts[2]


def test_a_class_with_a_method_of_its_own_is_declined():
    """A quantized layer, say, that overrides what the recipe would replace, is left to itself."""
    model, x = make_model(loha_example())
    inner = model.base_model.model

    class Other(type(inner.layer)):
        def get_delta_weight(self, *args, **kwargs):
            return 2 * super().get_delta_weight(*args, **kwargs)

    inner.layer.__class__ = Other
    expected = run(model, x)
    with pytest.warns(dora_cache.CacheWarning, match="its get_delta_weight"):
        cache = dora_cache.attach(model)
    assert torch.equal(run(model, x), expected)
    assert torch.equal(run(model, x), expected)
    assert [where.rpartition(".")[2] for _, _, where, _ in cache.declined] == ["Other"]
    assert cache.stats().entries == 1  # the other layer's
    cache.detach()


# Where recipes come from


def deft(name="DEFT"):
    from peft.tuners.deft.layer import DeftLinear

    hook = memo(
        DeftLinear,
        "_project",
        "basis",
        adapter="adapter_name",
        depends_on=lambda layer, P, adapter_name: [layer.deft_decomposition[adapter_name]],
        warm=lambda layer, adapter: layer._project(layer.deft_P[adapter], adapter),
    )
    return LayerRecipe(name=name, hooks={DeftLinear: [hook]}, adapters="deft_P", relies_on={})


def deft_model(adapters=("one", "two")):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(12, 8)

        def forward(self, x):
            return self.layer(x)

    with quiet():
        torch.manual_seed(0)
        config = DeftConfig(r=4, decomposition_method="qr", target_modules=TARGETS)
        model = get_peft_model(Net(), config, adapter_name=adapters[0])
        for name in adapters[1:]:
            model.add_adapter(name, config)
    return model.eval(), torch.randn(3, 12)


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(recipes, "_registered", {})


@pytest.mark.usefixtures("registered")
def test_a_registered_recipe_is_applied_and_keeps_the_promises():
    """A third party's recipe gets all that built-in ones have."""
    with pytest.raises(dora_cache.NothingToCacheError):
        dora_cache.attach(deft_model()[0])
    dora_cache.register_recipe(deft())
    check_recipe(deft_model)


@pytest.mark.usefixtures("registered")
def test_a_registered_recipe_comes_before_the_built_in_one():
    """A name that is taken is taken over."""
    mine = deft(name="LoHa")
    dora_cache.register_recipe(mine)
    assert [recipe for recipe in load_recipes() if recipe.name == "LoHa"] == [mine]


@pytest.mark.usefixtures("registered")
def test_what_is_no_recipe_is_refused():
    """The error says what a recipe is."""
    with pytest.raises(dora_cache.ConfigError, match=r"it has no 'relies_on'.*LayerRecipe"):
        dora_cache.register_recipe(types.SimpleNamespace(name="mine"))


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"hooks": {}}, r"'mine' has no hooks: give hooks=\{Layer: \[memo"),
        ({"hooks": None}, "has no hooks"),
        ({"hooks": {FourierFTLinear: []}}, "no hooks for FourierFTLinear"),
        ({"hooks": {"Linear": [guard(print)]}}, "has hooks for 'Linear': give a class"),
        ({"hooks": {FourierFTLinear: [print]}}, r"what memo\(\.\.\.\) or guard"),
        ({"hooks": {FourierFTLinear: [Hook("foward", print)]}}, "did you mean 'forward'"),
        ({"hooks": {FourierFTLinear: [Hook("xyz", print)]}}, "one that it has"),
        ({"fast": {FourierFTLinear: []}}, "no fast for FourierFTLinear"),
        ({"fast": {FourierFTLinear: [guard(print)]}}, "not in its hooks"),
        ({"adapters": ""}, 'adapters="lora_A"'),
        ({"adapters": ["deft_P"]}, 'adapters="lora_A"'),
        ({"adapters": "deft.P"}, 'adapters="lora_A"'),
    ],
)
def test_a_recipe_that_would_cache_nothing_is_refused(change, part):
    """When it is made, with what to write instead."""
    whole = deft(name="mine")
    with pytest.raises(dora_cache.ConfigError, match=part):
        dataclasses.replace(whole, **change)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    ("adapters", "part"),
    [
        ("deft_p", r"DeftLinear has no such attribute: did you mean 'deft_P'\? It has "),
        ("wholly_other", "DeftLinear has no such attribute: it has "),
        ("base_layer", "DeftLinear has no keys there: it has "),
    ],
)
def test_an_attribute_that_no_layer_has_is_an_error(adapters, part):
    """Misspelt, it would be missed by warm() or by a forward, so attaching says so."""
    dora_cache.register_recipe(dataclasses.replace(deft(), adapters=adapters))
    model, x = deft_model()
    expected = run(model, x)
    with pytest.raises(dora_cache.ConfigError, match=part):
        dora_cache.attach(model)
    assert torch.equal(run(model, x), expected)
    assert type(model.base_model.model.layer).__module__.startswith("peft.")


@pytest.mark.usefixtures("registered")
def test_installed_packages_offer_recipes(monkeypatch):
    """Under an entry point; one that cannot be loaded is declined, and attaching goes on."""
    module = types.ModuleType("somebodys_recipe")
    module.RECIPE = deft()
    monkeypatch.setitem(__import__("sys").modules, "somebodys_recipe", module)
    group = recipes.ENTRY_POINT_GROUP
    points = [
        EntryPoint("DEFT", "somebodys_recipe:RECIPE", group),
        EntryPoint("broken", "no_such_package:RECIPE", group),
    ]
    monkeypatch.setattr(recipes, "entry_points", lambda group: points)
    model, x = deft_model()
    expected = run(model, x)
    with pytest.warns(dora_cache.CacheWarning, match="broken .*cannot be loaded"):
        cache = dora_cache.attach(model)
    assert torch.equal(run(model, x), expected)
    assert cache.stats().stores == 1
    cache.detach()


def test_a_built_in_recipe_that_cannot_be_imported_is_declined(monkeypatch):
    """As when a release of PEFT drops a kind of adapter."""
    monkeypatch.setitem(recipes.RECIPES, "Gone", "dora_cache.recipes.no_such_module")
    model = dora_model()
    with pytest.warns(dora_cache.CacheWarning, match="Gone .*cannot be loaded"):
        cache = dora_cache.attach(model)
    run(model, sample("linear"))
    assert cache.stats().stores == 1
    cache.detach()


# What is covered


def test_every_kind_of_adapter_has_a_recipe_or_a_reason():
    """So that nobody wonders; by PEFT's own list of kinds."""
    covered = {
        example.config(16, 24).peft_type
        for recipe in BY_NAME.values()
        for example in recipe.examples
    }
    names = {kind.value for kind in PeftType}
    assert {kind.value for kind in covered} | set(NOTHING_TO_CACHE) >= names
    assert set(NOTHING_TO_CACHE) <= names
    assert {kind.value for kind in covered} & set(NOTHING_TO_CACHE) <= {"LORA"}  # DoRA is one


def test_a_model_with_nothing_to_cache_is_told_so():
    """VeRA recomputes nothing."""
    with quiet():
        model = get_peft_model(
            nn.Sequential(nn.Linear(8, 8)), VeraConfig(r=2, target_modules=["0"])
        )
    with pytest.raises(dora_cache.NothingToCacheError, match="nothing to cache"):
        dora_cache.attach(model)


def test_examples_are_the_same_each_time():
    """An oracle made like the model is its equal."""
    make = partial(make_model, loha_example(), adapters=("a", "b"))
    (one, x), (other, y) = make(), make()
    assert torch.equal(x, y)
    assert torch.equal(run(one, x), run(other, y))
