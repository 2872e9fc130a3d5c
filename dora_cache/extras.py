"""Packages that only an extra installs, and errors where they are missing."""

from importlib.util import find_spec

__all__ = ["CLI", "RAY", "SERVE", "require"]

CLI = ("matplotlib", "numpy", "rich", "typer")
"""What the extra ``cli`` installs."""

SERVE = ("fastapi", "jinja2", "prometheus_client", "uvicorn")
"""What the extra ``serve`` installs beside."""

RAY = (*SERVE, "ray")
"""What the extra ``ray`` installs beside that of ``cli``."""


def require(extra: str, packages: tuple[str, ...], what: str) -> None:
    """Check that packages are installed; they are not imported.

    Args:
        extra: the extra of dora-cache that installs them.
        packages: their import names.
        what: what needs them.

    Raises:
        ImportError: some are missing; the message says which, and what to install.
    """
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        names = " and ".join(filter(None, [", ".join(missing[:-1]), missing[-1]]))
        raise ImportError(f'{what} needs {names}: pip install "dora-cache[{extra}]"')
