"""Models that mix kinds of adapters, under every operation that all kinds share.

As in ``model_machine.py`` there are two models alike, and only one has a cache.
"""

import contextlib
import copy

import torch
from hypothesis import assume
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from peft import inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from zoo import balanced, quiet

import dora_cache
from dora_cache.recipes import RECIPES, load_recipes
from dora_cache.recipes.examples import linear
from dora_cache.testing.recipes import _changed, _get, _place, _tensors

SIZE = 16
NAMES = ("ada", "bob")
SETTINGS = [
    {},
    {"backend": "lru", "max_bytes": 3000},
    {"backend": "cpu", "max_bytes": 3000},
    {"backend": "null"},
]


def _fits(example):
    """Whether an example's adapter may go onto one layer of a model that has others as well."""
    if example.base is not linear or example.dtypes[0] is not torch.float32:
        return False
    torch.manual_seed(0)
    try:
        with quiet():
            Chain([example])
    except Exception:  # noqa: BLE001 - PEFT injects kinds with shared state by get_peft_model only
        return False
    return True


class Chain(nn.Module):
    """Square linear layers, each with a kind of adapter of its own, under two names."""

    def __init__(self, examples):
        super().__init__()
        self.count = len(examples)
        for index in range(self.count):
            setattr(self, f"layer{index}", nn.Linear(SIZE, SIZE))
        for name in NAMES:
            for index, example in enumerate(examples):
                config = copy.deepcopy(example.config(SIZE, SIZE))
                config.target_modules = [f"layer{index}"]
                inject_adapter_in_model(config, self, name)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        self.x = torch.randn(3, SIZE)
        self.eval()
        self.activate("ada")

    def forward(self, x):
        for index in range(self.count):
            x = torch.tanh(getattr(self, f"layer{index}")(x))
        return x

    def layers(self):
        return [m for m in self.modules() if isinstance(m, BaseTunerLayer)]

    def activate(self, *names):
        for layer in self.layers():
            layer.set_adapter(list(names))


class Mixed(nn.Module):
    """PEFT's mixed model: two kinds on the same layers, one around the other."""

    def __init__(self, examples):
        super().__init__()
        from peft import get_peft_model

        base = nn.Sequential(nn.Linear(SIZE, SIZE), nn.Tanh(), nn.Linear(SIZE, SIZE))
        self.model = None
        for name, example in zip(NAMES, examples, strict=True):
            config = copy.deepcopy(example.config(SIZE, SIZE))
            config.target_modules = ["0", "2"]
            if self.model is None:
                self.model = get_peft_model(base, config, adapter_name=name, mixed=True)
            else:
                self.model.add_adapter(name, config)
        self.model.set_adapter(list(NAMES))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        self.x = torch.randn(3, SIZE)
        self.eval()

    def forward(self, x):
        return self.model(x)

    def layers(self):
        return [m for m in self.modules() if isinstance(m, BaseTunerLayer)]

    def activate(self, *names):
        self.model.set_adapter(list(names))


EXAMPLES = [
    example
    for recipe in load_recipes()
    if recipe.name in RECIPES
    for example in recipe.examples
    if _fits(example)
]
MIXABLE = [
    example
    for example in EXAMPLES
    if example.config(SIZE, SIZE).peft_type in {"LORA", "LOHA", "LOKR", "OFT"}
]


def outcome(act, model):
    torch.manual_seed(0)
    with quiet():
        try:
            return act(model)
        except Exception as error:  # noqa: BLE001 - compared with the other side's
            return error


class KindsMachine(RuleBasedStateMachine):
    """Every rule is something that all kinds of adapters offer."""

    numerics = "peft"
    steps = 0

    @initialize(
        chain=st.lists(st.sampled_from(EXAMPLES), min_size=2, max_size=3),
        pair=st.lists(st.sampled_from(MIXABLE), min_size=2, max_size=2),
        mixed=st.sampled_from([False, False, True]),
        which=st.sampled_from(SETTINGS),
    )
    def start(self, chain, pair, mixed, which):
        self.plain, self.cached = (
            outcome(lambda _: Mixed(pair) if mixed else Chain(chain), None) for _ in range(2)
        )
        assert type(self.plain) is type(self.cached)
        assume(not isinstance(self.plain, Exception))  # PEFT cannot have both in one model
        self.types = [type(module) for module in self.plain.modules()]
        self.attach(which)

    def attach(self, which):
        self.cache = None
        with contextlib.suppress(dora_cache.NothingToCacheError), quiet():
            self.cache = dora_cache.attach(self.cached, numerics=self.numerics, **which)

    def teardown(self):
        if getattr(self, "cache", None):
            self.cache.detach()
            for one, other in zip(self.cached.modules(), self.plain.modules(), strict=True):
                assert type(one) is type(other)
                assert vars(one).keys() == vars(other).keys()

    def both(self, act):
        expected, found = outcome(act, self.plain), outcome(act, self.cached)
        if isinstance(expected, Exception) or isinstance(found, Exception):
            assert type(found) is type(expected), (found, expected)
        elif isinstance(expected, torch.Tensor):
            self.assert_same(found, expected)

    def assert_same(self, found, expected):
        assert found.dtype is expected.dtype
        assert torch.equal(found.nan_to_num(), expected.nan_to_num())

    @invariant()
    def fresh(self):
        if not hasattr(self, "plain"):
            return
        type(self).steps += 1
        for _ in range(2):
            self.both(_run)

    @invariant()
    def sums_and_cap(self):
        if not getattr(self, "cache", None):
            return
        stats = balanced(self.cache)
        assert stats.max_bytes is None or stats.nbytes <= stats.max_bytes

    # Weights

    @rule(index=st.integers(0, 99), way=st.sampled_from(["in place", "data", "anew"]))
    def write(self, index, way):
        names = [name for name, _ in _tensors(self.plain)]
        name = names[index % len(names)]

        def act(model):
            owner, last = _place(model, name)
            value = _get(owner, last)
            new = _changed(value)
            with torch.no_grad():
                if way == "in place":
                    value.copy_(new)
                elif way == "data" or not isinstance(value, nn.Parameter):
                    value.data = new
                else:
                    setattr(owner, last, nn.Parameter(new, requires_grad=value.requires_grad))

        self.both(act)

    @rule(fused=st.booleans(), train=st.booleans())
    def step(self, fused, train):
        def act(model):
            model.train(train)
            weights = [p for p in model.parameters() if p.requires_grad]
            model(model.x).square().sum().backward()
            nn.utils.clip_grad_value_(weights, 1.0)  # else steps add up until numbers overflow
            torch.optim.SGD(weights, lr=0.01, fused=fused).step()
            model.zero_grad()
            model.eval()

        self.both(act)

    @rule()
    def load(self):
        def act(model):
            state = {key: value.clone() for key, value in model.state_dict().items()}
            for value in state.values():
                if value.is_floating_point():
                    value.mul_(1.1)
            model.load_state_dict(state)

        self.both(act)

    @rule(assign=st.booleans())
    def to_double_and_back(self, assign):
        if assign:
            self.both(
                lambda m: m.load_state_dict(copy.deepcopy(m.state_dict()), assign=True) and None
            )
        else:
            self.both(lambda m: m.double() and m.float() and None)

    @rule(index=st.integers(0, 9), factor=st.sampled_from([0.5, 2.0]))
    def scale(self, index, factor):
        def act(model):
            layers = [layer for layer in model.layers() if hasattr(layer, "scale_layer")]
            if layers:
                layers[index % len(layers)].scale_layer(factor)

        self.both(act)

    # Adapters and modes

    @rule(names=st.sampled_from([("ada",), ("bob",), ("ada", "bob"), ("bob", "ada")]))
    def activate(self, names):
        self.both(lambda model: model.activate(*names))

    @rule(index=st.integers(0, 9), name=st.sampled_from(NAMES))
    def activate_in_one(self, index, name):
        def act(model):
            layers = model.layers()
            layers[index % len(layers)].set_adapter([name])

        self.both(act)

    @rule(enabled=st.booleans())
    def enable(self, enabled):
        def act(model):
            for layer in model.layers():
                layer.enable_adapters(enabled)

        self.both(act)

    @rule(index=st.integers(0, 9), name=st.sampled_from([None, *NAMES]), safe=st.booleans())
    def merge(self, index, name, safe):
        def act(model):
            layers = model.layers()
            layer = layers[index % len(layers)]
            layer.merge(safe_merge=safe, adapter_names=None if name is None else [name])

        self.both(act)

    @rule()
    def unmerge(self):
        def act(model):
            for layer in model.layers():
                if layer.merged:
                    layer.unmerge()

        self.both(act)

    @rule(index=st.integers(0, 9), mode=st.booleans())
    def switch_part(self, index, mode):
        def act(model):
            layers = model.layers()
            layers[index % len(layers)].train(mode)

        self.both(act)

    @rule()
    def evaluate(self):
        self.both(lambda model: model.eval() and None)

    @rule(name=st.sampled_from(NAMES))
    def delete(self, name):
        def act(model):
            for layer in model.layers():
                layer.delete_adapter(name)

        self.both(act)

    @rule()
    def autocast(self):
        def act(model):
            with torch.autocast("cpu", torch.bfloat16):
                return _run(model)

        self.both(act)

    @rule()
    def with_gradients(self):
        def act(model):
            x = model.x.clone().requires_grad_()
            model(x).sum().backward()
            model.zero_grad()
            return x.grad

        self.both(act)

    # The cache's own

    @rule(name=st.sampled_from([None, *NAMES]))
    def invalidate(self, name):
        if self.cache:
            self.cache.invalidate(adapter=name)

    @rule()
    def warm(self):
        if self.cache:
            with contextlib.suppress(ValueError):  # in training mode
                self.cache.warm()

    @rule()
    def bypass(self):
        if self.cache:
            with self.cache.bypass():
                self.both(_run)

    @rule(which=st.sampled_from(SETTINGS))
    def reattach(self, which):
        if self.cache:
            self.cache.detach()
        self.attach(which)

    @rule()
    def copied(self):
        def act(model):
            clone = copy.deepcopy(model)
            with torch.no_grad():
                for parameter in clone.parameters():
                    parameter.mul_(1.25)
            return _run(clone)

        self.both(act)


def _run(model):
    with torch.no_grad():
        return model(model.x)


class FastKindsMachine(KindsMachine):
    """The same with numerics="fast", to rounding."""

    numerics = "fast"

    def assert_same(self, found, expected):
        assert found.dtype is expected.dtype
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2, equal_nan=True)
