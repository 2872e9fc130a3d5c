"""What ``dora-cache bench`` measures: the ways, and the prompts of a prefill."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from dora_cache.cli.console import CliError
from dora_cache.cli.options import given
from dora_cache.config import CacheConfig
from dora_cache.lab import bench

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["all_ways", "choose_ways", "parse_prefill"]

_BACKENDS = ("dict", "lru", "cpu")
_OURS = "dora-cache"
_NOT_FOR_SHAPES = ("dora-cache:lru", "dora-cache:cpu")


def all_ways(backend: str | None, cap: int | str, settings: dict[str, Any]) -> list[bench.Way]:
    """Return every way that can be measured.

    Args:
        backend: the only one of dora-cache's to measure; by default the usual ones.
        cap: of the lru backend, where it is one of several.
        settings: of dora-cache, as given; without numerics, both are measured.
    """
    if backend is not None:
        configs = [CacheConfig(backend=backend, **settings)]
    else:
        shared = given(numerics=settings.get("numerics"))
        own: dict[str, dict[str, Any]] = {
            "lru": {"max_bytes": cap},
            "cpu": given(device_bytes=settings.get("device_bytes")),
        }
        configs = [CacheConfig(backend=name, **shared, **own.get(name, {})) for name in _BACKENDS]
    first = configs[0]
    ours = [bench.with_cache(config) for config in configs]
    if "numerics" not in settings and first.numerics == "peft":
        fast = first.model_copy(update={"numerics": "fast"})
        ours.append(bench.with_cache(fast, label="dora-cache fast"))
    return [bench.BASE, bench.LORA, bench.MERGED, bench.PEFT, bench.PEFT_CACHING, *ours]


def choose_ways(ways: Sequence[bench.Way], wanted: str | None, *, shape: bool) -> list[bench.Way]:
    """Return the ways that a comma-separated list names, in their own order.

    ``dora-cache`` stands for all of dora-cache's. By default all ways are chosen; of a shape's,
    only those with dora-cache's plainest backend.

    Raises:
        CliError: no way has that name.
    """
    usual = [way for way in ways if not (shape and way.name.startswith(_NOT_FOR_SHAPES))]
    if not any(way.name.startswith(_OURS) for way in usual):
        usual = list(ways)  # the backend that was asked for
    if wanted is None:
        return usual
    chosen: set[str] = set()
    for name in filter(None, map(str.strip, wanted.split(","))):
        if name == _OURS:
            chosen.update(way.name for way in usual if way.name.startswith(_OURS))
        elif any(way.name == name for way in ways):
            chosen.add(name)
        else:
            known = ", ".join([_OURS, *(way.name for way in ways)])
            raise CliError(f"there is no way {name!r}: choose from {known}")
    if not chosen:
        raise CliError("--ways names none: write, e.g., --ways lora,peft,dora-cache")
    return [way for way in ways if way.name in chosen]


def parse_prefill(text: str | None) -> list[tuple[int, int]]:
    """Read batch sizes and lengths such as ``1x512,8x512``.

    Raises:
        CliError: it is something else.
    """
    found = []
    for part in text.split(",") if text else ():
        match = re.fullmatch(r"\s*([1-9]\d*)x([1-9]\d*)\s*", part)
        if match is None:
            msg = f"--prefill {part!r} is no batch size and length: write, e.g., --prefill 1x512"
            raise CliError(msg)
        found.append((int(match[1]), int(match[2])))
    return list(dict.fromkeys(found))
