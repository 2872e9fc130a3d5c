"""The table of set-ups: it has what is listed, and says what came of each."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from dora_cache.cli.app import app
from dora_cache.lab.field import SetUp, measuring, setups
from dora_cache.lab.field.measuring import NOT_TRIED, Row, verdict
from dora_cache.reasons import Reason

ROOT = Path(__file__).parents[1]
EVERYWHERE = SetUp.__dataclass_fields__["cannot"].default
SETUP = setups("transformers")[0]


def cells(line):
    return [cell.replace(r"\|", "|").strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def documented():
    """Return name, library and what is said of each set-up in the documentation."""
    lines = (ROOT / "docs" / "where-it-works-table.md").read_text(encoding="utf-8").splitlines()
    library, rows = None, []
    for line in lines:
        if line.startswith("## "):
            library = line.removeprefix("## ")
        elif line.startswith("|") and not line.startswith(("| set-up", "| ---")):
            name, cached, *_ = cells(line)
            rows.append((name, library, cached))
    return rows


def test_the_documentation_has_every_set_up_once():
    """`dora-cache lab field --markdown docs/where-it-works-table.md` writes it."""
    listed = [(setup.name, setup.library) for setup in setups()]
    assert len(set(listed)) == len(listed)
    assert [(name, library.split()[0]) for name, library, *_ in documented()] == listed


@pytest.mark.parametrize("setup", setups(), ids=lambda setup: f"{setup.library}, {setup.name}")
def test_the_documentation_says_whether_it_is_cached(setup):
    """As the set-up is listed; one may be left untried only if some machines cannot run it."""
    (row,) = (
        row for row in documented() if (row[0], row[1].split()[0]) == (setup.name, setup.library)
    )
    expected = verdict(() if setup.reason is None else (setup.reason.value,))
    note = f" ({setup.note})" if setup.note else ""
    untried = row[2].startswith(NOT_TRIED) and setup.cannot is not EVERYWHERE
    assert row[2] == f"{expected}{note}" or untried


@pytest.mark.parametrize("setup", setups(), ids=lambda setup: f"{setup.library}, {setup.name}")
def test_the_named_test_exists(setup):
    """Each set-up has a file that tests it, which is what the table names."""
    text = (ROOT / measuring.test_of(setup)).read_text(encoding="utf-8")
    assert "setups(" in text or "SETUPS" in text


def measure(setup, **settings):
    return measuring.measure(setup, **({"width": 16, "rounds": 3, "seconds": 0} | settings))


def test_a_row_has_times_and_their_ratios():
    """All ways are timed, and compared within rounds."""
    row = measure(SETUP)
    assert (row.cached, row.agrees, row.reasons, row.absent) == ("yes", True, (), {})
    assert set(row.ms) == set(measuring.WAYS)
    assert set(row.ratios) == {"uncached / cached", "cached / LoRA"}
    for spread in (*row.ms.values(), *row.ratios.values()):
        assert 0 < spread.low <= spread.median <= spread.high < math.inf
    assert row.version


def hooked(dora, width):
    built = SETUP.build(dora, width)
    for module in built.model.modules():
        if isinstance(module, torch.nn.Linear):
            hook = module.register_forward_hook(lambda *_: None)
            built.undo.callback(hook.remove)
    return built


def test_a_set_up_that_is_not_cached_has_its_reason():
    """It agrees if it is listed with that reason, and with that alone."""
    right = replace(SETUP, build=hooked, reason=Reason.HOOKED)
    row = measure(right)
    assert (row.cached, row.agrees) == ("no: hooks on a part", True)
    assert not measure(replace(right, reason=None)).agrees
    assert not measure(replace(right, reason=Reason.TRACED)).agrees
    assert not measure(replace(SETUP, reason=Reason.HOOKED)).agrees
    text = measuring.as_markdown([row])
    assert "| no: hooks on a part |" in text
    assert f"- hooks on a part: {Reason.HOOKED.advice}" in text


def wrong(dora, width):
    built = SETUP.build(dora, width)
    run, calls = built.run, iter(range(10**6))
    built.run = lambda: run() + next(calls)
    return built


def test_wrong_outputs_stand_out():
    """They never agree with what is listed, and are in bold."""
    row = measure(replace(SETUP, build=wrong))
    assert not row.agrees
    assert "| **wrong outputs** |" in measuring.as_markdown([row])
    assert "wrong outputs" in measuring.summary([row])


def test_a_set_up_that_fails_has_its_error():
    """One that cannot be built costs its own row, not the others."""

    def build(*_):
        raise ValueError("no such | model")

    row = measure(replace(SETUP, build=build))
    assert (row.cached, row.agrees) == ("fails: ValueError: no such | model", False)
    assert cells(measuring.markdown_line(row))[1] == "**fails: ValueError: no such | model**"


def test_a_set_up_that_cannot_be_tried_says_why():
    """What is missing is no fault, and is not counted as tried."""
    rows = [
        measure(replace(SETUP, library="no_such_library")),
        measure(replace(SETUP, cannot=lambda: "needs a GPU")),
    ]
    assert [(row.cached, row.agrees) for row in rows] == [
        ("not tried: no_such_library is not installed", True),
        ("not tried: needs a GPU", True),
    ]
    assert "Of 0 set-ups tried, 0 are cached. 2 cannot be tried here." in measuring.summary(rows)


def test_where_peft_cannot_run_it_there_is_no_uncached_time():
    """The reference is what outputs are compared with, and is not timed as PEFT's."""

    def build(dora, width):
        built = SETUP.build(dora, width)
        built.reference = built.run
        return built

    row = measure(replace(SETUP, build=build))
    assert row.agrees
    assert set(row.ms) == {"cached", "LoRA"}
    assert row.absent == {"uncached": "PEFT cannot"}
    assert set(row.ratios) == {"cached / LoRA"}
    assert "| PEFT cannot |" in measuring.as_markdown([row])


def test_where_plain_lora_cannot_run_the_rest_is_measured():
    """Its error stands in the place of its time; what it had set up is undone."""
    undone = []

    def build(dora, width):
        built = SETUP.build(dora, width)
        built.undo.callback(undone.append, dora)
        if not dora:
            built.run = lambda: 1 / 0
        return built

    row = measure(replace(SETUP, build=build))
    assert row.agrees
    assert set(row.ms) == {"uncached", "cached"}
    assert row.absent["LoRA"].startswith("ZeroDivisionError")
    assert sorted(undone) == [False, True, True, True]


def run(*arguments):
    return CliRunner().invoke(app, ["lab", "field", *map(str, arguments)])


def test_the_command_shows_and_saves_the_rows(tmp_path):
    """Table, JSON and Markdown have one library's set-ups, and the machine."""
    markdown = tmp_path / "table.md"
    more = ("--width", 16, "--seconds", 0, "--out", tmp_path, "--markdown", markdown)
    result = run("--library", "transformers", *more)
    assert result.exit_code == 0, result.output
    data = json.loads((tmp_path / "field.json").read_text(encoding="utf-8"))
    names = [setup.name for setup in setups("transformers")]
    assert [row["name"] for row in data["rows"]] == names
    assert data["machine"]["torch"] == torch.__version__
    text = markdown.read_text(encoding="utf-8")
    assert data["machine"]["cpu"] in text
    for name in names:
        assert name in result.stdout
        assert f"| {name} |" in text


def test_the_command_fails_where_a_row_is_other_than_listed(tmp_path, monkeypatch):
    """So it can stand in a CI."""
    row = Row("one", "torch", "2", "yes", agrees=False, test="")
    monkeypatch.setattr(measuring, "measure", lambda *_, **__: row)
    result = run("--out", tmp_path, "--named", "add_adapter")
    assert result.exit_code == 1, result.output
    assert "Other than listed: torch: one (yes)" in result.stdout


def test_no_set_up_of_that_name_is_an_error(tmp_path):
    """It costs one line."""
    result = run("--library", "accelerate", "--named", "nothing", "--out", tmp_path)
    assert result.exit_code != 0
    assert "no set-up of accelerate has 'nothing' in its name" in result.stderr


def test_an_unknown_library_is_an_error(tmp_path):
    """It costs one line that names those there are."""
    result = run("--library", "transformer", "--out", tmp_path)
    assert result.exit_code == 2
    assert "--library takes" in result.stderr
    assert "transformers" in result.stderr
