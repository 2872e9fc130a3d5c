"""Shapes, phases, memory, compiled decoding, profiles: all of it measured on a tiny model."""

import warnings
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import dora_cache
from dora_cache.lab import bench
from dora_cache.lab.bench.ways import groups, rotated
from dora_cache.lab.models import plain_lora, random_dora
from dora_cache.lab.shapes import SHAPES, shaped

PARAMETERS = {
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "qwen2.5-7b": 7_615_616_512,
    "smollm2-135m": 134_515_008,
}
FAST = bench.with_cache(dora_cache.CacheConfig(numerics="fast"))
EXACT = bench.with_cache(dora_cache.CacheConfig())
WAYS = (bench.BASE, bench.LORA, bench.MERGED, bench.PEFT, bench.PEFT_CACHING, EXACT, FAST)
PROMPT = torch.arange(1, 7)[None]


def tiny(**options):
    return random_dora(shaped("tiny"), ["a", "b"], rank=4, **options)


@pytest.fixture
def model():
    return tiny()


@pytest.fixture(scope="module")
def measured():
    return bench.measure_phases(
        tiny(), adapters=["a", "b"], ways=WAYS, prefill=[(1, 4), (2, 8)], rounds=2
    )


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_shape_has_as_many_parameters_as_the_model_it_is_named_after(name):
    """The sizes of the published models."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SHAPES[name]))
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_shaped_model_is_one_that_transformers_would_make(dtype):
    """What is no weight, too, is as in a model that was made in the ordinary way."""
    model = shaped("tiny", dtype=dtype)
    again = AutoModelForCausalLM.from_config(model.config, dtype=dtype).eval()
    again.load_state_dict(model.state_dict())
    assert model.dtype == dtype
    assert torch.equal(bench.logits(model, PROMPT), bench.logits(again, PROMPT))
    for (name, ours), (other, theirs) in zip(
        model.named_buffers(), again.named_buffers(), strict=True
    ):
        assert (name, ours.dtype) == (other, theirs.dtype)
        assert torch.equal(ours, theirs)


def test_a_shape_can_be_cut_down_and_repeated():
    """Layers are as many as wanted, weights the same every time, and tied where they should be."""
    state = torch.get_rng_state()
    model, again = (shaped("smollm2-135m", layers=1) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert len(model.model.layers) == model.config.num_hidden_layers == 1
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for ours, theirs in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match="from 1 to 2"):
        shaped("tiny", layers=3)


def test_all_seven_linear_layers_are_adapted(model):
    """Attention and MLP alike, in every layer of the model."""
    adapted = {name.split(".")[-1] for name, part in model.named_modules()
               if hasattr(part, "lora_A")}  # fmt: skip
    assert len(adapted) == 7
    assert dora_cache.attach(model).warm(["a"]) == 7 * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adapters_have_the_dtype_that_is_wanted(dtype):
    """DoRA's adapters, and those of the LoRA beside it."""
    model = random_dora(shaped("tiny", dtype=torch.bfloat16), ["a"], dtype=dtype)
    for wrapped in (model, plain_lora(model, ["a"])):
        found = {weight.dtype for name, weight in wrapped.named_parameters() if ".a." in name}
        assert found == {dtype}


def test_random_magnitudes_matter(model):
    """A random adapter scales its outputs: without that, exactness would be no achievement."""
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    weight = layer.weight + layer.get_delta_weight("a")
    scale = layer.lora_magnitude_vector["a"].weight / weight.norm(dim=1)
    assert 0.01 < scale.std() < 0.1


def test_each_way_takes_the_first_turn():
    """The order rotates; ways that work in place are kept from the others."""
    first = [rotated(WAYS, turn)[0] for turn in range(len(WAYS))]
    assert set(first) == set(WAYS)
    assert all(set(rotated(WAYS, turn)) == set(WAYS) for turn in range(3))
    together, alone = groups(WAYS)
    assert set(together) == set(WAYS) - {bench.MERGED}
    assert alone == (bench.LORA, bench.MERGED)
    assert groups([bench.MERGED]) == [alone]


def test_every_phase_has_a_time_or_a_reason_for_every_way(measured):
    """Nothing is missing without a word, and LoRA takes as long as LoRA."""
    assert [phase.name for phase in measured.phases] == [
        "prefill 1x4", "prefill 2x8", "warm-up", "switch"
    ]  # fmt: skip
    for phase in measured.phases:
        assert list(phase.cells) == [way.name for way in WAYS]
        for cell in phase.cells.values():
            assert bool(cell.reason) == (cell.ms is None)
            assert cell.ms is None or cell.ms.low <= cell.ms.median <= cell.ms.high
    for phase in measured.phases[:2]:
        assert all(cell.ms.low > 0 for cell in phase.cells.values())
        assert all(cell.ratio.low > 0 for cell in phase.cells.values())
        assert phase.cells["lora"].ratio == bench.Spread(1, 1, 1)


def test_what_does_nothing_in_a_phase_says_so(measured):
    """The base model has no adapters to switch; merged and LoRA adapters derive nothing."""
    warm_up, switch = (phase.cells for phase in measured.phases[2:])
    assert {way for way, cell in switch.items() if cell.reason} == {"base"}
    assert {way for way, cell in warm_up.items() if cell.reason} == {"base", "lora", "merged"}


def test_memory_is_that_of_weights_and_of_what_is_held(measured, model):
    """A way weighs what its tensors do, for one adapter."""
    weigh = {way: weighed.allocated for way, weighed in measured.memory.items()}
    assert set(weigh) == {way.name for way in WAYS}
    size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    values = bench.working_set(model, ["a"])["a"]
    assert weigh["peft"] == weigh["merged"] == size
    assert weigh["dora-cache:dict"] == size + values
    assert weigh["base"] < weigh["lora"] < weigh["peft"]
    assert weigh["peft-caching"] > 10 * values + size
    assert {weighed.peak for weighed in measured.memory.values()} == {None}


def test_merging_is_measured_with_nothing_else_disturbed(model):
    """Merged weights are seen by no other way, and are given back up to rounding."""
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    comparison = bench.compare(model, PROMPT, adapters=["a", "b"], ways=WAYS, tokens=2, rounds=1)
    results = {result.way: result for result in comparison.results}
    assert list(results) == [way.name for way in WAYS]
    assert results["merged"].max_logit_difference < 1e-4
    assert results["dora-cache:dict"].max_logit_difference == 0
    assert results["dora-cache:dict-fast"].max_logit_difference < 1e-4
    assert results["dora-cache:dict"].stats.invalidations == 0
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight, before[name])


def test_the_ratio_has_a_spread(model):
    """Quartiles of the ratio surround its median; without LoRA there is neither."""
    ways = [bench.LORA, bench.PEFT]
    _, peft = bench.compare(model, PROMPT, adapters=["a"], ways=ways, tokens=4).results
    assert peft.ratio_spread.low <= peft.ratio == peft.ratio_spread.median <= peft.ratio_spread.high
    (alone,) = bench.compare(model, PROMPT, adapters=["a"], ways=ways[1:], tokens=2).results
    assert alone.ratio_spread is None


def test_the_model_is_left_without_a_trace(model):
    """After phases and a profile nothing is attached, cached or merged."""
    expected = bench.logits(model, PROMPT)
    ways = [way for way in WAYS if way is not bench.MERGED]
    bench.measure_phases(model, adapters=["a", "b"], ways=ways, rounds=1)
    bench.profile(model, PROMPT, adapter="a", way=EXACT)
    assert torch.equal(bench.logits(model, PROMPT), expected)
    assert bench.dora_caching_bytes(model) == 0
    dora_cache.attach(model).detach()


def test_one_adapter_is_not_switched(model):
    """With one adapter there is no other one to switch to."""
    found = bench.measure_phases(model, adapters=["a"], ways=[bench.LORA, EXACT], rounds=1)
    switch = found.phases[-1].cells
    assert {cell.reason for cell in switch.values()} == {"there is one adapter"}


def test_the_surplus_of_peft_needs_lora(model):
    """What PEFT derives at each forward can only be told by comparison."""
    warm_up = bench.measure_phases(model, adapters=["a"], ways=[bench.PEFT], rounds=1).phases[0]
    assert "without plain LoRA" in warm_up.cells["peft"].reason


def short_of_memory(way, after):
    """A way whose model runs out of memory after so many forwards; None: at once."""

    @contextmanager
    def run(model, adapters):
        if after is None:
            raise torch.OutOfMemoryError
        with way.open(model, adapters) as running:
            left = after

            def forward(*args, **kwargs):
                nonlocal left
                left -= 1
                if left < 0:
                    raise torch.OutOfMemoryError
                return running.model(*args, **kwargs)

            forward.parameters, forward.buffers = running.model.parameters, running.model.buffers
            yield replace(running, model=forward)

    return replace(way, open=run)


@pytest.mark.parametrize("after", [None, 0, 3])
def test_a_way_that_does_not_fit_stops_no_other(model, after):
    """Out of memory is a reason; the other ways are measured all the same."""
    ways = [bench.LORA, short_of_memory(bench.PEFT_CACHING, after), EXACT]
    found = bench.measure_phases(model, adapters=["a"], ways=ways, prefill=[(1, 4)], rounds=3)
    prefill = found.phases[0].cells
    assert prefill["peft-caching"] == bench.Cell(reason="out of memory")
    assert prefill["lora"].ms.median > 0
    assert prefill["dora-cache:dict"].ratio.median > 0
    assert set(found.memory) == {"lora", "dora-cache:dict"}


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"adapters": []}, {"ways": []}])
def test_too_little_to_measure_is_an_error(model, wrong):
    """As in a comparison."""
    settings = {"adapters": ["a"], "ways": [bench.LORA], "rounds": 1} | wrong
    with pytest.raises(ValueError, match="give"):
        bench.measure_phases(model, **settings)
    with pytest.raises(ValueError, match="training"):
        bench.measure_phases(model.train(), adapters=["a"], ways=[bench.LORA])


def test_compiled_decoding_is_compiled_and_a_failure_is_a_reason(model):
    """Steps run in compiled code; what does not compile leaves the rest alone."""
    graphs = []

    def compiler(graph, _, **__):
        graphs.append(graph)
        return graph

    @contextmanager
    def broken(*_):
        raise RuntimeError("no\nway")
        yield

    ways = [bench.BASE, bench.LORA, replace(bench.PEFT, open=broken)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        phase = bench.measure_compiled(
            model, PROMPT, adapter="a", ways=ways, tokens=3, rounds=1, backend=compiler
        )
    assert len(graphs) >= 2
    assert list(phase.cells) == ["base", "lora", "peft"]
    assert phase.cells["peft"] == bench.Cell(reason="RuntimeError: no way")
    assert phase.cells["base"].ratio.median > 0
    assert phase.cells["lora"].ratio.median == 1
    with pytest.raises(ValueError, match="three tokens"):
        bench.measure_compiled(model, PROMPT, adapter="a", ways=ways, tokens=2)


@pytest.mark.parametrize(("way", "layers"), [(bench.BASE, 15), (bench.LORA, 14), (EXACT, 14)])
def test_a_profile_says_where_time_goes(model, way, layers):
    """A profile has a table of operators and what a layer costs."""
    found = bench.profile(model, PROMPT, adapter="a", way=way)
    assert found.layers == layers
    assert 0 < found.busy <= 1
    assert found.step_ms > 0
    assert found.count > layers
    assert "aten::mm" in found.table or "aten::addmm" in found.table
    assert found.summary().startswith(f"{way.label}: ")


def test_a_long_reason_is_given_in_full_below():
    """The table has room for a few words; the rest is for the lines below it."""
    cells = {"lora": bench.Cell(reason="short"), "peft": bench.Cell(reason="long " * 20)}
    labels = {"lora": "plain LoRA", "peft": "PEFT"}
    (line,) = bench.reasons([bench.Phase("decode", cells)], labels)
    assert line == "PEFT, decode: " + "long " * 20
    table = bench.phases_table([bench.Phase("decode", cells)], labels)
    assert "".join(table.columns[3].cells).startswith("short" + "long ")
    assert len("".join(table.columns[3].cells)) == len("short") + 20


def test_the_tables_have_a_row_for_everything(measured):
    """Each phase and way has a row."""
    labels = {way.name: way.label for way in WAYS}
    assert bench.phases_table(measured.phases, labels).row_count == 4 * len(WAYS)
    assert bench.memory_table(measured.memory, labels).row_count == len(WAYS)
    without = {way: size for way, size in measured.memory.items() if way != "lora"}
    assert bench.memory_table(without, labels).row_count == len(WAYS) - 1
