"""dora_cache.lab.doctor: what is cached in a model, and what is not and why."""

import pytest
import torch
from peft import LoHaConfig, LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer

import dora_cache
from dora_cache.lab import doctor
from dora_cache.lab.field.of_transformers import config, llama
from dora_cache.reasons import Reason

IDS = torch.arange(1, 6)[None]


def run(model):
    return model(IDS).logits


def dora(**settings):
    chosen = {"target_modules": ["q_proj", "v_proj"]} | settings
    return get_peft_model(llama(16), config(True, **chosen)).eval()


def examine(model, *settings, **others):
    return doctor.examine(model, run, *settings, seconds=0, **others)


def test_a_healthy_model():
    """What is held is named by layer; every way is timed as often; the model is as it was."""
    model = dora()
    expected = run(model)
    found = examine(model)
    assert found.healthy
    assert (found.hits, found.misses, found.reasons, found.equal) == (4, 0, {}, True)
    prefix = "base_model.model.model.layers"
    assert {kind: set(names) for kind, names in found.cached.items()} == {
        "DoRA scale": {f"{prefix}.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qv"}
    }
    assert found.report.stats.nbytes == found.report.stats.entries * 16 * 4
    assert set(found.times) == {"PEFT", "dora-cache", "plain LoRA"}
    assert len({len(times) for times in found.times.values()}) == 1
    assert "model.layers.{0,1}.self_attn.{q,v}_proj" in str(found)
    assert torch.equal(run(model), expected)
    dora_cache.attach(model).detach()  # it left none behind


def test_every_adapter_is_examined():
    """Each is active for two forwards, and hits in the second."""
    model = dora()
    model.add_adapter("b", config(True, target_modules=["q_proj"]))
    found = examine(model, adapters=("default", "b"))
    assert found.healthy
    assert found.hits == 4 + 2
    assert {row.adapter for row in found.report.rows} == {"default", "b"}


def test_what_is_not_cached_has_its_reason():
    """Calls past the cache make a model unhealthy, and the text says what to do."""
    model = dora()
    part = model.base_model.model.model.layers[1].self_attn.q_proj.lora_A["default"]
    part.register_forward_hook(lambda *_: None)
    found = examine(model)
    assert not found.healthy
    assert (found.hits, found.reasons) == (3, {Reason.HOOKED.value: 1})
    assert Reason.HOOKED.advice in str(found)
    assert "    in model.layers.1.self_attn.q_proj\n" in str(found)


def test_layers_without_anything_to_cache_are_named():
    """Plain LoRA beside DoRA is no fault."""
    model = get_peft_model(llama(16), LoHaConfig(r=2, target_modules=["q_proj"])).eval()
    inner = model.base_model.model
    inner.model.layers[0].mlp = get_peft_model(
        inner.model.layers[0].mlp, LoraConfig(r=2, target_modules=["up_proj"])
    ).eval()
    found = examine(model)
    assert found.healthy
    ((name,),) = found.plain.values()
    assert isinstance(model.get_submodule(name), BaseTunerLayer)
    assert name.endswith("layers.0.mlp.base_model.model.up_proj")
    assert "Nothing to cache, or not run:" in str(found)


def test_what_is_declined_is_not_cached(monkeypatch):
    """A recipe that declines a layer makes the model unhealthy."""
    model = dora()
    attach = dora_cache.attach

    def declining(*args):
        cache = attach(*args)
        with pytest.warns(dora_cache.CacheWarning):
            cache._engine.decline("OFT", "model.layer.3", "so")
        return cache

    monkeypatch.setattr(doctor, "attach", declining)
    found = examine(model)
    assert not found.healthy
    assert "OFT, model.layer.3: so" in str(found)


def test_wrong_outputs_are_a_fault(monkeypatch):
    """Outputs that differ from PEFT's make a model unhealthy, whatever hits."""
    model = dora()
    outputs = iter(range(1000))
    found = doctor.examine(model, lambda one: run(one) + next(outputs), seconds=0)
    assert (found.misses, found.reasons, found.equal) == (0, {}, False)
    assert not found.healthy
    assert "outputs differ" in str(found)


def test_fast_numerics_are_not_compared():
    """They may differ from PEFT's in rounding."""
    found = examine(dora(), dora_cache.CacheConfig(numerics="fast"))
    assert found.equal is None
    assert found.healthy


def test_a_model_that_peft_does_not_wrap():
    """Plain LoRA cannot be measured there, which is said; the rest is as for others."""
    model = llama(16)
    model.add_adapter(config(True), "a")
    model.eval()
    found = examine(model)
    assert found.healthy
    assert set(found.times) == {"PEFT", "dora-cache"}
    assert "not measured: the model is no PeftModel" in str(found)


def test_nothing_to_cache_is_an_error():
    """As when attaching."""
    with pytest.raises(dora_cache.NothingToCacheError):
        examine(get_peft_model(llama(16), config(False)).eval())
