"""Mixed batches are measured side by side, with adapters that are what they are said to be."""

import json
import math

import pytest
import torch
from peft import PeftModel
from typer.testing import CliRunner

from dora_cache.cli.app import app
from dora_cache.lab import bench
from dora_cache.lab.models import twin, write_adapter
from dora_cache.lab.shapes import shaped

PROMPT = torch.arange(1, 7)[None]
WAYS = {
    "base", "lora", "peft-mixed", "peft-one-by-one", "dora-cache:lora", "dora-cache:dora"
}  # fmt: skip
TINY = ("bench", "--shape", "tiny", "--tokens", "3", "--rounds", "2", "--rank", "2")


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed")
    return bench.mixture(shaped("tiny"), folder, 3, rank=2, ranks=(1, 4))


def measure(made, rows, **how):
    ways = [way for way in bench.mixed_ways(made) if way.name != "dora-cache:ranks"]
    return bench.measure_mixed(made, rows, ways=ways, **{"tokens": 2, "rounds": 1} | how)


@pytest.mark.parametrize("dora", [False, True])
def test_a_written_adapter_is_one_that_peft_reads(tmp_path, dora):
    """PEFT finds a weight for each of its parameters, and each changes the output."""
    base = shaped("tiny")
    before = bench.logits(base, PROMPT)
    write_adapter(base, tmp_path / "x", rank=2, dora=dora, dtype=torch.bfloat16, seed=1)
    model = PeftModel.from_pretrained(
        twin(base), tmp_path / "x", "x", autocast_adapter_dtype=False
    ).eval()
    loaded = model.load_adapter(tmp_path / "x", "x")
    assert not [key for key in loaded.missing_keys if "lora" in key]
    assert not loaded.unexpected_keys
    assert not torch.allclose(bench.logits(model, PROMPT), before, rtol=0.05)
    layers = [part for part in model.modules() if hasattr(part, "lora_A") and part.lora_A]
    assert len(layers) == 14
    for layer in layers:
        assert layer.r["x"] == 2
        if dora:
            weight = layer.weight + layer.get_delta_weight("x")
            scale = layer.lora_magnitude_vector["x"].weight / weight.norm(dim=1)
            assert scale.std() > 0.01
        else:
            assert not layer.lora_magnitude_vector
    assert torch.equal(bench.logits(base, PROMPT), before)


def test_written_adapters_differ(made):
    """Each row has an adapter of its own, with its own rank where ranks are mixed."""
    config = [
        json.loads((made.folders["ranks"] / name / "adapter_config.json").read_text("utf-8"))
        for name in made.names
    ]
    assert [one["r"] for one in config] == [1, 4, 1]
    outputs = []
    for name in made.names:
        made.model.set_adapter(name, inference_mode=True)
        outputs.append(bench.logits(made.model, PROMPT))
    for index, one in enumerate(outputs):
        for other in outputs[:index]:
            assert not torch.allclose(one, other, rtol=0.05)


def test_every_phase_has_every_way_and_outputs_are_right(made):
    """Times relative to LoRA's, checks of the first and the last row, and limits above the base."""
    done = []
    found = measure(
        made, 3, tokens=11, rounds=3, prompt=4, per_second=1e9,
        on_step=lambda *counts: done.append(counts),
    )  # fmt: skip
    assert [phase.name for phase in found.phases] == ["decode, 3 rows", "prefill 3x4"]
    for phase in found.phases:
        assert set(phase.cells) == WAYS
        for cell in phase.cells.values():
            assert 0 < cell.ms.low <= cell.ms.median <= cell.ms.high
            assert cell.ratio.low > 0
        assert phase.cells["lora"].ratio == bench.Spread(1, 1, 1)
    turns = len(WAYS) * (3 * 3 + 3)  # a generation's first token, eight, and two; and the prefills
    assert done == [(index + 1, turns) for index in range(turns)]
    assert [(check.way, check.what[:5]) for check in found.checks] == [
        (way, row) for way in ("dora-cache:lora", "dora-cache:dora") for row in ("row 0", "row 2")
    ]
    assert all(check.right and check.error < 1e-5 < check.effect for check in found.checks)
    base = found.phases[0].cells["base"].ms.median
    lora, dora = found.limits
    assert base < lora.ms < dora.ms
    assert lora.ms - base == pytest.approx(lora.nbytes / 1e6)
    assert dora.times == pytest.approx(found.phases[0].cells[dora.way].ms.median / dora.ms)


def test_time_that_is_up_leaves_three_rounds(made):
    """A time limit ends a phase early, not before it has three rounds."""
    done = []
    measure(made, 1, rounds=9, seconds=0, on_step=lambda count, _: done.append(count))
    assert len(done) == len(WAYS) * 3 * 2


def test_a_wrong_output_is_seen(made):
    """An adapter that is another than PEFT's is an error beyond rounding."""
    way = next(way for way in bench.mixed_ways(made) if way.name == "dora-cache:dora")
    with way.open(made.model, made.names) as running:
        turned = running.pool.use(list(reversed(made.names)))
        with turned:
            wrong = bench.logits(running.model, PROMPT.expand(3, -1))
        with running.turn():
            right = bench.logits(running.model, PROMPT.expand(3, -1))
    error = float((wrong[0] - right[0]).norm() / right[0].norm())
    assert not bench.Check("way", "row 0", error, effect=1.0, tolerance=5e-2).right
    assert not bench.Check("way", "row 0", 0.01, effect=0.02, tolerance=5e-2).right
    assert not bench.Check("way", "row 0", math.nan, effect=1.0, tolerance=5e-2).right


def test_the_model_is_left_without_a_trace(made):
    """After a measurement the model has no pool and computes what it did."""
    before = bench.logits(made.base, PROMPT)
    measure(made, 2)
    assert torch.equal(bench.logits(made.base, PROMPT), before)
    with pytest.raises(ValueError, match="3 adapters"):
        measure(made, 4)


def test_the_command_shows_and_writes_what_it_found(tmp_path):
    """Each number of rows has a table, limits and checks, and all of it is in the file."""
    result = run(*TINY, "--mixed", "3,1", "--ranks", "1,4", "--prompt", 4, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    for part in ("decode, 1 rows", "prefill 3x4", "pool, ranks 1, 4", "limit of pool, DoRA"):
        assert part in result.stdout
    assert "WRONG" not in result.stdout
    data = json.loads((tmp_path / "mixed.json").read_text(encoding="utf-8"))
    assert (data["model"], data["dtype"], data["rows"], data["ranks"]) == (
        "tiny", "float32", [1, 3], [1, 4],
    )  # fmt: skip
    assert set(data["phases"]) == {
        "decode, 1 rows", "prefill 1x4", "decode, 3 rows", "prefill 3x4"
    }  # fmt: skip
    for cells in data["phases"].values():
        assert set(cells) == set(data["labels"]) == WAYS | {"dora-cache:ranks"}
    assert len(data["checks"]) == 3 * (1 + 2)
    assert all(check["right"] for check in data["checks"])
    assert len(data["limits"]) == 3 * 2
    assert data["bytes_per_second"] > 0
    assert data["machine"]["torch"] == torch.__version__


def test_the_command_measures_the_ways_that_are_wanted(tmp_path):
    """In bfloat16 as well; PEFT's mixed batches, which take long, can be left out."""
    more = ("--dtype", "bf16", "--ways", "lora,dora-cache:dora", "--out", tmp_path)
    result = run(*TINY, "--mixed", 2, *more)
    assert result.exit_code == 0, result.output
    data = json.loads((tmp_path / "mixed.json").read_text(encoding="utf-8"))
    assert set(data["phases"]["decode, 2 rows"]) == {"lora", "dora-cache:dora"}
    assert data["dtype"] == "bfloat16"
    assert data["limits"] == []


def test_a_wrong_output_ends_the_command(tmp_path, monkeypatch):
    """The numbers are written, and the exit code says that they are of no use."""
    wrong = bench.Check("dora-cache:dora", "row 0", 0.5, effect=1.0, tolerance=1e-4)
    cells = {way: bench.Cell(reason="no") for way in WAYS}
    found = bench.Mixed((bench.Phase("decode, 1 rows", cells),), (wrong,), ())
    monkeypatch.setattr(bench, "measure_mixed", lambda *_, **__: found)
    result = run(*TINY, "--mixed", 1, "--out", tmp_path)
    assert result.exit_code == 2
    assert "WRONG: pool, DoRA, row 0" in result.stdout
    assert "1 of 1 outputs" in result.stderr
    data = json.loads((tmp_path / "mixed.json").read_text(encoding="utf-8"))
    assert [check["right"] for check in data["checks"]] == [False]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--mixed", "1,x"], ["'1,x'", "--mixed 1,4,16"]),
        (["--mixed", "0"], ["'0'"]),
        (["--mixed", "2", "--ranks", ","], ["--ranks"]),
        (["--mixed", "2", "--graphs", "--device", "cpu"], ["--graphs", "CUDA"]),
        (["--mixed", "2", "--prefill", "1x4"], ["--prefill", "--mixed"]),
        (["--mixed", "2", "--max-bytes", "1MiB"], ["--max-bytes"]),
        (["--mixed", "2", "--ways", "peft"], ["'peft'", "peft-mixed"]),
        (["--prompt", "4"], ["--prompt", "--mixed 1,4,16"]),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path, arguments, parts):
    """What goes only with --mixed, or not with it, and lists that are none."""
    result = run(*TINY, *arguments, "--out", tmp_path)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    for part in parts:
        assert part in result.stderr
