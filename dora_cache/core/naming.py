"""Names of layers: the module names of owners, and short forms for many names."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from dora_cache.core.decorator import owners_in

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import nn

__all__ = ["names_of_owners", "shorten"]

_WRAPPER = "base_model.model."  # what PEFT puts before every name of the model that it wraps
_PATTERNS = 3  # shown of names that have no pattern in common
_CHOICES = 8  # shown of the parts of a name that differ

_Pattern = tuple[tuple[str, ...], ...]


def names_of_owners(parts: Mapping[str, nn.Module]) -> dict[int, str]:
    """Return the names of all modules, and of the objects with decorated methods they hold.

    Args:
        parts: models, by what their modules' names begin with; ``""`` for nothing.

    Returns:
        By ``id()``: a module's full name, and for what is no module that of the module holding it.
        What has no name, as the model itself, is named by its class.
    """
    found: dict[int, str] = {}
    known: dict[type, bool] = {}
    for prefix, part in parts.items():
        for name, module in part.named_modules():
            full = ".".join(filter(None, (prefix, name))) or type(module).__name__
            found.setdefault(id(module), full)
            for owner in owners_in(module, known):
                found.setdefault(id(owner), full)
    return found


def shorten(names: Iterable[str]) -> str:
    """Return names in a line, e.g. ``model.layers.{0..31}.self_attn.{q,v}_proj``.

    What stands in braces takes every value that is listed, with every value of the other braces.
    The prefix that PEFT gives to all names is left out; of many patterns, and many values in
    braces, the first ones are shown, and how many more there are.
    """
    patterns = _patterns(list(dict.fromkeys(names)))
    shown = [".".join(map(_braces, pattern)) for pattern in patterns[:_PATTERNS]]
    if len(patterns) > _PATTERNS:
        shown.append(f"{len(patterns) - _PATTERNS} more")
    return ", ".join(shown)


def _patterns(names: list[str]) -> list[_Pattern]:
    """Join names that differ in one of their parts alone, numbers first."""
    if all(name.startswith(_WRAPPER) for name in names):
        names = [name.removeprefix(_WRAPPER) for name in names]
    patterns: list[_Pattern] = [tuple((part,) for part in name.split(".")) for name in names]
    longest = max(map(len, patterns), default=0)
    for numbers in (True, False):
        for place in reversed(range(longest)):
            patterns = _joined(patterns, place, numbers=numbers)
    return patterns


def _joined(patterns: list[_Pattern], place: int, *, numbers: bool) -> list[_Pattern]:
    groups: defaultdict[tuple[object, ...], list[_Pattern]] = defaultdict(list)
    for index, pattern in enumerate(patterns):
        if place < len(pattern) and (not numbers or all(map(_is_number, pattern[place]))):
            groups[pattern[:place], pattern[place + 1 :]].append(pattern)
        else:
            groups[(index,)].append(pattern)
    return [
        one[0]
        if len(one) == 1
        else (
            *one[0][:place],
            tuple(value for pattern in one for value in pattern[place]),
            *one[0][place + 1 :],
        )
        for one in groups.values()
    ]


def _braces(values: tuple[str, ...]) -> str:
    if len(values) == 1:
        return values[0]
    if all(map(_is_number, values)):
        return f"{{{_listed(_ranges(sorted(map(int, values))))}}}"
    before = _common(values)
    rests = [value.removeprefix(before) for value in values]
    after = _common([rest[::-1] for rest in rests])[::-1]
    return f"{before}{{{_listed([rest.removesuffix(after) for rest in rests])}}}{after}"


def _is_number(text: str) -> bool:
    return text.isdecimal() and text == str(int(text))


def _listed(values: list[str]) -> str:
    if len(values) > _CHOICES:
        values = [*values[:_CHOICES], f"... {len(values) - _CHOICES} more"]
    return ",".join(values)


def _ranges(numbers: list[int]) -> list[str]:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return [
        f"{run[0]}..{run[-1]}" if len(run) > 2 else ",".join(map(str, run))  # noqa: PLR2004
        for run in runs
    ]


def _common(values: Iterable[str]) -> str:
    """Return the words that all values begin with, each with its underscore."""
    words = [value.split("_")[:-1] for value in values]
    common = []
    for choices in zip(*words, strict=False):
        if len(set(choices)) > 1:
            break
        common.append(f"{choices[0]}_")
    return "".join(common)
