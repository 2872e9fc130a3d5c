"""Replicas of a model by Ray Serve, in a cluster of this machine alone: ``... SETTINGS PORT``."""

import os
import secrets
import sys
import tempfile

__all__ = ["main"]

_STORE = 100 * 2**20  # bytes of Ray's object store


def main(settings: str, port: str) -> None:
    """Serve on loopback.

    Args:
        settings: of :class:`dora_cache.serving.ray.Settings`, as JSON.
        port: the port.
    """
    os.environ.update(  # Ray reads them when it is imported
        RAY_USAGE_STATS_ENABLED="0", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(16)
    )
    from dora_cache.serving import ray

    with tempfile.TemporaryDirectory(prefix="dc-") as scratch:  # short: it has Unix sockets
        ray.run(
            ray.Settings.model_validate_json(settings),
            port=int(port),
            address="local",
            num_cpus=2,
            object_store_memory=_STORE,
            include_dashboard=False,
            log_to_driver=False,
            _node_ip_address="127.0.0.2" if sys.platform == "linux" else None,
            _temp_dir=scratch,
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
