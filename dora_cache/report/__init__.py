"""What a cache holds and what that has saved: as data, as a table, as a curve, and as a page."""

from dora_cache.report.data import (
    CacheReport,
    CurvePoint,
    Declined,
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
    "Declined",
    "LayerRow",
    "ReasonRow",
    "ReportRow",
    "Seen",
    "layers_of",
    "rows_of",
    "seen_of",
]
