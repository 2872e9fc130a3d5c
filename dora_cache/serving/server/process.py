"""A server process that finishes what it has accepted before it ends."""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
from typing import TYPE_CHECKING, Any

import uvicorn

if TYPE_CHECKING:
    from types import FrameType

    from fastapi import FastAPI

    from dora_cache.serving.server.engine import Engine

__all__ = ["Server", "run"]

_log = logging.getLogger(__name__)


class Server(uvicorn.Server):
    """Uvicorn's, which drains on SIGTERM.

    From then on new requests get status 503, and accepted ones are answered; then it ends, with
    exit status 0. A second signal ends it at once.

    Args:
        config: uvicorn's.
        engine: what the app serves.
        drain: seconds for accepted requests; None for as long as it takes.
    """

    def __init__(self, config: uvicorn.Config, engine: Engine, drain: float | None) -> None:
        super().__init__(config)
        self._engine = engine
        self._seconds = drain
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None
        self._asked = threading.Event()

    async def serve(self, sockets: Any = None) -> None:
        """Serve until a signal comes."""
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain at the first signal, end at once at another one."""
        if self._asked.is_set() or self._loop is None:
            super().handle_exit(sig, frame)
            return
        self._asked.set()
        _log.info("draining", extra={"signal": signal.Signals(sig).name})
        self._loop.call_soon_threadsafe(self.drain)

    def drain(self) -> None:
        """Begin to drain; called in the event loop."""
        self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        await self._engine.drain(self._seconds)
        self.should_exit = True


def run(
    app: FastAPI, engine: Engine, *, host: str, port: int, drain: float | None = None, **more: Any
) -> None:
    """Serve an app until SIGTERM or SIGINT.

    Args:
        app: from :func:`~dora_cache.serving.server.create_app`.
        engine: what it serves.
        host: the address to listen at.
        port: the port; 0 for any.
        drain: seconds for accepted requests after the signal; None for as long as it takes.
        more: of :class:`uvicorn.Config`.
    """
    Server(uvicorn.Config(app, host=host, port=port, **more), engine, drain).run()
