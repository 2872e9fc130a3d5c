"""Adapters in Diffusers' models and pipelines."""

import pytest
import torch
from field_setups import check, ids

import dora_cache
from dora_cache.lab.field import setups
from dora_cache.lab.field.of_transformers import config

WIDTH = 32
pytestmark = pytest.mark.filterwarnings(
    "ignore:Already found a `peft_config`"
)  # of a second adapter


@pytest.mark.parametrize("setup", setups("diffusers"), ids=ids)
def test_setup(setup):
    check(setup)


@pytest.fixture(name="of")
def _of():
    pytest.importorskip("diffusers")
    from dora_cache.lab.field import of_diffusers

    return of_diffusers


def weights_of(of, seed, targets):
    """Return the weights of a DoRA adapter as load_lora_weights takes them."""
    from peft import get_peft_model_state_dict

    model = of.unet(WIDTH)
    settings = config(True, target_modules=targets)
    torch.manual_seed(seed)
    model.add_adapter(settings, "x")
    found = get_peft_model_state_dict(model, adapter_name="x")
    return {f"unet.{name}": tensor for name, tensor in found.items()}


def compare(cache, run, *, hits):
    """The output is that without a cache; the second forward derives nothing."""
    first = run()
    before = cache.stats()
    second = run()
    after = cache.stats()
    with cache.bypass():
        expected = run()
    assert torch.equal(first, expected)
    assert torch.equal(second, expected)
    assert after.misses == before.misses
    assert (after.hits > before.hits) == hits
    assert after.bypasses == before.bypasses
    return expected


@pytest.fixture(name="pipe")
def _pipe(of):
    pipe = of.pipeline(WIDTH)
    pipe.load_lora_weights(weights_of(of, 1, of.TARGETS), adapter_name="a")
    pipe.load_lora_weights(weights_of(of, 2, ["to_q", "to_v"]), adapter_name="b")
    pipe.set_adapters("a")
    with torch.no_grad():
        yield pipe


def test_strengths_that_change_at_each_call(of, pipe):
    run = of.running(pipe.unet, WIDTH)
    with dora_cache.attach(pipe) as cache:
        outputs = []
        for names, strengths in [
            (["a"], [0.5]),
            (["a", "b"], [0.7, 0.3]),
            (["b"], [1.0]),
            (["a"], [{"down": 0.2, "mid": 1.0, "up": {"block_0": [0.4, 0.5]}}]),
        ] * 2:
            pipe.set_adapters(names, strengths)
            outputs.append(compare(cache, run, hits=True))
        assert not torch.equal(outputs[0], outputs[3])  # the strengths matter
        misses = cache.stats().misses
        pipe.set_adapters(["a"], [0.5])
        run()
        assert cache.stats().misses == misses  # a strength there was before


def test_fuse_and_unfuse(of, pipe):
    run = of.running(pipe.unet, WIDTH)
    with dora_cache.attach(pipe) as cache:
        before = compare(cache, run, hits=True)
        pipe.fuse_lora()
        fused = compare(cache, run, hits=False)
        assert torch.allclose(fused, before, atol=1e-4)
        pipe.unfuse_lora()
        compare(cache, run, hits=True)


def test_delete_and_disable(of, pipe):
    run = of.running(pipe.unet, WIDTH)
    with dora_cache.attach(pipe) as cache:
        compare(cache, run, hits=True)
        pipe.disable_lora()
        compare(cache, run, hits=False)
        pipe.enable_lora()
        compare(cache, run, hits=True)
        pipe.set_adapters("b")
        compare(cache, run, hits=True)
        pipe.delete_adapters("a")
        compare(cache, run, hits=True)
        assert {row.adapter for row in cache.report().rows} == {"b"}


def test_unload_and_load_again(of, pipe):
    run = of.running(pipe.unet, WIDTH)
    with dora_cache.attach(pipe) as cache:
        compare(cache, run, hits=True)
        assert cache.stats().entries
        pipe.unload_lora_weights()
        assert cache.stats().entries == 0
        compare(cache, run, hits=False)
        pipe.load_lora_weights(weights_of(of, 3, of.TARGETS), adapter_name="c")
        compare(cache, run, hits=True)
        assert cache.stats().entries == 4 * 2 * len(list(transformers_in(pipe.unet)))


def transformers_in(model):
    return [part for part in model.modules() if type(part).__name__ == "BasicTransformerBlock"]


def test_hotswap(of, pipe):
    """By PEFT's function: Diffusers calls it with names under which it does not find DoRA's."""
    from peft.utils.hotswap import hotswap_adapter_from_state_dict

    run = of.running(pipe.unet, WIDTH)
    new = {
        name: torch.randn_like(tensor)
        for name, tensor in pipe.unet.state_dict().items()
        if "lora_" in name and ".a" in name
    }
    with dora_cache.attach(pipe) as cache:
        before = compare(cache, run, hits=True)
        hotswap_adapter_from_state_dict(pipe.unet, new, "a", pipe.unet.peft_config["a"])
        assert not torch.equal(compare(cache, run, hits=True), before)


def test_layers_that_are_added_later(of):
    pipe = of.pipeline(WIDTH)
    pipe.load_lora_weights(weights_of(of, 1, ["to_q"]), adapter_name="a")
    run = of.running(pipe.unet, WIDTH)
    with torch.no_grad(), dora_cache.attach(pipe) as cache:
        compare(cache, run, hits=True)
        entries = cache.stats().entries
        pipe.load_lora_weights(weights_of(of, 2, of.TARGETS), adapter_name="b")
        pipe.set_adapters("b")
        compare(cache, run, hits=True)
        assert cache.stats().entries == entries + 4 * entries
    kinds = {type(part) for part in pipe.unet.modules()}
    assert not any("dora_cache" in kind.__module__ for kind in kinds)


def test_training_stands_aside(of):
    """An injected layer keeps ``training``; a forward that wants gradients shows that it trains."""
    model = of.unet(WIDTH)
    model.add_adapter(config(True, target_modules=of.TARGETS), "a")
    run = of.running(model, WIDTH)
    with dora_cache.attach(model) as cache:
        run().square().mean().backward()
        reasons = cache.stats().reasons
        assert set(reasons) == {"gradients wanted"}
        with torch.no_grad():
            run()
        assert cache.stats().reasons["training mode"]
        assert cache.stats().hits == cache.stats().misses == 0
        model.eval()
        with torch.no_grad():
            compare(cache, run, hits=True)


def test_dropout_stands_aside(of):
    model = of.unet(WIDTH)
    model.add_adapter(config(True, target_modules=of.TARGETS, lora_dropout=0.5), "a")
    run = of.running(model, WIDTH)
    with torch.no_grad(), dora_cache.attach(model) as cache:
        outputs = []
        for bypassed in (False, True):
            torch.manual_seed(5)
            if bypassed:
                with cache.bypass():
                    outputs.append(run())
            else:
                outputs.append(run())
                assert set(cache.stats().reasons) == {"dropout at work"}
        assert torch.equal(*outputs)
        model.eval()
        compare(cache, run, hits=True)


def test_repeated_blocks_compiled(of):
    model = of.flux(WIDTH)
    model.add_adapter(config(True, target_modules=of.TARGETS), "a")
    run = of.running(model, WIDTH)
    with torch.no_grad():
        expected = run()
        with dora_cache.attach(model) as cache:
            model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
            assert torch.allclose(run(), expected, atol=1e-5)
            assert torch.allclose(run(), expected, atol=1e-5)
            for part in model.modules():
                if hasattr(part, "lora_B"):
                    part.lora_B["a"].weight.mul_(0.5)
            changed = run()
            with cache.bypass():
                plain = run()
            assert torch.allclose(changed, plain, atol=1e-5)
            assert not torch.allclose(changed, expected, atol=1e-5)
