"""What all commands show alike: results, progress, and mistakes in one line."""

from __future__ import annotations

import re
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from dora_cache.errors import DoraCacheError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["EXIT_CODE", "CliError", "progress_bar", "quiet", "reported", "results", "spinner"]

_AS_KEYWORD = re.compile(r"\b(backend|max_bytes|device_bytes)=\"([^\"]*)\"")
EXIT_CODE = 2
"""Of a command that could not do what it was asked for."""


class CliError(Exception):
    """What the user wrote cannot be done; the message says what to write instead."""


@contextmanager
def reported() -> Iterator[None]:
    """Turn a mistake of the user's, or too little memory, into one line and exit code 2."""
    try:
        yield
    except torch.OutOfMemoryError:
        text = "the device's memory does not suffice: measure less, e.g. --ways lora,dora-cache"
        typer.echo(f"error: {text}", err=True)
        raise typer.Exit(EXIT_CODE) from None
    except (CliError, DoraCacheError) as error:
        text = _AS_KEYWORD.sub(_as_option, " ".join(str(error).split()))
        typer.echo(f"error: {text}", err=True)
        raise typer.Exit(EXIT_CODE) from None


def _as_option(keyword: re.Match[str]) -> str:
    return f"--{keyword[1].replace('_', '-')} {keyword[2]}"


def results() -> Console:
    """Return the console for what a command was asked for; wide enough for tables in a file."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=140)


@contextmanager
def progress_bar(description: str, total: int) -> Iterator[Callable[..., None]]:
    """Show a bar on stderr until the end; yield what moves it on by one, or to a place."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with _progress(*columns) as progress:
        task = progress.add_task(description, total=total)

        def move(completed: int | None = None, total: int | None = None) -> None:
            if completed is None:
                progress.advance(task)
            else:
                progress.update(task, completed=completed, total=total)

        yield move


def _progress(*columns: ProgressColumn) -> Progress:
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


@contextmanager
def spinner(description: str) -> Iterator[Callable[[str], None]]:
    """Show on stderr that something of unknown length goes on; yield what renames it."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with _progress(*columns) as progress:
        task = progress.add_task(description, total=None)
        yield lambda text: progress.update(task, description=text)


@contextmanager
def quiet() -> Iterator[None]:
    """Hide the bars, advice and warnings of Transformers and PEFT, but not their errors."""
    from transformers.utils import logging

    hub: Any = logging
    verbosity, bars = hub.get_verbosity(), hub.is_progress_bar_enabled()
    hub.set_verbosity_error()
    hub.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        hub.set_verbosity(verbosity)
        if bars:
            hub.enable_progress_bar()
