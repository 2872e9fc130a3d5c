"""Settings of the documentation, built by ``make docs``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import dora_cache

if TYPE_CHECKING:
    from sphinx.application import Sphinx

# Texts of attributes and properties as they were written: napoleon would take what stands before
# a colon for a type.
_written: dict[str, list[str]] = {}


def _keep(_app: Sphinx, what: str, name: str, _o: object, _p: object, lines: list[str]) -> None:
    if what in {"attribute", "property"}:
        _written[name] = list(lines)


def _restore(_app: Sphinx, _w: str, name: str, _o: object, _p: object, lines: list[str]) -> None:
    lines[:] = _written.pop(name, lines)


def setup(app: Sphinx) -> None:
    """Let napoleon, whose priority is 500, work between the two steps."""
    app.connect("autodoc-process-docstring", _keep, priority=400)
    app.connect("autodoc-process-docstring", _restore, priority=600)


project = "dora-cache"
author = "the dora-cache authors"
version = release = dora_cache.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
# The tables are parts of pages.
exclude_patterns = ["_build", "*-table.md"]
myst_heading_anchors = 3

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_member_order = "bysource"
napoleon_use_ivar = True  # the attributes that a class lists are not documented a second time

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_title = f"dora-cache {release}"
html_show_copyright = False
