"""Planning: what is said before any weight is loaded comes true."""

import copy
import itertools
import json
from types import SimpleNamespace

import pytest
import torch
from peft import LoHaConfig, LoraConfig, OFTConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner
from zoo import quiet

import dora_cache
from dora_cache import cached
from dora_cache.cli.app import app
from dora_cache.core import deriver
from dora_cache.lab import planning

POLICIES = ["lru", "budget"]
SHARED = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
TUNERS = {
    "DoRA": lambda: LoraConfig(r=4, use_dora=True, **SHARED),
    "LoHa": lambda: LoHaConfig(r=4, **SHARED),
    "OFT": lambda: OFTConfig(r=0, oft_block_size=8, **SHARED),
}


def llama(dtype=torch.float32):
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        bos_token_id=0,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def folder(request, tmp_path_factory):
    """A model and one adapter of each tuner, as save_pretrained() leaves them."""
    root = tmp_path_factory.mktemp("plan")
    with quiet():
        llama(request.param).save_pretrained(root / "model")
        for name, make in TUNERS.items():
            get_peft_model(llama(request.param), make()).save_pretrained(root / name)
    return root


def loaded(folder, adapters):
    """The real thing, with weights."""
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    first, *others = adapters
    with quiet():
        model = PeftModel.from_pretrained(base, folder / first, adapter_name=first)
        for name in others:
            model.load_adapter(folder / name, adapter_name=name)
    return model.eval()


def planned(folder, adapters, numerics="peft"):
    """The plan of the same, from the two configuration files alone."""
    model = planning.without_weights(AutoConfig.from_pretrained(folder / "model"))
    configs = {name: PeftConfig.from_pretrained(folder / name) for name in adapters}
    with quiet():
        model = planning.with_adapters(model, configs)
    assert all(
        parameter.is_meta for name, parameter in model.named_parameters() if "oft" not in name
    )
    return planning.plan(model, numerics=numerics)


def forward(model):
    with torch.no_grad():
        return model(input_ids=torch.tensor([[1, 2, 3]]), use_cache=False).logits


@pytest.mark.parametrize("numerics", ["peft", "fast"])
@pytest.mark.parametrize("tuner", TUNERS)
def test_the_bytes_are_those_then_held(folder, tuner, numerics):
    """For every tuner, dtype and numerics, the plan is exact, value by value."""
    found = planned(folder, [tuner], numerics)
    model = loaded(folder, [tuner])
    with dora_cache.attach(model, numerics=numerics) as cache:
        forward(model)
        report = cache.report()
    assert found.declined == ()
    assert found.working_set == report.stats.nbytes > 0
    assert [value.nbytes for value in found.values] == [one.nbytes for one in report.seen]
    assert [(row.kind, row.adapter, row.entries, row.nbytes) for row in report.rows] == [
        (row.kind, row.adapter, row.entries, row.nbytes) for row in found.rows
    ]


def test_rows_are_by_adapter(tmp_path):
    """Of several adapters each has rows of its own, and what is whole under a cap is counted."""
    with quiet():
        llama().save_pretrained(tmp_path / "model")
        for name, rank in (("a", 2), ("b", 4), ("c", 4)):
            config = LoraConfig(r=rank, use_dora=True, **SHARED)
            get_peft_model(llama(), config).save_pretrained(tmp_path / name)
    found = planned(tmp_path, "abc")
    one = found.nbytes("a")
    assert found.adapters == ("a", "b", "c")
    assert [(row.adapter, row.nbytes) for row in found.rows] == [("a", one), ("b", one), ("c", one)]
    assert [found.whole(cap) for cap in (0, one - 1, one, 3 * one - 1, 3 * one)] == [0, 0, 1, 2, 3]
    found.check_pins(["a", "c"], 2 * one)
    with pytest.raises(dora_cache.PinError, match=r"'a', 'c' take .* pin fewer, or raise the cap"):
        found.check_pins(["a", "c"], 2 * one - 1)
    with pytest.raises(dora_cache.ConfigError, match="pin one of 'a', 'b', 'c'"):
        found.check_pins(["x"], 1)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A folder with a model and two adapters of it, and the model loaded with both."""
    root = tmp_path_factory.mktemp("pair")
    with quiet():
        llama().save_pretrained(root / "model")
        for name in "ab":
            get_peft_model(llama(), TUNERS["DoRA"]()).save_pretrained(root / name)
    return planned(root, "ab"), loaded(root, "ab")


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("names", ["a", "ab"])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.9, 1.0])
def test_the_hit_rate_is_the_one_then_seen(pair, policy, names, share, monkeypatch):
    """A model served as the plan assumes hits as often as the plan says."""
    # What budget keeps depends on what values cost, which another load may change in between.
    clock = SimpleNamespace(perf_counter=itertools.count().__next__)
    monkeypatch.setattr(deriver, "time", clock)
    found, model = pair
    cap = int(share * found.working_set)
    rate = found.hit_rate(policy, cap, list(names), tokens=3)
    with dora_cache.attach(model, backend=policy, max_bytes=cap) as cache:
        for _ in range(2):  # the second time it is settled
            before = cache.stats()
            for name in names * 3:
                model.set_adapter(name, inference_mode=True)
                for _ in range(3):
                    forward(model)
        after = cache.stats()
    seen = (after.hits - before.hits) / (after.lookups - before.lookups)
    # The plan estimates costs; lru depends on nothing but the order.
    assert seen == rate if policy == "lru" else abs(seen - rate) < 0.25


def test_the_traffic_model_at_its_ends(folder):
    """All fits: every lookup hits. A cycle that does not fit an LRU whole: none does."""
    found = planned(folder, ["DoRA"])
    assert found.hit_rate("lru", found.working_set, ["DoRA"]) == 1.0
    assert found.hit_rate("lru", 0, ["DoRA"]) == 0.0
    assert found.hit_rate("lru", found.working_set - 1, ["DoRA"]) == 0.0
    assert found.hit_rate("lru", 0, ["other"]) == 1.0


def test_budget_keeps_its_share_of_a_cycle(folder):
    """Where a forward does not fit, budget hits about as often as the cap is large."""
    found = planned(folder, ["LoHa"])
    assert 0.3 < found.hit_rate("budget", found.working_set // 2, ["LoHa"]) < 0.7


def test_pins_in_the_traffic_model(tmp_path):
    """A pinned adapter always hits, and the others have what is left."""
    values = [planning.PlannedValue("kind", adapter, 10) for adapter in "ab" for _ in range(4)]
    found = planning.Plan(tuple(values), ())
    assert found.hit_rate("lru", 60, ["a", "b"]) == 0.0
    assert found.hit_rate("lru", 60, ["a", "b"], pinned=["a"]) == 0.5
    assert found.hit_rate("lru", 60, ["b"], pinned=["a"]) == 0.0
    assert found.hit_rate("lru", 60, ["b"]) == 1.0


def test_what_cannot_be_planned_is_told(folder):
    """Adapters that nothing is cached of, and values that need data, are named with the reason."""
    config = AutoConfig.from_pretrained(folder / "model")
    model = planning.without_weights(config)
    adapters = {
        "plain": LoraConfig(r=2, **SHARED),
        "dora": LoraConfig(r=2, use_dora=True, **SHARED),
    }
    with quiet():
        model = planning.with_adapters(model, adapters)
    found = planning.plan(model)
    assert found.adapters == ("dora",)
    assert [(one.kind, one.adapter) for one in found.declined] == [("LORA", "plain")]
    assert "plain LoRA derives nothing" in found.declined[0].reason

    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, device="meta"), requires_grad=False)
            self.eval()

        @cached("count", depends_on=lambda self: [self.weight])
        def count(self):
            return torch.zeros(int(self.weight.sum()))

        @cached("double", depends_on=lambda self: [self.weight])
        def double(self):
            return self.weight * 2

    found = planning.plan(Reads())
    assert [(value.kind, value.nbytes) for value in found.values] == [("double", 12)]
    assert "cannot be told without weights" in found.declined[0].reason


def test_a_plan_without_values(folder):
    """A model with nothing to cache has an empty plan that says why."""
    config = AutoConfig.from_pretrained(folder / "model")
    model = planning.without_weights(config)
    with quiet():
        model = planning.with_adapters(model, {"a": LoraConfig(r=2, **SHARED)})
    found = planning.plan(model)
    assert (found.values, found.working_set, found.rows) == ((), 0, ())
    assert found.declined[0].adapter == "a"


def test_a_quantized_model_is_planned_as_if_it_were_not(folder):
    """The plan says so."""
    config = copy.deepcopy(AutoConfig.from_pretrained(folder / "model"))
    model = planning.without_weights(config)
    with quiet():
        model = planning.with_adapters(model, {"a": TUNERS["DoRA"]()})
    model.config.quantization_config = {"load_in_4bit": True}
    assert "as if it were not" in planning.plan(model).declined[-1].reason


def test_a_model_in_training_mode(folder):
    """Nothing is cached there, so there is nothing to plan."""
    model = planning.without_weights(AutoConfig.from_pretrained(folder / "model"))
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        planning.plan(model.train())


# The command


@pytest.fixture
def run(monkeypatch):
    for name in ("BACKEND", "MAX_BYTES", "DEVICE_BYTES", "NUMERICS", "GUARD", "OPTIONS"):
        monkeypatch.delenv(f"DORA_CACHE_{name}", raising=False)

    def invoke(*arguments):
        return CliRunner().invoke(app, ["plan", *map(str, arguments)])

    return invoke


def test_the_command_reads_configurations_only(folder, run, tmp_path):
    """Two JSON files are enough: sizes, what a cap holds, and hit rates are printed."""
    (tmp_path / "model").mkdir()
    (tmp_path / "a").mkdir()
    for source, target in (("model/config.json", "model"), ("DoRA/adapter_config.json", "a")):
        text = (folder / source).read_text()
        (tmp_path / target / source.rpartition("/")[2]).write_text(text)
    result = run(tmp_path / "model", "--adapter", f"a={tmp_path / 'a'}", "--max-bytes", "1KiB")
    assert result.exit_code == 0, result.output
    for words in ("DoRA scale", "1.75 KiB", "A cap of 1 KiB holds", "not even one", "a alone"):
        assert words in result.output
    assert "in turn" not in result.output


def test_the_command_on_a_shape(run):
    """A shape needs no file at all; without a cap, shares of the working set are tried."""
    result = run("--shape", "tiny", "--numerics", "fast", "--layers", 1)
    assert result.exit_code == 0, result.output
    for words in ("working set", "(50 %)", "(100 %)", "all in turn", "100.0%", *POLICIES):
        assert words in result.output
    result = run("--shape", "tiny", "--backend", "dict")
    assert result.exit_code == 0, result.output
    assert "dict has no cap" in result.output


def test_the_command_names_what_it_cannot_plan(run, tmp_path):
    """Adapters without a recipe are named in the output."""
    LoraConfig(r=2, **SHARED).save_pretrained(tmp_path)
    result = run("--shape", "tiny", "--adapter", f"plain={tmp_path}")
    assert result.exit_code == 0, result.output
    assert "LORA 'plain', all layers: plain LoRA derives nothing" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give a MODEL folder, or a shape"),
        (("--shape", "huge"), "there is no shape 'huge'"),
        (("--shape", "tiny", "--layers", 9), "tiny has 2 layers"),
        (("nowhere", "--adapter", "a=nowhere"), "no model folder nowhere"),
        (("nowhere",), "write --adapter name=PATH"),
        (("nowhere", "--shape", "tiny"), "there are two models"),
        (("nowhere", "--layers", 2, "--adapter", "a=b"), "--layers is for shapes"),
        (("--shape", "tiny", "--adapter", "a=nowhere"), "no adapter folder nowhere"),
        (("--shape", "tiny", "--backend", "lur"), "did you mean 'lru'"),
        (("--shape", "tiny", "--backend", "dict", "--max-bytes", "1MiB"), "takes no max_bytes"),
        (("--shape", "tiny", "--max-bytes", "lots"), "'lots' is not a size"),
        (("--shape", "tiny", "--pin", "a"), "--pin goes with a cap"),
        (("--shape", "tiny", "--max-bytes", "1KiB", "--pin", "a"), "pin fewer, or raise the cap"),
        (("--shape", "tiny", "--max-bytes", "1MiB", "--pin", "x"), "pin one of 'a', 'b'"),
    ],
)
def test_mistakes_are_told_in_one_line(run, arguments, message):
    """Each says what to write instead."""
    result = run(*arguments)
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr


def test_an_adapter_of_another_model(run, tmp_path):
    """Target modules that the model has not are told as such."""
    config = LoraConfig(r=2, use_dora=True, target_modules=["nothing"], task_type="CAUSAL_LM")
    config.save_pretrained(tmp_path)
    result = run("--shape", "tiny", "--adapter", f"a={tmp_path}")
    assert result.exit_code == 2
    assert "cannot put these adapters into this model" in result.stderr
    broken = tmp_path / "adapter_config.json"
    broken.write_text(json.dumps({"peft_type": "NO_SUCH"}))
    result = run("--shape", "tiny", "--adapter", f"a={tmp_path}")
    assert result.exit_code == 2
    assert "cannot read" in result.stderr
