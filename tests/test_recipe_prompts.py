"""Prompt encoders: batches, generation, and what must not be stored."""

import copy

import pytest
import torch

import dora_cache
from dora_cache.recipes import load_recipes
from dora_cache.recipes.examples import make_model

EXAMPLES = {
    example.name: example
    for recipe in load_recipes()
    if recipe.name == "prompt encoders"
    for example in recipe.examples
}
PREFIX = EXAMPLES["prefix tuning, projected"]
LSTM = EXAMPLES["p-tuning, LSTM"]


def _logits(model, x):
    with torch.no_grad():
        return model(x).logits


@pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES)
@pytest.mark.parametrize("numerics", ["peft", "fast"])
def test_batches(example, numerics):
    """Batches of several sizes share a model; each has PEFT's output, the second time stored."""
    model, _ = make_model(example)
    with dora_cache.attach(model, numerics=numerics) as cache:
        for rows in (1, 3, 2):
            x = torch.randint(0, 64, (rows, 4))
            with cache.bypass():
                expected = _logits(model, x)
            for _ in range(2):
                found = _logits(model, x)
                if numerics == "peft":
                    assert torch.equal(found, expected)
                else:
                    torch.testing.assert_close(found, expected)
        assert cache.stats().hits >= 3


def test_a_prefix_is_stored_once_for_any_batch():
    """Rows that are alike are not stored again and again."""
    model, _ = make_model(PREFIX)
    # Sums of whole numbers are exact, and so is tanh of large ones: all rows come out alike,
    # however a processor shares out a product of matrices.
    with torch.no_grad():
        for weight in model.prompt_encoder["first"].parameters():
            weight.copy_(32 * torch.randint_like(weight, -2, 3))
    with dora_cache.attach(model) as cache:
        _logits(model, torch.zeros(1, 3, dtype=torch.long))
        one = cache.stats().nbytes
        _logits(model, torch.zeros(8, 3, dtype=torch.long))
        assert cache.stats().nbytes == 2 * one


@pytest.mark.filterwarnings("ignore:Position ids are not supported")
@pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES)
def test_generation(example):
    """Generating twice, which appends to the cache of keys and values, leaves the prompt as is."""
    model, x = make_model(example)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(input_ids=x, **settings)
    with dora_cache.attach(model) as cache:
        for _ in range(3):
            assert torch.equal(model.generate(input_ids=x, **settings), expected)
        assert cache.stats().hits > 0


def test_writing_into_a_prompt_is_the_callers_own():
    """What a caller writes into the keys of a prefix does not come back at the next call."""
    model, x = make_model(PREFIX)
    expected = _logits(model, x)
    with dora_cache.attach(model), torch.no_grad():
        for _ in range(3):
            found = model.get_prompt(1)
            for layer in found.layers:
                layer.keys.zero_()
        assert torch.equal(_logits(model, x), expected)


def test_hooks_in_the_encoder_run():
    """With a hook on one of the encoder's layers, the encoder runs at each forward."""
    model, x = make_model(LSTM)
    seen = []
    with dora_cache.attach(model):
        _logits(model, x)
        hook = (
            model.prompt_encoder["first"]
            .mlp_head[0]
            .register_forward_hook(lambda *_: seen.append(1))
        )
        for _ in range(2):
            _logits(model, x)
        assert len(seen) == 2
        hook.remove()
        _logits(model, x)
        assert len(seen) == 2


def test_another_activation_is_noticed():
    """A layer without parameters that is exchanged changes the prompt."""
    model, x = make_model(PREFIX)
    with dora_cache.attach(model) as cache:
        before = _logits(model, x)
        model.prompt_encoder["first"].transform[1] = torch.nn.ReLU()
        after = _logits(model, x)
        with cache.bypass():
            assert torch.equal(after, _logits(model, x))
        assert not torch.equal(before, after)


def test_in_inference_mode_there_is_nothing_to_cache():
    """PEFT reads the prompt from its embedding then, so attaching says that nothing is cached."""
    config = copy.copy(LSTM.config(16, 24))
    config.inference_mode = True
    example = copy.copy(LSTM)
    object.__setattr__(example, "config", lambda *_: config)
    model, _ = make_model(example)
    with pytest.raises(dora_cache.NothingToCacheError):
        dora_cache.attach(model)


def test_an_adapter_added_later_is_cached():
    """So is one that takes a deleted one's name."""
    model, x = make_model(LSTM)
    with dora_cache.attach(model) as cache:
        _logits(model, x)
        for name in ("second", "second"):
            model.add_adapter(name, LSTM.config(16, 24))
            model.eval()
            model.set_adapter(name)
            with cache.bypass():
                expected = _logits(model, x)
            before = cache.stats().hits
            for _ in range(2):
                assert torch.equal(_logits(model, x), expected)
            assert cache.stats().hits == before + 1
            model.set_adapter("first")
            model.delete_adapter(name)
