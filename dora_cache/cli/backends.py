"""``dora-cache backends``: what can be given as a backend."""

from __future__ import annotations

import warnings

import typer
from rich.table import Table

from dora_cache.backends import available
from dora_cache.cli.console import reported, results

__all__ = ["backends"]


def backends() -> None:
    """List the backends that can be chosen, built in and installed."""
    with reported():
        table = Table()
        table.add_column("backend", style="bold", no_wrap=True)
        for column in ("origin", "settings (* must be given)", "what it does"):
            table.add_column(column)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            found = available()
        for warning in seen:
            typer.echo(f"warning: {warning.message}", err=True)
        for info in found.values():
            settings = ", ".join(
                f"{name}*" if name in info.required else name for name in info.options
            )
            table.add_row(info.name, info.origin, settings or "-", info.summary.replace("`", ""))
        results().print(table)
