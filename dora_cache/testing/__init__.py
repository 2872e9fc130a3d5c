"""Tools for the authors of backends and recipes. Needs Hypothesis."""

from dora_cache.extras import require

require("testing", ("hypothesis",), "dora_cache.testing")

from dora_cache.testing.conformance import BackendConformance, Spec  # noqa: E402
from dora_cache.testing.recipes import check_recipe  # noqa: E402

__all__ = ["BackendConformance", "Spec", "check_recipe"]
