"""After each operation, on every kind of DoRA layer: the outputs are the uncached model's."""

import functools
import itertools
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from dora_cache.cli.app import app
from dora_cache.lab.freshness import (
    DORA_CACHING,
    KINDS,
    LAYERS,
    OPERATIONS,
    RAW,
    Pick,
    Scene,
    attached,
    named,
    report,
    run_trial,
    trial,
)

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
DTYPES = [torch.float32, torch.bfloat16]


DOCS = Path(__file__).parent.parent / "docs"


@functools.cache
def installed():
    """Whether PyTorch and PEFT are of the versions that the table was made with."""
    pins = (DOCS.parent / "constraints.txt").read_text()
    ours = {name: version(name).partition("+")[0] for name in ("torch", "peft")}
    return all(f"{name}=={number}" in pins.split() for name, number in ours.items())


def on(device, operations):
    return [one for one in operations if one.device in {None, device}]


def by_name(operations):
    return pytest.mark.parametrize("operation", on("cpu", operations), ids=lambda one: one.name)


def expect_fresh(operation, pick=Pick(), *, dtype=torch.float32, device="cpu", **settings):  # noqa: B008
    trial = run_trial(operation, attached(**settings), pick, dtype=dtype, device=device)
    assert trial.verdict.word == "fresh", (operation.name, pick, trial.verdict)


@by_name(OPERATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outputs_are_fresh_after(operation, dtype):
    """An operation on all layers and parameters of an adapter."""
    expect_fresh(operation, dtype=dtype)


@by_name(OPERATIONS)
def test_the_documentation_has_what_happens(operation):
    """The line of the table in docs/freshness.md; `dora-cache freshness --markdown` writes it."""
    row = report.Row(
        operation, run_trial(operation, DORA_CACHING), run_trial(operation, attached())
    )
    line = report.markdown_line(row)
    table = (DOCS / "freshness-table.md").read_text()
    if installed():
        assert line in table.splitlines()
    else:  # of other versions it says only that dora-cache is right
        assert row.ours.verdict.word == "fresh"
        assert line.split("|")[1] in table


def rounding_aside(found, expected):
    """Whether outputs differ by so much, or in so many places, that no rounding decides it."""
    if found is None or expected is None or found.dtype is not expected.dtype:
        return found is not expected
    eps = torch.finfo(expected.dtype).eps
    if eps > 1e-3:  # too few digits to tell
        return (found != expected).double().mean() > 0.5
    found, expected = found.double(), expected.double()
    return (found - expected).abs().max() > 64 * eps * expected.abs().max()


@by_name([*OPERATIONS, *RAW])
def test_no_processor_has_another_table(operation):
    """Where DoraCaching is stale, it is by more than rounding, which processors do differently."""
    runs = [
        trial._outputs(operation, subject, Pick(), Scene(), trial.Trial())
        for subject in (DORA_CACHING, trial._uncached)
    ]
    same = all(one is other or torch.equal(one, other) for one, other in zip(*runs, strict=True))
    assert same or any(itertools.starmap(rounding_aside, zip(*runs, strict=True)))


@CUDA
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outputs_are_fresh_on_a_gpu(dtype):
    """The same there, with the operations that need a GPU."""
    for operation in on("cuda", OPERATIONS):
        expect_fresh(operation, dtype=dtype, device="cuda")


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("group", ["weights", "base weights", "scaling", "merging", "modes"])
def test_outputs_are_fresh_after_one_parameter_changed(group, layer):
    """One parameter of one layer, under a cap that holds little."""
    kinds = itertools.cycle(KINDS)
    for operation in on("cpu", OPERATIONS):
        if operation.group == group:
            pick = Pick("bob", "ada", layer=layer, kind=next(kinds), factor=0.5)
            expect_fresh(operation, pick, backend="lru", max_bytes=100)


@by_name(RAW)
def test_content_guard_sees(operation):
    """A write that leaves no trace but the contents themselves."""
    expect_fresh(operation, guard="content")
    pick = Pick(layer="linear", kind="B")
    expect_fresh(operation, pick, guard="content", dtype=torch.bfloat16)


@CUDA
def test_content_guard_sees_on_a_gpu():
    """The same there."""
    for operation in on("cuda", RAW):
        for dtype in DTYPES:
            expect_fresh(operation, guard="content", dtype=dtype, device="cuda")


@pytest.mark.parametrize("name", ["p.data.mul_()", "a numpy array of the same memory"])
def test_what_is_impossible_without_it(name):
    """These limits are stated in the documentation: should they fall, it has to say so.

    Without the audit as well, whose turn it may be.
    """
    assert run_trial(named(name), attached(audit=False)).verdict.word == "stale"


def test_the_judge_judges():
    """A cache that goes stale is found out, and one that fails is."""
    stale = run_trial(named("in place under no_grad"), DORA_CACHING)
    assert stale.verdict.word == "stale"
    assert float(stale.verdict.detail) > 0
    fresh = run_trial(named("no operation"), DORA_CACHING)
    assert fresh.verdict.word == "fresh"


def test_the_command_compares_both_caches(monkeypatch, tmp_path):
    """Both columns, a summary, and the table for the documentation."""
    few = [named(name) for name in ("no operation", "AdamW step, fused", "set_scale")]
    monkeypatch.setattr(report, "OPERATIONS", few)
    monkeypatch.setattr(report, "RAW", [named("p.data.mul_()")])
    markdown = tmp_path / "table.md"
    result = CliRunner().invoke(app, ["freshness", "--markdown", str(markdown), "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "After 3 ordinary operations, DoraCaching is wrong 2 times" in " ".join(
        result.stdout.split()
    )
    table = markdown.read_text()
    assert "| AdamW step, fused | **stale** | fresh | 6 → 3 | 3 derived again | warm |" in table
    assert "stale; fresh with content" in table


def test_the_command_fails_if_dora_cache_is_wrong(monkeypatch):
    """So that it can stand in somebody's CI."""
    monkeypatch.setattr(report, "OPERATIONS", [])
    monkeypatch.setattr(report, "RAW", [named("p.data.mul_()")])
    monkeypatch.setattr(report, "attached", lambda **_: attached())
    result = CliRunner().invoke(app, ["freshness", "--device", "cpu"])
    assert result.exit_code == 1
