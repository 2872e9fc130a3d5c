"""A small real PEFT model under every operation there is: cached always equals uncached.

Two models are built alike, and everything is done to both; only one has a cache. So the oracle
shares nothing with the cache, not even a copy that the cache has to leave alone.
"""

import contextlib
import importlib.util

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from pretended import TIERS
from zoo import balanced, quiet

import dora_cache
from dora_cache.core.audit import EVERY
from dora_cache.lab.freshness import KINDS, LAYERS, OPERATIONS, RAW, Pick, Scene

NAMES = ("ada", "bob", "lora", "new0", "new1")
PLACES = ("lora_A", "lora_B", "lora_embedding_A", "lora_magnitude_vector", "lora_dropout")
SETTINGS = [
    {},
    {"backend": "lru", "max_bytes": 100},
    {"backend": "lru", "max_bytes": 40},
    {"backend": "budget", "max_bytes": 100},
    {"backend": "cpu", "max_bytes": 150},
    {"backend": TIERS, "device_bytes": 60},
    {"backend": TIERS, "max_bytes": 150, "device_bytes": 100},
    {"backend": "null"},
]

some_name = st.sampled_from(NAMES) | st.sampled_from(NAMES[:2])
picks = st.builds(
    Pick,
    adapter=some_name,
    other=some_name,
    layer=st.sampled_from(LAYERS) | st.none(),
    kind=st.sampled_from(KINDS) | st.none(),
    factor=st.sampled_from([0.5, 1.25, 2.0]),
    seed=st.integers(0, 5),
)


def outcome(act, scene, pick):
    """What an action returns, or the kind of error it raises."""
    torch.manual_seed(pick.seed)
    with quiet():
        try:
            return list(act(scene, pick) or ())
        except Exception as error:  # noqa: BLE001 - compared with the other side's
            return error


class ModelMachine(RuleBasedStateMachine):
    """Every rule is something PyTorch or PEFT lets people do."""

    numerics = "peft"
    guard = "version"
    buffers = False  # whether bytes may be held without entries
    outputs = ()  # of the latest action
    steps = 0

    @initialize(
        dtype=st.sampled_from([torch.float32, torch.bfloat16]),
        which=st.sampled_from(SETTINGS),
        dropout=st.sampled_from([0.0, 0.5]),
    )
    def start(self, dtype, which, dropout):
        self.plain = Scene(dtype, dropout=dropout)
        self.cached = Scene(dtype, dropout=dropout)
        self.attach(which)

    def attach(self, which):
        # Where nothing is left to cache, the model is as it was.
        self.cache = None
        self.beside = which.get("device_bytes", 0)  # the cap of a tier that resize() is not about
        with contextlib.suppress(dora_cache.NothingToCacheError):
            self.cache = dora_cache.attach(
                self.cached.model, numerics=self.numerics, guard=self.guard, **which
            )

    def teardown(self):
        if getattr(self, "cache", None):
            self.cache.detach()
            assert self.cached.model.state_dict().keys() == self.plain.model.state_dict().keys()
            for one, other in zip(
                self.cached.model.modules(), self.plain.model.modules(), strict=True
            ):
                assert type(one) is type(other)
                assert vars(one).keys() == vars(other).keys()
                for variant in getattr(one, "lora_variant", {}).values():
                    assert type(variant).__module__.startswith("peft")

    def both(self, act, pick):
        """Do it to both, and expect the same of both."""
        expected = outcome(act, self.plain, pick)
        found = outcome(act, self.cached, pick)
        if isinstance(expected, Exception) or isinstance(found, Exception):
            assert type(found) is type(expected), (found, expected)
            return
        assert len(found) == len(expected)
        self.outputs = [one for one in found if one is not None]
        for one, other in zip(found, expected, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                self.assert_same(one, other)

    def assert_same(self, found, expected):
        assert found.dtype is expected.dtype
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found.nan_to_num(), expected.nan_to_num())

    @invariant()
    def fresh(self):
        type(self).steps += 1
        for _ in range(2):
            self.both(lambda scene, _: [scene.run()], Pick())

    @invariant()
    def sums_and_cap(self):
        if not getattr(self, "cache", None):
            return
        stats = balanced(self.cache)
        assert stats.max_bytes is None or stats.nbytes <= stats.max_bytes
        assert stats.entries == 0 or stats.nbytes > 0
        assert stats.entries > 0 or stats.nbytes == 0 or self.buffers

    # States that last

    @rule(name=some_name, safe=st.booleans())
    def merge(self, name, safe):
        def act(scene, _):
            scene.model.merge_adapter([name] if name in scene.adapters else None, safe_merge=safe)

        self.both(act, Pick())

    @precondition(lambda self: any(x.merged_adapters for x in self.plain.layers(Pick())))
    @rule()
    def unmerge(self):
        self.both(lambda scene, _: scene.model.unmerge_adapter(), Pick())

    @rule(name=some_name)
    def activate(self, name):
        self.both(lambda scene, _: name in scene.adapters and scene.activate(name), Pick())

    @rule(names=st.permutations(NAMES), count=st.integers(1, 3))
    def activate_several(self, names, count):
        def act(scene, _):
            scene.activate(*[name for name in names if name in scene.adapters][:count])

        self.both(lambda scene, pick: act(scene, pick), Pick())

    @rule(layer=st.sampled_from(LAYERS), mode=st.booleans())
    def switch_part(self, layer, mode):
        def act(scene, pick):
            for part in scene.layers(pick):
                part.train(mode)

        self.both(act, Pick(layer=layer))

    @rule(
        layer=st.sampled_from(LAYERS) | st.none(), place=st.sampled_from(PLACES), mode=st.booleans()
    )
    def switch_container(self, layer, place, mode):
        def act(scene, pick):
            for part in scene.layers(pick):
                getattr(part, place).train(mode)

        self.both(act, Pick(layer=layer))

    @precondition(lambda self: importlib.util.find_spec("torch_ema"))
    @rule(pick=picks)
    def copy_an_average(self, pick):
        from torch_ema import ExponentialMovingAverage

        def act(scene, pick):
            ema = ExponentialMovingAverage(scene.weights(pick), decay=0.5)
            ema.shadow_params = [kept * pick.factor for kept in ema.shadow_params]
            ema.copy_to()

        self.both(act, pick)

    @rule()
    def evaluate(self):
        self.both(lambda scene, _: scene.model.eval() and None, Pick())

    @rule(enabled=st.booleans())
    def enable(self, enabled):
        def act(scene, _):
            for layer in scene.layers(Pick()):
                layer.enable_adapters(enabled)

        self.both(act, Pick())

    # The cache's own

    @precondition(lambda self: self.cache)
    @rule(name=some_name | st.none())
    def invalidate(self, name):
        self.cache.invalidate(adapter=name)

    @precondition(lambda self: self.cache)
    @rule(layer=st.sampled_from(LAYERS))
    def invalidate_part(self, layer):
        self.cache.invalidate(module=self.cached.layers(Pick(layer=layer))[0])

    @precondition(lambda self: self.cache)
    @rule()
    def bypass(self):
        before = self.cache.stats()
        with self.cache.bypass():
            self.both(lambda scene, _: [scene.run()], Pick())
        after = self.cache.stats()
        assert (after.lookups, after.entries) == (before.lookups, before.entries)

    @precondition(lambda self: self.cache)
    @rule()
    def warm(self):
        with contextlib.suppress(ValueError):  # in training mode
            self.cache.warm()

    @precondition(lambda self: self.cache)
    @rule(name=some_name)
    def pin(self, name):
        # Not all backends can, not every adapter is there, and not all fit.
        with contextlib.suppress(dora_cache.ConfigError, dora_cache.AdapterNotFoundError):
            self.cache.pin(name)
            assert name in self.cache.pins

    @precondition(lambda self: self.cache and self.cache.pins)
    @rule(name=some_name)
    def unpin(self, name):
        self.cache.unpin(name)
        assert name not in self.cache.pins

    @precondition(lambda self: self.cache and self.cache.stats().max_bytes)
    @rule(size=st.sampled_from([0, 35, 80, 150, 300]))
    def resize(self, size):
        with contextlib.suppress(dora_cache.ConfigError):
            self.cache.resize(size)
            assert self.cache.stats().nbytes <= self.cache.stats().max_bytes == size + self.beside

    @rule(which=st.sampled_from(SETTINGS))
    def reattach(self, which):
        if self.cache:
            self.cache.detach()
        self.attach(which)

    @rule(pick=picks)
    def copy_with_a_cache_of_its_own(self, pick):
        clone = self.cached.copied()
        try:
            cache = dora_cache.attach(clone.model)
        except dora_cache.NothingToCacheError:
            return
        with cache, quiet():
            with contextlib.suppress(Exception):  # PEFT's, e.g. for several merged adapters
                clone.run()
            with torch.no_grad():
                for weight in clone.weights(pick):
                    weight.mul_(pick.factor)


def _enter(operation, name):
    def do(self, pick):
        self.both(operation.apply, pick)

    do.__name__ = name  # a failure says which operations led to it
    return rule(pick=picks)(do)


REPEATABLE = [one for one in OPERATIONS if one.repeatable and one.device is None]


def with_rules(operations):
    """A class decorator: each operation becomes a rule of its name."""

    def enter(cls):
        for operation in operations:
            name = "do_" + "".join(c if c.isalnum() else "_" for c in operation.name)
            setattr(cls, name, _enter(operation, name))
        return cls

    return enter


with_rules(REPEATABLE)(ModelMachine)


class FastModelMachine(ModelMachine):
    """The same operations with numerics="fast", to rounding."""

    numerics = "fast"

    def assert_same(self, found, expected):
        # Some layers may be of another dtype than the output, and round as that one does; under
        # autocast that shows in what else comes out.
        weights = [one.detach() for one in self.plain.model.parameters()]
        dtypes = {found.dtype, *(one.dtype for one in (*weights, *self.outputs))}
        loose = max({torch.float64: 1e-9, torch.float32: 1e-3}.get(one, 0.1) for one in dtypes)
        # Rounded by the largest numbers that take part: small ones may be what is left of these.
        # An optimizer may have made weights that are a hundred million times as large as outputs.
        numbers = (expected, *self.outputs, *weights)
        finite = [one.detach()[one.isfinite()].abs() for one in numbers]
        largest = max([1.0, *(float(one.max()) for one in finite if one.numel())])
        torch.testing.assert_close(
            found, expected, rtol=loose, atol=loose * largest, equal_nan=True
        )


@with_rules([one for one in RAW if one.repeatable])
class ContentModelMachine(ModelMachine):
    """With guard="content", writes that PyTorch does not count are found as well."""

    guard = "content"


@with_rules([one for one in RAW if one.repeatable])
class AuditedModelMachine(ModelMachine):
    """By default, writes that PyTorch does not count are found within so many forwards."""

    @invariant()
    def fresh(self):
        type(self).steps += 1
        if self.cache:
            for _ in range(EVERY + 2):
                outcome(lambda scene, _: [scene.run()], self.cached, Pick())
        self.both(lambda scene, _: [scene.run()], Pick())


class CompiledModelMachine(ModelMachine):
    """Compiled code, after refresh(), returns what the uncached model does when it is not compiled.

    Without refresh() it may not notice what raises no event, as the documentation says.
    """

    buffers = True

    def attach(self, which):
        super().attach(which)
        torch._dynamo.reset()
        self.compiled = torch.compile(self.cached.tuner.model, backend="eager", dynamic=False)

    @invariant()
    def fresh(self):
        type(self).steps += 1
        with quiet(), torch.no_grad():
            try:
                expected = self.run(self.plain.tuner.model, self.plain.ids)
            except Exception:  # noqa: BLE001 - PEFT's: there is nothing to compare with
                return
            if self.cache:
                self.cache.refresh()
            self.assert_same(self.run(self.compiled, self.cached.ids), expected)
            self.assert_same(self.run(self.cached.tuner.model, self.cached.ids), expected)

    @staticmethod
    def run(model, ids):
        torch.manual_seed(0)  # an operation that failed half-way leaves training mode, and dropout
        return model(ids)

    def teardown(self):
        for module in self.cached.model.modules():
            vars(module).pop("_is_torch_compile", None)  # torch.compile's own
        super().teardown()
        torch._dynamo.reset()
