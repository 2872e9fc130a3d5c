"""Tools for the authors of backends: a conformance test to subclass. Needs Hypothesis."""

try:
    import hypothesis as _hypothesis  # noqa: F401 - to say at once what is missing
except ModuleNotFoundError as error:
    msg = "dora_cache.testing needs Hypothesis: pip install dora-cache[testing]"
    raise ImportError(msg) from error

from dora_cache.testing.conformance import BackendConformance, Spec

__all__ = ["BackendConformance", "Spec"]
