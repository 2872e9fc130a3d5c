"""Reports of what a cache holds and the time saved: as data, tables, curves and HTML pages."""

from dora_cache.report.data import (
    CacheReport,
    CurvePoint,
    LayerRow,
    ReasonRow,
    ReportRow,
    Seen,
    layers_of,
    rows_of,
    seen_of,
)

__all__ = [
    "CacheReport",
    "CurvePoint",
    "LayerRow",
    "ReasonRow",
    "ReportRow",
    "Seen",
    "layers_of",
    "rows_of",
    "seen_of",
]
