"""A count of finished items on the terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["counted"]

T = TypeVar("T")


def counted(items: Sequence[T], description: str) -> Iterator[T]:
    """Yield items; one line on stderr shows how many of them are done."""
    try:
        for done, item in enumerate(items):
            _show(f"\r{description}: {done}/{len(items)}")
            yield item
        _show(f"\r{description}: {len(items)}/{len(items)}")
    finally:
        _show("\n")


def _show(text: str) -> None:
    if sys.stderr is not None:
        sys.stderr.write(text)
        sys.stderr.flush()
