"""An OpenAI-compatible server for an :class:`~dora_cache.AdapterPool`. Needs the extra ``serve``.

FastAPI answers, Transformers' continuous batching generates, the pool has the adapters.
"""

from dora_cache.extras import SERVE, require

require("serve", SERVE, "dora_cache.serving.server")

from dora_cache.serving.server.app import create_app  # noqa: E402 - after the check
from dora_cache.serving.server.engine import Engine, Generation, Limits, Sampling  # noqa: E402
from dora_cache.serving.server.errors import RequestError  # noqa: E402
from dora_cache.serving.server.folder import AdapterFolder, Version  # noqa: E402
from dora_cache.serving.server.process import Server, run  # noqa: E402

__all__ = [
    "AdapterFolder",
    "Engine",
    "Generation",
    "Limits",
    "RequestError",
    "Sampling",
    "Server",
    "Version",
    "create_app",
    "run",
]
