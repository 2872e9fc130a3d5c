"""Set-ups of other libraries that people run adapters in, each as a model that can be tried."""

from dora_cache.lab.field.setup import Built, Found, SetUp, setups, try_out

__all__ = ["Built", "Found", "SetUp", "setups", "try_out"]
