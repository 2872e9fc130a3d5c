"""A small real PEFT model under every lifecycle operation: cached always equals uncached."""

import contextlib
import copy

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from peft import LoraConfig, get_peft_model
from peft.utils.hotswap import hotswap_adapter_from_state_dict
from torch import nn
from zoo import quiet, shake

import dora_cache

NAMES = ("ada", "bob", "cyd")
TARGETS = ["embedding", "conv", "linear"]


class Net(nn.Module):
    """An embedding, a convolution and a linear layer, all with something to adapt."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 9)
        self.conv = nn.Conv2d(2, 3, 2)
        self.linear = nn.Linear(12, 5)

    def forward(self, ids):
        x = self.embedding(ids).unflatten(-1, (3, 3))
        return self.linear(torch.tanh(self.conv(x)).flatten(1))


def config(rank, *, use_dora=True):
    return LoraConfig(
        use_dora=use_dora,
        r=rank,
        lora_alpha=3,
        target_modules=TARGETS,
        init_lora_weights=False,
    )


names = st.sampled_from(NAMES)
factors = st.sampled_from([0.5, 1.25, 2.0])
layers = st.sampled_from(TARGETS)
SETTINGS = [
    {},
    {"backend": "lru", "max_bytes": 100},
    {"backend": "lru", "max_bytes": 40},
    {"backend": "cpu", "max_bytes": 150},
    {"backend": "null"},
]


class ModelMachine(RuleBasedStateMachine):
    """Every rule is something PyTorch or PEFT lets people do; the oracle is a plain copy."""

    numerics = "peft"

    @initialize(
        dtype=st.sampled_from([torch.float32, torch.bfloat16]), which=st.sampled_from(SETTINGS)
    )
    def start(self, dtype, which):
        torch.manual_seed(0)
        with quiet():
            self.model = get_peft_model(Net().to(dtype), config(2), adapter_name="ada")
            self.model.add_adapter("bob", config(3))
        shake(self.model)
        self.model.eval()
        self.ids = torch.randint(0, 11, (2, 2))
        self.attach(which)

    def attach(self, which):
        self.cache = dora_cache.attach(self.model, numerics=self.numerics, **which)

    def teardown(self):
        if hasattr(self, "cache"):
            self.cache.detach()
            assert not [
                key
                for module in self.model.modules()
                for key in vars(module)
                if "dora_cache_" in key
            ]

    # Looking things up

    @property
    def tuner(self):
        return self.model.base_model

    def layer(self, name):
        return getattr(self.tuner.model, name)

    def adapters(self):
        return list(self.model.peft_config)

    def has(self, name):
        return name in self.model.peft_config

    def weights(self, name):
        return [p for n, p in self.model.named_parameters() if f".{name}" in n]

    def merged(self):
        return bool(self.layer("linear").merged_adapters)

    # Running, against the oracle

    def compare(self, context=contextlib.nullcontext, times=2):
        with quiet():
            oracle = copy.deepcopy(self.model)
            with torch.no_grad(), context():
                expected = oracle(self.ids)
                for _ in range(times):
                    self.assert_same(self.model(self.ids), expected)

    def assert_same(self, found, expected):
        assert torch.equal(found, expected)

    @invariant()
    def fresh(self):
        if hasattr(self, "cache"):
            self.compare()

    @invariant()
    def sums_and_cap(self):
        if hasattr(self, "cache"):
            stats = self.cache.stats()
            gone = stats.evictions + stats.invalidations + stats.replacements
            assert stats.stores == stats.entries + gone
            assert stats.evictions >= 0
            assert stats.max_bytes is None or stats.nbytes <= stats.max_bytes
            assert (stats.entries == 0) == (stats.nbytes == 0)

    @rule(low=st.sampled_from([torch.bfloat16, torch.float16]))
    def forward_under_autocast(self, low):
        self.compare(lambda: torch.autocast("cpu", dtype=low))

    @rule()
    def forward_in_inference_mode(self):
        self.compare(torch.inference_mode)

    @rule()
    def forward_with_gradients(self):
        with quiet():
            oracle = copy.deepcopy(self.model)
            gradients = []
            for model in (oracle, self.model):
                model.zero_grad(set_to_none=True)
                result = model(self.ids)
                if result.requires_grad:
                    result.float().square().sum().backward()
                gradients.append([p.grad for p in model.parameters()])
            for one, other in zip(*gradients, strict=True):
                assert (one is None) == (other is None)
                if one is not None:
                    self.assert_same(other, one)
            self.model.zero_grad(set_to_none=True)

    # Adapters

    @precondition(lambda self: not self.merged())
    @rule(chosen=st.lists(names, min_size=1, max_size=3, unique=True))
    def activate(self, chosen):
        chosen = [name for name in chosen if self.has(name)]
        if chosen:
            self.tuner.set_adapter(chosen)

    @precondition(lambda self: not self.merged())
    @rule(name=names, rank=st.integers(1, 3), use_dora=st.booleans())
    def add(self, name, rank, use_dora):
        if not self.has(name):
            with quiet():
                self.model.add_adapter(name, config(rank, use_dora=use_dora))
            self.model.eval()

    @precondition(lambda self: not self.merged() and len(self.adapters()) > 1)
    @rule(name=names)
    def delete(self, name):
        if self.has(name):
            with quiet():
                self.model.delete_adapter(name)
            # PeftModel goes on naming the adapter it was made with, even if it is gone.
            self.model.active_adapter = self.adapters()[0]

    @rule(name=names, factor=factors, assign=st.booleans())
    def load(self, name, factor, assign):
        state = {k: v * factor for k, v in self.model.state_dict().items() if f".{name}" in k}
        self.model.load_state_dict(state, strict=False, assign=assign)

    @precondition(lambda self: not self.merged())
    @rule(name=names, factor=factors)
    def hotswap(self, name, factor):
        if self.has(name):
            state = {
                key: value * factor
                for key, value in self.model.state_dict().items()
                if f".{name}" in key and "embedding" not in key
            }
            missing = {
                key: value.clone()
                for key, value in self.model.state_dict().items()
                if f".{name}" in key and "embedding" in key
            }
            with quiet():
                hotswap_adapter_from_state_dict(
                    self.model, state, name, self.model.peft_config[name]
                )
            self.model.load_state_dict(missing, strict=False)

    @rule(name=names)
    def disable(self, name):
        with quiet(), self.model.disable_adapter():
            self.compare()

    # Weights

    @rule(name=names, factor=factors, layer=layers)
    def write_in_place(self, name, factor, layer):
        with torch.no_grad():
            for parameter_name, parameter in self.model.named_parameters():
                if layer in parameter_name and f".{name}" in parameter_name:
                    parameter.mul_(factor)

    @rule(name=names, factor=factors)
    def replace_data(self, name, factor):
        for parameter in self.weights(name):
            parameter.data = parameter.data * factor

    @rule(name=names, factor=factors)
    def swap(self, name, factor):
        for parameter in self.weights(name):
            torch.utils.swap_tensors(parameter, nn.Parameter(parameter.detach() * factor))

    @rule(factor=factors, layer=layers)
    def write_base(self, factor, layer):
        with torch.no_grad():
            self.layer(layer).get_base_layer().weight.mul_(factor)

    @rule(
        name=names,
        make=st.sampled_from(
            [
                lambda p: torch.optim.SGD(p, lr=0.1, foreach=False),
                lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
                lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
            ]
        ),
    )
    def optimize(self, name, make):
        parameters = self.weights(name)
        if parameters:
            for parameter in parameters:
                parameter.grad = torch.ones_like(parameter)
            make(parameters).step()
            self.model.zero_grad(set_to_none=True)

    # Scaling, merging, modes, moves

    @rule(name=names, factor=factors, how=st.sampled_from(["set", "multiply", "hand", "tensor"]))
    def scale(self, name, factor, how):
        if not self.has(name) or self.merged():
            return
        for target in TARGETS:
            layer = self.layer(target)
            if how == "set":
                layer.set_scale(name, factor)
            elif how == "multiply":
                layer.scale_layer(factor)
            elif how == "hand":
                layer.scaling[name] = factor
            else:
                layer.scaling[name] = torch.tensor(factor)

    @precondition(lambda self: not self.merged())
    @rule(safe=st.booleans())
    def merge(self, safe):
        with quiet(), contextlib.suppress(ValueError):
            self.model.merge_adapter(safe_merge=safe)

    @precondition(lambda self: self.merged())
    @rule()
    def unmerge(self):
        self.model.unmerge_adapter()

    @precondition(lambda self: not self.merged())
    @rule(fused=st.booleans())
    def train(self, fused):
        self.model.train()
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        if parameters:
            optimizer = torch.optim.SGD(parameters, lr=0.1, fused=fused)
            self.model(self.ids).float().square().mean().backward()
            optimizer.step()
            self.model.zero_grad(set_to_none=True)
        self.model.eval()

    @rule(layer=layers, mode=st.booleans())
    def switch_part(self, layer, mode):
        self.layer(layer).train(mode)

    @rule()
    def eval(self):
        self.model.eval()

    @precondition(lambda self: not self.merged())
    @rule(dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
    def move(self, dtype):
        self.model.to(dtype)

    # The cache's own

    @rule(name=names | st.none())
    def invalidate(self, name):
        self.cache.invalidate(adapter=name)

    @rule()
    def bypass(self):
        with self.cache.bypass():
            self.compare()

    @rule()
    def warm(self):
        if not any(module.training for module in self.model.modules()):
            self.cache.warm()

    @rule(which=st.sampled_from(SETTINGS))
    def reattach(self, which):
        self.cache.detach()
        try:
            self.attach(which)
        except dora_cache.NothingToCacheError:
            del self.cache

    @precondition(lambda self: not hasattr(self, "cache"))
    @rule()
    def attach_again(self):
        with contextlib.suppress(dora_cache.NothingToCacheError):
            self.attach({})

    @rule(factor=factors)
    def copies_are_independent(self, factor):
        clone = copy.deepcopy(self.model)
        with torch.no_grad():
            for parameter in clone.parameters():
                parameter.mul_(factor)
        with contextlib.suppress(dora_cache.NothingToCacheError), dora_cache.attach(clone):
            clone(self.ids)


def _guarded(cls):
    """Rules that need the cache wait until there is one."""
    for name in ("invalidate", "bypass", "warm", "reattach"):
        method = getattr(cls, name)
        setattr(cls, name, precondition(lambda self: hasattr(self, "cache"))(method))
    return cls


_guarded(ModelMachine)


class FastModelMachine(ModelMachine):
    """The same operations with numerics="fast", to rounding."""

    numerics = "fast"

    def assert_same(self, found, expected):
        loose = {torch.float64: 1e-9, torch.float32: 1e-3}.get(found.dtype, 0.1)
        torch.testing.assert_close(found, expected, rtol=loose, atol=loose, equal_nan=True)


ModelMachine.TestCase.settings = settings(settings.default)
FastModelMachine.TestCase.settings = settings(settings.default)
TestModel = pytest.mark.machine(ModelMachine.TestCase)
TestFastModel = pytest.mark.machine(FastModelMachine.TestCase)
