"""The workflow files: what they run exists, and what they use is pinned."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
IGNORED = re.compile(r"--ignore=(\S+)")


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_pinned(path):
    """Every action is pinned to a commit, with its version beside it."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if "uses:" in line]
    assert lines
    for line in lines:
        assert re.fullmatch(r" *(- )?uses: [\w./-]+@[0-9a-f]{40}  # v\d+\.\d+\.\d+", line), line


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_targets_exist(path):
    """Every ``make`` target that a workflow names is in the Makefile."""
    text = path.read_text(encoding="utf-8")
    named = re.findall(r"run: make ([\w-]+)$", text, re.MULTILINE)
    for several in re.findall(r"target: \[(.*)\]", text):
        named += several.split(", ")
    assert named
    assert set(named) <= set(re.findall(r"^([a-z][a-z-]*):", MAKEFILE, re.MULTILINE))


def test_every_system_runs_the_tests_of_make_test():
    """The matrix leaves out what ``make test`` leaves out."""
    (recipe,) = re.findall(r"^test: .*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)
    assert "$(ELSEWHERE)" in recipe
    (elsewhere,) = re.findall(r"^ELSEWHERE := (.*)", MAKEFILE, re.MULTILINE)
    matrix = (ROOT / ".github/workflows/tests.yml").read_text(encoding="utf-8")
    assert IGNORED.findall(matrix) == IGNORED.findall(elsewhere) != []
