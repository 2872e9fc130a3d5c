"""The server under load: right answers, tokens per second, and faults.

Needs the extras ``serve`` and ``serving-tests``.
"""

from dora_cache.extras import require

require("serving-tests", ("httpx", "openai"), "dora_cache.lab.serving")
