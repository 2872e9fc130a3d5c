"""Layers that are not as PEFT makes them: weights that are no parameters, hooks, other calls."""

import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize, prune

from dora_cache import attach
from dora_cache.recipes import load_recipes
from dora_cache.recipes.examples import make_model

EXAMPLES = {example.name: example for recipe in load_recipes() for example in recipe.examples}
BOTH = ("peft", "fast")


class Twice(nn.Module):
    def forward(self, x):
        return 2 * x


class Seen:
    """A hook that counts its calls, and changes outputs; each time otherwise."""

    def __init__(self):
        self.count = 0

    def __call__(self, module, inputs, output):
        self.count += 1
        return (1 + self.count / 8) * output


def layer_of(model):
    return model.base_model.model.layer


def check(name, steps, *, numerics="peft", grad=False, **more):
    """Whether the steps give with a cache what they give without one."""
    found = []
    for attached in (False, True):
        model, x = make_model(EXAMPLES[name], **more)
        cache = attach(model, numerics=numerics) if attached else None
        with warnings.catch_warnings(), torch.set_grad_enabled(grad):
            warnings.simplefilter("ignore")  # PEFT's, and PyTorch's
            warnings.filterwarnings("error", message=".*values are derived again")  # the cache's
            found.append(list(steps(model, x)))
        if cache is not None:
            cache.detach()
    for expected, actual in zip(*found, strict=True):
        if numerics == "fast" and isinstance(expected, torch.Tensor):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
        elif isinstance(expected, torch.Tensor):
            assert torch.equal(actual, expected)
        else:
            assert actual == expected


# Weights that are no parameters

MEMBERS = [
    ("BOFT", "boft_R"),
    ("BOFT", "boft_s"),
    ("BOFT, Conv2d", "boft_s"),
    ("C3A", "c3a_kernel"),
    ("DeLoRA", "delora_A"),
    ("DeLoRA", "delora_B"),
    ("DeLoRA", "delora_lambda"),
    ("FourierFT", "fourierft_spectrum"),
    ("FRoD", "frod_lambda_s_values"),
    ("FRoD", "frod_lambda_l"),
    ("HiRA", "hira_A"),
    ("HiRA", "hira_B"),
    ("HiRA, Embedding", "hira_embedding_A"),
    ("HiRA, Embedding", "hira_embedding_B"),
    ("HiRA, Conv2d", "hira_B"),
    ("HRA", "hra_u"),
    ("LoHa", "hada_w1_a"),
    ("LoHa", "hada_w2_b"),
    ("LoHa, Conv2d, effective", "hada_t1"),
    ("LoKr", "lokr_w1"),
    ("LoKr, decompose_both", "lokr_w1_a"),
    ("LoKr, decompose_both", "lokr_w2_b"),
    ("LoKr, Conv2d, effective", "lokr_t2"),
    ("MiSS, bat", "miss_block"),
    ("OSF", "osf_svd_params"),
    ("Poly", "poly_lora_A"),
    ("Poly", "poly_lora_B"),
    ("RandLoRA", "randlora_lambda"),
    ("RandLoRA", "randlora_gamma"),
    ("SHiRA", "shira_weight"),
    ("Super-Tuning", "supertuning_values"),
    ("TrainableTokens", "trainable_tokens_delta"),
    ("TrainableTokens, head", "trainable_tokens_delta"),
    ("UniLoRA", "unilora_theta_d"),
    ("VB-LoRA", "vblora_logits_A"),
    ("VB-LoRA", "vblora_vector_bank"),
    ("WaveFT", "waveft_spectrum"),
    # parts that are modules of their own
    ("GLoRA", "glora_A"),
    ("GLoRA, vectors", "glora_B"),
    ("GLoRA, constants", "glora_D"),
    ("OFT", "oft_R"),
    ("PEANuT", "peanut_A"),
    ("PEANuT", "peanut_B"),
    ("PEANuT, depth=2", "peanut_encoders"),
    ("Poly", "poly_router"),
    ("PSOFT", "psoft_R"),
    ("LoRA on attention", "lora_A"),
]
WEIGHTS = {
    "osf_svd_params": "S_low",
    "poly_router": "module_logits",
    "glora_A": "Xu",
    "glora_B": "X",
    "glora_D": "X",
}


def place(model, attribute):
    """Return the module that has the weight, and the weight's name."""
    layer = layer_of(model)
    layer = getattr(layer, "attention", layer)
    there = getattr(layer, attribute)
    if isinstance(there, nn.ParameterDict):
        return there, "first"
    part = there["first"]
    if isinstance(part, nn.ModuleList):
        part = part[0]
    return part, WEIGHTS.get(attribute, "weight")


def make_plain(module, name):
    value = getattr(module, name).detach().clone()
    delattr(module, name)
    if isinstance(module, nn.ParameterDict):
        module._keys[name] = None  # as it stays when FSDP takes the parameter away
    setattr(module, name, value)
    return value


def make_buffer(module, name):
    value = module._parameters.pop(name).detach().clone()
    module.register_buffer(name, value)
    return value


def make_parametrized(module, name):
    parametrize.register_parametrization(module, name, Twice())
    module.eval()
    return module.parametrizations[name].original


def make_pruned(module, name):
    prune.l1_unstructured(module, name, 0.5)
    return getattr(module, name)


def run(model, x):
    """Run a model, on a task if it is Poly's."""
    if "poly" in type(model.base_model).__name__.lower():
        return model.base_model(x, task_ids=torch.zeros(1, dtype=torch.int64)).clone()
    found = model(x)
    return found.clone() if isinstance(found, torch.Tensor) else found.logits.clone()


@pytest.mark.parametrize("numerics", BOTH)
@pytest.mark.parametrize("change", [make_plain, make_buffer, make_parametrized, make_pruned])
@pytest.mark.parametrize(("name", "attribute"), MEMBERS)
def test_a_weight_that_is_no_parameter(name, attribute, change, numerics):
    """A weight that becomes a plain tensor, a buffer, computed or pruned counts as it is now."""

    def steps(model, x):
        calls = []
        layer = layer_of(model)
        base = getattr(layer, "attention", layer).base_layer
        base.register_forward_hook(lambda *_: calls.append(1))
        yield run(model, x)
        yield run(model, x)
        weight = change(*place(model, attribute))
        yield run(model, x)
        yield run(model, x)
        with torch.no_grad():
            weight.mul_(1.25)
        yield run(model, x)
        yield len(calls)

    check(name, steps, numerics=numerics)


@pytest.mark.parametrize("change", [make_plain, make_buffer, make_parametrized, make_pruned])
@pytest.mark.parametrize(("name", "attribute"), MEMBERS)
def test_no_forward_is_passed_over_in_silence(name, attribute, change):
    """Each is looked up, or counted as a call past the cache with its reason."""
    model, x = make_model(EXAMPLES[name])
    with attach(model) as cache, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(model, x)
        change(*place(model, attribute))
        before = cache.stats()
        run(model, x)
        after = cache.stats()
    assert after.lookups + after.bypasses > before.lookups + before.bypasses
    assert sum(after.reasons.values()) >= after.bypasses


@pytest.mark.parametrize("name", ["LoHa", "LoKr", "HiRA", "C3A", "GLoRA", "PSOFT", "PEANuT", "OFT"])
def test_flat_parameters_of_fsdp(name, tmp_path):
    """Under FSDP with flat parameters, weights are views that are nobody's parameters."""

    def steps(model, x):
        model.requires_grad_(True)
        sharded = FullyShardedDataParallel(
            model,
            use_orig_params=False,
            sharding_strategy=ShardingStrategy.NO_SHARD,
            device_id=torch.device("cpu"),
        ).eval()
        for factor in (1, 1, 1.1, 1):
            with torch.no_grad():
                for parameter in sharded.parameters():
                    parameter.mul_(factor)
                yield sharded(x).clone()

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/x", rank=0, world_size=1)
    try:
        check(name, steps, grad=True)
    finally:
        dist.destroy_process_group()


# Hooks

CALLED = [
    ("BOFT", "boft_dropout"),
    ("BOFT, Conv2d", "boft_dropout"),
    ("DeLoRA", "delora_dropout"),
    ("FRoD", "frod_dropout"),
    ("GLoRA", "glora_B"),
    ("HiRA", "hira_dropout"),
    ("PEANuT", "peanut_B"),
    ("PEANuT, depth=2", "peanut_encoders"),
    ("PEANuT, depth=2", "peanut_decoders"),
    ("Poly", "poly_router"),
    ("PSOFT", "psoft_R"),
    ("PSOFT", "psoft_dropout"),
    ("RandLoRA", "randlora_dropout"),
    ("UniLoRA", "unilora_dropout"),
    ("VB-LoRA", "vblora_dropout"),
    # the base layer
    ("FourierFT", None),
    ("GLoRA", None),
    ("HiRA", None),
    ("LoHa", None),
    ("LoRA on attention", None),
    ("LoRA on parameters", None),
]


def called(model, attribute):
    layer = layer_of(model)
    if attribute is None:
        return getattr(layer, "attention", layer).get_base_layer()
    part = getattr(layer, attribute)["first"]
    return part[0] if isinstance(part, nn.ModuleList) else part


def hook(module):
    seen = Seen()
    module.register_forward_hook(
        lambda module, inputs, output: (
            (seen(module, inputs, output[0]), *output[1:])
            if isinstance(output, tuple)
            else seen(module, inputs, output)
        )
    )
    return seen


def replace_forward(module):
    """Set a forward on the instance, as accelerate does."""
    seen, forward = Seen(), module.forward

    def replaced(*args, **kwargs):
        output = forward(*args, **kwargs)
        if isinstance(output, tuple):
            return seen(module, args, output[0]), *output[1:]
        return seen(module, args, output)

    module.forward = replaced
    return seen


@pytest.mark.parametrize("numerics", BOTH)
@pytest.mark.parametrize("change", [hook, replace_forward])
@pytest.mark.parametrize(("name", "attribute"), CALLED)
def test_a_module_whose_call_is_followed(name, attribute, change, numerics):
    """A module that PEFT calls is called, once a forward, from when somebody follows its calls."""

    def steps(model, x):
        yield run(model, x)
        yield run(model, x)
        seen = change(called(model, attribute))
        yield run(model, x)
        yield run(model, x)
        yield seen.count

    check(name, steps, numerics=numerics)


@pytest.mark.parametrize("numerics", BOTH)
@pytest.mark.parametrize("name", EXAMPLES)
def test_hooks_on_all_modules(name, numerics):
    """Hooks on all modules see in the cached model the calls that they see in the other one."""

    def steps(model, x):
        seen = []

        def look(module, inputs, output):
            seen.append(type(module).__name__)
            return 1.25 * output if type(module) is nn.Linear else None

        yield run(model, x)
        yield run(model, x)
        with register_module_forward_hook(look):
            yield run(model, x)
            yield run(model, x)
        yield seen

    check(name, steps, numerics=numerics)


def test_a_forward_set_on_a_part_of_a_prompt_encoder():
    """P-tuning's encoder runs at each forward, once the forward of its head is replaced."""

    def steps(model, x):
        yield run(model, x)
        yield run(model, x)
        seen = replace_forward(model.prompt_encoder["first"].mlp_head)
        yield run(model, x)
        yield run(model, x)
        yield seen.count

    check("p-tuning, MLP", steps)


def test_a_parametrization_in_a_prompt_encoder():
    """What a parametrization in p-tuning's encoder computes counts as it is now."""

    def steps(model, x):
        yield run(model, x)
        linear = model.prompt_encoder["first"].mlp_head[0]
        weight = make_parametrized(linear, "weight")
        yield run(model, x)
        yield run(model, x)
        with torch.no_grad():
            weight.mul_(1.25)
        yield run(model, x)

    check("p-tuning, MLP", steps)


# Other calls


@pytest.mark.parametrize("disabled", [False, True])
def test_attention_called_with_keywords(disabled):
    """All of an attention's inputs may come by their names."""

    def steps(model, x):
        attention = layer_of(model).attention
        for _ in range(4):
            if disabled:
                with model.disable_adapter():
                    yield attention(query=x, key=x, value=x, need_weights=False)[0]
            else:
                yield attention(query=x, key=x, value=x, need_weights=False)[0]
                yield attention(key=x, value=x, query=x)[1]

    check("LoRA on attention", steps)


@pytest.mark.parametrize(
    ("name", "word"), [("p-tuning, MLP", "indices"), ("prefix tuning, projected", "prefix")]
)
def test_prompt_encoders_called_with_keywords(name, word):
    """A prompt encoder's input may come by the name that it has there."""

    def steps(model, _):
        encoder = model.prompt_encoder["first"]
        tokens = model.prompt_tokens["first"].unsqueeze(0)
        yield encoder(**{word: tokens}).clone()

    check(name, steps)


def test_pruning_the_weights_of_an_attention():
    """A pruning hook on the attention writes its weights at each forward, and so it stays."""

    def steps(model, x):
        base = layer_of(model).attention.base_layer
        for _ in range(4):
            yield model(x).clone()
        weight = base.in_proj_weight
        mask = (torch.arange(weight.numel()) % 2).view_as(weight)
        prune.custom_from_mask(base, "in_proj_weight", mask)
        for _ in range(3):
            yield model(x).clone()
        list(model.modules())
        yield model(x).clone()

    check("LoRA on attention", steps)


# Attributes that values depend on


def outcome(function, *args):
    try:
        return function(*args).clone()
    except (RuntimeError, ValueError) as error:
        return type(error).__name__


@pytest.mark.parametrize(
    ("name", "where", "attribute", "value"),
    [
        ("BOFT", None, "in_features", 8),
        ("BOFT", None, "out_features", 8),
        ("BOFT, Conv2d", None, "in_features", 8),
        ("HRA", None, "in_features", 8),
        ("HRA, Conv2d", None, "in_features", 8),
        ("OFT", "oft_R", "block_share", True),
        ("OFT, block_share", "oft_R", "block_share", False),
    ],
)
def test_an_attribute_that_changes(name, where, attribute, value):
    """After a change of an attribute that PEFT reads, the outcome is PEFT's, be it an error."""

    def steps(model, x):
        yield outcome(run, model, x)
        yield outcome(run, model, x)
        layer = layer_of(model)
        setattr(layer if where is None else getattr(layer, where)["first"], attribute, value)
        yield outcome(run, model, x)

    check(name, steps)
