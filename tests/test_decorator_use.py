"""The decorator as somebody new to it might use it: it works, or says what to write instead."""

import collections
import contextlib
import dataclasses
import enum
import functools
import itertools
import types
import warnings
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

import dora_cache
from dora_cache import CacheWarning, ConfigError, ambient, backends, cached
from dora_cache.core.cells import Pending
from dora_cache.core.facts import read


class Layer(nn.Module):
    """Holds two weights; what ``depends_on`` returns is chosen by a test."""

    def __init__(self, returns=None):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3), requires_grad=False)
        self.parts = nn.ParameterDict({"one": torch.randn(3, 3), "two": torch.randn(3, 3)})
        self.parts.requires_grad_(requires_grad=False)
        self.listed = nn.ParameterList([torch.randn(3, 3)]).requires_grad_(requires_grad=False)
        self.inner = nn.Linear(3, 3).requires_grad_(requires_grad=False)
        self.returns = returns
        self.eval()

    @cached("sum", depends_on=lambda self: self.returns(self))
    def sum(self):
        parts = self.parts["one"] + self.parts["two"] + self.listed[0] + self.inner.weight
        return self.weight + parts


def told(caught):
    return [str(one.message) for one in caught if issubclass(one.category, CacheWarning)]


@contextlib.contextmanager
def warned():
    """Collect the messages of the cache's warnings."""
    texts = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield texts
    texts += told(caught)


# Where values are made


@cached("steps")
def steps(size):
    return torch.arange(size)


class Stepping(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.ones(1))
        self.eval()

    @cached("steps", adapter="name", depends_on=lambda self, name: [self.weight])
    def steps(self, name):
        return torch.arange(3)


@pytest.mark.parametrize("meta_first", [False, True])
def test_the_default_device_is_part_of_the_key(meta_first):
    """What is derived under one default device is never used under another."""
    stepping = Stepping()
    with dora_cache.attach(steps) as function, dora_cache.attach(stepping) as method:
        for meta in (meta_first, not meta_first) * 3:
            for call in (lambda: steps(3), lambda: stepping.steps("a")):
                with torch.device("meta") if meta else contextlib.nullcontext():
                    assert call().device.type == ("meta" if meta else "cpu")
        for cache in (function, method):
            assert (cache.stats().misses, cache.stats().hits) == (2, 4)


def test_the_innermost_default_device_decides():
    """Contexts within contexts, and a device set for good, are told apart."""
    try:
        with dora_cache.attach(steps) as cache:
            assert steps(3).device.type == "cpu"
            torch.set_default_device("meta")
            assert steps(3).is_meta
            with torch.device("cpu"):
                assert not steps(3).is_meta
                with torch.device("meta"):
                    assert steps(3).is_meta
            assert (cache.stats().misses, cache.stats().hits) == (2, 2)
    finally:
        torch.set_default_device(None)


def test_the_current_cuda_device_is_part_of_the_key(monkeypatch):
    """The device "cuda" without a number is another one after ``torch.cuda.set_device``."""
    monkeypatch.setattr(ambient, "_cuda_is_used", lambda: True)
    monkeypatch.setattr(ambient, "_HAS_CUDA", True)
    monkeypatch.setattr(ambient, "cuda_device", lambda: 0)
    before = ambient.environment()
    assert ambient.environment() == before
    monkeypatch.setattr(ambient, "cuda_device", lambda: 1)
    assert ambient.environment() != before


def test_a_default_dtype_that_changes_meanwhile_is_noticed():
    """A value derived while a global setting changes is returned and not stored."""

    @cached("value", depends_on=list)
    def value():
        torch.set_default_dtype(torch.float64)
        return torch.ones(1)

    try:
        with dora_cache.attach(value) as cache:
            value()
            assert cache.stats().stores == 0
    finally:
        torch.set_default_dtype(torch.float32)


# What depends_on returns


RETURNS = {
    "list": lambda self: [*self.parameters()],
    "tuple": lambda self: tuple(self.parameters()),
    "generator": lambda self: self.parameters(),
    "pairs": lambda self: self.named_parameters(),
    "dict": lambda self: dict(self.named_parameters()),
    "state_dict": lambda self: self.state_dict(keep_vars=True),
    "mapping": lambda self: types.MappingProxyType(dict(self.named_parameters())),
    "values": lambda self: dict(self.named_parameters()).values(),
    "items": lambda self: dict(self.named_parameters()).items(),
    "modules": lambda self: {"parts": self.parts, "others": [self.inner, self.listed, self.weight]},
    "module itself": lambda self: self,
    "parts": lambda self: [self.parts, self.inner, self.listed, self.weight],
    "nested": lambda self: [[self.parts], {"inner": self.inner}, (self.listed, 3), self.weight],
    "views": lambda self: [
        self.parts.values(),
        self.inner._parameters.values(),
        collections.deque([self.weight]),
        dict(enumerate(self.listed)).items(),
    ],
}


@pytest.mark.parametrize("form", RETURNS)
def test_whatever_holds_the_weights_counts_with_its_values(form):
    """Sequences, iterators, mappings and modules are followed by what they hold, and hit."""
    layer = Layer(RETURNS[form])
    with dora_cache.attach(layer) as cache:
        layer.sum()
        for count, weight in enumerate(layer.parameters(), start=1):
            if weight.dim() == 1:  # a bias, of which nothing is made
                continue
            for _ in range(3):
                assert torch.equal(layer.sum(), Layer.sum.__wrapped__(layer))
            weight.add_(1)
            assert torch.equal(layer.sum(), Layer.sum.__wrapped__(layer)), count
        assert cache.stats().hits == 15
        assert cache.stats().bypasses == 0


@pytest.mark.parametrize(
    "returns",
    [
        lambda self: self.parts,
        lambda self: {"one": self.parts["one"], "two": self.parts["two"]},
        lambda self: self.parts.state_dict(keep_vars=True),
        lambda self: [self.parts.values()],
        lambda self: self.parts.items(),
        lambda self: {"parts": {"inner": self.parts}},
    ],
)
def test_a_mapping_counts_with_its_keys_and_values(returns):
    """A ParameterDict, a plain dict or a state_dict is followed by its values, and never stale."""

    class Mapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ParameterDict({"one": torch.ones(2), "two": torch.ones(2)})
            self.requires_grad_(requires_grad=False).eval()

        @cached("sum", depends_on=returns)
        def sum(self):
            return sum(self.parts.values())

    layer = Mapped()
    with dora_cache.attach(layer) as cache:
        for change in (
            lambda: None,
            lambda: layer.parts["two"].add_(1),
            lambda: layer.parts.update({"two": nn.Parameter(torch.zeros(2), requires_grad=False)}),
        ):
            change()
            for _ in range(3):
                assert torch.equal(layer.sum(), Mapped.sum.__wrapped__(layer))
        assert (cache.stats().misses, cache.stats().hits) == (3, 6)


def test_one_mapping_in_place_of_another_is_noticed():
    """Equal values under other keys are other dependencies."""
    layer = Layer(lambda self: {self.key: self.weight})
    layer.key = "a"
    with dora_cache.attach(layer) as cache:
        layer.sum(), layer.sum(), layer.sum()
        layer.key = "b"
        layer.sum(), layer.sum(), layer.sum()
        assert (cache.stats().misses, cache.stats().hits) == (2, 4)


def test_a_bare_tensor_is_a_dependency():
    """A tensor that depends_on returns without a list is followed, hits, and is stored once."""

    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(1, 3), requires_grad=False)
            self.eval()

        @cached("double", depends_on=lambda self: self.weight)
        def double(self):
            return self.weight * 2

    layer = Bare()
    with dora_cache.attach(layer) as cache:
        for _ in range(3):
            assert torch.equal(layer.double(), layer.weight * 2)
        assert (cache.stats().hits, cache.stats().stores) == (2, 1)
        layer.weight.add_(1)
        assert torch.equal(layer.double(), layer.weight * 2)
        layer.weight.data = torch.zeros(1, 3)
        assert torch.equal(layer.double(), layer.weight * 2)
        assert cache.stats().stores == 3


@pytest.mark.parametrize(
    ("returns", "message"),
    [
        (lambda self: "weight", "it returned 'weight', which is text: return a list"),
        (lambda self: None, "it returned None: return a list of tensors"),
        (lambda self: 3, "it returned a int: return a list of tensors"),
        (lambda self: np.ones(3), "it returned a ndarray: return a list of tensors"),
    ],
)
def test_what_cannot_be_followed_is_refused_and_named(returns, message):
    """A return value that is no dependencies costs one warning, which says what to write."""
    layer = Layer(returns)
    with dora_cache.attach(layer) as cache:
        with pytest.warns(CacheWarning, match=message):
            layer.sum()
        layer.weight.add_(1)
        assert torch.equal(layer.sum(), Layer.sum.__wrapped__(layer))
        assert cache.stats().bypasses == 2


@pytest.mark.parametrize(
    "returns",
    [
        lambda self: [self.weight.T],
        lambda self: [self.weight.data],
        lambda self: self.state_dict(),
        lambda self: [self.weight.detach(), 1.0],
        lambda self: list(self.weight),
    ],
)
def test_new_tensors_at_each_call_are_named(returns):
    """Where depends_on makes tensors anew nothing is stored, and one warning says what to write."""
    layer = Layer(returns)
    with dora_cache.attach(layer) as cache:
        with pytest.warns(CacheWarning, match="returns new tensors each time: return the weights"):
            layer.sum()
        with warned() as texts:
            layer.weight.add_(1)
            assert torch.equal(layer.sum(), Layer.sum.__wrapped__(layer))
        assert texts == []
        assert cache.stats().stores == 0


@pytest.mark.parametrize("nested", [False, True])
def test_an_iterator_that_has_been_read_is_named(nested):
    """An iterator is empty the second time; then nothing is stored, and one warning says so."""
    layer = Layer()
    once = layer.parameters()
    layer.returns = (lambda self: [once]) if nested else (lambda self: once)
    with dora_cache.attach(layer) as cache:
        with pytest.warns(CacheWarning, match="can be read only once: return a list"):
            layer.sum()
        for _ in range(2):
            layer.weight.add_(1)
            assert torch.equal(layer.sum(), Layer.sum.__wrapped__(layer))
        assert cache.stats().stores == 0


@pytest.mark.parametrize("wrong", [["w"], "w", torch.ones(1), {"w": torch.ones(1)}])
def test_depends_on_must_be_a_function(wrong):
    """Anything else is an error where it is written, with what to write."""
    with pytest.raises(ConfigError, match=r"give a function .*lambda self: \[self.weight\]"):
        cached("value", depends_on=wrong)


def test_depends_on_must_take_the_functions_arguments():
    """One that cannot be called as the function is, is an error where it is written."""
    with pytest.raises(ConfigError, match=r"write depends_on=lambda self, name, \*rest: \[...\]"):

        @cached("value", depends_on=lambda self: [])
        def value(self, name, *rest): ...

    async def later(self):
        return []

    with pytest.raises(ConfigError, match="a function that has to be awaited: give a function"):
        cached("value", depends_on=later)

    @cached("value", depends_on=lambda self, *names, **more: [])
    def other(self, name, *, more, default=1): ...

    @cached("value", depends_on=list)
    def function(): ...


def test_a_plain_function_that_reads_a_weight_has_to_say_so():
    """A tensor or module that is no argument is an error on attach, until depends_on is given."""
    weight, module = torch.ones(3), nn.Linear(2, 2)

    @cached("double")
    def double():
        return sum(weight * factor for factor in (1, 1))

    @cached("bias")
    def bias(size):
        return module.bias[:size]

    with pytest.raises(ConfigError, match=r"'double' reads weight, .*depends_on=lambda .*weight"):
        dora_cache.attach(double)
    with pytest.raises(ConfigError, match="'bias' reads module"):
        dora_cache.attach(bias)

    @cached("nothing")
    def nothing(weight):
        return steps.__wrapped__(3) + weight.T

    dora_cache.attach(nothing).detach()


# What callers do to a returned value


def _swap(value):
    torch.utils.swap_tensors(value, torch.zeros(3, 3))


def _accumulate(value):
    value.requires_grad_()
    (value * 2).sum().backward()


WRITES = {
    "in place": lambda value: value.mul_(2),
    "requires_grad_": lambda value: value.requires_grad_(),
    "backward": _accumulate,
    "grad": lambda value: setattr(value, "grad", torch.ones(3, 3)),
    "data": lambda value: setattr(value, "data", torch.zeros(3, 3)),
    "data of another shape": lambda value: setattr(value, "data", value.data.view(9)),
    "data of other strides": lambda value: setattr(value, "data", value.data.T),
    "data of another dtype": lambda value: setattr(value, "data", value.data.view(torch.int32)),
    "set_": lambda value: value.set_(torch.zeros(3, 3)),
    "swap_tensors": _swap,
    "freed": lambda value: value.untyped_storage().resize_(0),
    "truncated": lambda value: value.untyped_storage().resize_(8),
    "transposed": lambda value: value.t_(),
    "resized": lambda value: value.resize_(1),
    "with a graph": lambda value: value.mul_(torch.ones(3, 3, requires_grad=True)),
}


class Derived(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3), requires_grad=False)
        self.eval()

    @cached("one", depends_on=lambda self: [self.weight])
    def one(self):
        return self.weight * 2

    @cached("pair", depends_on=lambda self: [self.weight])
    def pair(self):
        return self.weight * 2, self.weight * 3

    @cached("twice", depends_on=lambda self: [self.weight])
    def twice(self):
        value = self.weight * 2
        return value, value

    @cached("long", depends_on=lambda self, power: [self.weight])
    def long(self, power):
        return self.weight * power


METHODS = {
    "one": lambda layer: layer.one(),
    "pair": lambda layer: layer.pair(),
    "twice": lambda layer: layer.twice(),
    "long": lambda layer: layer.long(2),  # a number: hits take the long way
}


@pytest.mark.parametrize(
    "settings", [{}, {"backend": "lru", "max_bytes": "1MiB"}], ids=["dict", "lru"]
)
@pytest.mark.parametrize("hits", [0, 3])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("write", WRITES)
def test_what_a_caller_does_to_a_value_reaches_no_other(write, method, hits, settings):
    """A value that its caller has changed in any way that shows is derived anew for the next."""
    layer, expected = Derived(), Derived()
    expected.load_state_dict(layer.state_dict())
    call = METHODS[method]
    with dora_cache.attach(layer, **settings) as cache:
        for _ in range(1 + hits):
            value = call(layer)
        WRITES[write](value[-1] if isinstance(value, tuple) else value)
        for _ in range(3):
            found, wanted = call(layer), call(expected)
            if not isinstance(found, tuple):
                found, wanted = (found,), (wanted,)
            for one, other in zip(found, wanted, strict=True):
                assert (one.requires_grad, one.grad) == (False, None)
                assert one.dtype is other.dtype
                assert torch.equal(one, other)
        assert (cache.stats().misses, cache.stats().invalidations) == (2, 1)


@pytest.mark.parametrize("write", [w for w in WRITES if w != "in place"])
def test_a_value_of_dora_that_was_changed_is_derived_anew(write):
    """The shortest way to a hit, which recipes take, looks at the value as well."""
    layer = Derived()
    with dora_cache.attach(layer) as cache:
        layer.one(), layer.one(), layer.one()
        (binding,) = cache._engine.bindings.values()
        (shortcut,) = binding.shortcuts.values()
        assert cache._engine.recall(shortcut, [layer.weight]) is not None
        WRITES[write](layer.one())
        assert cache._engine.recall(shortcut, [layer.weight]) is None


def test_who_waited_for_a_value_looks_at_it():
    """A value whose first caller has changed it is not handed to those who waited for it."""
    pending = Pending(None, read([]), None, 1)
    pending.entry = backends.Entry(torch.ones(3), pending.facts)
    assert pending.result() is pending.entry
    pending.entry.value.requires_grad_()
    assert pending.result() is None


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("backend", ["dict", "lru", "budget"])
def test_bytes_are_counted_right_whatever_callers_do(write, backend):
    """What was counted in is counted out, also if a caller has put other memory in its place."""
    layer = Derived()
    settings = {} if backend == "dict" else {"max_bytes": "1MiB"}
    with dora_cache.attach(layer, backend=backend, **settings) as cache:
        values = layer.one(), *layer.pair(), layer.twice()[0]
        nbytes = cache.stats().nbytes
        for value in values:
            WRITES[write](value)
        layer.one(), layer.pair(), layer.twice()
        assert cache.stats().nbytes == nbytes
        cache.invalidate()
        assert cache.stats().nbytes == 0


# What a function uses again


class Reusing(nn.Module):
    """Derives into memory that it holds, and gives out what that memory is known by."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3), requires_grad=False)
        self.register_buffer("buffer", torch.zeros(3))
        self.array = np.zeros(3, dtype=np.float32)
        self.kept = []
        self.how = None
        self.eval()

    @cached("value", adapter="name", depends_on=lambda self, name: [self.weight, name])
    def value(self, name):
        self.buffer.data.copy_(self.weight * len(name))
        self.array[:] = self.buffer.numpy()
        return self.how(self)


def _keep(self, value, kept):
    self.kept.append(kept)
    return value


REUSES = {
    "the buffer": lambda self: self.buffer,
    "its data": lambda self: self.buffer.data,
    "detached": lambda self: self.buffer.detach(),
    "a view": lambda self: self.buffer.data.view(3, 1),
    "an array's memory": lambda self: torch.from_numpy(self.array),
    "in a tuple": lambda self: (self.weight * 1, self.buffer.data),
    "as a parameter": lambda self: nn.Parameter(self.buffer.data, requires_grad=False),
}


@pytest.mark.parametrize("how", REUSES)
def test_memory_that_the_function_uses_again_is_copied(how):
    """A stored value is no alias of what the function writes to at its next call."""
    layer = Reusing()
    layer.how = REUSES[how]
    with dora_cache.attach(layer) as cache:
        for name in ("a", "bb", "a", "bb", "a"):
            found = layer.value(name)
            found = found[-1] if isinstance(found, tuple) else found
            assert torch.equal(found.flatten(), layer.weight * len(name)), name
        assert (cache.stats().misses, cache.stats().hits) == (2, 3)


@pytest.mark.parametrize(
    "hold",
    [
        lambda kept, value: kept.append(value),
        lambda kept, value: kept.append(value.data),
        lambda kept, value: kept.append(value.numpy()),
        lambda kept, value: kept.append(value.untyped_storage()),
        lambda kept, value: kept.append(torch.utils.dlpack.to_dlpack(value)),
        lambda kept, value: kept.append(lambda: value),
    ],
    ids=["itself", "data", "numpy", "storage", "dlpack", "closure"],
)
def test_a_result_that_somebody_keeps_is_copied(hold):
    """Whoever holds the result or its memory when it is stored holds no part of the store."""
    kept = []

    @cached("value", depends_on=list)
    def value():
        made = torch.ones(3)
        hold(kept, made)
        return made

    with dora_cache.attach(value):
        first = value()
        assert value().data_ptr() != first.data_ptr()


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.ones(3, 3) * 2,
        lambda: torch.ones(3, 3).T,
        lambda: torch.ones(9).view(3, 3),
        lambda: torch.matrix_exp(torch.ones(3, 3)),
    ],
)
def test_a_result_that_nobody_holds_is_stored_as_it_is(make):
    """What the function has made and let go of needs no copy."""

    @cached("value", depends_on=list)
    def value():
        return make()

    @cached("pair", depends_on=list)
    def pair():
        return make(), make()

    with dora_cache.attach(value), dora_cache.attach(pair):
        assert value() is value()
        assert all(one is other for one, other in zip(pair(), pair(), strict=True))


# Where the decorator is put


def test_a_property_over_cached_works():
    """Properties are stored, followed and warmed as methods are, inherited ones included."""

    class Squared(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3), requires_grad=False)
            self.eval()

        @property
        @cached("square", depends_on=lambda self: [self.weight])
        def square(self):
            return self.weight**2

    class Further(Squared):
        pass

    layer = Further()
    with dora_cache.attach(nn.Sequential(layer).eval()) as cache:
        assert cache.warm() == 1
        for _ in range(2):
            assert torch.equal(layer.square, layer.weight**2)
            assert torch.equal(layer.square, layer.weight**2)
            layer.weight.add_(1)
        assert (cache.stats().misses, cache.stats().hits) == (2, 3)
        assert Squared.square.fget.cache_info().currsize == 1


def test_a_partialmethod_of_a_cached_function_works():
    """A functools.partialmethod calls what it is made of, with the object first."""

    class Powers(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3), requires_grad=False)
            self.eval()

        square = functools.partialmethod(
            cached("power", depends_on=lambda self, power: [self.weight])(
                lambda self, power: self.weight**power
            ),
            2,
        )

    layer = Powers()
    with dora_cache.attach(layer) as cache:
        assert torch.equal(layer.square(), layer.weight**2)
        layer.square()
        assert cache.stats().hits == 1


@pytest.mark.parametrize("wraps", [True, False])
def test_other_decorators_over_cached_work(wraps):
    """Decorators between the class and @cached hide nothing, whether they copy its name or not."""

    def logged(function):
        def wrapper(*args):
            return function(*args)

        return functools.wraps(function)(wrapper) if wraps else wrapper

    class Logged(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3), requires_grad=False)
            self.eval()

        @logged
        @cached("double", depends_on=lambda self: [self.weight])
        def double(self):
            return self.weight * 2

    layer = Logged()
    with dora_cache.attach(layer) as cache:
        layer.double(), layer.double()
        assert cache.stats().hits == 1


def _under(decorator, **more):
    function = cached("value", depends_on=lambda *_: [])(lambda *_: torch.ones(1))
    function.__name__ = "value"
    return type("Owner", (nn.Module,), {"value": decorator(function), **more})


@pytest.mark.parametrize(
    ("decorator", "message"),
    [
        (classmethod, "Owner.value cannot be kept: a class method .* make it a method"),
        (functools.cached_property, "keeps the first value .*: write @property over @cached"),
        (functools.lru_cache, "functools.lru_cache keeps the first value .*: leave it out"),
    ],
)
def test_decorators_under_which_nothing_can_be_kept(decorator, message):
    """A class method, and what keeps its first value itself, is an error on attach."""
    with pytest.raises(ConfigError, match=message):
        dora_cache.attach(nn.Sequential(_under(decorator)()))


def test_a_static_method_is_attached_by_itself():
    """In a model it is named, as not cached; attached by itself it works."""
    kind = _under(staticmethod)
    with (
        warned() as texts,
        pytest.raises(dora_cache.NothingToCacheError, match=r"attach\(Owner.value\)"),
    ):
        dora_cache.attach(kind())
    assert len(texts) == 1
    model = nn.Sequential(Derived(), kind()).eval()
    with pytest.warns(CacheWarning, match="belongs to no object: attach it by itself"):
        cache = dora_cache.attach(model)
    assert [(one.kind, one.where) for one in cache.declined] == [("value", "Owner.value")]
    cache.detach()
    with dora_cache.attach(kind.value) as cache:
        kind.value(), kind().value()
        assert cache.stats().hits == 1
        with dora_cache.attach(model) as other:
            assert other.declined == []


def test_a_decorated_function_in_an_attribute_is_named():
    """A plain function that a module holds is attached by itself, and attach says so."""
    layer = Derived()
    layer.function = cached("ones")(lambda: torch.ones(1))
    with (
        pytest.warns(CacheWarning, match="attach it by itself"),
        dora_cache.attach(layer) as cache,
    ):
        assert [one.kind for one in cache.declined] == ["ones"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (staticmethod(lambda: None), "put @staticmethod over @cached"),
        (property(lambda self: None), "put @property over @cached"),
        (classmethod(lambda cls: None), "a class method has no object .* make it a method"),
        (functools.cached_property(lambda self: None), "write @property over @cached"),
        (functools.lru_cache(lambda: None), "functools.lru_cache keeps .*: leave it out"),
        (functools.partial(print), "a partial: decorate the function itself, or a def"),
        (nn.Linear(1, 1), "a Linear: decorate the function itself, or a def"),
        (nn.Linear, "the class Linear: decorate its methods"),
        (Derived().one, "a bound method, .*: decorate the method in its class"),
        (torch.matrix_exp, "cannot tell which parameters .*: decorate a def that calls it"),
    ],
)
def test_what_is_no_function_is_an_error(wrong, message):
    """What cannot be decorated is refused where it is written, with what to write."""
    with pytest.raises(ConfigError, match=message):
        cached("value")(wrong)


def test_functions_that_return_no_tensor_are_errors():
    """Coroutine functions and generators of both kinds are refused where they are written."""

    async def coroutine():
        return torch.ones(1)

    async def stream():
        yield torch.ones(1)

    def generator():
        yield torch.ones(1)

    for function in (coroutine, stream):
        with pytest.raises(ConfigError, match="returns no tensor: decorate a plain one it calls"):
            cached("value")(function)
    with pytest.raises(ConfigError, match="return a tuple of tensors instead of yielding them"):
        cached("value")(generator)


def test_bare_cached_is_an_error():
    """Without a name the error says what to write; so does a name of another kind."""
    with pytest.raises(ConfigError, match=r'write @cached\("rotation"\)'):

        @cached
        def rotation(): ...

    with pytest.raises(ConfigError, match="as a string"):
        cached(3)
    with pytest.raises(ConfigError, match="as a string"):
        cached("value", adapter=lambda self: "a")


# Owners


class Table:
    def __init__(self, data):
        self.data = data

    @cached("double", depends_on=lambda self: [self.data])
    def double(self):
        return self.data * 2


class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = Table(torch.ones(2))
        self.tables = [Table(torch.zeros(2)), {"a": (Table(torch.ones(3)),)}]
        self.method = Table(torch.ones(4)).double
        self.partial = functools.partial(Table(torch.ones(5)).double)
        self.eval()

    def every(self):
        return [
            self.table,
            self.tables[0],
            self.tables[1]["a"][0],
            self.method.__self__,
            self.partial.func.__self__,
        ]


def test_decorated_objects_inside_modules_are_attached():
    """Objects that a module holds, in containers and by their methods too, are owners as well."""
    model = nn.Sequential(Holder(), nn.ReLU())
    model.shared = model[0].table
    tables = model[0].every()
    with dora_cache.attach(model) as cache:
        assert cache.warm() == len(tables)
        for table in tables:
            assert torch.equal(table.double(), table.data * 2)
        assert cache.stats().hits == len(tables)
        tables[0].data = torch.full((2,), 7.0)
        assert torch.equal(tables[0].double(), torch.full((2,), 14.0))
        assert cache.invalidate(module=model[0]) == len(tables)
        assert cache.invalidate(module=model[1]) == 0
    assert all(vars(table).keys() == {"data"} and type(table) is Table for table in tables)


def test_objects_inside_modules_need_depends_on():
    """What they depend on cannot be listed, and attach says what to write."""

    class Careless:
        @cached("value")
        def value(self): ...

    model = nn.Module()
    model.careless = Careless()
    with pytest.raises(ConfigError, match=r"Careless is no nn.Module, .*depends_on=lambda self"):
        dora_cache.attach(model)


def test_owners_with_slots_are_errors_that_say_what_to_add():
    """An owner that nothing can be tied to is refused; with the slots it needs, it works."""

    class Slotted:
        __slots__ = ("data",)

        @cached("double", depends_on=lambda self: [self.data])
        def double(self):
            return self.data * 2

    class Enough(Slotted):
        __slots__ = ("__dict__", "__weakref__")

    class Half(Slotted):
        __slots__ = ("__dict__",)

    @dataclasses.dataclass(frozen=True, slots=True)
    class Record:
        data: torch.Tensor
        double = Slotted.double

    model = nn.Module()
    model.inside = Slotted()
    for owner in (Slotted(), Record(torch.ones(1)), model):
        with pytest.raises(ConfigError, match='add "__dict__" and "__weakref__" to its __slots__'):
            dora_cache.attach(owner)
    with pytest.raises(ConfigError, match=r'Half has no __weakref__, .* add "__weakref__" to'):
        dora_cache.attach(Half())
    owner = Enough()
    owner.data = torch.ones(2)
    with dora_cache.attach(owner) as cache:
        owner.double(), owner.double()
        assert cache.stats().hits == 1


def test_owners_of_many_kinds():
    """Dataclasses, enums, and objects with attributes and an equality of their own are owners."""

    @dataclasses.dataclass
    class Record:
        data: torch.Tensor
        double = Table.double

    class Kind(enum.Enum):
        ONE = 1
        double = cached("double", depends_on=lambda self: [self.value])(
            lambda self: torch.ones(2) * self.value * 2
        )

    class Lazy:
        def __init__(self):
            self.parts = {"data": torch.ones(2)}

        def __getattr__(self, name):
            return self.parts[name]  # raises KeyError

        double = Table.double

    class Alike(Table):
        def __eq__(self, other):
            return True

        def __hash__(self):
            return 1

    for owner in (Record(torch.ones(2)), Kind.ONE, Lazy(), Alike(torch.ones(2))):
        with dora_cache.attach(owner) as cache:
            for _ in range(3):
                assert torch.equal(owner.double(), torch.full((2,), 2.0))
            assert (cache.stats().misses, cache.stats().hits) == (1, 2), owner


def test_modules_that_are_equal_are_not_one():
    """Modules with an equality of their own are followed, and told apart, by identity."""

    class Alike(nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.register_buffer("factor", torch.tensor([factor]))
            self.eval()

        def __eq__(self, other):
            return isinstance(other, Alike)

        def __hash__(self):
            return 1

    class Other(Alike):
        pass

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = Alike(1.0), Alike(2.0)
            self.eval()

        @cached("sum")
        def sum(self):
            return self.one.factor + self.two.factor

    @cached("kind")
    def kind(module):
        return torch.ones(1) * isinstance(module, Other)

    both = Both()
    with dora_cache.attach(both) as cache, dora_cache.attach(kind):
        both.sum(), both.sum()
        both.two.factor.add_(5)
        assert both.sum().item() == 8
        assert (cache.stats().misses, cache.stats().hits) == (2, 1)
        empty, other = Alike(1.0), Other(1.0)
        del empty.factor, other.factor
        assert [kind(module).item() for module in (empty, other, empty)] == [0, 1, 0]


def test_modules_whose_class_cannot_be_extended_are_errors():
    """A class that wants arguments of its subclasses is refused, with what to do."""

    class Named(nn.Module):
        def __init_subclass__(cls, *, key):
            super().__init_subclass__()

    class One(Named, key="one"):
        value = Derived.one

    with pytest.raises(ConfigError, match=r"what its __init_subclass__ .* takes defaults"):
        dora_cache.attach(One())


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (Derived, "Derived is a class: attach an object of it"),
        (Derived().one, "Derived.one is a method of an object: attach the object"),
    ],
)
def test_attaching_what_is_no_owner_says_what_to_attach(target, message):
    """A class, and a bound method, are errors that name the object."""
    with pytest.raises(dora_cache.NothingToCacheError, match=message):
        dora_cache.attach(target)


# What can never be stored


class Pair(NamedTuple):
    one: torch.Tensor
    two: torch.Tensor


UNSTORABLE = {
    "None": (lambda: None, "it returned None"),
    "a dict": (lambda: {"a": torch.ones(1)}, "it returned a dict"),
    "a list": (lambda: [torch.ones(1)], "it returned a list"),
    "a namedtuple": (lambda: Pair(torch.ones(1), torch.ones(1)), "it returned a Pair"),
    "linalg.qr": (lambda: torch.linalg.qr(torch.ones(2, 2)), "it returned a linalg_qr"),
    "a generator": (lambda: (one for one in [torch.ones(1)]), "it returned a generator"),
    "a number": (lambda: 3, "it returned a int"),
    "an empty tuple": (tuple, "it returned an empty tuple"),
    "a mixed tuple": (lambda: (torch.ones(1), 3), "it returned a tuple of Tensor, int"),
    "sparse": (lambda: torch.eye(2).to_sparse(), "it returned a tensor of layout torch.sparse_coo"),
}


@pytest.mark.parametrize("what", UNSTORABLE)
def test_results_that_cannot_be_stored_are_named_and_no_misses(what):
    """They count as calls past the cache, also in warm(), and one warning says what is stored."""
    make, message = UNSTORABLE[what]

    class Owner(nn.Module):
        @cached("result", depends_on=lambda self: [])
        def result(self):
            return make()

    owner = Owner().eval()
    with dora_cache.attach(owner) as cache:
        with warned() as texts:
            assert cache.warm() == 0
            assert type(owner.result()) is type(make())
        assert len(texts) == 1
        assert (
            f"'result' is never stored, since {message}: return a tensor or a plain tuple"
            in texts[0]
        )
        assert cache.stats().bypasses == 2
        assert (cache.stats().misses, cache.stats().hits, cache.stats().entries) == (0, 0, 0)


def test_a_coroutine_is_returned_and_named():
    """A function that hands on a coroutine is as good as one that returns nothing to store."""

    async def later():
        return torch.ones(1)

    @cached("value")
    def value():
        return later()

    with dora_cache.attach(value), warned() as texts:
        coroutine = value()
        coroutine.close()
    assert "it returned a coroutine" in texts[0]


def test_a_result_may_be_storable_at_times():
    """A function that returns None for some arguments is stored for the others."""

    @cached("value")
    def value(size):
        return torch.ones(size) if size else None

    with dora_cache.attach(value) as cache, warned():
        for size in (0, 1, 0, 1):
            value(size)
        stats = cache.stats()
        assert (stats.misses, stats.hits, stats.bypasses) == (1, 1, 2)


def test_a_namedtuple_as_a_plain_tuple_is_stored():
    """The way that the warning names works."""

    @cached("qr", depends_on=list)
    def qr():
        return tuple(torch.linalg.qr(torch.ones(2, 2)))

    with dora_cache.attach(qr) as cache:
        qr(), qr()
        assert cache.stats().hits == 1


def test_counts_add_up():
    """Every call is a hit, a miss or a bypass."""
    calls = itertools.count()

    @cached("value")
    def value(size):
        return torch.ones(size) if next(calls) % 2 else None

    with dora_cache.attach(value) as cache, warned():
        for size in (1, 1, 2, 2, 1):
            value(size)
        stats = cache.stats()
        assert stats.hits + stats.misses + stats.bypasses == 5
