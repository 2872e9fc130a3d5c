"""The documentation: its code runs, its settings are accepted, its commands and links exist."""

from __future__ import annotations

import itertools
import re
import sys

import pytest
from documents import DOCS, FENCE, IN_THE_FIELD, PAGES, ROOT, blocks, run_page

INLINE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\[[^\]]*\]\((?!https?://|#)([^)#]+)")
LANGUAGES = {"python", "toml", "console", "text"}


def name(page):
    return page.name


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


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name not in IN_THE_FIELD], ids=name
)
def test_code_of_the_page_runs(page, tmp_path, monkeypatch):
    """A page's code runs in order, its assertions and tests hold, its settings are accepted."""
    run_page(page, tmp_path, monkeypatch)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_block_is_of_a_kind_that_is_checked(page):
    """No block escapes the tests by an unknown language."""
    for block in blocks(page):
        directive = block.language.startswith("{") and page in DOCS
        assert directive or block.language in LANGUAGES, f"{page.name}, line {block.line}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_make_targets_exist(page):
    """Every ``make`` target that a page names is in the Makefile."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))
    for command in commands(page):
        if command[0] == "make":
            named = {word for word in command[1:] if "=" not in word}
            assert named <= targets


@pytest.mark.parametrize("page", PAGES, ids=name)
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


@pytest.mark.parametrize("page", PAGES, ids=name)
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
