"""The figures of the documentation: current, and drawn from what they claim to show."""

import importlib.util
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

DOCS = Path(__file__).parents[1] / "docs"
_spec = importlib.util.spec_from_file_location("figures", DOCS / "figures.py")
figures = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(figures)


@pytest.mark.parametrize("name", figures.FIGURES)
def test_the_figure_is_current(name):
    """Run `python docs/figures.py` after a change to a table, a module or a layer."""
    assert (DOCS / name).read_text(encoding="utf-8") == figures.FIGURES[name]()


@pytest.mark.parametrize("name", [name for name in figures.FIGURES if name.endswith(".svg")])
def test_the_figure_is_well_formed_and_within_its_bounds(name):
    """It is XML, and no box and no text leaves the drawing."""
    root = ET.fromstring(figures.FIGURES[name]())
    *_, width, height = map(float, root.get("viewBox").split())
    boxes = root.findall("{*}rect")
    assert len(boxes) > 5
    for box in boxes:
        assert float(box.get("x")) + float(box.get("width")) <= width
        assert float(box.get("y")) + float(box.get("height")) <= height
    for text in root.findall("{*}text"):
        if text.get("text-anchor") is None:  # some 6 units a character
            assert float(text.get("x")) + 6 * len(text.text) <= width + 20, text.text


def test_a_changed_table_changes_the_headline(tmp_path, monkeypatch):
    """The figures in the chart are those of docs/benchmarks.md."""
    text = (DOCS / "benchmarks.md").read_text(encoding="utf-8")
    decode = figures.table(text, "## Measured on a GPU", "decode")["decode"]["PEFT"]
    (tmp_path / "benchmarks.md").write_text(text.replace(decode, "9.87"), encoding="utf-8")
    assert ">9.87<" not in figures.headline()
    monkeypatch.setattr(figures, "DOCS", tmp_path)
    assert ">9.87<" in figures.headline()


def test_a_table_that_is_not_there_is_an_error():
    """It names the heading and the row."""
    with pytest.raises(LookupError, match=r"'# A' has a row 'x'"):
        figures.table("# A\n| a | b |\n| --- | --- |\n| y | 1 |\n", "# A", "x")


def test_every_module_of_the_picture_exists_and_is_described():
    """Each has a file, and a docstring that begins with a sentence."""
    table = figures.modules().splitlines()[2:]
    assert len(table) == sum(map(len, figures.layers()))
    assert all(line.split("|")[2].strip() for line in table)
    assert all(figures.source(name).exists() for layer in figures.layers() for name in layer)
