"""Attaching and detaching: what changes on the model, and that it changes back."""

import copy
import gc
import io
import pickle
import subprocess
import sys
import weakref
from collections import OrderedDict

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from zoo import (
    KINDS,
    activate,
    dora_config,
    dora_model,
    loha_config,
    oft_config,
    quiet,
    run,
    sample,
)

import dora_cache
from dora_cache import attachment, cached
from dora_cache.attributes import SLOT


def snapshot(model):
    """Everything about a model that attaching could leave behind."""
    return {
        name: (
            type(module),
            {key: id(value) for key, value in vars(module).items()},
            {key: id(value) for key, value in getattr(module, "lora_variant", {}).items()},
        )
        for name, module in model.named_modules()
    }


def traces(model):
    return [
        (name, key)
        for name, module in model.named_modules()
        for key in [*vars(module), type(module).__module__]
        if key.startswith(("_dora_cache_", "dora_cache"))
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_detach_restores_every_class_and_attribute(kind):
    """After detach each module has its own class, attributes and variants again."""
    model = dora_model(kind, adapters=("first", "second"))
    model(sample(kind))
    before = snapshot(model)
    expected = run(model, sample(kind).clone())
    with dora_cache.attach(model) as cache:
        run(model, sample(kind))
        cache.invalidate()
        assert snapshot(model) != before
    assert snapshot(model) == before
    assert traces(model) == []
    assert expected.shape == run(model, sample(kind)).shape


def test_the_state_dict_never_changes():
    """Attached, warm or detached, the state_dict has the same keys and tensors."""
    model = dora_model()
    before = model.state_dict()
    with dora_cache.attach(model) as cache:
        run(model, sample("linear"))
        cache.warm()
        during = model.state_dict()
    for found in (during, model.state_dict()):
        assert list(found) == list(before)
        assert all(torch.equal(found[key], before[key]) for key in before)
        assert all(found[key].data_ptr() == before[key].data_ptr() for key in before)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: _saved(model),
}


def _saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("kind", KINDS)
def test_copies_start_cold_and_are_independent(kind, how):
    """A copy of a warm attached model is a plain PEFT model that can be attached itself."""
    model = dora_model(kind)
    classes = [type(module) for module in model.modules()]
    x = sample(kind)
    with dora_cache.attach(model) as cache:
        expected = run(model, x)
        clone = COPIES[how](model)
        assert traces(clone) == []
        assert [type(module) for module in clone.modules()] == classes
        with torch.no_grad():
            for parameter in clone.parameters():
                parameter.mul_(1.5)
        changed = run(clone, x)
        lookups = cache.stats().lookups
        with dora_cache.attach(clone) as other:
            assert torch.equal(run(clone, x), changed)
            assert other.stats().misses == 1
        assert torch.equal(run(model, x), expected)
        assert cache.stats().lookups == lookups + 1


def test_a_shallow_copy_has_no_share_in_the_cache():
    """copy.copy of an attached layer is a plain layer."""
    model = dora_model()
    with dora_cache.attach(model):
        clone = copy.copy(model.base_model.model.layer)
        assert SLOT not in vars(clone)
        assert type(clone) is type(dora_model().base_model.model.layer)


def test_a_copy_by_dict_is_recognised():
    """An object that carries the owner's binding along by accident gets no cached values."""
    model = dora_model()
    x = sample("linear")
    layer = model.base_model.model.layer
    with dora_cache.attach(model) as cache:
        run(model, x)
        twin = layer.__class__.__new__(layer.__class__)
        twin.__dict__.update(layer.__dict__)
        with torch.no_grad():
            assert torch.equal(twin(x), layer(x))
        assert cache.stats().bypasses == 1


def test_an_unpickled_model_does_not_need_the_library():
    """A pickle of an attached model names nothing of dora_cache."""
    model = dora_model()
    with dora_cache.attach(model):
        run(model, sample("linear"))
        payload = pickle.dumps(model)
    assert b"dora_cache." not in payload
    assert b"dora_cache_" not in payload


@pytest.mark.parametrize("whole_first", [True, False])
def test_attaching_twice_is_an_error_that_changes_nothing(whole_first):
    """A second cache on the model, or on a part of it, is refused and leaves no trace."""
    model = dora_model(adapters=("first", "second"))
    part = model.base_model.model
    first, second = (model, part) if whole_first else (part, model)
    with dora_cache.attach(first) as cache:
        run(model, sample("linear"))
        before = snapshot(model)
        with pytest.raises(dora_cache.AlreadyAttachedError, match="detach"):
            dora_cache.attach(second)
        assert snapshot(model) == before
        run(model, sample("linear"))
        assert cache.stats().hits == 1
    with dora_cache.attach(second) as cache:
        run(model, sample("linear"))
        assert cache.stats().misses == 1


def test_a_failing_attach_leaves_nothing_behind(monkeypatch):
    """An error half-way through attaching undoes what was done so far."""
    with quiet():
        model = dora_model()
        model.base_model.model.add_module("extra", dora_model("conv2d"))
    before = snapshot(model)

    def fail(_):
        raise RuntimeError("no hooks today")

    monkeypatch.setattr("dora_cache.attachment.follow_optimizers", fail)
    with pytest.raises(RuntimeError, match="no hooks today"):
        dora_cache.attach(model)
    assert snapshot(model) == before


def test_nothing_to_cache_is_an_error():
    """A model without cacheable layers is refused, with a hint at what would be cacheable."""
    with pytest.raises(dora_cache.NothingToCacheError, match="plain LoRA derives nothing"):
        dora_cache.attach(dora_model(use_dora=False))
    with pytest.raises(dora_cache.NothingToCacheError, match="DoRA"):
        dora_cache.attach(nn.Linear(2, 2))
    with pytest.raises(dora_cache.NothingToCacheError):
        dora_cache.attach(object())


def test_wrong_configurations_are_refused_before_anything_changes():
    """Bad settings leave the model as it was."""
    model = dora_model()
    before = snapshot(model)
    config = dora_cache.CacheConfig()
    for arguments in [
        {"backend": "nope"},
        {"backend": "lru"},
        {"max_bytes": "1KiB"},
        {"colour": "red"},
        {"config": config, "backend": "dict"},
        {"config": {"backend": "dict"}},
    ]:
        with pytest.raises(dora_cache.ConfigError):
            dora_cache.attach(model, **arguments)
        assert snapshot(model) == before


def test_a_detached_cache_says_so():
    """Using a cache after detach is a clear error; detaching again is not."""
    model = dora_model()
    cache = dora_cache.attach(model)
    run(model, sample("linear"))
    cache.detach()
    cache.detach()
    assert repr(cache) == "<AdapterCache, detached>"
    assert cache.stats().entries == cache.stats().nbytes == 0
    with pytest.raises(dora_cache.DetachedError, match="attach"):
        cache.warm()
    with dora_cache.attach(model) as again:
        run(model, sample("linear"))
        assert again.stats().misses == 1


def test_an_error_inside_the_with_block_detaches():
    """Leaving the with block by an exception detaches all the same."""
    model = dora_model()
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError), dora_cache.attach(model):
        raise ZeroDivisionError
    assert snapshot(model) == before


def test_plain_injected_modules_can_be_attached():
    """A model into which adapters were injected without a PeftModel around it works as well."""
    from peft import inject_adapter_in_model

    model = nn.ModuleDict({"layer": nn.Linear(6, 6)})
    inject_adapter_in_model(dora_config(), model, adapter_name="first")
    model.eval()
    x = torch.randn(2, 6)
    expected = run(model["layer"], x)
    with dora_cache.attach(model) as cache:
        assert torch.equal(run(model["layer"], x), expected)
        assert torch.equal(run(model["layer"], x), expected)
        with quiet():
            inject_adapter_in_model(dora_config(), model, adapter_name="second")
        model["layer"].set_adapter("second")
        model.eval()
        run(model["layer"], x)
        assert cache.stats().entries == 2


def test_layers_added_later_are_cached_too():
    """An adapter that targets further modules after attaching has them cached."""
    model = nn.Sequential()
    model.add_module("layer", nn.Linear(6, 6))
    model.add_module("other", nn.Linear(6, 6))
    from peft import get_peft_model

    with quiet():
        model = get_peft_model(model, dora_config(), adapter_name="first").eval()
    x = torch.randn(2, 6)
    with dora_cache.attach(model) as cache:
        run(model, x)
        assert cache.stats().entries == 1
        config = dora_config()
        config.target_modules = {"layer", "other"}
        with quiet():
            model.add_adapter("second", config)
        activate(model, "second")
        model.eval()
        with cache.bypass():
            expected = run(model, x)
        assert torch.equal(run(model, x), expected)
        assert cache.stats().entries == 3
        assert torch.equal(run(model, x), expected)
    assert traces(model) == []


def test_a_collected_model_frees_its_entries():
    """The cache keeps no model alive, and a dead model's entries go at once."""
    model = dora_model()
    cache = dora_cache.attach(model)
    run(model, sample("linear"))
    assert cache.stats().entries == 1
    dead = weakref.ref(model)
    weights = weakref.ref(model.base_model.model.layer.lora_A["first"])
    del model
    gc.collect()
    assert dead() is None
    assert weights() is None
    assert cache.stats().entries == cache.stats().nbytes == 0


def test_a_forgotten_handle_lives_with_its_model():
    """Dropping the handle does not detach; the model keeps its cache, and both die together."""
    model = dora_model()
    dora_cache.attach(model)
    cache = weakref.ref(vars(model.base_model.model.layer)[SLOT].cache)
    gc.collect()
    run(model, sample("linear"))
    assert cache().cells.count() == (0, 1)
    del model
    gc.collect()
    assert cache() is None


def test_parameters_can_be_swapped_while_entries_are_held():
    """torch.utils.swap_tensors, which refuses weakly referenced tensors, still works."""
    model = dora_model()
    x = sample("linear")
    layer = model.base_model.model.layer
    with dora_cache.attach(model) as cache:
        run(model, x)
        for parameter in list(layer.parameters()):
            torch.utils.swap_tensors(parameter, nn.Parameter(parameter.detach() * 2))
        changed = run(model, x)
        with cache.bypass():
            assert torch.equal(run(model, x), changed)


def test_detach_works_after_unloading():
    """merge_and_unload takes the layers away; detaching afterwards finds nothing to trip over."""
    with quiet():
        model = dora_model()
        cache = dora_cache.attach(model)
        run(model, sample("linear"))
        plain = model.merge_and_unload()
    del model
    gc.collect()
    assert cache.stats().entries == 0
    cache.detach()
    assert traces(plain) == []


@pytest.mark.parametrize("make", [loha_config, oft_config])
def test_other_recipes_detach_exactly(make):
    """LoHa and OFT layers, and OFT's rotations, get their classes back."""
    from peft import get_peft_model
    from zoo import Block

    with quiet():
        model = get_peft_model(Block(nn.Linear(12, 8)), make(), adapter_name="first").eval()
    before = snapshot(model)
    with dora_cache.attach(model):
        run(model, sample("linear"))
        clone = copy.deepcopy(model)
        assert traces(clone) == []
        assert {n: t for n, (t, *_) in snapshot(clone).items()} == {
            name: kind for name, (kind, *_) in before.items()
        }
    assert snapshot(model) == before


def test_importing_the_library_imports_neither_peft_nor_transformers():
    """Importing dora_cache stays quick: PEFT and transformers are loaded by recipes alone."""
    code = (
        "import sys, dora_cache, dora_cache.backends;"
        "unwanted = {'peft', 'lycoris', 'transformers', 'accelerate', 'rich', 'typer'};"
        "unwanted.add('safetensors');"
        "print(sorted(unwanted & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


# Objects that hold models


class Pipeline:
    """What Diffusers' pipelines are to a cache: no module, but models and more by name."""

    def __init__(self, **parts):
        vars(self).update(parts)
        self.names = list(parts)

    @property
    def components(self):
        return {name: getattr(self, name) for name in self.names}

    def __call__(self, x):
        return run(self.unet, run(self.text_encoder, x)[..., :4].repeat(1, 1, 3))


def pipeline(**more):
    parts = {
        "vae": nn.Linear(2, 2),
        "text_encoder": dora_model(),
        "tokenizer": object(),
        "unet": dora_model(),
        "safety_checker": None,
    }
    return Pipeline(**parts | more)


def test_a_pipelines_models_are_attached():
    """One handle covers all of a pipeline's components in which there is something to cache."""
    pipe, x = pipeline(), sample("linear")
    before = [snapshot(part) for part in (pipe.vae, pipe.text_encoder, pipe.unet)]
    expected = pipe(x)
    with dora_cache.attach(pipe) as cache:
        assert cache.warm() == 2
        assert torch.equal(pipe(x), expected)
        assert cache.stats().hits == 2
        with torch.no_grad():
            pipe.unet.base_model.model.layer.lora_B["first"].weight.mul_(2)
        changed = pipe(x)
        with cache.bypass():
            assert torch.equal(pipe(x), changed)
        assert cache.invalidate(module=pipe.text_encoder) == 1
        with quiet():
            pipe.unet.add_adapter("second", dora_config())
        assert cache.warm(adapters=["second"]) == 1
        with pytest.raises(dora_cache.AlreadyAttachedError):
            dora_cache.attach(pipe.unet)
    assert not torch.equal(changed, expected)
    assert traces(pipe.unet) == traces(pipe.text_encoder) == []
    assert [snapshot(part) for part in (pipe.vae, pipe.text_encoder)] == before[:2]


def test_models_that_a_pipeline_has_twice_are_attached_once():
    """The same model under two names, or as part of another one, has one entry."""
    pipe = pipeline()
    pipe = pipeline(text_encoder=pipe.unet, unet=pipe.unet, both=nn.Sequential(pipe.unet))
    with dora_cache.attach(pipe) as cache:
        assert cache.warm() == 1
        with quiet():
            pipe.unet.add_adapter("second", dora_config())
        assert cache.warm() == 1
    assert traces(pipe.unet) == []


def test_a_pipelines_models_keep_no_other_alive():
    """A text encoder can be dropped to save memory, and its entries go with it."""
    pipe = pipeline()
    cache = dora_cache.attach(pipe)
    assert cache.warm() == 2
    dead = weakref.ref(pipe.text_encoder)
    pipe.text_encoder = None
    gc.collect()
    assert dead() is None
    assert cache.stats().entries == 1
    cache.detach()


def test_a_components_cached_methods_are_attached():
    """Decorated methods count as well as PEFT layers."""

    class Scaled(nn.Linear):
        @dora_cache.cached("scaled")
        def scaled(self):
            return self.weight * 2

    pipe = Pipeline(head=Scaled(2, 2).eval().requires_grad_(False))
    with dora_cache.attach(pipe) as cache:
        assert torch.equal(pipe.head.scaled(), pipe.head.scaled())
        assert cache.stats().hits == 1


def test_a_pipelines_devices_are_those_of_its_models():
    """So that caps are held where its models are."""
    offloaded = pipeline(vae=nn.Linear(2, 2, device="meta"))
    assert attachment._devices(offloaded) == [torch.device("cpu")]
    only = Pipeline(tokenizer=object(), unet=nn.Linear(2, 2, device="meta"))
    assert attachment._devices(only) == [torch.device("meta")]


def test_a_pipeline_of_which_a_part_is_attached_is_refused_whole():
    """The error leaves none of its models attached."""
    pipe = pipeline()
    with dora_cache.attach(pipe.unet):
        with pytest.raises(dora_cache.AlreadyAttachedError, match="detach"):
            dora_cache.attach(pipe)
        assert traces(pipe.text_encoder) == []


def test_a_pipeline_with_nothing_to_cache_is_told_so():
    """The error names the components that were looked at."""
    pipe = Pipeline(vae=nn.Linear(2, 2), tokenizer=object(), unet=dora_model(use_dora=False))
    with pytest.raises(dora_cache.NothingToCacheError, match="its components vae, unet: it needs"):
        dora_cache.attach(pipe)


class Holder:
    def __init__(self, **parts):
        vars(self).update(parts)


class Wrong:
    """An object whose properties raise."""

    components = model = property(lambda self: 1 / 0)


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (
            lambda model: Holder(model=model, other=model),
            r"write dora_cache\.attach\(obj\.model\)$",
        ),
        (lambda model: Holder(unet=model, size=3), r"attach\(obj\.unet\)$"),
        (
            lambda model: Holder(a=model, b=model),
            r"attach\(obj\.a\) or dora_cache\.attach\(obj\.b\)",
        ),
        (lambda model: [model, model], r"attach\(torch\.nn\.ModuleList\(\[\.\.\.\]\)\)$"),
        (lambda model: {"a": model}, r"attach\(torch\.nn\.ModuleList"),
        (lambda model: [1, 2], "list has nothing to cache"),
        (lambda model: Wrong(), "Wrong has nothing to cache"),
        (lambda model: type(model), "is a class: attach an object of it"),
        (lambda model: Holder(components={"a": 1}), "Holder has nothing to cache"),
        (lambda model: Holder(components=[model], model=model), r"attach\(obj\.model\)$"),
    ],
)
def test_what_holds_a_model_is_told_what_to_attach(make, part):
    """The error says which attribute is the model, as of a pipeline of Transformers."""
    with pytest.raises(dora_cache.NothingToCacheError, match=part):
        dora_cache.attach(make(dora_model()))


def test_without_depends_on_layers_with_a_cache_are_part_of_the_owner():
    """What the cache keeps in the owner's parts is no part of its state."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            config = LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False)
            model = get_peft_model(nn.Sequential(OrderedDict(layer=nn.Linear(4, 4))), config)
            self.layer = model.base_model.model.layer

        @cached("total")
        def total(self):
            return self.layer.base_layer.weight.sum() + self.layer.lora_A["default"].weight.sum()

    block = Block().eval()
    with dora_cache.attach(block) as cache, torch.no_grad():
        for _ in range(2):
            block.total()
        assert cache.stats().hits == 1
        block.layer.lora_A["default"].weight.add_(1)
        assert torch.equal(block.total(), Block.total.__wrapped__(block))
        assert cache.stats().misses == 2
