"""A derivation that changes what it depends on is never stored, and the user is told why."""

import warnings

import pytest
import torch
from torch import nn

import dora_cache
from dora_cache import cached
from dora_cache.core.explain import changed_attributes, pieces
from dora_cache.core.facts import read
from dora_cache.core.keys import own_state, state_names


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.count = 0
        self.eval()


class Restless(nn.Module):
    """Its method does something to its own state by the way."""

    def __init__(self, change):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3), requires_grad=False)
        self.register_buffer("seen", torch.zeros(1))
        self.ready = None
        self.scale = 0.5
        self.calls = 0
        self.log = [1]
        self.inner = Inner()
        self.eval()
        vars(self)["_buffers"]["more"] = None
        type(self).change = staticmethod(change)

    @cached("value")
    def value(self, other=None):
        type(self).change(self, other)
        return self.weight * 2


def replace_weight(self, _):
    self.weight = nn.Parameter(self.weight.detach().clone(), requires_grad=False)


def add_attribute(self, _):
    setattr(self, f"extra{len(vars(self))}", "text")


def toggle(self, _):
    self.ready = 3 if self.ready is None else None


CHANGES = {
    "calls": lambda self, _: setattr(self, "calls", self.calls + 1),
    "scale": lambda self, _: setattr(self, "scale", self.scale + 1),
    "ready": toggle,
    "log": lambda self, _: self.log.append(2),
    "seen": lambda self, _: self.seen.add_(1),
    "inner.count": lambda self, _: setattr(self.inner, "count", self.inner.count + 1),
    "weight": replace_weight,
}


def told(*calls):
    """Return the cache's warnings about some calls; pytest's filter would hide them."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for call in calls:
            call()
    return [str(one.message) for one in seen if one.category is dora_cache.CacheWarning]


@pytest.mark.parametrize("name", CHANGES)
def test_the_attribute_that_a_method_changes_is_named(name):
    """The one warning has the derivation, the attribute, and what to write instead."""
    module = Restless(CHANGES[name])
    with dora_cache.attach(module) as cache:
        (text,) = told(*[module.value] * 5)
        assert cache.stats().stores == cache.stats().hits == 0
    assert text.startswith(f"'value' is never stored: Restless.value changes self.{name}, on which")
    assert "@cached('value', depends_on=lambda self, ...: [...])" in text


def test_new_attributes_are_named():
    """Also where there are more of them each time."""
    module = Restless(add_attribute)
    with dora_cache.attach(module):
        (text,) = told(*[module.value] * 5)
    assert "changes self.extra" in text


def test_several_changes_are_named_together():
    """All that changed, up to a few."""

    def change(self, _):
        self.calls += 1
        self.log.append(2)

    module = Restless(change)
    with dora_cache.attach(module):
        (text,) = told(*[module.value] * 5)
    assert "changes self.calls, self.log, on which" in text


def test_layers_of_one_class_cost_one_warning():
    """The cause is the method's, not each layer's."""
    model = nn.Sequential(*[Restless(CHANGES["calls"]) for _ in range(3)])
    with dora_cache.attach(model):
        assert len(told(*[layer.value for layer in model] * 3)) == 1


def test_a_change_of_an_argument_is_told():
    """Arguments are depended on whatever depends_on says, so another remedy is named."""
    module, other = Restless(lambda _, other: other.add_(1)), torch.ones(2)
    with dora_cache.attach(module):
        (text,) = told(*[lambda: module.value(other)] * 4)
    assert "Restless.value writes into an argument" in text
    assert "into a copy" in text

    @cached("sum")
    def total(tensor):
        return tensor.add_(1).sum()

    with dora_cache.attach(total):
        (text,) = told(*[lambda: total(other)] * 4)
    assert "writes into an argument" in text


def test_the_advice_works():
    """With a depends_on that leaves the counter out, the same method is stored."""

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3), requires_grad=False)
            self.calls = 0

        @cached("value", depends_on=lambda self: [self.weight])
        def value(self):
            self.calls += 1
            return self.weight * 2

    module = Counting().eval()
    with dora_cache.attach(module) as cache:
        assert told(*[module.value] * 3) == []
        assert cache.stats().hits == 2


@pytest.mark.parametrize(
    "depends_on",
    [lambda self: [self.weight, self.calls], lambda self: [self.weight * 1]],
    ids=["what changes", "made anew"],
)
def test_dependencies_of_the_users_that_change_are_told(depends_on):
    """Those that the function changes, and tensors that are others each time."""

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3), requires_grad=False)
            self.calls = 0

        @cached("own", depends_on=depends_on)
        def value(self):
            self.calls += 1
            return self.weight * 2

    module = Own().eval()
    with dora_cache.attach(module) as cache:
        (text,) = told(*[module.value] * 4)
        assert cache.stats().stores == 0
    assert text.startswith("'own' is never stored: what its depends_on lists is not the same")


def test_a_change_that_does_not_last_is_not_told():
    """A table made at the first call, or one write from elsewhere, says nothing of the next."""
    module = Restless(lambda self, _: setattr(self, "ready", 3))
    with dora_cache.attach(module) as cache:
        assert told(*[module.value] * 4) == []
        assert cache.stats().hits == 2

    class Elsewhere:
        again = False

    def write(self, _):
        if Elsewhere.again:
            self.seen.add_(1)
        Elsewhere.again = not Elsewhere.again

    module = Restless(write)
    with dora_cache.attach(module) as cache:
        for _ in range(4):
            assert told(module.value) == []
            cache.invalidate()


class Counting(nn.Module):
    """Counts its calls outside of the method that is cached."""

    def __init__(self, change):
        super().__init__()
        self.inner = Restless(lambda *_: None)
        self.weight = nn.Parameter(torch.ones(3), requires_grad=False)
        self.change = change
        self.calls = 0

    @cached("doubled")
    def doubled(self):
        return self.weight * 2

    def forward(self):
        self.change(self)
        return self.doubled()


def count(self):
    self.calls += 1


def count_inside(self):
    self.inner.calls += 1


@pytest.mark.parametrize(("change", "name"), [(count, "calls"), (count_inside, "inner.calls")])
def test_an_attribute_that_changes_between_calls_is_named(change, name):
    """Values are stored then, and are void before their first use."""
    module = Counting(change).eval()
    with dora_cache.attach(module) as cache:
        (text,) = told(*[module] * 9)
        assert cache.stats().hits == 0
    assert text.startswith(f"'doubled' has been derived 4 times and never used again: self.{name} ")
    assert "@cached('doubled', depends_on=lambda self: [...])" in text


def test_weights_that_change_between_calls_are_not_told():
    """That is what a cache is for, whatever else changes with them."""

    def train(self):
        self.weight.add_(1)
        self.calls += 1

    module = Counting(train).eval()
    with dora_cache.attach(module) as cache:
        assert told(*[module] * 9) == []
        assert cache.stats().hits == 0


def test_values_that_are_used_at_times_are_not_told():
    """An attribute that changes now and then is part of what is followed."""

    def change(self):
        self.calls += 1

    module = Counting(change).eval()
    with dora_cache.attach(module):
        assert told(*[module, module.doubled] * 9) == []


def test_names_are_those_of_the_state():
    """There is one for each thing that own_state yields, whatever the module holds."""
    module = nn.ModuleDict({"a": Restless(None), "b": nn.Conv2d(1, 2, 3), "c": Inner()}).eval()
    module["again"] = module["a"]
    names, state = list(state_names(module)), list(own_state(module))
    assert len(names) == len(state)
    found = dict(zip(names, state, strict=True))  # of an attribute, its value comes last
    assert found["a.weight"] is module["a"].weight
    assert found["a.more"] is None
    assert found["a.log"] is module["a"].log
    assert found["a.inner.count"] == 0
    assert found["b.bias"] is module["b"].bias


def state(dependencies):
    found = read(dependencies)
    return found.plain, found.rows


def test_readings_come_apart():
    """Each dependency's part changes with it, and with no other."""
    weight, entries = torch.ones(3), [1]
    before = [None, weight, 1.5, "a", entries, 3, None, weight]
    old = pieces(state(before))
    assert len(old) == len(before)
    assert old[1] == old[7]
    weight.add_(1)
    entries.append(2)
    after = [0, weight, 1.5, "a", entries, 3, None, weight]
    changed = [one != two for one, two in zip(old, pieces(state(after)), strict=True)]
    assert changed == [True, True, False, False, True, False, False, True]


def test_tensors_with_tensors_of_their_own_are_one_dependency():
    """What a quantized weight has beside its data belongs to it, and not to what follows."""

    class Scaled(torch.Tensor):
        pass

    scaled, weight = torch.ones(3).as_subclass(Scaled), torch.ones(3)
    scaled.scale = torch.ones(1)
    old = pieces(state([scaled, weight]))
    scaled.scale.add_(1)
    new = pieces(state([scaled, weight]))
    assert [one != two for one, two in zip(old, new, strict=True)] == [True, False]
    weight.add_(1)
    newest = pieces(state([scaled, weight]))
    assert [one != two for one, two in zip(new, newest, strict=True)] == [False, True]


def test_attributes_that_have_gone_do_not_confuse_it():
    """Names are those of what is there; what is left is not named."""
    module = Restless(None)
    before = state(own_state(module))
    del module.log
    module.calls += 1
    assert changed_attributes(module, before, state(own_state(module))) == ["calls"]
