"""What is special about TrainableTokens: lists of tokens, ties, wrappers, odd embeddings."""

import copy

import pytest
import torch
from peft import LoraConfig, TrainableTokensConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from dora_cache import attach


class Net(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.embedding = nn.Embedding(16, 8, **options)
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return self.linear(self.embedding(x))


def tokens(*indices):
    return TrainableTokensConfig(
        token_indices=list(indices), target_modules=["embedding"], init_weights=False
    )


def make(config, net=None, **options):
    torch.manual_seed(0)
    return get_peft_model(net or Net(**options), config, adapter_name="first").eval()


def compare(plain, model, x, numerics="peft"):
    with torch.no_grad():
        expected = plain(x)
        for _ in range(3):
            found = model(x)
            if numerics == "peft":
                assert torch.equal(*(getattr(y, "logits", y) for y in (found, expected)))
            else:
                torch.testing.assert_close(found.logits, expected.logits)


X = torch.arange(16)[None]


def test_the_list_of_tokens_may_change_in_place():
    """Outputs follow a list that is written to."""
    plain = make(tokens(1, 5))
    model = copy.deepcopy(plain)
    with attach(model):
        compare(plain, model, X)
        for one in (plain, model):
            one.base_model.model.embedding.token_indices["first"][1] = 7
        compare(plain, model, X)


def test_compiled_code_follows_the_list_of_tokens():
    """Written to or replaced, with no event: right at the next call, and compiled once."""
    plain = make(tokens(1, 5))
    model = copy.deepcopy(plain)
    with attach(model):
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        compare(plain, compiled, X)
        with torch.compiler.set_stance("fail_on_recompile"):
            for change in (
                lambda lists: lists["first"].__setitem__(1, 7),
                lambda lists: lists.update(first=[7, 2]),
            ):
                for one in (plain, model):
                    change(one.base_model.model.embedding.token_indices)
                compare(plain, compiled, X)


def test_adapters_that_overlap_are_pefts_error():
    """Two adapters for one token raise as without a cache; a token given twice works."""
    plain = make(tokens(1, 5))
    plain.add_adapter("second", tokens(5, 6))
    plain.add_adapter("third", tokens(2, 2, 3))
    model = copy.deepcopy(plain)
    with attach(model):
        for one in (plain, model):
            one.base_model.set_adapter(["first", "second"])
            with pytest.raises(ValueError, match="already defined"):
                one(X)
            one.base_model.set_adapter(["first", "third"])
        compare(plain, model, X)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_embeddings_with_options(dtype):
    """Padding, a longest norm, a scale: as in PEFT's forward, which writes to no stored weight."""
    for options in ({"padding_idx": 5}, {"max_norm": 0.5}, {"scale_grad_by_freq": True}):
        plain = make(tokens(1, 5), **options)
        model = copy.deepcopy(plain)
        with attach(model):
            compare(plain, model, X.to(dtype))
    for scale in (3.0, torch.tensor(0.5)):
        for one in (plain, model):
            one.base_model.model.embedding.base_layer.embed_scale = scale
        with attach(model):
            compare(plain, model, X.to(dtype))


def test_tokens_beside_lora():
    """Tokens that come with LoRA are cached: PEFT wraps the same layer."""
    config = LoraConfig(target_modules=["linear"], trainable_token_indices={"embedding": [1, 5]})
    plain = make(config)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(torch.randn_like(parameter))
    model = copy.deepcopy(plain)
    with attach(model) as cache:
        compare(plain, model, X)
        assert cache.stats().hits
        with plain.disable_adapter(), model.disable_adapter():
            compare(plain, model, X)


@pytest.mark.parametrize("numerics", ["peft", "fast"])
def test_a_tied_head(numerics):
    """A head that is tied to the embedding is cached, and follows the embedding's rows."""
    settings = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    config = TrainableTokensConfig(token_indices=[1, 5], init_weights=False)
    plain = make(config, LlamaForCausalLM(settings))
    model = copy.deepcopy(plain)
    with attach(model, numerics=numerics) as cache:
        compare(plain, model, X, numerics)
        assert cache.stats().entries == 2
        for one in (plain, model):
            embedding = one.get_input_embeddings()
            with torch.no_grad():
                embedding.trainable_tokens_delta["first"].mul_(2)
        compare(plain, model, X, numerics)
        for one in (plain, model):
            one.merge_adapter()
            one.unmerge_adapter()
        compare(plain, model, X, numerics)
