"""The decorator on code that never heard of PEFT."""

import enum
import gc
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import dora_cache
from dora_cache import CacheConfig, cached
from dora_cache.core.keys import freeze, make_binder


class Rotation(nn.Module):
    """A user's own adapter layer."""

    def __init__(self, *names, size=4):
        super().__init__()
        self.weight = nn.ParameterDict({name: torch.randn(size, size) for name in names})
        self.requires_grad_(requires_grad=False)
        self.scaling = 1.0
        self.derived = []
        self.eval()

    @cached(
        "rotation",
        adapter="adapter_name",
        depends_on=lambda self, adapter_name, *_, **__: [self.weight[adapter_name], self.scaling],
    )
    def rotation(self, adapter_name, power=1, *, transpose=False):
        """Derive a matrix."""
        self.derived.append((adapter_name, power, transpose))
        matrix = torch.matrix_exp(self.weight[adapter_name] * power * self.scaling)
        return matrix.T if transpose else matrix


def test_unattached_it_is_as_if_not_there():
    """Without a cache each call derives, and the function keeps its name and documentation."""
    layer = Rotation("a")
    assert not torch.equal(layer.rotation("a"), torch.zeros(4, 4))
    layer.rotation("a")
    assert len(layer.derived) == 2
    assert Rotation.rotation.__name__ == "rotation"
    assert Rotation.rotation.__doc__ == "Derive a matrix."
    assert Rotation.rotation.__wrapped__(layer, "a").shape == (4, 4)
    assert Rotation.rotation.cache_info() == (0, 0, None, 0)


def test_one_call_is_one_key_however_it_is_spelled():
    """Positional, keyword and default arguments of one logical call share one entry."""
    layer = Rotation("a")
    with dora_cache.attach(layer) as cache:
        layer.rotation("a")
        layer.rotation(adapter_name="a")
        layer.rotation("a", 1)
        layer.rotation("a", power=1, transpose=False)
        Rotation.rotation(layer, "a")
        assert len(layer.derived) == 1
        assert cache.stats().hits == 4
        layer.rotation("a", 2)
        layer.rotation("a", transpose=True)
        assert len(layer.derived) == 3


def test_equal_numbers_of_different_types_are_different_keys():
    """1, 1.0, True and -0.0, 0.0 may derive different values, so they do not share."""
    layer = Rotation("a")
    with dora_cache.attach(layer):
        for power in (1, 1.0, True, 0.0, -0.0):
            layer.rotation("a", power)
            layer.rotation("a", power)
        assert len(layer.derived) == 5


def test_functools_attributes():
    """cache_info counts over all caches and cache_clear empties them, as in functools."""
    first, second = Rotation("a", "b"), Rotation("a")
    gc.collect()  # caches of other tests count for as long as they are there
    base = Rotation.rotation.cache_info()
    with dora_cache.attach(first) as one, dora_cache.attach(second) as two:
        for name in ("a", "b", "a"):
            first.rotation(name)
        second.rotation("a")
        assert Rotation.rotation.cache_info() == (1 + base.hits, 3 + base.misses, None, 3)
        Rotation.rotation.cache_clear()
        assert one.stats().entries == two.stats().entries == 0
        assert Rotation.rotation.cache_info().currsize == 0


def test_an_unknown_adapter_parameter_is_an_error():
    """adapter= must name a parameter; the error lists those there are."""
    with pytest.raises(dora_cache.ConfigError, match="its parameters are self, name"):

        @cached("x", adapter="adapter")
        def method(self, name): ...


def test_what_cannot_be_decorated_is_an_error():
    """A staticmethod object is refused with a hint."""
    with pytest.raises(dora_cache.ConfigError, match="put @staticmethod over @cached"):
        cached("x")(staticmethod(lambda: None))


def test_wrong_arguments_raise_what_the_function_raises():
    """A call that does not fit the signature fails as it would without the decorator."""
    layer = Rotation("a")
    with dora_cache.attach(layer), pytest.raises(TypeError, match="rotation"):
        layer.rotation("a", 1, 2, 3)
    with dora_cache.attach(layer), pytest.raises(TypeError, match="adapter_name"):
        layer.rotation()


class Default(nn.Module):
    """Gives no depends_on."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.register_buffer("shift", torch.ones(3))
        self.scale = 2.0
        self.options = {"power": [1, 2]}
        self.requires_grad_(requires_grad=False)
        self.eval()

    @cached("value")
    def value(self, extra=None):
        base = (self.inner.weight * self.scale + self.shift) ** self.options["power"][1]
        return base if extra is None else base + extra


@pytest.mark.parametrize(
    "change",
    [
        lambda module: module.inner.weight.mul_(2),
        lambda module: module.shift.add_(1),
        lambda module: setattr(module, "scale", 3.0),
        lambda module: module.options["power"].__setitem__(1, 3),
    ],
)
def test_without_depends_on_the_owners_state_is_followed(change):
    """Parameters, buffers and plain attributes of the owner and its submodules are dependencies."""
    module = Default()
    with dora_cache.attach(module) as cache:
        module.value()
        assert torch.equal(module.value(), module.value.__wrapped__(module))
        assert cache.stats().hits == 1
        change(module)
        assert torch.equal(module.value(), module.value.__wrapped__(module))
        assert cache.stats().misses == 2


def test_tensor_arguments_are_dependencies():
    """A tensor argument is keyed by identity and followed; other arguments by value."""
    module = Default()
    one, two = torch.ones(3), torch.full((3,), 2.0)
    with dora_cache.attach(module) as cache:
        for extra in (one, two, one, two):
            assert torch.equal(module.value(extra), module.value.__wrapped__(module, extra))
        assert cache.stats().hits == 2
        one.add_(5)
        assert torch.equal(module.value(one), module.value.__wrapped__(module, one))
        assert cache.stats().misses == 3


def test_entries_of_dead_arguments_do_not_pile_up():
    """Values derived from temporaries go once their arguments are gone."""
    module = Default()
    with dora_cache.attach(module) as cache:
        for _ in range(1000):
            module.value(torch.ones(3))
        assert cache.stats().entries < 300


def test_unkeyable_arguments_go_past_the_cache():
    """An argument whose equality says nothing sure makes the call a bypass."""
    layer = Rotation("a")

    class Power(int):
        pass

    with dora_cache.attach(layer) as cache:
        layer.rotation("a", Power(1))
        layer.rotation("a", Power(1))
        assert cache.stats().bypasses == 2


def test_a_plain_function_can_be_attached():
    """A decorated function without an owner is attached itself."""
    weight = torch.randn(3, 3)
    calls = []

    @cached("square", depends_on=lambda w, power=2: [w])
    def square(w, power=2):
        calls.append(power)
        return w**power

    square(weight)
    with dora_cache.attach(square) as cache:
        square(weight)
        square(w=weight, power=2)
        assert len(calls) == 2
        with pytest.raises(dora_cache.AlreadyAttachedError):
            dora_cache.attach(square)
        weight.add_(1)
        assert torch.equal(square(weight), weight**2)
        assert cache.stats().hits == 1
    square(weight)
    assert len(calls) == 4


def test_a_plain_object_can_be_attached():
    """An object that is no module works with depends_on, and is refused without."""

    class Table:
        def __init__(self):
            self.data = torch.randn(3)

        @cached("double", depends_on=lambda self: [self.data])
        def double(self):
            return self.data * 2

    class Careless:
        @cached("value")
        def value(self):
            return torch.ones(1)

    table = Table()
    with dora_cache.attach(table) as cache:
        first = table.double()
        assert table.double() is first
        table.data = torch.zeros(3)
        assert torch.equal(table.double(), torch.zeros(3))
        assert cache.stats().misses == 2
    assert vars(table).keys() == {"data"}
    assert type(table) is Table
    with pytest.raises(dora_cache.ConfigError, match="depends_on"):
        dora_cache.attach(Careless())


@pytest.mark.parametrize("result", [None, 3, "text", [torch.ones(1)], {"a": torch.ones(1)}, ()])
def test_other_results_are_returned_and_never_stored(result):
    """None and whatever is not tensors comes through as it is, at every call."""

    @cached("odd", depends_on=list)
    def odd():
        return result

    with dora_cache.attach(odd) as cache:
        with pytest.warns(dora_cache.CacheWarning, match="'odd' is never stored"):
            assert odd() is result
        assert odd() is result
        assert cache.stats().bypasses == 2
        assert cache.stats().misses == cache.stats().stores == 0


def test_tuples_of_tensors_are_stored():
    """A tuple of tensors is one entry, and comes back as a tuple."""

    @cached("pair", depends_on=list)
    def pair():
        return torch.ones(2), torch.zeros(3)

    with dora_cache.attach(pair) as cache:
        pair()
        one, zero = pair()
        assert torch.equal(one, torch.ones(2))
        assert torch.equal(zero, torch.zeros(3))
        assert cache.stats().nbytes == 20
        assert cache.stats().hits == 1


def test_views_and_aliases_are_not_kept():
    """A view keeps no larger storage, and an alias of a dependency is copied."""
    weight = torch.randn(1000)

    @cached("head", depends_on=lambda: [weight])
    def head():
        return weight[:2]

    @cached("slice", depends_on=list)
    def part():
        return torch.ones(1000)[10:12]

    with dora_cache.attach(head) as one, dora_cache.attach(part) as two:
        head(), part()
        assert one.stats().nbytes == two.stats().nbytes == 8
        assert head().data_ptr() != weight.data_ptr()
        assert torch.equal(head(), weight[:2])


def test_exceptions_are_never_stored():
    """A failing derivation fails its caller and leaves nothing behind."""
    layer = Rotation("a")
    with dora_cache.attach(layer) as cache:
        for _ in range(2):
            with pytest.raises((KeyError, AttributeError)):
                layer.rotation("missing")
        with pytest.raises(TypeError):
            layer.rotation("a", "x")
        assert cache.stats().stores == 0
        layer.rotation("a")
        layer.rotation("a")
        assert cache.stats().hits == 1


def test_a_broken_depends_on_costs_a_warning_and_no_result():
    """depends_on that raises means a bypass and one warning, not a failure."""

    @cached("value", depends_on=lambda: 1 / 0)
    def value():
        return torch.ones(1)

    @cached("strange", depends_on=lambda: [object()])
    def strange():
        return torch.ones(1)

    with dora_cache.attach(value) as cache:
        with pytest.warns(dora_cache.CacheWarning, match="depends_on of 'value'"):
            assert torch.equal(value(), torch.ones(1))
        assert torch.equal(value(), torch.ones(1))
        assert cache.stats().bypasses == 2
    with dora_cache.attach(strange) as cache:
        strange()
        assert cache.stats().bypasses == 1


def test_gradients_through_the_value_are_bypassed():
    """While a dependency wants a gradient the value is derived with its graph."""
    layer = Rotation("a")
    layer.weight["a"].requires_grad_()
    with dora_cache.attach(layer) as cache:
        with torch.no_grad():
            layer.rotation("a")
        layer.rotation("a").sum().backward()
        assert layer.weight["a"].grad is not None
        assert cache.stats().bypasses == 1
        assert not layer.rotation.__self__.rotation("a", 3).is_leaf
        with torch.no_grad():
            assert not layer.rotation("a").requires_grad
        assert cache.stats().hits == 1


@pytest.mark.parametrize("compiled", [True, False])
def test_no_gradient_flows_through_a_constant(compiled):
    """Wherever it is derived: from the cache, past it, and in compiled code."""

    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        @cached("norm", detach=True)
        def norm(self):
            return self.weight.norm()

        def forward(self):
            return self.weight / self.norm()

    layer = Norm()
    with dora_cache.attach(layer) as cache:
        run = torch.compile(layer, backend="eager") if compiled else layer
        for training in (True, False):
            layer.train(training)
            found = torch.autograd.grad(run().sum(), layer.weight)[0]
            torch.testing.assert_close(found, torch.full((3,), 3**-0.5))
            with cache.bypass():
                assert torch.equal(torch.autograd.grad(run().sum(), layer.weight)[0], found)


def test_a_recursive_function_does_not_deadlock():
    """A function that calls itself with the same arguments derives on, and ends."""
    depth = []

    @cached("nested", depends_on=list)
    def nested():
        depth.append(1)
        return torch.ones(1) if len(depth) > 3 else nested() + 1

    with dora_cache.attach(nested):
        assert nested().item() == 4


def test_inherited_and_overridden_methods():
    """A subclass's override and the method it calls are separate derivations of one owner."""

    class Doubled(Rotation):
        @cached(
            "doubled",
            adapter="adapter_name",
            depends_on=lambda self, adapter_name: [self.weight[adapter_name]],
        )
        def rotation(self, adapter_name):
            return super().rotation(adapter_name) * 2

    layer = Doubled("a")
    expected = layer.rotation("a")
    with dora_cache.attach(layer) as cache:
        assert torch.equal(layer.rotation("a"), expected)
        assert torch.equal(layer.rotation("a"), expected)
        assert cache.stats().entries == 2


def test_modules_with_cached_methods_inside_a_model():
    """Attach finds decorated methods anywhere in a model; events go by adapter."""
    model = nn.Sequential(Rotation("a", "b"), nn.ReLU(), Rotation("a"))
    with dora_cache.attach(model) as cache:
        for layer in (model[0], model[2]):
            layer.rotation("a")
        model[0].rotation("b")
        assert cache.stats().entries == 3
        assert cache.invalidate(adapter="a") == 2
        assert cache.invalidate(module=model[2]) == 0
        assert cache.invalidate(module=model[0]) == 1
        model.train()
        model[0].rotation("a")
        assert cache.stats().entries == 0


def test_warm_calls_what_needs_no_argument():
    """warm() derives for decorated modules: without arguments, or for the adapters named."""
    model = nn.Sequential(Rotation("a", "b"), Default())
    with dora_cache.attach(model) as cache:
        assert cache.warm() == 1
        assert cache.warm(adapters=["b"]) == 1
        assert cache.warm(["a", "b"]) == 1
        model[0].rotation("a"), model[0].rotation("b"), model[1].value()
        assert cache.stats().misses == 3
        with pytest.raises(dora_cache.AdapterNotFoundError):
            cache.warm(adapters=["c"])


def test_warm_can_show_how_far_it_is(capsys):
    """warm(progress=True) derives as much, and counts; by default it shows nothing."""
    model = nn.Sequential(Default(), Default())
    with dora_cache.attach(model) as cache:
        assert cache.warm() == 2
        assert capsys.readouterr() == ("", "")
        cache.invalidate()
        assert cache.warm(progress=True) == 2
        shown = capsys.readouterr().err
        assert [line.rpartition(" ")[2] for line in shown.split("\r")] == [
            "",
            "0/2",
            "1/2",
            "2/2\n",
        ]


def test_module_arguments_are_followed_and_never_confused():
    """A module argument counts with all its state, and not for another module at its address."""

    class Factor(nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.factor = factor

    @cached("scaled", depends_on=lambda part: [])
    def scaled(part):
        return torch.ones(1) * part.factor

    with dora_cache.attach(scaled) as cache:
        for factor in range(20):
            assert scaled(Factor(factor).eval()).item() == factor
        part = Factor(1).eval()
        scaled(part)
        scaled(part)
        assert cache.stats().hits == 1
        part.factor = 7
        assert scaled(part).item() == 7


def test_attributes_that_cannot_be_compared_make_calls_bypass():
    """Without depends_on, an attribute of some other class means the value is never stored."""
    module = Default()
    module.config = Rotation  # a class, which may change
    with dora_cache.attach(module) as cache:
        module.value()
        module.value()
        assert cache.stats().bypasses == 2
        del module.config
        module.activation = nn.functional.relu
        module.kinds = {"a", 1}
        module.value()
        module.value()
        assert cache.stats().hits == 1
        module._private = 3
        module.value()
        assert cache.stats().misses == 2


def test_slots_and_builtin_owners_are_left_alone():
    """Calling on an object without a __dict__ derives plainly."""

    class Slotted:
        __slots__ = ("weight",)

        @cached("value", depends_on=lambda self: [self.weight])
        def value(self):
            return self.weight * 2

    owner = Slotted()
    owner.weight = torch.ones(2)
    assert torch.equal(owner.value(), torch.full((2,), 2.0))


def test_the_owner_is_not_kept_alive():
    """A collected owner's entries go with it."""
    layer = Rotation("a")
    cache = dora_cache.attach(layer)
    layer.rotation("a")
    reference = weakref.ref(layer)
    del layer
    gc.collect()
    assert reference() is None
    assert cache.stats().entries == 0


class Colour(enum.Enum):
    RED = 1


_scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(Colour.RED)
_arguments = st.recursive(
    _scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=2), inner, max_size=3)
    ),
    max_leaves=6,
)


def _alike(left, right):
    if type(left) is not type(right):
        return False
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(_alike, left, right))
    if isinstance(left, dict):
        return list(left) == list(right) and all(_alike(left[k], right[k]) for k in left)
    if isinstance(left, float):
        return left.hex() == right.hex()
    return left == right


@given(_arguments, _arguments)
def test_keys_are_equal_exactly_for_alike_arguments(left, right):
    """Frozen arguments are hashable, and equal if and only if they are alike in value and type."""
    one, other = freeze(left, []), freeze(right, [])
    hash(one)
    assert (one == other) == _alike(left, right)
    assert freeze(left, []) == one


def test_binders_take_every_kind_of_parameter():
    """A binder fills in defaults and keeps the order of the signature."""

    def function(a, /, b, c=3, *args, d, e=5, **kwargs): ...

    bind, names = make_binder(function)
    assert names == ["a", "b", "c", "args", "d", "e", "kwargs"]
    assert bind(1, 2, d=4) == (1, 2, 3, (), 4, 5, {})
    assert bind(1, d=4, b=2, f=6) == (1, 2, 3, (), 4, 5, {"f": 6})
    assert bind(1, 2, 3, 9, 8, d=4, e=1) == (1, 2, 3, (9, 8), 4, 1, {})

    def only(a, *, b=1): ...

    assert make_binder(only)[0](1) == (1, 1)

    def positional(a, b=2, /): ...

    assert make_binder(positional)[0](1) == (1, 2)
    with pytest.raises(TypeError):
        make_binder(positional)[0](a=1)


def test_explicit_config_object():
    """A CacheConfig chooses the backend for any target."""
    layer = Rotation("a", "b")
    config = CacheConfig(backend="lru", max_bytes=64)
    with dora_cache.attach(layer, config) as cache:
        for name in "ab":
            layer.rotation(name)
        assert cache.stats().entries == 1
        assert cache.stats().evictions == 1
        assert cache.stats().max_bytes == 64


def test_a_dependency_may_be_listed_twice_and_beside_shapes():
    """Hits take the short way all the same, and each change is noticed."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Parameter(torch.randn(3), requires_grad=False)
            self.other = self.one
            self.shape = self.one.shape
            self.eval()

        @cached("sum", depends_on=lambda self: [self.one, self.shape, self.other])
        def total(self):
            return self.one + self.other + len(self.shape)

    module = Twice()
    with dora_cache.attach(module) as cache:
        for _ in range(3):
            module.total()
        shortcuts = [
            s for binding in cache._engine.bindings.values() for s in binding.shortcuts.values()
        ]
        assert len(shortcuts) == 1
        for change in (
            lambda: module.one.add_(1),
            lambda: setattr(module, "other", nn.Parameter(torch.ones(3), requires_grad=False)),
            lambda: setattr(module, "shape", torch.Size((3, 1))),
            lambda: module.other.mul_(2),
            lambda: setattr(module, "one", module.other),
        ):
            change()
            for _ in range(3):
                assert torch.equal(module.total(), Twice.total.__wrapped__(module))
