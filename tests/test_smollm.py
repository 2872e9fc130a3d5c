"""The real model of the demo: SmolLM2-135M with the two trained adapters that come along."""

import pytest
import torch
from peft import PeftModel
from peft.helpers import DoraCaching
from zoo import quiet

import dora_cache
from dora_cache.lab.bench import dora_caching_bytes
from dora_cache.lab.demo import ADAPTERS, adapter_directory, smollm

LAYERS = 30 * 7


@pytest.fixture(scope="module")
def language():
    """The model with both adapters, and its tokenizer."""
    base, tokenizer = smollm.load_model(smollm.model_directory())
    with quiet():
        first, *others = ADAPTERS
        model = PeftModel.from_pretrained(base, adapter_directory(first), adapter_name=first)
        for name in others:
            model.load_adapter(adapter_directory(name), adapter_name=name)
    return model.eval(), tokenizer


def logits(language, adapter):
    model, tokenizer = language
    ids = torch.tensor([tokenizer("The morning")["input_ids"]])
    model.set_adapter(adapter, inference_mode=True)
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False).logits


@pytest.fixture(scope="module")
def expected(language):
    """Uncached PEFT's logits for each adapter."""
    return {adapter: logits(language, adapter) for adapter in ADAPTERS}


def test_the_adapters_are_different(expected):
    """The two adapters were trained on different texts, and it shows."""
    one, other = expected.values()
    assert (one - other).abs().max() > 1


def test_a_tiny_part_of_what_pefts_cache_holds(language, expected):
    """All linear layers of both adapters take less than 1/400 of DoraCaching's bytes."""
    with DoraCaching():
        for adapter in ADAPTERS:
            logits(language, adapter)
        held_by_peft = dora_caching_bytes(language[0])
    for adapter in ADAPTERS:  # with the flag off again, PEFT clears what it held
        logits(language, adapter)
    with dora_cache.attach(language[0]) as cache:
        for adapter in ADAPTERS * 2:
            assert torch.equal(logits(language, adapter), expected[adapter])
        stats = cache.stats()
    assert stats.entries == stats.misses == stats.hits == 2 * LAYERS
    assert stats.nbytes * 400 < held_by_peft


@pytest.mark.parametrize("share", [2, 10, 1000])
def test_outputs_are_equal_under_a_cap(language, expected, share):
    """At 50 %, 10 % and 0.1 % of the working set, logits are equal and the cap is kept."""
    with dora_cache.attach(language[0]) as cache:
        cache.warm()
        working_set = cache.stats().nbytes
    cap = working_set // share
    over = []
    with dora_cache.attach(language[0], backend="lru", max_bytes=cap) as cache:
        hooks = [
            module.register_forward_hook(
                lambda *_: over.append(1) if cache.stats().nbytes > cap else None
            )
            for module in language[0].modules()
            if hasattr(module, "lora_magnitude_vector")
        ]
        try:
            for adapter in ADAPTERS:
                assert torch.equal(logits(language, adapter), expected[adapter])
        finally:
            for hook in hooks:
                hook.remove()
        assert not over
        assert 0 <= cache.stats().nbytes <= cap
        assert cache.stats().misses == 2 * LAYERS
