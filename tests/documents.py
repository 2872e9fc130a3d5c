"""Pages of the documentation: their blocks, and how their code is run."""

import os
import re
import sys
import tomllib
import types
import unittest
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

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
# Pages whose code needs other libraries or several processes: tests/field/test_pages.py runs it.
IN_THE_FIELD = {"diffusers.md", "fsdp2.md", "qdora.md"}

# A fence, with the comments that stand right before it: <!-- no-run -->, <!-- file: NAME -->.
# One within a comment of several lines is run and not shown.
FENCE = re.compile(
    r"(?P<comments>(?:^<!--[^\n]*-->\n+)*)^(?P<ticks>`{3,})(?P<language>[^\n`]*)\n"
    r"(?P<text>.*?)^(?P=ticks)$",
    re.MULTILINE | re.DOTALL,
)


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
            line=text.count("\n", 0, match.start("ticks")) + 1,
        )
        for match in FENCE.finditer(text)
    ]


def run_page(page, folder, monkeypatch):
    """Run a page's code in order, in an empty folder; check its settings and test cases."""
    with _namespace(folder, monkeypatch) as namespace:
        for number, block in enumerate(blocks(page)):
            saved = folder / (block.file or f"block{number}.{block.language}")
            if block.file or block.language == "toml":
                saved.write_text(block.text, encoding="utf-8")
            if block.language == "toml":
                _check_toml(block, saved)
            elif block.language == "python" and not block.file:
                _run_python(block, page, namespace)
        _run_test_cases(namespace)


@contextmanager
def _namespace(folder, monkeypatch):
    """An empty module for a page's code; what it registers is undone."""
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    with (
        mock.patch.dict(os.environ),
        mock.patch.dict(registry._registered),
        mock.patch.dict(recipes._registered),
    ):
        yield vars(module)
    for name in [name for name in sys.modules if (folder / f"{name}.py").exists()]:
        del sys.modules[name]


def _run_python(block, page, namespace):
    # The code keeps its place in the page, so that tracebacks show the page's own lines.
    code = compile("\n" * block.line + block.text, str(page), "exec")
    if "<!-- no-run -->" not in block.comments:
        exec(code, namespace)


def _check_toml(block, saved):
    data = tomllib.loads(block.text)
    if "project" in data:
        for group, points in data["project"]["entry-points"].items():
            assert group in {ENTRY_POINT_GROUP, recipes.ENTRY_POINT_GROUP}
            assert all(re.fullmatch(r"[\w.]+:\w+", target) for target in points.values())
    else:
        CacheConfig.from_file(saved)


def _run_test_cases(namespace):
    for name, case in namespace.items():
        if name.startswith("Test") and issubclass(case, unittest.TestCase):
            result = unittest.TestResult()
            unittest.defaultTestLoader.loadTestsFromTestCase(case).run(result)
            assert result.testsRun, name
            assert result.wasSuccessful(), result.errors + result.failures
