"""Compiled models under changes of every sort: they equal uncached ones, and seldom compile.

As in ``model_machine.py`` there are two models alike, and only one has a cache and is compiled. A
kind is added by the name of its example.
"""

from functools import partial
from weakref import WeakKeyDictionary

import torch
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import hotswap
from torch import nn
from torch._dynamo.testing import CompileCounter
from zoo import balanced, quiet

import dora_cache
from dora_cache.recipes import RECIPES, load_recipes
from dora_cache.recipes.examples import make_model
from dora_cache.testing.recipes import _changed, _get, _place, _tensors

BUFFERED = ("DoRA", "DoRA, Embedding", "DoRA, Conv2d")
"""Kinds whose values compiled code reads: changes of these alone compile nothing."""
KINDS = (*BUFFERED, "LoHa", "OFT", "HiRA", "LoRA on parameters")
NAMES = ("ada", "bob")
SETTINGS = ({}, {}, {"backend": "lru", "max_bytes": 120}, {"backend": "null"})
_REPLACED = 2  # parameters by others, before a layer is given up
EXAMPLES = {
    example.name: example
    for recipe in load_recipes()
    if recipe.name in RECIPES
    for example in recipe.examples
}

some_name = st.sampled_from(NAMES)


def outcome(act, model):
    """What an action returns, or the kind of error it raises."""
    torch.manual_seed(0)
    with quiet():
        try:
            return act(model)
        except Exception as error:  # noqa: BLE001 - compared with the other side's
            return error


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


class CompiledKindsMachine(RuleBasedStateMachine):
    """Nobody calls refresh()."""

    kinds = KINDS
    numerics = "peft"
    check = True
    steps = 0

    @initialize(data=st.data(), which=st.sampled_from(SETTINGS), part=st.booleans())
    def start(self, data, which, part):
        self.kind = data.draw(st.sampled_from(self.kinds), label="kind")
        example = EXAMPLES[self.kind]
        (self.plain, self.x), (self.cached, _) = (
            make_model(example, 8, 12, adapters=NAMES) for _ in range(2)
        )
        for model in (self.plain, self.cached):
            model.base_model.set_adapter("ada")
        with quiet():
            self.cache = dora_cache.attach(
                self.cached, numerics=self.numerics, compiled_check=self.check, **which
            )
        torch._dynamo.reset()
        self.limits = torch._dynamo.config.patch(
            recompile_limit=1 << 10, accumulated_recompile_limit=1 << 10
        )
        self.limits.__enter__()
        self.counter = CompileCounter()
        self.compiled = self.cached
        if part:  # the layers alone, each by itself
            for layer in layers_of(self.cached):
                layer.compile(backend=self.counter, dynamic=False)
        else:
            self.compiled = torch.compile(self.cached, backend=self.counter, dynamic=False)
        self.bounded = self.kind in BUFFERED and not which
        self.addresses = WeakKeyDictionary()
        self.replaced = 0
        self.may_compile = True

    def teardown(self):
        if hasattr(self, "cache"):
            self.cache.detach()
            self.limits.__exit__(None, None, None)
            torch._dynamo.reset()

    def both(self, act):
        """Do it to both, and expect the same kind of end of both."""
        expected, found = outcome(act, self.plain), outcome(act, self.cached)
        if isinstance(expected, Exception) or isinstance(found, Exception):
            assert type(found) is type(expected), (found, expected)

    def silently(self, act):
        """Do to both what raises no event."""
        self.both(act)
        if not self.check:
            self.cache.refresh()

    @invariant()
    def fresh(self):
        if not hasattr(self, "cache"):
            return
        type(self).steps += 1
        for _ in range(2):
            before = self.counter.frame_count
            expected = outcome(self._run, self.plain)
            found = outcome(self._run, self.compiled)
            if isinstance(expected, Exception):
                assert isinstance(found, Exception)
                return
            assert isinstance(found, torch.Tensor), found
            self.assert_same(found, expected)
            if self.bounded and self.replaced <= _REPLACED and not self.may_compile:
                assert self.counter.frame_count == before
            self.may_compile = False

    def _run(self, model):
        with torch.no_grad():
            return model(self.x)

    def assert_same(self, found, expected):
        assert found.dtype is expected.dtype
        assert torch.equal(found.nan_to_num(), expected.nan_to_num())

    @invariant()
    def sums_and_cap(self):
        if hasattr(self, "cache"):
            stats = balanced(self.cache)
            assert stats.max_bytes is None or stats.nbytes <= stats.max_bytes

    @invariant()
    def in_place(self):
        """What CUDA graphs read stays where it is."""
        if not hasattr(self, "cache") or not self.bounded:
            return
        for holder in self.cache._engine.buffers.holders():
            for buffer in holder.binding.buffers.values():
                found = [value.data_ptr() for value in buffer._tensors]
                if found:
                    assert self.addresses.setdefault(buffer, found) == found

    # What raises no event

    @rule(index=st.integers(0, 99), way=st.sampled_from(["in place", "data", "storage"]))
    def write(self, index, way):
        def act(model):
            owner, last = self._chosen(model, index)
            value = _get(owner, last)
            # With the very strides: others are compiled anew.
            new = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
            new.copy_(_changed(value))
            if way == "data":
                value.data = new
                return
            with torch.no_grad():
                if way == "in place":
                    value.copy_(new)
                else:
                    value.set_(new)

        self.silently(act)

    @rule(name=some_name, index=st.integers(0, 9), value=st.sampled_from([0.5, 2.0, 3.25]))
    def scale_by_hand(self, name, index, value):
        def act(model):
            layers = layers_of(model)
            layers[index % len(layers)].scaling[name] = value

        self.silently(act)

    @rule(index=st.integers(0, 99))
    def load_a_part(self, index):
        def act(model):
            owner, _ = self._chosen(model, index)
            if isinstance(owner, nn.Module):
                state = {key: _changed(value) for key, value in owner.state_dict().items()}
                owner.load_state_dict(state)

        self.silently(act)

    @rule(index=st.integers(0, 99), stored=st.booleans())
    def replace(self, index, stored):
        """If there is a stored value, its event comes before the parameter is in its place."""
        if stored:
            outcome(self._run, self.cached)

        def act(model):
            owner, last = self._chosen(model, index)
            value = _get(owner, last)
            if isinstance(value, nn.Parameter):
                new = nn.Parameter(_changed(value), requires_grad=value.requires_grad)
                setattr(owner, last, new)

        self.may_compile = True
        self.replaced += 1
        self.both(act)

    @rule(index=st.integers(0, 9), factor=st.sampled_from([0.5, 2.0]))
    def come_and_go(self, index, factor):
        """As with offloading: a weight is never the same object again."""

        def act(factor, model):
            layers = layers_of(model)
            base = layers[index % len(layers)].base_layer
            if isinstance(base.weight, nn.Parameter):
                base.weight = nn.Parameter(factor * base.weight.detach(), requires_grad=False)

        for turn in range(_REPLACED + 2):
            self.may_compile = True
            self.replaced += 1
            # In turn, else numbers grow until rounding shows.
            self.both(partial(act, factor if turn % 2 == 0 else 1 / factor))
            self.fresh()

    @staticmethod
    def _chosen(model, index):
        names = sorted(name for name, _ in _tensors(model))  # PEFT may change their order
        return _place(model, names[index % len(names)])

    # Events

    @rule(name=some_name)
    def activate(self, name):
        self.may_compile = True
        self.both(lambda model: model.base_model.set_adapter(name))

    @rule(name=some_name, factor=st.sampled_from([0.5, 2.0]))
    def scale(self, name, factor):
        def act(model):
            for layer in layers_of(model):
                layer.set_scale(name, factor)

        self.both(act)

    @precondition(lambda self: self.kind in {"DoRA", "DoRA, Conv2d"})
    @rule(name=some_name)
    def swap(self, name):
        def act(model):
            state = {
                key: _changed(value)
                for key, value in model.state_dict().items()
                if f".{name}" in key
            }
            hotswap.hotswap_adapter_from_state_dict(
                model, state, name, EXAMPLES[self.kind].config(8, 12)
            )

        self.both(act)

    @rule(fused=st.booleans(), train=st.booleans())
    def step(self, fused, train):
        def act(model):
            model.train(train)
            weights = [weight for weight in model.parameters() if weight.requires_grad]
            model(self.x).square().sum().backward()
            nn.utils.clip_grad_value_(weights, 1.0)  # else steps add up until numbers overflow
            torch.optim.SGD(weights, lr=0.01, fused=fused).step()
            model.zero_grad()
            model.eval()

        self.may_compile = True  # the layers, if they are compiled, for training
        self.both(act)

    @rule()
    def switch(self):
        def act(model):
            model.train()
            for weight in model.parameters():
                weight.data.mul_(1.25)
            model.eval()

        self.both(act)

    @rule()
    def load(self):
        def act(model):
            state = {key: _changed(value) for key, value in model.state_dict().items()}
            model.load_state_dict(state)

        self.both(act)

    @rule()
    def merge(self):
        def act(model):
            model.merge_adapter()
            model.unmerge_adapter()

        self.both(act)

    # The cache's own

    @rule(name=st.sampled_from([None, *NAMES]))
    def invalidate(self, name):
        self.cache.invalidate(adapter=name)

    @rule()
    def refresh(self):
        self.cache.refresh()
        assert self.cache.refresh() == 0

    @rule()
    def eager(self):
        expected, found = outcome(self._run, self.plain), outcome(self._run, self.cached)
        if isinstance(expected, torch.Tensor):
            self.assert_same(found, expected)


class UncheckedKindsMachine(CompiledKindsMachine):
    """Without the check where compiled code is entered: refresh() follows what raises no event."""

    check = False


class FastCompiledKindsMachine(CompiledKindsMachine):
    """The same with numerics="fast", to rounding."""

    numerics = "fast"

    def assert_same(self, found, expected):
        assert found.dtype is expected.dtype
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3, equal_nan=True)
