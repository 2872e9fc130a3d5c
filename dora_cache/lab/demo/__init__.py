"""Small real model, texts and trained DoRA adapters for demonstrations."""

from __future__ import annotations

from pathlib import Path

ADAPTERS = ("sonnets", "kitchen")


def adapter_directory(name: str) -> Path:
    """Return the folder of a shipped adapter, in PEFT's on-disk format.

    Raises:
        ValueError: if ``name`` is not one of ``ADAPTERS``.
    """
    if name not in ADAPTERS:
        raise ValueError(f"unknown demo adapter {name!r}; choose from {', '.join(ADAPTERS)}")
    return Path(__file__).resolve().parent / "adapters" / name
