"""Measurements and simulators. Needs the extra ``cli``; the library needs nothing of this."""

from dora_cache.extras import CLI, require

require("cli", CLI, "dora_cache.lab")
