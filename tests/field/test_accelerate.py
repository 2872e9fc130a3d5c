"""Adapters in models that accelerate has put hooks on, or whose weights it offloads."""

import copy
import os

import pytest
import torch
from field_setups import check, ids
from peft.tuners.lora import LoraLayer

from dora_cache import attach
from dora_cache.lab.field import of_accelerate, setups
from dora_cache.lab.field.of_accelerate import adapted
from dora_cache.lab.field.of_transformers import running
from dora_cache.reasons import Reason
from dora_cache.recipes import load_recipes
from dora_cache.recipes.examples import make_model

accelerate = pytest.importorskip("accelerate")

WIDTH = 32
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("setup", setups("accelerate"), ids=ids)
def test_setup(setup):
    check(setup)


@pytest.mark.parametrize("name", ["cpu_offload", "disk_offload"])
def test_fast_numerics(name):
    """The bias is read outside the base layer's forward here as well."""
    (setup,) = [one for one in of_accelerate.SETUPS if one.name == name]
    built = setup.build(True, WIDTH)
    whole = adapted(True, WIDTH)
    with built.undo, torch.no_grad():
        with attach(whole, numerics="fast"):
            expected = running(whole).run()
        with attach(built.model, numerics="fast") as cache:
            for _ in range(2):
                torch.testing.assert_close(built.run(), expected)
            assert cache.stats().hits > 0


@pytest.mark.parametrize("guard", ["version", "content"])
@pytest.mark.parametrize(
    "name", ["disk_offload", "cpu_offload of blocks", "disk_offload of blocks"]
)
def test_long_use_finds_no_fault(name, guard):
    """The audit compares contents that are somewhere else at each use."""
    (setup,) = [one for one in of_accelerate.SETUPS if one.name == name]
    built = setup.build(True, WIDTH)
    with built.undo, torch.no_grad():
        expected = (built.reference or built.run)()
        with attach(built.model, guard=guard) as cache:
            for _ in range(40):
                assert torch.equal(built.run(), expected)
            stats = cache.stats()
            assert stats.misses == stats.entries
            assert not stats.reasons


# Writes to the master copies


def offloaded(by_block):
    """Return a model, what its weights are brought from, and what the reference is to run."""
    model = adapted(True, WIDTH)
    master = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    accelerate.cpu_offload(
        model,
        "cpu",
        state_dict=master,
        preload_module_classes=["LlamaDecoderLayer"] if by_block else None,
    )
    return model, master


def expected_of(master):
    whole = adapted(True, WIDTH)
    whole.load_state_dict(master)
    return running(whole).run()


def write_in_place(master, name):
    master[name].mul_(1.5)


def replace(master, name):
    master[name] = master[name] * 1.5


def write_a_row(master, name):
    master[name][0].add_(1.0)


@pytest.mark.parametrize("by_block", [False, True], ids=["leaf", "block"])
@pytest.mark.parametrize(
    "name",
    [
        f"{Q_PROJ}.base_layer.weight",
        f"{Q_PROJ}.base_layer.bias",
        f"{Q_PROJ}.lora_A.default.weight",
        f"{Q_PROJ}.lora_B.default.weight",
        f"{Q_PROJ}.lora_magnitude_vector.default.weight",
    ],
)
@pytest.mark.parametrize("write", [write_in_place, replace, write_a_row])
def test_a_write_to_the_master_copy_is_noticed(write, name, by_block):
    model, master = offloaded(by_block)
    run = running(model).run
    with torch.no_grad(), attach(model) as cache:
        before = run()
        assert torch.equal(before, expected_of(master))
        run()
        write(master, name)
        after = run()
        assert torch.equal(after, expected_of(master))
        assert not torch.equal(after, before)
        hits = cache.stats().hits
        assert torch.equal(run(), after)
        assert cache.stats().hits > hits


@pytest.mark.parametrize("by_block", [False, True], ids=["leaf", "block"])
def test_a_file_that_is_written_is_noticed(tmp_path, by_block):
    model = adapted(True, WIDTH)
    accelerate.disk_offload(
        model,
        tmp_path,
        "cpu",
        preload_module_classes=["LlamaDecoderLayer"] if by_block else None,
    )
    run = running(model).run
    name = f"{Q_PROJ}.base_layer.weight"
    whole = adapted(True, WIDTH)
    file = tmp_path / f"{name}.dat"
    with torch.no_grad(), attach(model) as cache:
        before = run()
        run()
        weight = whole.get_parameter(name)
        weight.mul_(1.5)
        old = file.stat().st_mtime_ns
        file.write_bytes(weight.numpy().tobytes())
        after = run()  # the file was written a moment ago: nothing is kept
        assert torch.equal(after, running(whole).run())
        assert not torch.equal(after, before)
        settle(file)
        run()
        hits = cache.stats().hits
        assert torch.equal(run(), after)
        assert cache.stats().hits > hits
        # Another file of the same size and time in its place.
        weight.mul_(1.5)
        other = tmp_path / "other"
        other.write_bytes(weight.numpy().tobytes())
        os.utime(other, ns=(old, old))
        other.replace(file)
        assert torch.equal(run(), running(whole).run())


def settle(file):
    """Wait until a file counts as left alone."""
    from dora_cache.core.facts import UncheckableError
    from dora_cache.lifecycle import offloading

    for _ in range(10_000):
        try:
            offloading._file(str(file))
        except UncheckableError:
            continue
        return


def test_a_file_is_not_trusted_at_once(tmp_path):
    """A second write within the same tick of the clock would not show."""
    model = adapted(True, WIDTH)
    accelerate.disk_offload(model, tmp_path, "cpu")
    later = 2**62  # a clock that is ahead of ours
    for file in tmp_path.glob("*.dat"):
        os.utime(file, ns=(later, later))
    run = running(model).run
    expected = running(adapted(True, WIDTH)).run
    with torch.no_grad(), attach(model) as cache:
        for _ in range(2):
            assert torch.equal(run(), expected())
        assert cache.stats().hits == 0
        assert cache.stats().reasons.keys() == {Reason.OFFLOADED.value}


def test_content_guard_sees_what_a_mapping_of_the_file_writes(tmp_path):
    """The file system counts such a write once only, until it has written the page back."""
    import numpy as np

    model = adapted(True, WIDTH)
    accelerate.disk_offload(model, tmp_path, "cpu")
    name = f"{Q_PROJ}.base_layer.weight"
    whole = adapted(True, WIDTH)
    run = running(model).run
    mapped = np.memmap(tmp_path / f"{name}.dat", dtype="float32", mode="r+")
    with torch.no_grad(), attach(model, guard="content"):
        for factor in (1.0, 1.5, 2.0):
            mapped *= factor
            whole.get_parameter(name).mul_(factor)
            settle(tmp_path / f"{name}.dat")
            for _ in range(2):
                assert torch.equal(run(), running(whole).run())


class OwnMap(dict):
    """A map of weights that is not one of accelerate's."""


def test_maps_of_others_are_not_trusted():
    model = adapted(True, WIDTH)
    master = OwnMap({name: tensor.clone() for name, tensor in model.state_dict().items()})
    accelerate.cpu_offload(
        model, "cpu", state_dict=master, preload_module_classes=["LlamaDecoderLayer"]
    )
    run = running(model).run
    with torch.no_grad(), attach(model) as cache:
        for _ in range(3):
            assert torch.equal(run(), expected_of(dict(master)))
        assert cache.stats().hits == 0


# Hooks that come and go


def test_hooks_are_removed_and_weights_offloaded_again_after_a_write():
    model = adapted(True, WIDTH)
    whole = adapted(True, WIDTH)
    run, expected = running(model).run, running(whole).run
    name = f"{Q_PROJ}.base_layer.weight"
    with torch.no_grad(), attach(model) as cache:
        assert torch.equal(run(), expected())
        for offload in (True, False, True):
            if offload:
                accelerate.cpu_offload(model, "cpu")
            else:
                accelerate.hooks.remove_hook_from_module(model, recurse=True)
                for one in (model, whole):
                    one.get_parameter(name).mul_(1.5)
            for _ in range(2):
                assert torch.equal(run(), expected())
            hits = cache.stats().hits
            assert torch.equal(run(), expected())
            assert cache.stats().hits > hits


@pytest.mark.parametrize("attached_first", [False, True])
@pytest.mark.parametrize("removed", [False, True])
def test_detaching_leaves_what_the_hooks_call_as_it_was(attached_first, removed):
    model = adapted(True, WIDTH)
    whole = running(adapted(True, WIDTH)).run
    if not attached_first:
        accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    cache = attach(model)
    if attached_first:
        accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    with torch.no_grad():
        running(model).run()
        if removed:
            accelerate.hooks.remove_hook_from_module(model, recurse=True)
        cache.detach()
        layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
        for layer in layers:
            called = layer.forward if removed else layer._old_forward
            assert called.__func__ is type(layer).forward
            assert called.__func__.__module__.startswith("peft.")
        assert torch.equal(running(model).run(), whole())


def test_copies_of_a_model_with_hooks_are_plain():
    model = adapted(True, WIDTH)
    accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    with torch.no_grad(), attach(model):
        expected = running(model).run()
        other = copy.deepcopy(model)
        other.get_parameter(f"{Q_PROJ}.base_layer.weight").mul_(1.5)
        whole = adapted(True, WIDTH)
        whole.get_parameter(f"{Q_PROJ}.base_layer.weight").mul_(1.5)
        assert torch.equal(running(other).run(), running(whole).run())
        assert torch.equal(running(model).run(), expected)


def test_hooks_of_users_are_still_hooks():
    """A forward or hook of somebody else's on an adapter's part may do anything."""
    model = adapted(True, WIDTH)
    accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)

    class Doubling(accelerate.hooks.ModelHook):
        def post_forward(self, module, output):
            return 2 * output

    part = model.get_submodule(f"{Q_PROJ}.lora_B.default")
    accelerate.hooks.add_hook_to_module(part, Doubling(), append=True)
    with torch.no_grad():
        expected = running(model).run()
        with attach(model) as cache:
            running(model).run()
            before = cache.stats()
            assert torch.equal(running(model).run(), expected)
            after = cache.stats()
        assert after.hits > before.hits  # of the other layers
        assert after.reasons[Reason.HOOKED.value] > before.reasons[Reason.HOOKED.value]


def test_a_hook_whose_method_is_replaced_is_not_known():
    model = adapted(True, WIDTH)
    accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    part = model.get_submodule(f"{Q_PROJ}.lora_B.default")
    part._hf_hook.post_forward = lambda module, output: 2 * output
    with torch.no_grad():
        expected = running(model).run()
        with attach(model) as cache:
            assert torch.equal(running(model).run(), expected)
            assert cache.stats().reasons[Reason.HOOKED.value] == 1


def test_warm_derives_what_is_offloaded():
    model, master = offloaded(by_block=False)
    with torch.no_grad(), attach(model) as cache:
        cache.warm()
        misses = cache.stats().misses
        assert misses > 0
        assert torch.equal(running(model).run(), expected_of(master))
        assert cache.stats().misses == misses
        assert all(parameter.is_meta for parameter in model.parameters())


def test_gradients_are_pefts_matter():
    model, _ = offloaded(by_block=True)
    whole = adapted(True, WIDTH)
    with attach(model) as cache:
        loss, expected = running(model).run().sum(), running(whole).run().sum()
        assert torch.equal(loss, expected)
        assert cache.stats().hits == 0


def put_hooks_everywhere(model):
    accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)


def offload_whole(model):
    accelerate.cpu_offload(model, "cpu", preload_module_classes=[type(model).__name__])


def cast(model):
    from diffusers.hooks import apply_layerwise_casting

    apply_layerwise_casting(
        model, torch.bfloat16, torch.float32, skip_modules_pattern=("norm", "lora_")
    )


EXAMPLES = {recipe.name: recipe.examples[0] for recipe in load_recipes() if recipe.examples}


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("prepare", [put_hooks_everywhere, offload_whole, cast])
@pytest.mark.parametrize("kind", EXAMPLES)
def test_every_kind_of_adapter(kind, prepare):
    """It gives what it gives uncached; and it hits, or says why not."""

    def make():
        model, x = make_model(EXAMPLES[kind])
        prepare(model)
        return lambda: getattr(output := model(x), "logits", output), model

    if kind == "prompt encoders" and prepare is not put_hooks_everywhere:
        pytest.skip("accelerate and diffusers cannot hook a base model that PEFT has twice")
    try:
        with torch.no_grad():
            expected = make()[0]()
    except (AttributeError, RuntimeError) as error:
        pytest.skip(f"PEFT cannot run it: {error}")
    run, model = make()
    with torch.no_grad(), attach(model) as cache:
        assert torch.equal(run(), expected)
        before = cache.stats()
        for _ in range(2):
            assert torch.equal(run(), expected)
        after = cache.stats()
        assert after.hits > before.hits or sum(after.reasons.values()) > sum(
            before.reasons.values()
        )
