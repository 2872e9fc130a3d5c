"""Libraries whose functions write weights through .data: what is derived from these goes at once.

Libraries that are not installed are skipped. Stand-ins, modules with the same names in
``sys.modules``, show what does not depend on a library's own code.
"""

import contextlib
import copy
import gc
import importlib
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn
from zoo import dora_model, quiet, run, sample

import dora_cache
from dora_cache.lifecycle.writers import WRITERS


class Setup:
    """A model to attach, another of the same kind, and an input."""

    def __init__(self):
        self.model = dora_model()
        self.other = copy.deepcopy(self.model)
        with torch.no_grad():
            for parameter in self.other.parameters():
                parameter.mul_(1.25)
        self.x = sample("linear")

    def expect_followed(self, write, model=None):
        """After the write the output is the uncached one, and what was stored is gone by then."""
        model = model or self.model
        model.eval()
        with dora_cache.attach(model) as cache:
            before = run(model, self.x)
            assert cache.stats().entries == 1
            with quiet():
                write()
            assert cache.stats().entries == 0
            output = run(model, self.x)
            with cache.bypass():
                assert torch.equal(output, run(model, self.x))
            assert not torch.equal(output, before)


@pytest.fixture(autouse=True)
def _no_others():
    gc.collect()  # caches that other tests left attached


def library(name):
    with quiet():
        return pytest.importorskip(name, exc_type=ImportError)


def accelerator():
    return library("accelerate").Accelerator(cpu=True)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("method", ["copy_to", "restore"])
def test_diffusers_emamodel(method, foreach):
    """copy_to() and restore() of diffusers' EMAModel, which are given a generator."""
    setup = Setup()
    ema_model = library("diffusers.training_utils").EMAModel
    ema = ema_model(setup.other.parameters(), foreach=foreach)
    ema.store(setup.other.parameters())
    setup.expect_followed(lambda: getattr(ema, method)(setup.model.parameters()))


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("method", ["copy_to", "restore"])
def test_torch_ema(method, given):
    """copy_to() and restore() of torch_ema's average, into its own parameters or given ones."""
    setup = Setup()
    kind = library("torch_ema.ema").ExponentialMovingAverage
    ema = kind(setup.model.parameters(), decay=0.5)
    ema.store()
    for kept in (*ema.shadow_params, *ema.collected_params):
        kept.mul_(1.25)
    arguments = [setup.model.parameters()] if given else []
    setup.expect_followed(lambda: getattr(ema, method)(*arguments))


def test_torch_ema_as_a_context():
    """Within average_parameters() the averages are used, and after it the weights of before."""
    setup = Setup()
    kind = library("torch_ema.ema").ExponentialMovingAverage
    ema = kind(setup.other.parameters(), decay=0.5)

    def average():
        with ema.average_parameters(setup.model.parameters()):
            inside.append(run(setup.model, setup.x))

    inside = []
    with dora_cache.attach(setup.model):
        before = run(setup.model, setup.x)
        average()
        assert torch.equal(run(setup.model, setup.x), before)
    assert torch.equal(inside[0], run(setup.other, setup.x))


EMA_PYTORCH = {
    "ema_pytorch EMA": {"beta": 0.5, "update_every": 1, "update_after_step": 0},
    "ema_pytorch EMA, foreach": {"beta": 0.5, "update_every": 1, "use_foreach": True},
    "post_hoc_ema KarrasEMA": {"sigma_rel": 0.1, "update_every": 1},
}


@pytest.mark.parametrize("act", ["update", "copy_params_from_model_to_ema"])
@pytest.mark.parametrize("which", EMA_PYTORCH)
def test_ema_pytorch(which, act):
    """ema_pytorch updates the average, and begins it as a copy."""
    setup = Setup()
    ema = ema_of(which, setup)
    setup.expect_followed(lambda: getattr(ema, act)(), ema.ema_model)


@pytest.mark.parametrize("which", EMA_PYTORCH)
def test_ema_pytorch_writes_to_the_model(which):
    """ema_pytorch copies the average to the model."""
    setup = Setup()
    ema = ema_of(which, setup)
    setup.expect_followed(lambda: ema.copy_params_from_ema_to_model())


def ema_of(which, setup):
    module, _, name = which.partition(",")[0].partition(" ")
    kind = getattr(library(f"ema_pytorch.{module}"), name)
    with quiet():
        ema = kind(setup.model, ema_model=setup.other, **EMA_PYTORCH[which])
    ema.initted.fill_(value=True)
    ema.step.fill_(200)
    return ema


def test_trl_reference_model():
    """TRL's callback blends the policy into the reference model."""
    callback = library("trl.trainer.callbacks").SyncRefModelCallback
    setup = Setup()
    accelerator()
    args = SimpleNamespace(ref_model_sync_steps=1, ref_model_mixup_alpha=0.5)
    syncing = callback(ref_model=setup.model, accelerator=None)
    setup.expect_followed(
        lambda: syncing.on_step_end(
            args, SimpleNamespace(global_step=1), None, model=setup.other.eval()
        )
    )


@pytest.mark.parametrize("hook", ["on_validation_epoch_start", "on_train_end"])
@pytest.mark.parametrize("package", ["pytorch_lightning", "lightning.pytorch"])
def test_lightning_weight_averaging(package, hook):
    """Lightning's callback swaps the weights for validation, and copies them in the end."""
    module = library(f"{package}.callbacks.weight_averaging")
    setup = Setup()
    callback = module.WeightAveraging()
    callback._average_model = torch.optim.swa_utils.AveragedModel(setup.other)
    setup.expect_followed(lambda: getattr(callback, hook)(None, setup.model))


def test_lightning_weight_averaging_of_the_average():
    """The average is written to as well when the two are swapped."""
    module = library("pytorch_lightning.callbacks.weight_averaging")
    setup = Setup()
    callback = module.WeightAveraging()
    callback._average_model = torch.optim.swa_utils.AveragedModel(setup.other)
    average = callback._average_model.module
    setup.expect_followed(lambda: callback.on_validation_epoch_end(None, setup.model), average)


def test_timm_model_ema():
    """The average of timm is updated by an operation that CUDA does not count."""
    setup = Setup()
    ema = library("timm.utils.model_ema").ModelEmaV3(setup.model, decay=0.5)
    setup.expect_followed(lambda: ema.update(setup.other), ema.module)


@pytest.mark.parametrize("leave", [False, True])
def test_accelerate_local_sgd(leave, monkeypatch):
    """What all processes reduce in place is written in this one as well, at a step and in the end.

    One process reduces nothing, so the operation of several is stood in for.
    """
    module = library("accelerate.local_sgd")
    single = accelerator()
    monkeypatch.setattr(single, "reduce", lambda tensor, reduction: tensor.mul_(1.25))
    setup = Setup()
    syncing = module.LocalSGD(single, setup.model, local_sgd_steps=1)
    syncing.enabled, syncing.accelerator, syncing.model = True, single, setup.model
    syncing.local_sgd_steps = 1
    syncing.model_sync_obj = contextlib.nullcontext()
    setup.expect_followed(lambda: syncing.__exit__(None, None, None) if leave else syncing.step())


def test_mmengine_averages():
    """MMEngine's average is updated, and its hook swaps it with the model."""
    averaged = library("mmengine.model.averaged_model")
    hooks = library("mmengine.hooks.ema_hook")
    setup = Setup()
    ema = averaged.ExponentialMovingAverage(setup.model, momentum=0.5)
    ema.steps.fill_(1)
    setup.expect_followed(lambda: ema.update_parameters(setup.other), ema.module)
    hook = hooks.EMAHook(begin_iter=0)
    hook.src_model, hook.ema_model = setup.model, ema
    runner = SimpleNamespace(iter=5)
    setup.expect_followed(lambda: hook.before_val_epoch(runner))


# Stand-ins


def stand_in(monkeypatch, name, **classes):
    module = ModuleType(name)
    vars(module).update(classes)
    monkeypatch.setitem(sys.modules, name, module)
    return module


class Average:
    """Writes like diffusers' EMAModel."""

    def __init__(self, factor):
        self.factor = factor

    def copy_to(self, parameters):
        for parameter in parameters:
            parameter.data.mul_(self.factor)

    restore = copy_to


class Fallen(Average):
    """Another version of it, whose method takes a model and fails half-way."""

    def copy_to(self, model, strict):
        super().copy_to(model.parameters())
        raise ArithmeticError


def a_switch():
    nn.Dropout().train()


def a_step():
    weight = nn.Parameter(torch.ones(1))
    weight.grad = torch.ones(1)
    torch.optim.SGD([weight]).step()


@pytest.mark.parametrize("event", [a_switch, a_step])
def test_a_library_that_is_imported_after_attaching(event, monkeypatch):
    """Its functions are followed from the next switch of a mode or optimizer step on."""
    monkeypatch.delitem(sys.modules, "diffusers.training_utils", raising=False)
    setup = Setup()
    kind = type("EMAModel", (Average,), {"copy_to": Average.__dict__["copy_to"]})

    def write():
        stand_in(monkeypatch, "diffusers.training_utils", EMAModel=kind)
        event()
        kind(1.25).copy_to(setup.model.parameters())

    setup.expect_followed(write)


def test_methods_are_wrapped_where_they_are_defined_and_unwrapped(monkeypatch):
    """Subclasses share the wrapper of their base; after the last detach all is as it was."""
    base = type("Base", (), dict(vars(Average)))
    before = dict(vars(base))
    sub = type("EMAModel", (base,), {})
    stand_in(monkeypatch, "diffusers.training_utils", EMAModel=sub)
    functions = {}
    for writer in WRITERS:  # those of real libraries, as far as they have been imported
        owner = getattr(sys.modules.get(writer.module), writer.owner, None)
        for name in writer.methods if owner else ():
            functions[owner, name] = owner.__dict__.get(name)
    first, second = Setup(), Setup()
    caches = [dora_cache.attach(one.model) for one in (first, second)]
    assert vars(base)["copy_to"] is not before["copy_to"]
    assert "copy_to" not in vars(sub)
    run(first.model, first.x)
    sub(1.25).copy_to(first.model.parameters())
    assert caches[0].stats().entries == 0
    caches[0].detach()
    assert vars(base)["copy_to"] is not before["copy_to"]
    caches[1].detach()
    assert dict(vars(base)) == before
    for (owner, name), function in functions.items():
        assert owner.__dict__.get(name) is function


def test_static_methods_stay_static(monkeypatch):
    """A static method is followed however it is called, and is one again after the detach."""

    class SyncRefModelCallback:
        @staticmethod
        def sync_target_model(model, target_model, alpha):
            Average(alpha).copy_to(target_model.parameters())

    stand_in(monkeypatch, "trl.trainer.callbacks", SyncRefModelCallback=SyncRefModelCallback)
    before = vars(SyncRefModelCallback)["sync_target_model"]
    for callback in (SyncRefModelCallback, SyncRefModelCallback()):
        setup = Setup()
        setup.expect_followed(
            lambda: callback.sync_target_model(setup.other, target_model=setup.model, alpha=1.25)
        )
    assert vars(SyncRefModelCallback)["sync_target_model"] is before


def test_another_version_of_a_library_voids_everything(monkeypatch):
    """A method whose arguments are not understood may have written anything, errors included."""
    kind = type("EMAModel", (), dict(vars(Fallen)))
    kind.__init__ = Average.__init__
    kind.copy_to = lambda self, model, strict: Fallen(1.25).copy_to(model, strict)
    stand_in(monkeypatch, "diffusers.training_utils", EMAModel=kind)
    setup = Setup()

    def write():
        with pytest.raises(ArithmeticError):
            kind(1.25).copy_to(setup.model, strict=True)

    setup.expect_followed(write)


def test_other_models_are_left_alone():
    """A write to one model's weights drops nothing of another attached model."""
    setup = Setup()
    kind = library("torch_ema.ema").ExponentialMovingAverage
    ema = kind(setup.other.parameters(), decay=0.5)
    with dora_cache.attach(setup.model) as cache, dora_cache.attach(setup.other) as other:
        run(setup.model, setup.x)
        run(setup.other, setup.x)
        ema.copy_to()
        assert (cache.stats().entries, other.stats().entries) == (1, 0)


def test_attaching_imports_no_library():
    """The libraries in the table are looked for among what is imported, and not imported."""
    there = set(sys.modules)
    setup = Setup()
    with dora_cache.attach(setup.model):
        run(setup.model, setup.x)
        setup.model.train()
        setup.model.eval()
    assert not {writer.module for writer in WRITERS} & (set(sys.modules) - there)


def test_the_table_names_what_there_is():
    """Every method in the table is one of the library's, as far as that is installed."""
    for writer in WRITERS:
        with quiet():
            try:
                module = importlib.import_module(writer.module)
            except (ImportError, RuntimeError):
                continue
        for name in writer.methods:
            assert callable(getattr(getattr(module, writer.owner), name))


def test_a_library_imported_after_attaching():
    """Its functions are followed from the first use on, and left alone once nothing is attached."""
    pytest.importorskip("torch_ema")
    script = """
        import sys
        import torch
        import dora_cache
        from zoo import dora_model, run, sample

        model, x = dora_model("linear"), sample("linear")
        finders = list(sys.meta_path)
        with dora_cache.attach(model, audit=False) as cache:
            for _ in range(3):
                run(model, x)
            assert "torch_ema" not in sys.modules
            from torch_ema import ExponentialMovingAverage
            weights = [p for n, p in model.named_parameters() if "lora_A" in n]
            ema = ExponentialMovingAverage(weights, decay=0.5)
            ema.shadow_params = [kept * 3 for kept in ema.shadow_params]
            ema.copy_to()
            found = run(model, x)
            with cache.bypass():
                assert torch.equal(found, run(model, x))
        assert sys.meta_path == finders
        assert not hasattr(ExponentialMovingAverage.copy_to, "__wrapped__")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
