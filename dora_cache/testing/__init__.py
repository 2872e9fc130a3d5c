"""Tools for the authors of backends and recipes. Needs Hypothesis."""

try:
    import hypothesis as _hypothesis  # noqa: F401 - to say at once what is missing
except ModuleNotFoundError as error:
    msg = "dora_cache.testing needs Hypothesis: pip install dora-cache[testing]"
    raise ImportError(msg) from error

from dora_cache.testing.conformance import BackendConformance, Spec
from dora_cache.testing.recipes import check_recipe

__all__ = ["BackendConformance", "Spec", "check_recipe"]
