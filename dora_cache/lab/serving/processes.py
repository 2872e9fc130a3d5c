"""Servers in processes of their own, on loopback."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import httpx
import psutil

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["Running", "running"]

_PATIENCE = 300.0  # seconds until a server answers, or has ended


@dataclass(eq=False)
class Running:
    """A server that runs.

    Attributes:
        url: its address.
        process: its process.
        exit_status: after it has ended; None before.
    """

    url: str
    process: psutil.Process
    exit_status: int | None = None

    @property
    def rss(self) -> int:
        """Bytes that it has in memory."""
        return int(self.process.memory_info().rss)


@contextmanager
def running(arguments: Sequence[str], *, threads: int) -> Iterator[Running]:
    """Run a server until the end of the block, then have it end by SIGTERM.

    Args:
        arguments: of the interpreter; ``PORT`` in them is put in.
        threads: of PyTorch.

    Raises:
        RuntimeError: it does not start; the message has what it wrote.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *(one.replace("PORT", str(port)) for one in arguments)]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)  # noqa: S603
        one = Running(f"http://127.0.0.1:{port}", psutil.Process(process.pid))
        try:
            end = time.monotonic() + _PATIENCE
            while not _answers(one.url):
                if process.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    raise RuntimeError(f"the server has not started: {log.read()[-2000:]}")
                time.sleep(0.1)
            yield one
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            try:
                one.exit_status = process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                one.exit_status = process.wait()


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).is_success
    except httpx.TransportError:
        return False
