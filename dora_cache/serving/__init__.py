"""Serve many adapters of one model in one batch, under one cap."""

from dora_cache.serving.pool import AdapterPool, PoolStats

__all__ = ["AdapterPool", "PoolStats"]
