"""Whether PEFT's methods are still those that a recipe was written for.

A recipe lists what a value depends on, and repeats some of PEFT's arithmetic. Both come from
reading a method. If another release of PEFT, or a patch, changes that method, the recipe has to
stand back. So it names the methods it relies on, each with a fingerprint of its source.

``python -m dora_cache.recipes.fingerprints`` lists those that do not match, with what they are now.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import io
import sys
import tokenize
from types import FunctionType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from types import CodeType

__all__ = ["changed", "fingerprint"]

Fingerprints = dict[str, str]
"""Methods as ``"package.module:Class.method"``, and the fingerprints they are known by, separated
by spaces."""

_TORCH_WRAPPERS = ("torch/utils/_contextlib.py", "torch\\utils\\_contextlib.py")


def changed(relies_on: Mapping[str, str]) -> list[str]:
    """Return those methods that are gone or are not as they were; in the order given."""
    return [path for path, known in relies_on.items() if fingerprint(path) not in known.split()]


def fingerprint(path: str) -> str:
    """Return twelve hexadecimal digits that stand for a method's source.

    Comments, docstrings and layout do not count. Decorators do.

    Args:
        path: the method, as ``"package.module:Class.method"``.

    Returns:
        The digits; ``"gone"`` if there is no such method, ``"unknown"`` if its source is not there.
    """
    module, _, name = path.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = inspect.getattr_static(found, part)
    except (ImportError, AttributeError):
        return "gone"
    if isinstance(found, staticmethod | classmethod):
        found = found.__func__
    if isinstance(found, property):
        found = found.fget
    try:
        text = "\n".join(_source(code) for code in _codes(found))
    except (OSError, TypeError, SyntaxError, tokenize.TokenError):
        return "unknown"
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _codes(function: object) -> Iterator[CodeType]:
    """Yield the code of a function and of what it wraps; PyTorch's own wrappers are left out."""
    while isinstance(function, FunctionType):
        if not function.__code__.co_filename.endswith(_TORCH_WRAPPERS):
            yield function.__code__
        inner = getattr(function, "__wrapped__", None)
        if inner is None:
            return
        function = inner
    msg = f"{function!r} is not written in Python"
    raise TypeError(msg)


@functools.lru_cache(maxsize=1024)
def _source(code: CodeType) -> str:
    """Return a function's source without comments, docstrings and white space."""
    kept: list[str] = []
    fresh = True  # at the beginning of a statement, where a string is a docstring
    for token in tokenize.generate_tokens(io.StringIO(_dedented(code)).readline):
        if token.type in {tokenize.COMMENT, tokenize.NL, tokenize.INDENT, tokenize.DEDENT}:
            continue
        if token.type == tokenize.NEWLINE:
            fresh = True
            continue
        if fresh and token.type == tokenize.STRING:
            continue
        fresh = False
        kept.append(token.string)
    return "".join("".join(kept).split())


def _dedented(code: CodeType) -> str:
    return inspect.cleandoc("\n" + inspect.getsource(code))


def main() -> int:
    """Print every fingerprint in the recipes that does not match; return how many there are."""
    from dora_cache.recipes import load_recipes

    count = 0
    for recipe in load_recipes():
        for path in changed(recipe.relies_on):
            print(f"{recipe.name}: {path} is now {fingerprint(path)}")  # noqa: T201
            count += 1
    return count


if __name__ == "__main__":
    sys.exit(min(main(), 1))
