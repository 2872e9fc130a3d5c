"""The documentation, run: its code, its settings files, its commands and its links."""

from __future__ import annotations

import itertools
import os
import re
import sys
import tomllib
import types
import unittest
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest

from dora_cache import CacheConfig, recipes
from dora_cache.backends import ENTRY_POINT_GROUP, registry

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "SECURITY.md",
    *DOCS,
]
NAMES = [page.name for page in PAGES]

# A fence, with the comments that stand right before it: <!-- no-run -->, <!-- file: NAME -->.
FENCE = re.compile(
    r"(?P<comments>(?:^<!--[^\n]*-->\n+)*)^(?P<ticks>`{3,})(?P<language>[^\n`]*)\n"
    r"(?P<text>.*?)^(?P=ticks)$",
    re.MULTILINE | re.DOTALL,
)
INLINE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\[[^\]]*\]\((?!https?://|#)([^)#]+)")
LANGUAGES = {"python", "toml", "console", "text"}


@dataclass(frozen=True)
class Block:
    language: str
    text: str
    comments: str
    line: int

    @property
    def file(self):
        """The name under which the reader is told to save the block, if so."""
        named = re.search(r"<!-- file: (\S+) -->", self.comments)
        return named[1] if named else None


def blocks(page):
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            language=match["language"].strip(),
            text=match["text"],
            comments=match["comments"],
            line=text.count("\n", 0, match.start("text")),
        )
        for match in FENCE.finditer(text)
    ]


def commands(page):
    """Yield the words of every command on a page: console lines, and code within sentences."""
    for block in blocks(page):
        if block.language == "console":
            for line in block.text.splitlines():
                assert line.startswith("$ "), f"a console line without a prompt: {line!r}"
                yield line.removeprefix("$ ").split()
    outside = FENCE.sub("", page.read_text(encoding="utf-8"))
    for match in INLINE.finditer(outside):
        yield match[1].split()


@pytest.fixture
def namespace(monkeypatch, tmp_path):
    """An empty module for a page's code, in an empty folder; what it registers is undone."""
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with (
        mock.patch.dict(os.environ),
        mock.patch.dict(registry._registered),
        mock.patch.dict(recipes._registered),
    ):
        yield vars(module)
    for name in [name for name in sys.modules if (tmp_path / f"{name}.py").exists()]:
        del sys.modules[name]


def run_python(block, page, namespace):
    # The code keeps its place in the page, so that tracebacks show the page's own lines.
    code = compile("\n" * block.line + block.text, str(page), "exec")
    if "<!-- no-run -->" not in block.comments:
        exec(code, namespace)


def check_toml(block, saved):
    data = tomllib.loads(block.text)
    if "project" in data:
        for group, points in data["project"]["entry-points"].items():
            assert group in {ENTRY_POINT_GROUP, recipes.ENTRY_POINT_GROUP}
            assert all(re.fullmatch(r"[\w.]+:\w+", target) for target in points.values())
    else:
        CacheConfig.from_file(saved)


def run_test_cases(namespace):
    for name, case in namespace.items():
        if name.startswith("Test") and issubclass(case, unittest.TestCase):
            result = unittest.TestResult()
            unittest.defaultTestLoader.loadTestsFromTestCase(case).run(result)
            assert result.testsRun, name
            assert result.wasSuccessful(), result.errors + result.failures


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_code_of_the_page_runs(page, namespace, tmp_path):
    """A page's code runs in order, its assertions and tests hold, its settings are accepted."""
    for number, block in enumerate(blocks(page)):
        saved = tmp_path / (block.file or f"block{number}.{block.language}")
        if block.file or block.language == "toml":
            saved.write_text(block.text, encoding="utf-8")
        if block.language == "toml":
            check_toml(block, saved)
        elif block.language == "python" and not block.file:
            run_python(block, page, namespace)
    run_test_cases(namespace)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_block_is_of_a_kind_that_is_checked(page):
    """No block escapes the tests by an unknown language."""
    for block in blocks(page):
        directive = block.language.startswith("{") and page in DOCS
        assert directive or block.language in LANGUAGES, f"{page.name}, line {block.line}"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_make_targets_exist(page):
    """Every ``make`` target that a page names is in the Makefile."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))
    for command in commands(page):
        if command[0] == "make":
            named = {word for word in command[1:] if "=" not in word}
            assert named <= targets


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_subcommands_exist(page, monkeypatch, capsys):
    """Every ``dora-cache`` subcommand that a page names shows its help."""
    for command in commands(page):
        if command[0].rpartition("/")[2] != "dora-cache" or len(command) == 1:
            continue
        from dora_cache.cli import main

        words = itertools.takewhile(re.compile(r"[a-z]+").fullmatch, command[1:])
        monkeypatch.setattr(sys, "argv", ["dora-cache", *words, "--help"])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code in {None, 0}, capsys.readouterr().err


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_within_the_repository_lead_somewhere(page):
    """Every relative link on a page names a file that exists."""
    outside = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in LINK.findall(outside):
        assert (page.parent / target).exists(), target


def test_readme_has_a_place_for_the_measured_table():
    """The README keeps the two markers between which the demo's table goes."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    start, end = "<!-- demo-table:start -->", "<!-- demo-table:end -->"
    assert text.count(start) == text.count(end) == 1
    assert text.index(start) < text.index(end)
