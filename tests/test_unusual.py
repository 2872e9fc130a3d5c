"""What few people do to a model: the output is still that of a twin without a cache."""

import gc

import pytest
import torch
from peft import HiraConfig, LoraConfig, get_peft_model
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrize
from zoo import activate, dora_config, dora_model, loha_config, quiet, run, sample, shake

import dora_cache


def dora():
    torch.manual_seed(1)
    return dora_model(adapters=("first",))


def loha():
    torch.manual_seed(1)
    with quiet():
        model = get_peft_model(Stack(), loha_config())
    shake(model)
    return model.eval()


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(12, 8)

    def forward(self, x):
        return torch.tanh(self.layer(x))


class Twice(nn.Module):
    def forward(self, weight):
        return 2 * weight


def layer_of(model):
    return next(part for part in model.modules() if hasattr(part, "lora_A"))


def compare(make, act, **settings):
    """Do the same to a cached model and to its twin, and compare everything that comes of it."""
    x = sample("linear")
    expected = [value.clone() for value in act(make(), x)]
    model = make()
    with dora_cache.attach(model, **settings):
        found = [value.clone() for value in act(model, x)]
    assert len(found) == len(expected)
    loose = 1e-5 if settings.get("numerics") == "fast" else 0
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=loose, atol=loose)


def test_hooks_of_all_modules_run():
    """A hook on every linear layer changes and sees what it would without a cache."""

    def act(model, x):
        seen = [run(model, x)]

        def hook(module, _, output):
            seen.append(output)
            return 1.25 * output if type(module) is nn.Linear else None

        handle = nn.modules.module.register_module_forward_hook(hook)
        try:
            seen.append(run(model, x))
        finally:
            handle.remove()
        return [*seen, run(model, x)]

    compare(dora, act)


@pytest.mark.parametrize("part", ["lora_A", "lora_B", "lora_magnitude_vector"])
def test_a_forward_set_on_an_adapters_module_runs(part):
    """As accelerate and others set it."""

    def act(model, x):
        outputs = [run(model, x)]
        module = getattr(layer_of(model), part)["first"]
        original = module.forward
        module.forward = lambda *args, **kwargs: 1.5 * original(*args, **kwargs)
        outputs.append(run(model, x))
        del module.forward
        return [*outputs, run(model, x)]

    compare(dora, act)


def test_a_result_that_a_module_keeps_is_not_written_into():
    """A module of an adapter may return the same tensor again and again."""

    def act(model, x):
        module = layer_of(model).lora_B["first"]
        original, kept = module.forward, {}

        def forward(x):
            if x.shape not in kept:
                kept[x.shape] = original(x)
            return kept[x.shape]

        module.forward = forward
        return [run(model, x), run(model, x), *kept.values()]

    compare(dora, act)


class Shifted(nn.Linear):
    """A linear layer with a parameter of its own in its forward."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, bias=False)
        self.shift = nn.Parameter(torch.ones(outputs))

    def forward(self, x):
        return super().forward(x) + self.shift


@pytest.mark.parametrize(("kind", "name"), [(nn.Linear, "bias"), (Shifted, "shift")])
@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
@pytest.mark.parametrize("numerics", ["peft", "fast"])
def test_another_module_in_an_adapters_place(kind, name, part, numerics):
    """All its parameters count."""

    def act(model, x):
        torch.manual_seed(3)
        modules = getattr(layer_of(model), part)
        old = modules["first"]
        modules["first"] = new = kind(old.in_features, old.out_features).eval()
        outputs = [run(model, x), run(model, x)]
        with torch.no_grad():
            getattr(new, name).add_(1)
        return [*outputs, run(model, x)]

    compare(dora, act, numerics=numerics)


@pytest.mark.parametrize("numerics", ["peft", "fast"])
@pytest.mark.parametrize("part", ["lora_magnitude_vector.first", "base_layer"])
def test_vmap_over_weights(part, numerics):
    """Vmap goes past the cache, with and without gradients."""

    def act(model, x):
        outputs = []
        name = next(key for key, _ in model.named_parameters() if key.endswith(f"{part}.weight"))
        weight = model.get_parameter(name).detach()
        for enabled in (False, True):
            with torch.set_grad_enabled(enabled):
                outputs.append(
                    torch.vmap(lambda weight: functional_call(model, {name: weight}, (x,)))(
                        torch.stack([weight, 2 * weight])
                    ).detach()
                )
        return outputs

    compare(dora, act, numerics=numerics)


@pytest.mark.parametrize("how", ["hooks", "closure"])
@pytest.mark.parametrize("make", [dora, loha])
def test_a_fused_step_whose_gradients_come_and_go_within_it(make, how):
    """Gradients made by the optimizer's own hooks or by the closure, and cleared by a hook."""

    def act(model, x):
        weights = [w for name, w in model.named_parameters() if "lora_" in name or "hada" in name]
        optimizer = torch.optim.SGD(weights, lr=0.1, fused=True)

        def make_gradients(*_):
            for weight in weights:
                weight.grad = torch.ones_like(weight)

        if how == "hooks":
            optimizer.register_step_pre_hook(make_gradients)
        optimizer.register_step_post_hook(lambda *_: optimizer.zero_grad())
        outputs = [run(model, x), run(model, x)]
        for _ in range(2):
            if how == "hooks":
                optimizer.step()
            else:
                optimizer.step(lambda: make_gradients() or torch.zeros(()))
            outputs.append(run(model, x))
        return outputs

    compare(make, act)


@pytest.mark.parametrize("guard", ["version", "content"])
def test_values_within_parametrize_cached_are_not_kept(guard):
    """parametrize.cached() does not notice writes; what is derived from it must not outlive it."""

    def act(model, x):
        base = layer_of(model).base_layer
        parametrize.register_parametrization(base, "weight", Twice())
        model.eval()
        outputs = [run(model, x)]
        with parametrize.cached():
            outputs.append(run(model, x))
            with torch.no_grad():
                base.parametrizations.weight.original.mul_(1.5)
            outputs.append(run(model, x))
        return [*outputs, run(model, x)]

    compare(dora, act, guard=guard)


@pytest.mark.parametrize("guard", ["version", "content"])
@pytest.mark.parametrize("make", [dora, loha])
def test_values_within_autocasts_cache_are_not_kept(make, guard):
    """Autocast keeps what it has cast, and does not notice writes; nothing stale outlives it."""

    def act(model, x):
        weights = [w for w in model.parameters() if w.requires_grad]
        assert weights
        outputs = []
        for _ in range(2):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                outputs.append(run(model, x))
                with torch.no_grad():
                    for weight in weights:
                        weight.mul_(1.5)
                run(model, x)  # PyTorch's own output is stale here
        return outputs

    compare(make, act, guard=guard)


def test_numbers_that_are_read_negated():
    """The same memory under a negative sign is other data."""

    def act(model, x):
        weight = layer_of(model).lora_A["first"].weight
        twofold = torch.complex(torch.zeros_like(weight), weight.detach().clone())
        outputs = [run(model, x)]
        for data in (twofold.imag, twofold.conj().imag, twofold.imag):
            weight.data = data
            outputs.append(run(model, x))
        return outputs

    compare(dora, act)


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("kind", ["DoRA", "HiRA"])
def test_a_merge_in_another_model_that_shares_the_weight(kind, safe):
    """Two PEFT models on one base weight: merging into it, and out of it, is noticed by both."""

    def make():
        torch.manual_seed(1)
        mine, others = Stack(), Stack()
        others.layer.weight = mine.layer.weight
        hira = HiraConfig(r=4, target_modules=["layer"], init_weights=False)
        lora = LoraConfig(r=4, target_modules=["layer"], init_lora_weights=False)
        with quiet():
            model = get_peft_model(mine, dora_config() if kind == "DoRA" else hira)
            model.other = [get_peft_model(others, lora).eval()]
        return model.eval()

    def act(model, x):
        (other,) = model.other
        outputs = [run(model, x), run(model, x)]
        other.merge_adapter(safe_merge=safe)
        outputs.append(run(model, x))
        other.unmerge_adapter()
        outputs.append(run(model, x))
        with quiet():
            other.merge_and_unload(safe_merge=safe)
        return [*outputs, run(model, x)]

    compare(make, act)


def test_detach_finds_the_variants_where_they_are_now():
    """Another dict in the place of lora_variant is restored as well."""
    model = dora()
    layer = layer_of(model)
    plain = type(layer.lora_variant["first"])
    with dora_cache.attach(model):
        run(model, sample("linear"))
        layer.lora_variant = dict(layer.lora_variant)
    assert type(layer.lora_variant["first"]) is plain


def test_nothing_of_peft_stays_wrapped():
    """The methods wrapped for the time of attachment are PEFT's own again after it."""
    from peft.tuners.tuners_utils import BaseTuner

    before = BaseTuner.merge_adapter
    model = dora_model(adapters=("first", "second"))
    activate(model, "first")
    cache = dora_cache.attach(model)
    assert BaseTuner.merge_adapter is not before
    cache.detach()
    del cache
    gc.collect()
    assert BaseTuner.merge_adapter is before
