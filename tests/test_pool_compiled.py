"""Compiled models: which adapters a batch has is data, so one graph serves every mix."""

import random

import pool_oracle
import pytest
import torch
import torch._dynamo
from peft import LoraConfig, get_peft_model

from dora_cache import AdapterPool

TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]


@pytest.fixture
def folder(tmp_path):
    """Eight adapters of different ranks, every other one DoRA."""
    for number in range(8):
        config = LoraConfig(
            r=2 + number,
            target_modules=TARGETS,
            use_dora=number % 2 == 0,
            init_lora_weights=False,
        )
        adapter = get_peft_model(pool_oracle.language_model(), config)
        adapter.save_pretrained(tmp_path / f"a{number}")
    return tmp_path


def test_one_graph_for_every_mix(folder):
    """A hundred mixes, with loads and evictions in between, and nothing is compiled again."""
    torch._dynamo.reset()
    model = pool_oracle.language_model()
    pool = AdapterPool(model)
    names = pool.add_folder(folder)
    pool.pin("a7")
    largest = pool.stats().device_bytes
    pool.unpin("a7")
    pool.resize(device_bytes=4 * largest)
    ids = torch.arange(20).view(4, 5)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")

    def run(mix, model):
        with torch.no_grad(), pool.use(mix):
            return model(ids, use_cache=False).logits

    run(names[:4], compiled)
    before = pool.stats()
    generator = random.Random(0)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(100):
            mix = generator.choices([*names, None], k=4)
            torch.testing.assert_close(run(mix, compiled), run(mix, model), rtol=1e-5, atol=1e-6)
        with torch.no_grad():
            outside = compiled(ids, use_cache=False).logits
    after = pool.stats()
    assert after.loads - before.loads >= 50
    assert after.evictions - before.evictions >= 50
    pool.close()
    with torch.no_grad():
        torch.testing.assert_close(outside, model(ids, use_cache=False).logits)


def test_a_write_to_the_base_weights(folder):
    """Compiled code has the scales of the weights there are."""
    torch._dynamo.reset()
    model = pool_oracle.language_model()
    pool = AdapterPool(model)
    pool.add_folder(folder)
    ids = torch.arange(10).view(2, 5)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    with torch.no_grad(), pool.use(["a0", None]):
        compiled(ids, use_cache=False)
        for parameter in model.parameters():
            parameter.mul_(1.25)
        found = compiled(ids, use_cache=False).logits
        expected = model(ids, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    pool.close()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_one_captured_graph_for_every_mix(folder):
    """A captured CUDA graph serves mixes, loads, evictions and writes, and the base model."""
    model = pool_oracle.language_model().float().cuda()
    ids = torch.arange(20, device="cuda").view(4, 5)
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits
    with AdapterPool(model, max_rank=16) as pool, torch.no_grad():
        names = pool.add_folder(folder)
        pool.pin("a7")
        largest = pool.stats().device_bytes
        pool.unpin("a7")
        pool.resize(device_bytes=4 * largest)

        def run():
            return model(ids, use_cache=False).logits

        with pool.use(names[:4]):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                run()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                output = run()
        before = pool.stats()
        generator = random.Random(0)
        for number in range(60):
            mix = generator.choices([*names, None], k=4)
            with pool.use(mix):
                if number == 40:
                    for parameter in model.parameters():
                        parameter.mul_(1.25)
                if number >= 40:  # the scales are looked at where a batch begins
                    with pool.use(mix):
                        graph.replay()
                else:
                    graph.replay()
                torch.testing.assert_close(output, run(), rtol=1e-5, atol=1e-5)
        after = pool.stats()
        assert after.evictions - before.evictions >= 30
        for parameter in model.parameters():
            parameter.div_(1.25)
        graph.replay()
        torch.testing.assert_close(output, plain, rtol=1e-4, atol=1e-5)
