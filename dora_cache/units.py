"""Format sizes and times."""

__all__ = ["format_bytes", "format_seconds"]


def format_bytes(count: float) -> str:
    """Return a size with three digits or so, e.g. ``608 KiB`` or ``1.19 MiB``."""
    units = iter(("B", "KiB", "MiB"))
    unit = next(units)
    while count >= 1000:  # noqa: PLR2004 - so that no size takes four digits
        count /= 1024
        unit = next(units, "GiB")
        if unit == "GiB":
            break
    return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.3g} {unit}"  # noqa: PLR2004


def format_seconds(seconds: float) -> str:
    """Return a time with three digits or so, e.g. ``1.25 s``, ``340 ms`` or ``52.1 us``."""
    if seconds >= 1000:  # noqa: PLR2004
        return f"{seconds:.0f} s"
    for scale, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"
