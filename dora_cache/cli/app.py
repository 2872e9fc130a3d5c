"""All commands of ``dora-cache``."""

from typing import Annotated

import typer

from dora_cache import __version__
from dora_cache.cli.backends import backends
from dora_cache.cli.bench import bench
from dora_cache.cli.demo import demo
from dora_cache.cli.doctor import doctor
from dora_cache.cli.freshness import freshness
from dora_cache.cli.generate import generate
from dora_cache.cli.lab import lab
from dora_cache.cli.plan import plan
from dora_cache.cli.serve import serve
from dora_cache.cli.top import top

__all__ = ["app"]

app = typer.Typer(
    name="dora-cache",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (demo, generate, serve, doctor, bench, plan, freshness, backends, top):
    app.command()(command)
app.add_typer(lab, name="lab", help="Measure the cache itself, and simulate eviction policies.")


def _print_version(wanted: bool) -> None:  # noqa: FBT001 - as typer calls it
    if wanted:
        typer.echo(f"dora-cache {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    *,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and exit.", is_eager=True, callback=_print_version
        ),
    ] = False,
) -> None:
    """Unmerged PEFT adapters at LoRA speed, under a memory cap you set, never stale."""
