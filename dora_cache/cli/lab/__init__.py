"""``dora-cache lab``: measurements of the cache itself, and simulators."""

import typer

from dora_cache.cli.lab.audit import audit
from dora_cache.cli.lab.caps import caps
from dora_cache.cli.lab.compiled import compiled
from dora_cache.cli.lab.coverage import coverage
from dora_cache.cli.lab.exported import export
from dora_cache.cli.lab.field import field
from dora_cache.cli.lab.pages import pages
from dora_cache.cli.lab.serving import serve_faults, serve_load
from dora_cache.cli.lab.simulate import simulate
from dora_cache.cli.lab.traffic import traffic

__all__ = ["lab"]

lab = typer.Typer(no_args_is_help=True)
for command in (
    coverage,
    compiled,
    export,
    field,
    caps,
    traffic,
    serve_load,
    serve_faults,
    simulate,
    audit,
    pages,
):
    lab.command()(command)
