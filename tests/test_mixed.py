"""Mixed batches: every row is what its adapter alone gives in plain PEFT."""

import copy
import threading

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from zoo import CASES, KINDS, Block, dora_config, dora_model, quiet, shake

import dora_cache
from dora_cache.recipes.dora import mixed
from dora_cache.recipes.fingerprints import changed

BASE = "__base__"
LINEAR = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
KINDS_OF_ADAPTERS = {
    "lora": {"r": 4, "lora_alpha": 6},
    "dora": {"r": 4, "lora_alpha": 6, "use_dora": True},
    "rslora": {"r": 8, "lora_alpha": 4, "use_rslora": True},
    "rsdora": {"r": 2, "lora_alpha": 6, "use_rslora": True, "use_dora": True},
    "biased": {"r": 3, "lora_alpha": 3, "lora_bias": True, "target_modules": LINEAR},
    "narrow": {"r": 5, "lora_alpha": 5, "use_dora": True, "target_modules": ["down_proj"]},
    "patterns": {
        "r": 4,
        "lora_alpha": 6,
        "use_dora": True,
        "rank_pattern": {"q_proj": 7},
        "alpha_pattern": {"v_proj": 11},
        "target_modules": ["q_proj", "v_proj"],
        "layers_to_transform": [1],
    },
}


def llama(adapters=KINDS_OF_ADAPTERS, dtype=torch.float64, **more):
    """Return a small model with adapters of several kinds, in eval mode."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=None,
        **more,
    )
    return adapted(LlamaForCausalLM(config).to(dtype), adapters)


def adapted(base, adapters, targets=(*LINEAR, "embed_tokens")):
    model = None
    common = {"task_type": "CAUSAL_LM", "target_modules": list(targets), "init_lora_weights": False}
    for name, settings in adapters.items():
        config = LoraConfig(**common | settings)
        with quiet():
            if model is None:
                model = get_peft_model(
                    base, config, adapter_name=name, autocast_adapter_dtype=False
                )
            else:
                model.add_adapter(name, config, autocast_adapter_dtype=False)
    model = model.to(base.dtype)
    shake(model)
    return model.eval()


NAMES = list(KINDS_OF_ADAPTERS)
DORA = ["dora", "rsdora", "narrow", "patterns"]
SCATTERED = [*NAMES, BASE, "dora", "dora", "lora", BASE, "rsdora"]
IDS = torch.arange(len(SCATTERED) * 5).view(-1, 5) % 60 + 1


def alone(model, x, name, run=None):
    """Return what one row gives with one adapter, in plain PEFT."""
    run = run or model
    if name == BASE:
        with model.disable_adapter():
            return out(run(x))
    active = model.active_adapters
    model.base_model.set_adapter(name)
    try:
        return out(run(x))
    finally:
        model.base_model.set_adapter(active)


def out(result):
    return getattr(result, "logits", result)


def far(found, expected):
    """Return the relative error."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@torch.no_grad()
def agree(model, plain, x, names, tolerance=1e-9):
    """Compare every row with the same row and its adapter alone, in a model without a cache."""
    found = out(model(x, adapter_names=names))
    for row, name in enumerate(names):
        expected = alone(plain, x[row : row + 1], name)
        assert far(found[row : row + 1], expected) <= tolerance, (row, name)
    return found


numerics = pytest.mark.parametrize("numerics", ["peft", "fast"])


@numerics
@pytest.mark.parametrize("backend", ["dict", "budget", "cpu", "null"])
def test_seven_kinds_and_the_base(numerics, backend):
    """All in one batch, adjacent and scattered; later batches derive nothing where it is kept."""
    model = llama()
    plain = copy.deepcopy(model)
    cap = "1MiB" if backend == "budget" else None
    with dora_cache.attach(model, numerics=numerics, backend=backend, max_bytes=cap) as cache:
        agree(model, plain, IDS, SCATTERED)
        misses = cache.stats().misses
        agree(model, plain, IDS, SCATTERED)
        agree(model, plain, IDS.flip(0)[:8], [*reversed(NAMES), BASE])
        if backend != "null":
            assert cache.stats().misses == misses > 0
            assert cache.stats().hits >= 2 * misses
    with pytest.raises(ValueError, match="DoRA is enabled"), torch.no_grad():
        model(IDS[:1], adapter_names=["dora"])


@numerics
def test_stored_values_are_those_of_ordinary_forwards(numerics):
    """What one adapter's own forward has stored serves a mixed batch, and the other way round."""
    model = llama()
    with dora_cache.attach(model, numerics=numerics) as cache, torch.no_grad():
        for name in DORA:
            alone(model, IDS[:1], name)
        misses = cache.stats().misses
        model(IDS, adapter_names=SCATTERED)
        assert cache.stats().misses == misses > 0


@numerics
@pytest.mark.parametrize("names", [["dora"] * 3, ["lora"] * 3, [BASE] * 3, ["rsdora"]])
def test_one_adapter_for_all(numerics, names):
    model = llama()
    plain = copy.deepcopy(model)
    with dora_cache.attach(model, numerics=numerics):
        agree(model, plain, IDS[: len(names)], names)


@pytest.mark.parametrize("length", [1, 7, 300])
def test_uneven_groups(length):
    """Few tokens are added to together, many adapter by adapter."""
    model = llama(max_position_embeddings=512)
    plain = copy.deepcopy(model)
    names = ["dora", "rsdora", "dora", "lora", "dora", "rslora", "dora", BASE, "lora"]
    ids = torch.arange(len(names) * length).view(-1, length) % 60 + 1
    with dora_cache.attach(model):
        agree(model, plain, ids, names)


@torch.no_grad()
def test_lora_alone_is_as_peft_mixes_it():
    model = llama()
    plain = copy.deepcopy(model)
    names = ["lora", "rslora", BASE, "biased", "lora", "rslora", "rslora"]
    with dora_cache.attach(model) as cache:
        found = model(IDS[:7], adapter_names=names).logits
        torch.testing.assert_close(found, plain(IDS[:7], adapter_names=names).logits)
        with cache.bypass():
            found = model(IDS[:7], adapter_names=names).logits
            assert torch.equal(found, plain(IDS[:7], adapter_names=names).logits)


@numerics
@pytest.mark.parametrize(("kind", "bias"), CASES)
def test_kinds_of_layers(kind, bias, numerics):
    """Convolutions, embeddings and transposed weights, DoRA and LoRA."""
    torch.manual_seed(0)
    model = dora_model(kind, bias=bias, dtype=torch.float64, adapters=("a", "b"))
    model.add_adapter("c", dora_config(kind, r=5, alpha=3, use_dora=False))
    model.double().eval()
    plain = copy.deepcopy(model)
    names = ["b", "a", BASE, "c", "a", "b", "b", "c"]
    x = torch.cat([KINDS[kind].sample(torch.float64) for _ in names])[: len(names)]
    with dora_cache.attach(model, numerics=numerics) as cache:
        agree(model, plain, x, names)
        agree(model, plain, x, names)
        assert cache.stats().hits > 0
        assert cache.stats().misses == 2


@numerics
def test_transposed_weights_in_a_model(numerics):
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=61, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    settings = {"fan_in_fan_out": True, "r": 4}
    adapters = {
        "a": settings | {"use_dora": True},
        "b": settings,
        "c": settings | {"use_dora": True},
    }
    model = adapted(GPT2LMHeadModel(config).double(), adapters, targets=["c_attn", "c_proj", "wte"])
    plain = copy.deepcopy(model)
    with dora_cache.attach(model, numerics=numerics):
        agree(model, plain, IDS[:5], ["a", "b", BASE, "c", "a"])


@torch.no_grad()
@pytest.mark.parametrize(
    "more", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}]
)
def test_generate(more):
    """Rows count as PEFT counts them."""
    model = llama()
    plain = copy.deepcopy(model)
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0} | more
    with dora_cache.attach(model):
        found = model.generate(input_ids=IDS, adapter_names=SCATTERED, **settings)
    each = more.get("num_return_sequences", 1)
    for row, name in enumerate(SCATTERED):
        expected = alone(
            plain,
            IDS[row : row + 1],
            name,
            lambda x: plain.generate(input_ids=x, **settings),
        )
        assert torch.equal(found[row * each : (row + 1) * each], expected), name


def _layer(model, name="q_proj", at=1):
    return getattr(model.base_model.model.model.layers[at].self_attn, name)


CHANGES = {
    "base": lambda model: _layer(model).base_layer.weight.mul_(1.5),
    "magnitude": lambda model: _layer(model).lora_magnitude_vector["dora"].weight.mul_(2),
    "factor": lambda model: _layer(model).lora_B["rsdora"].weight.mul_(3),
    "lora factor": lambda model: _layer(model).lora_A["lora"].weight.mul_(3),
    "bias of a factor": lambda model: _layer(model).lora_B["biased"].bias.add_(1),
    "bias": lambda model: _layer(model).base_layer.bias.add_(1),
    "embedding": lambda model: model.base_model.model.model.embed_tokens.lora_embedding_A[
        "dora"
    ].mul_(2),
    "scaling": lambda model: _layer(model).set_scale("patterns", 3),
    "scaling of all": lambda model: [_layer(model).scale_layer(0.5), _layer(model).scaling],
    "active adapter": lambda model: model.base_model.set_adapter(["rsdora"]),
    "state dict": lambda model: model.load_state_dict(
        {name: 1.1 * value for name, value in model.state_dict().items()}
    ),
    "double and back": lambda model: model.to(torch.float32).to(torch.float64),
}


@numerics
@pytest.mark.parametrize("change", CHANGES)
def test_after(change, numerics):
    """A mixed batch is of the weights of now."""
    model = llama()
    plain = copy.deepcopy(model)
    with dora_cache.attach(model, numerics=numerics):
        before = agree(model, plain, IDS, SCATTERED)
        with torch.no_grad():
            for one in (model, plain):
                CHANGES[change](one)
        after = agree(model, plain, IDS, SCATTERED)
    assert torch.equal(before, after) == (change == "active adapter")


def test_after_an_adapter_is_deleted_and_added():
    model = llama()
    plain = copy.deepcopy(model)
    with dora_cache.attach(model) as cache:
        agree(model, plain, IDS, SCATTERED)
        for one in (model, plain):
            one.delete_adapter("dora")
        with pytest.raises(ValueError, match="non-existing adapter"), torch.no_grad():
            model(IDS, adapter_names=SCATTERED)
        for one in (model, plain):
            torch.manual_seed(5)
            config = LoraConfig(r=6, use_dora=True, target_modules=LINEAR, init_lora_weights=False)
            one.add_adapter("dora", config)
            one.double().eval()
        agree(model, plain, IDS, SCATTERED)
        assert cache.stats().invalidations > 0


def test_errors_are_those_of_peft():
    model = llama()
    with dora_cache.attach(model), torch.no_grad():
        with pytest.raises(ValueError, match=r"non-existing adapter.*other"):
            model(IDS[:2], adapter_names=["lora", "other"])
        with pytest.raises(ValueError, match="Length of `adapter_names`"):
            model(IDS[:3], adapter_names=["dora", "lora"])
        with pytest.raises(ValueError, match="training mode"):
            model.train()(IDS[:1], adapter_names=["dora"])
        model.eval()
        with quiet():
            model.base_model.merge_adapter(["lora"])
        with pytest.raises(ValueError, match="merged adapters"):
            model(IDS[:1], adapter_names=["dora"])


@numerics
def test_bypass(numerics):
    """Within bypass() DoRA is derived by PEFT's code, and nothing is stored."""
    model = llama()
    plain = copy.deepcopy(model)
    with dora_cache.attach(model, numerics=numerics) as cache:
        with cache.bypass():
            agree(model, plain, IDS, SCATTERED)
        assert cache.stats().entries == cache.stats().hits == 0
        assert cache.stats().reasons == {"bypass()": cache.stats().bypasses}
        agree(model, plain, IDS, SCATTERED)


def test_a_cap_of_nothing():
    model = llama()
    plain = copy.deepcopy(model)
    with dora_cache.attach(model, backend="lru", max_bytes=0) as cache:
        agree(model, plain, IDS, SCATTERED)
        assert cache.stats().nbytes == 0


@numerics
def test_gradients(numerics):
    """With gradients, those of the parameters are as of each row alone."""
    model = llama({name: KINDS_OF_ADAPTERS[name] for name in ("dora", "lora", "rsdora")})
    plain = copy.deepcopy(model)
    names = ["dora", "lora", BASE, "rsdora", "dora"]
    for one in (model, plain):
        one.requires_grad_(True)
    with dora_cache.attach(model, numerics=numerics):
        model(IDS[:5], adapter_names=names).logits.square().sum().backward()
    for row, name in enumerate(names):
        switch = name if name != BASE else "lora"
        plain.base_model.set_adapter(switch)
        plain.requires_grad_(True)
        alone(plain, IDS[row : row + 1], name).square().sum().backward()
        plain.requires_grad_(True)
    for (name, found), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        if expected.grad is not None:
            assert far(found.grad, expected.grad) <= 1e-8, name


def test_hooks_and_other_parts():
    """A hook on a factor runs, and a factor of another class is called."""
    model = llama()
    plain = copy.deepcopy(model)
    calls = []
    with dora_cache.attach(model):
        agree(model, plain, IDS, SCATTERED)
        for one in (model, plain):
            layer = _layer(one)
            layer.lora_A["dora"].register_forward_hook(lambda *_: calls.append(1))
            layer.lora_B["lora"].register_forward_hook(lambda *args: args[-1] * 2)
        agree(model, plain, IDS, SCATTERED)
        assert calls

        class Doubling(nn.Linear):
            def forward(self, x):
                return 2 * super().forward(x)

        for one in (model, plain):
            for name in ("dora", "lora"):
                _layer(one, "v_proj").lora_A[name].__class__ = Doubling
        agree(model, plain, IDS, SCATTERED)


@pytest.mark.parametrize("use_dora", [True, False])
def test_dropout_of_an_adapter_that_is_not_active(use_dora):
    """Layers that are left in training mode drop out as PEFT's do."""
    model = dora_model(adapters=("first", "second"), lora_dropout=0.5)
    config = dora_config(use_dora=use_dora, lora_dropout=0.9)
    with quiet():
        model.add_adapter("third", config)
    model.eval()
    layer = model.base_model.model.layer
    layer.training = layer.lora_dropout["third"].training = True
    x = torch.randn(4, 5, 12)
    with dora_cache.attach(model), torch.no_grad():
        found = {float(layer(x, adapter_names=["third"] * 4).sum()) for _ in range(4)}
        assert len(found) == 4
        found = {float(layer(x, adapter_names=["second"] * 4).sum()) for _ in range(4)}
        assert len(found) == 1


@torch.no_grad()
def test_shapes_of_inputs():
    """Two dimensions, four, strided, and an empty batch."""
    model = dora_model(dtype=torch.float64, adapters=("a", "b"))
    plain = copy.deepcopy(model)
    names = ["b", "a", "b", BASE]
    with dora_cache.attach(model):
        for x in (
            torch.randn(4, 12),
            torch.randn(4, 2, 3, 12),
            torch.randn(4, 12, 5).mT,
            torch.randn(12, 4).T,
        ):
            agree(model, plain, x.double(), names)
        assert model(torch.randn(0, 5, 12).double(), adapter_names=[]).shape == (0, 5, 8)


@torch.no_grad()
def test_an_input_is_not_written_to():
    model = dora_model(adapters=("a", "b"))
    x = torch.randn(3, 5, 12)
    before = x.clone()
    with dora_cache.attach(model):
        model(x, adapter_names=["b", "a", "b"])
    assert torch.equal(x, before)


@numerics
@pytest.mark.parametrize("cast", [True, False], ids=["float32 adapters", "bfloat16 adapters"])
@torch.no_grad()
def test_lower_precision(numerics, cast):
    """Errors are those of PEFT's own mixed batches for LoRA, of one row alone for DoRA."""
    errors = {name: [0.0, 0.0] for name in ("lora", "dora")}
    for seed in range(5):
        torch.manual_seed(seed)
        model = Wide(cast)
        exact, plain = copy.deepcopy(model).double(), copy.deepcopy(model)
        names = ["dora", "lora", "dora2", "lora2", "lora", "dora"]
        x = torch.randn(len(names), 3, 256).bfloat16()
        lora = ["lora2", "lora", BASE, "lora", "lora2", "lora"]
        with dora_cache.attach(model.model, numerics=numerics):
            found = model.model(x, adapter_names=names)
            mixed_lora = model.model(x, adapter_names=lora)
        of_peft = plain.model(x, adapter_names=lora)
        for row, name in enumerate(names):
            expected = alone(exact.model, x[row : row + 1].double(), name)
            if name.startswith("dora"):
                peft = alone(plain.model, x[row : row + 1], name)
                errors["dora"][0] += far(found[row : row + 1], expected)
                errors["dora"][1] += far(peft, expected)
        for row, name in enumerate(lora):
            expected = alone(exact.model, x[row : row + 1].double(), name)
            errors["lora"][0] += far(mixed_lora[row : row + 1], expected)
            errors["lora"][1] += far(of_peft[row : row + 1], expected)
    for kind, (ours, theirs) in errors.items():
        assert ours <= 1.02 * theirs, kind


class Wide(nn.Module):
    """A layer in bfloat16 with two LoRA and two DoRA adapters."""

    def __init__(self, cast):
        super().__init__()
        base = Block(nn.Linear(256, 128)).to(torch.bfloat16)
        config = dora_config(r=8)
        with quiet():
            self.model = get_peft_model(
                base, config, adapter_name="dora", autocast_adapter_dtype=cast
            )
            for name, dora in (("dora2", True), ("lora", False), ("lora2", False)):
                config = dora_config(r=16, use_dora=dora)
                self.model.add_adapter(name, config, autocast_adapter_dtype=cast)
        shake(self.model)
        self.eval()


@torch.no_grad()
def test_autocast_and_inference_mode():
    model = llama(dtype=torch.float32)
    plain = copy.deepcopy(model)
    with dora_cache.attach(model):
        with torch.inference_mode():
            agree(model, plain, IDS, SCATTERED, 1e-5)
        agree(model, plain, IDS, SCATTERED, 1e-5)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            agree(model, plain, IDS, SCATTERED, 0.05)


def test_compiled():
    """Compiled code gives what PEFT's variants do."""
    model = dora_model(adapters=("a", "b"))
    plain = copy.deepcopy(model)
    layer = model.base_model.model.layer
    names = ["b", "a", "b"]
    x = torch.randn(3, 5, 12)
    with dora_cache.attach(model), torch.no_grad():
        found = torch.compile(lambda x: layer(x, adapter_names=names), backend="eager")(x)
        for row, name in enumerate(names):
            expected = alone(plain, x[row], name, plain.base_model.model.layer)
            torch.testing.assert_close(found[row], expected)


@torch.no_grad()
def test_threads_at_layers():
    """Layers keep nothing of a call: threads that call them with names of their own are right."""
    model = dora_model(dtype=torch.float64, adapters=("a", "b", "c"))
    plain = copy.deepcopy(model)
    layer = model.base_model.model.layer
    x = torch.randn(4, 12).double()
    mixes = [["a", "b", "c", BASE], ["c", "c", "a", "b"], ["b", BASE, "b", "a"]]
    expected = [
        torch.cat([alone(plain, x[row : row + 1], name) for row, name in enumerate(names)])
        for names in mixes
    ]
    ready = threading.Barrier(len(mixes))
    right = []

    def serve(names, expected):
        ready.wait()
        with torch.no_grad():
            for _ in range(200):
                found = torch.tanh(layer(x, adapter_names=names))
                right.append(far(found, expected) <= 1e-9)

    with dora_cache.attach(model):
        threads = [
            threading.Thread(target=serve, args=both) for both in zip(mixes, expected, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert right == [True] * 600


def test_methods_are_the_known_ones():
    """PEFT's methods are as they were, so that none of its classes is left out."""
    for methods in mixed.KNOWN.values():
        assert not changed(methods)


def test_another_class_is_left_to_peft():
    """A layer whose class mixes in a way of its own is PEFT's, which refuses DoRA."""
    model = dora_model(adapters=("a", "b"))
    layer = model.base_model.model.layer

    class Other(type(layer)):
        def _mixed_batch_forward(self, *args, **kwargs):
            return super()._mixed_batch_forward(*args, **kwargs)

    layer.__class__ = Other
    with dora_cache.attach(model), torch.no_grad(), pytest.raises(ValueError, match="DoRA is"):
        model(torch.randn(1, 5, 12), adapter_names=["a"])
