"""Layers that come into a model, or leave it, after it was attached."""

import gc
import weakref
from collections import OrderedDict

import pytest
import torch
from peft import LoraConfig, OFTConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora.layer import Linear
from torch import nn

import dora_cache
from dora_cache import cached

pytestmark = pytest.mark.filterwarnings(
    "ignore:Already found a `peft_config`"
)  # of a second adapter


def config(*targets, **others):
    return LoraConfig(
        **{"use_dora": True, "r": 4, "target_modules": list(targets), "init_lora_weights": False}
        | others
    )


def base():
    torch.manual_seed(0)
    inner = nn.Sequential(OrderedDict(second=nn.Linear(16, 16), act=nn.ReLU()))
    parts = OrderedDict(first=nn.Linear(16, 16), inner=inner, third=nn.Linear(16, 16))
    return nn.Sequential(parts)


def compare(cache, model, *, hits):
    x = torch.randn(3, 16)
    with torch.no_grad():
        model(x)
        before = cache.stats()
        output = model(x)
        after = cache.stats()
        with cache.bypass():
            assert torch.equal(output, model(x))
    assert after.hits - before.hits == hits
    assert after.misses == before.misses


@pytest.mark.parametrize(
    "kind", [config("second"), OFTConfig(oft_block_size=4, target_modules=["second"])]
)
def test_another_adapter_is_injected_elsewhere(kind):
    model = inject_adapter_in_model(config("first"), base(), adapter_name="a").eval()
    with dora_cache.attach(model) as cache:
        compare(cache, model, hits=1)
        inject_adapter_in_model(kind, model, adapter_name="a")
        compare(cache, model, hits=2)


def test_a_plain_layer_gets_dora():
    model = inject_adapter_in_model(config("first"), base(), adapter_name="a").eval()
    inject_adapter_in_model(config("third", use_dora=False), model, adapter_name="a")
    with dora_cache.attach(model) as cache:
        compare(cache, model, hits=1)
        model[2].update_layer("b", r=4, lora_alpha=8, config=config("third"))
        for layer in model.modules():
            if hasattr(layer, "lora_A"):
                layer.set_adapter(["b"] if "b" in layer.lora_A else ["a"])
        compare(cache, model, hits=2)
        assert "forward" in vars(type(model[2]))  # in the short form, as if attached with it


def test_a_model_is_wrapped_again():
    model = get_peft_model(base(), config("first")).eval()
    with dora_cache.attach(model) as cache:
        compare(cache, model, hits=1)
        plain = model.unload()
        assert cache.stats().entries == 0
        again = get_peft_model(plain, config("first", "second", "third")).eval()
        compare(cache, again, hits=3)
    assert {type(part) for part in again.modules() if hasattr(part, "lora_A")} == {Linear}


def test_an_adapter_with_other_targets_is_loaded(tmp_path):
    get_peft_model(base(), config("first", "third")).save_pretrained(tmp_path)
    model = get_peft_model(base(), config("second")).eval()
    with dora_cache.attach(model) as cache:
        compare(cache, model, hits=1)
        model.load_adapter(tmp_path, "b")
        model.set_adapter("b")
        compare(cache, model, hits=2)


def test_a_block_with_adapters_is_put_into_a_model():
    block = inject_adapter_in_model(config("first"), base(), adapter_name="a").eval()
    model = nn.Sequential(inject_adapter_in_model(config("first"), base(), adapter_name="a").eval())
    with dora_cache.attach(model) as cache:
        compare(cache, model, hits=1)
        model.append(nn.Sequential(block))
        compare(cache, model, hits=2)
        other = nn.Sequential(inject_adapter_in_model(config("first"), base(), adapter_name="a"))
        assert all("_dora_cache_binding" not in vars(part) for part in other.modules())


def test_what_is_replaced_is_forgotten():
    model = inject_adapter_in_model(config("first", "third"), base(), adapter_name="a").eval()
    with dora_cache.attach(model) as cache:
        compare(cache, model, hits=2)
        gone = weakref.ref(model[0])
        model[0] = nn.Linear(16, 16)
        assert cache.stats().entries == 1
        compare(cache, model, hits=1)
        gc.collect()
        assert gone() is None


def test_decorated_modules_are_attached_as_they_come():
    class Doubled(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        @cached("doubled", depends_on=lambda self: [self.weight])
        def doubled(self):
            return self.weight * 2

        def forward(self, x):
            return x @ self.doubled()

    model = nn.Sequential(Doubled()).eval()
    with torch.no_grad(), dora_cache.attach(model) as cache:
        model.append(Doubled().eval())
        model(torch.randn(2, 4)), model(torch.randn(2, 4))
        assert cache.stats().hits == cache.stats().misses == 2


def test_a_layer_that_cannot_be_attached_breaks_nothing(monkeypatch):
    model = inject_adapter_in_model(config("first"), base(), adapter_name="a").eval()
    other = inject_adapter_in_model(config("first"), base(), adapter_name="a").eval()
    with dora_cache.attach(model) as cache, dora_cache.attach(other):
        with pytest.warns(UserWarning, match="attaching a new module"):
            model[2] = other[0]  # it belongs to the other cache
        compare(cache, model, hits=1)


def test_nothing_is_told_after_the_last_detach():
    from torch.nn.modules import module

    before = len(module._global_module_registration_hooks)
    model = inject_adapter_in_model(config("first"), base(), adapter_name="a").eval()
    with dora_cache.attach(model):
        assert len(module._global_module_registration_hooks) == before + 1
    assert len(module._global_module_registration_hooks) == before


def test_a_peft_model_in_a_model():
    inner = get_peft_model(base(), config("first")).eval()
    model = nn.Sequential(inner)
    with dora_cache.attach(model) as cache:
        compare(cache, model, hits=1)
        assert isinstance(inner, PeftModel)
        inner.add_adapter("b", config("third"))
        inner.set_adapter("b")
        compare(cache, model, hits=1)
