"""The command ``dora-cache``."""

from typing import Annotated

import typer

from dora_cache.cli.audit import audit
from dora_cache.cli.backends import backends
from dora_cache.cli.bench import bench
from dora_cache.cli.caps import caps
from dora_cache.cli.coverage import coverage
from dora_cache.cli.demo import demo
from dora_cache.cli.freshness import freshness
from dora_cache.cli.generate import generate
from dora_cache.cli.output import checked_stdout
from dora_cache.cli.plan import plan
from dora_cache.cli.simulate import simulate
from dora_cache.cli.traffic import traffic

__all__ = ["app", "main"]

app = typer.Typer(
    name="dora-cache",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(demo)
app.command()(bench)
app.command()(plan)
app.command()(generate)
app.command()(coverage)
app.command()(caps)
app.command()(traffic)
app.command()(simulate)
app.command()(freshness)
app.command()(audit)
app.command()(backends)


def _print_version(wanted: bool) -> None:  # noqa: FBT001 - as typer calls it
    if wanted:
        from dora_cache import __version__

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


def main() -> None:
    """Run the command line."""
    with checked_stdout():
        app()
