"""Where results go: standard output that says when it cannot be written to, and files."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import typer

from dora_cache.cli.console import EXIT_CODE, CliError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["check_file", "checked_stdout", "make_folder", "writing"]

_EXIT_CODE_OF_A_PIPE = 141
"""What a shell shows for a tool whose reader has gone: 128 and SIGPIPE."""


class _OutputError(Exception):
    """Standard output cannot be written to. No OSError: others handle those as their files'."""


class _Checked:
    """Standard output, of which a failure can be told from that of a file."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with _told():
            written: int = self._stream.write(text)
        return written

    def flush(self) -> None:
        with _told():
            self._stream.flush()


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _OutputError from error


@contextmanager
def checked_stdout() -> Iterator[None]:
    """Turn a failure of standard output into one line and an exit code; into that alone for a pipe.

    All that is printed within is written by the end.
    """
    stream: Any = sys.stdout
    if stream is None:  # it was closed before the start: nothing can be printed
        yield
        return
    checked: Any = _Checked(stream)
    sys.stdout = checked
    try:
        try:
            yield
        finally:
            checked.flush()
    except _OutputError as error:
        _drop(stream)
        reason = error.__cause__
        if isinstance(reason, BrokenPipeError):
            sys.exit(_EXIT_CODE_OF_A_PIPE)
        text = getattr(reason, "strerror", None) or reason
        with suppress(OSError):
            typer.echo(
                f"error: cannot write to standard output ({text}): send it somewhere else", err=True
            )
        sys.exit(EXIT_CODE)
    finally:
        sys.stdout = stream


def _drop(stream: Any) -> None:
    """Send what is left in a stream's buffer nowhere: Python writes it when it ends."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        stream.flush()


def make_folder(path: Path, *names: str) -> Path:
    """Make the folder for results, its parents included, and check that they can be written there.

    Args:
        path: the folder, as given by ``--out``.
        names: of the files that are to be written.

    Raises:
        CliError: it cannot be made, or a file cannot be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        msg = f"cannot make the folder {path} ({error.strerror}): give another one as --out"
        raise CliError(msg) from None
    for name in names:
        check_file(path / name, "folder as --out")
    return path


def check_file(path: Path | None, option: str) -> None:
    """Check that a file can be written, before work that takes long; it stays as it is.

    Args:
        path: the file; None for none.
        option: what to give another one as, e.g. ``"--markdown"``.

    Raises:
        CliError: it cannot.
    """
    if path is None or (path.exists() and not (path.is_file() or path.is_dir())):
        return  # opening a pipe and closing it would end it for its reader
    with writing(path, option):
        new = not os.path.lexists(path)
        with path.open("ab"):
            pass
        if new:
            path.unlink()


@contextmanager
def writing(path: Path, option: str) -> Iterator[None]:
    """Turn a failure to write a file into one line that says what to give instead.

    Args:
        path: the file.
        option: as of :func:`check_file`.

    Raises:
        CliError: it cannot be written.
    """
    try:
        yield
    except OSError as error:
        msg = f"cannot write {path} ({error.strerror or error}): give another {option}"
        raise CliError(msg) from None
