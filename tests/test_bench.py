"""Measuring: what is compared is what it says it is, and the numbers add up."""

import json
import warnings
from contextlib import suppress

import pytest
import torch
from peft import LoraConfig, OFTConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import dora_cache
from dora_cache.lab import bench
from dora_cache.lab.layer import WAYS, count_frames, measure_layer
from dora_cache.lab.machine import describe_machine
from dora_cache.lab.models import plain_lora, random_dora, twin
from dora_cache.units import format_bytes

PROMPT = torch.arange(1, 7)[None]


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return random_dora(LlamaForCausalLM(config).eval(), ["a", "b"], rank=4)


@pytest.fixture
def comparison(model):
    return bench.compare(
        model,
        PROMPT,
        adapters=["a", "b"],
        ways=bench.standard_ways(max_bytes=3000),
        tokens=4,
        rounds=2,
    )


def test_a_twin_shares_every_weight_and_no_module(model):
    """Twins have the same parameters and different modules."""
    other = twin(model)
    for (name, ours), (again, theirs) in zip(
        model.named_parameters(), other.named_parameters(), strict=True
    ):
        assert name == again
        assert ours is theirs
    assert not set(map(id, model.modules())) & set(map(id, other.modules()))
    assert torch.equal(bench.logits(model, PROMPT), bench.logits(other, PROMPT))


def test_what_happens_to_a_twin_does_not_happen_to_the_model(model):
    """Attaching a cache to a twin and unloading it leave the model alone."""
    expected = bench.logits(model, PROMPT)
    other = twin(model)
    with dora_cache.attach(other) as cache:
        bench.logits(model, PROMPT)
        assert cache.stats().lookups == 0
    other.unload()
    assert torch.equal(bench.logits(model, PROMPT), expected)


def test_plain_lora_has_the_shapes_of_the_dora_adapters(model):
    """The yardstick has the ranks, targets and base weights of the original, without DoRA."""
    plain = plain_lora(model, ["a", "b"])
    shapes = {
        name: weight.shape for name, weight in model.named_parameters() if "magnitude" not in name
    }
    assert {name: weight.shape for name, weight in plain.named_parameters()} == shapes
    assert not any(config.use_dora for config in plain.peft_config.values())
    assert all(config.use_dora for config in model.peft_config.values())
    base = dict(model.named_parameters())
    for name, weight in plain.named_parameters():
        assert (weight is base[name]) == ("lora" not in name)


def test_plain_lora_stands_in_for_other_kinds_of_adapters():
    """An adapter that is no LoRA is compared with a LoRA on the same modules."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    oft = get_peft_model(
        LlamaForCausalLM(config),
        OFTConfig(r=0, oft_block_size=8, target_modules=["q_proj"], task_type="CAUSAL_LM"),
        adapter_name="a",
    ).eval()
    plain = plain_lora(oft, ["a"])
    assert isinstance(plain.peft_config["a"], LoraConfig)
    assert any("q_proj.lora_A.a" in name for name, _ in plain.named_parameters())
    comparison = bench.compare(
        oft, PROMPT, adapters=["a"], ways=bench.standard_ways(), tokens=2, rounds=1
    )
    assert {result.max_logit_difference for result in comparison.results} == {None, 0.0}


def test_random_adapters_are_seeded_and_leave_the_random_state(model):
    """The same seed gives the same adapters, another one others; torch's own state stays."""
    before = torch.get_rng_state()
    base = twin(model).unload()
    same = random_dora(twin(base), ["a", "b"], rank=4)
    other = random_dora(twin(base), ["a", "b"], rank=4, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(bench.logits(same, PROMPT), bench.logits(model, PROMPT))
    assert not torch.equal(bench.logits(other, PROMPT), bench.logits(model, PROMPT))


def test_decoding_gives_the_tokens_of_generate(model):
    """The measured loop is greedy generation, token by token."""
    decoded = bench.decode(model, PROMPT, 6)
    with torch.inference_mode():
        ids = model.generate(
            input_ids=PROMPT,
            attention_mask=torch.ones_like(PROMPT),
            do_sample=False,
            min_new_tokens=6,
            max_new_tokens=6,
        )
    assert decoded.tokens == tuple(ids[0, PROMPT.shape[1] :].tolist())
    assert len(decoded.step_ms) == 5
    assert min(decoded.first_ms, *decoded.step_ms) > 0


def test_every_cached_way_is_exact(comparison):
    """PEFT's cache and ours change no logit; what computes something else is not compared."""
    for result in comparison.results:
        expected = None if result.way in ("base", "lora") else 0.0
        assert result.max_logit_difference == expected, result.way


def test_counters_and_bytes_are_those_of_each_way(comparison):
    """Each way shows what it holds; only dora-cache counts."""
    results = {result.way: result for result in comparison.results}
    needed = sum(comparison.working_set.values())
    assert results["base"].held_bytes is None
    assert results["peft"].held_bytes is None
    assert results["peft-caching"].held_bytes > needed
    assert results["dora-cache:dict"].held_bytes == needed
    assert results["dora-cache:cpu"].held_bytes == needed
    assert results["dora-cache:lru"].held_bytes <= 3000 < needed
    assert results["dora-cache:lru"].stats.evictions > 0
    assert results["dora-cache:dict"].stats.evictions == 0
    assert results["peft-caching"].stats is None


def test_the_working_set_is_a_float_for_each_output(model, comparison):
    """Each adapter needs one float32 per output of each layer."""
    outputs = sum(
        weight.numel()
        for name, weight in model.named_parameters()
        if "magnitude" in name and ".a." in name
    )
    assert comparison.working_set == {"a": 4 * outputs, "b": 4 * outputs}


def test_a_plain_lora_adapter_needs_nothing(model):
    """An adapter that derives nothing has a working set of zero bytes."""
    model.add_adapter("c", LoraConfig(r=2, target_modules=["q_proj"]))
    model.eval()
    assert bench.working_set(model, ["a", "c"])["c"] == 0


def test_times_are_consistent(comparison):
    """The median lies in its range, and plain LoRA costs as much as itself."""
    for result in comparison.results:
        for spread in (result.token_ms, result.first_ms):
            assert 0 < spread.low <= spread.high
        assert result.ratio > 0
    assert {result.way: result.ratio for result in comparison.results}["lora"] == 1.0


def test_the_model_is_left_as_it_was(model):
    """After a comparison the model has no cache, no new classes, and the same outputs."""
    expected = bench.logits(model, PROMPT)
    kinds = [type(module) for module in model.modules()]
    bench.compare(model, PROMPT, adapters=["a"], ways=bench.standard_ways(), tokens=2, rounds=1)
    assert [type(module) for module in model.modules()] == kinds
    assert torch.equal(bench.logits(model, PROMPT), expected)
    assert bench.dora_caching_bytes(model) == 0
    dora_cache.attach(model).detach()


def test_doracaching_is_switched_off_again(model):
    """PEFT's global switch is off between turns and afterwards, even after a failure."""
    from peft.tuners.lora import dora

    with suppress(ZeroDivisionError), bench.PEFT_CACHING.open(model, ["a"]) as running:
        with running.turn():
            bench.logits(running.model, PROMPT)
            assert dora.ENABLE_DORA_CACHING
        assert not dora.ENABLE_DORA_CACHING
        assert running.held() > 0
        raise ZeroDivisionError
    assert running.held() == 0


def test_progress_reaches_its_end(model):
    """Steps are counted one by one up to the announced total."""
    seen = []
    bench.compare(
        model,
        PROMPT,
        adapters=["a", "b"],
        ways=[bench.LORA, bench.PEFT],
        tokens=3,
        rounds=2,
        on_step=lambda label, done, total: seen.append((label, done, total)),
    )
    assert [done for _, done, _ in seen] == list(range(1, seen[-1][2] + 1))
    assert {label for label, _, _ in seen} == {bench.LORA.label, bench.PEFT.label}


@pytest.mark.parametrize(
    "wrong",
    [
        {"tokens": 1},
        {"rounds": 0},
        {"adapters": []},
        {"ways": []},
        {"ways": [bench.LORA, bench.LORA]},
    ],
)
def test_too_little_to_measure_is_an_error(model, wrong):
    """Settings that leave nothing to measure, or name a way twice, are refused."""
    settings = {"adapters": ["a"], "ways": [bench.LORA], "tokens": 2, "rounds": 1} | wrong
    with pytest.raises(ValueError, match="give"):
        bench.compare(model, PROMPT, **settings)


def test_training_mode_is_an_error(model):
    """A model in training mode is not measured."""
    with pytest.raises(ValueError, match="training"):
        bench.compare(model.train(), PROMPT, adapters=["a"], ways=[bench.PEFT])


def test_a_comparison_without_lora_has_no_ratio(model):
    """Without the yardstick there is no ratio, and the reference need not be measured."""
    way = bench.with_cache(dora_cache.CacheConfig(), label="mine")
    comparison = bench.compare(model, PROMPT, adapters=["a"], ways=[way], tokens=2, rounds=1)
    (result,) = comparison.results
    assert (result.ratio, result.label, result.max_logit_difference) == (None, "mine", 0.0)


def test_the_report_names_every_way(comparison, tmp_path):
    """Table, JSON and chart have every way in them."""
    data = json.loads(json.dumps(bench.as_dict(comparison)))
    assert list(data["ways"]) == [result.way for result in comparison.results]
    assert data["ways"]["dora-cache:lru"]["stats"]["evictions"] > 0
    assert bench.table(comparison).row_count == len(comparison.results)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # matplotlib's own
        bench.draw(comparison, tmp_path / "chart.png", title="title")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "0.977 KiB"),
        (622080, "608 KiB"),
        (1 << 20, "1 MiB"),
        (1244160, "1.19 MiB"),
        (5 << 30, "5 GiB"),
    ],
)
def test_sizes_are_short(count, text):
    """Sizes have about three digits and a binary unit."""
    assert format_bytes(count) == text


def test_the_machine_has_no_name():
    """What is said of the machine tells its kind, not which one it is."""
    import platform

    machine = describe_machine()
    assert machine["cores"] >= 1
    assert machine["torch"] == torch.__version__
    assert platform.node() not in map(str, machine.values())


def test_a_layer_is_measured_in_every_way():
    """Plain LoRA, uncached DoRA and both numerics, each with a median and quartiles."""
    found = measure_layer(rank=2, rows=3, rounds=2, shape=(12, 8), adapter_dtype=torch.bfloat16)
    assert tuple(found) == WAYS
    for spread in found.values():
        assert 0 < spread.low <= spread.median <= spread.high


def test_frames_are_counted():
    """Those of Python functions alone, the one that is called included."""

    def inner():
        return len("builtin")

    assert count_frames(inner) == 1
    assert count_frames(lambda: [inner(), inner()]) == 3
