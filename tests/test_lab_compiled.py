"""Measuring compiled kinds and exported programs: what is measured is right, and said."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner
from zoo import quiet

from dora_cache.cli.app import app
from dora_cache.lab import compiled_kinds, exported
from dora_cache.lab.bench.measure import Spread
from dora_cache.lab.compiled_kinds import COMPILED, EAGER, Cell, Measured, Settings

SMALL = {"size": 32, "layers": 2, "rounds": 3, "seconds": 0.0, "backend": "eager"}


@pytest.mark.timeout(600)
def test_a_kind_is_compared_and_timed(tmp_path):
    """Every way of an example has a time, its distance from PEFT in float64, and its graphs."""
    out, markdown = tmp_path / "compiled.json", tmp_path / "compiled.md"
    settings = Settings(kinds=("DoRA",), tokens=(2,), jobs=3, **SMALL)
    text = compiled_kinds.run_and_write(settings, out, markdown)
    data = json.loads(out.read_text())
    assert [row["example"] for row in data["rows"]] == ["DoRA", "DoRA, Embedding", "DoRA, Conv2d"]
    for row in data["rows"]:
        assert set(row["cells"]) == {"2"}, row["notes"]
        for cells in row["cells"].values():
            assert set(cells) == {EAGER, COMPILED, "dora-cache, peft", "dora-cache, fast"}
            assert all(cell["us"] > 0 and not cell["note"] for cell in cells.values())
            assert cells[COMPILED]["speedup"]["median"] == 1
            assert cells["dora-cache, peft"]["error"] == cells[EAGER]["error"] > 0
            assert cells["dora-cache, peft"]["breaks"] == 0
    assert data["rows"][1]["cells"]["2"][COMPILED]["breaks"] > 0  # PEFT's embedding
    assert text in markdown.read_text()
    assert "of 1 kinds are at least 1.3 times as fast" in text


@pytest.mark.timeout(600)
def test_a_kind_that_takes_too_long_is_a_row(tmp_path):
    """The others are measured all the same; nothing waits for it."""
    settings = Settings(kinds=("DoRA",), tokens=(1, 4), jobs=3, limit=0.01, **SMALL)
    rows = compiled_kinds.measure_compiled_kinds(settings)
    assert [set(row.notes) for row in rows] == [{1, 4}] * 3
    assert {row.notes[1] for row in rows} == {"stopped after 0 s"}
    assert "Not timed: DoRA (1): stopped after 0 s;" in compiled_kinds.summary(rows)


def test_what_is_wrong_is_said_and_not_counted():
    """A wrong kind has no time; one that fails has its reason; neither gains."""
    right = Cell(us=1.0, speedup=Spread(2.0, 1.9, 2.1), breaks=0, graphs=1, error=0.0)
    slow = Cell(us=4.0, speedup=Spread(0.5, 0.4, 0.6), breaks=2, graphs=3, error=0.0)
    wrong = Cell(breaks=0, graphs=1, error=1.0, note="wrong: 1.0e+00 from PEFT in float64")
    base = {COMPILED: Cell(us=2.0, speedup=Spread(1.0, 1.0, 1.0), breaks=1, graphs=2)}
    rows = [
        Measured("A", "A", "Linear", "float32", {1: {**base, "dora-cache, peft": right}}),
        Measured("B", "B", "Linear", "float32", {1: {**base, "dora-cache, peft": slow}}),
        Measured("C", "C", "Linear", "float32", {1: {**base, "dora-cache, peft": wrong}}),
        Measured("D", "D", "Linear", "float32", notes={1: "its process ended with -9"}),
    ]
    said = compiled_kinds.summary(rows)
    assert said.startswith("1 of 4 kinds")
    assert "Below 0.97 times: B (dora-cache, peft, 1): 0.50." in said
    assert "Graph breaks: B (dora-cache, peft, 1): 2." in said
    assert "C (dora-cache, peft, 1): wrong: 1.0e+00 from PEFT in float64" in said
    assert "D (1): its process ended with -9" in said
    table = compiled_kinds.as_markdown(rows)
    assert "| A | Linear, float32 | 2 µs, 1 graph break | 2.00 (1.90\N{EN DASH}2.10) |" in table
    assert "0.50 (0.40\N{EN DASH}0.60), 2 graph breaks" in table


def test_unknown_names_are_errors(tmp_path):
    """They say which there are."""
    with pytest.raises(ValueError, match=r"there are .*'DoRA'"):
        compiled_kinds.measure_compiled_kinds(Settings(kinds=("Dora",)))
    done = CliRunner().invoke(
        app, ["lab", "compiled", "--kind", "Dora", "--backend", "eager", "--out", str(tmp_path)]
    )
    assert done.exit_code == 2
    assert "no recipe with examples is called 'Dora'" in done.stderr
    done = CliRunner().invoke(app, ["lab", "export", "--ways", "all", "--out", str(tmp_path)])
    assert done.exit_code == 2
    assert "write some of merged, derived, baked, baked weights" in done.stderr


def test_exported_programs_are_those_of_each_way():
    """Merged weights and baked ones give one graph; without baked() the norms are in it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    lora = LoraConfig(use_dora=True, r=2, target_modules="all-linear", init_lora_weights=False)
    with quiet():
        model = get_peft_model(LlamaForCausalLM(config), lora).eval()
    ids = torch.arange(4)[None]
    counts, nbytes = {}, {}
    for way in exported.WAYS:
        with torch.no_grad(), quiet():
            program, nbytes[way] = exported._export(model, way, ids)
            expected = model(input_ids=ids, use_cache=False).logits
            torch.testing.assert_close(program.module()(ids), expected, rtol=1e-3, atol=1e-4)
        counts[way] = sum(node.op == "call_function" for node in program.graph.nodes)
    assert counts["merged"] == counts["baked weights"] < counts["baked"] < counts["derived"]
    assert 0 == nbytes["merged"] == nbytes["derived"] < nbytes["baked"] < nbytes["baked weights"]
