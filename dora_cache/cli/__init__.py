"""The command ``dora-cache``. Needs the extra ``cli``."""

import sys

from dora_cache.extras import CLI, require

__all__ = ["main"]


def main() -> None:
    """Run the command line; where a package is missing, say in one line what to install."""
    try:
        require("cli", CLI, "the command dora-cache")
    except ImportError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201 - typer may be what is missing
        sys.exit(2)
    from dora_cache.cli.app import app
    from dora_cache.cli.output import checked_stdout

    with checked_stdout():
        app()
