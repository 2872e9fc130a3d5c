"""Many requests, some of them faulty, while adapters come and go: each status and text checked."""

from __future__ import annotations

import asyncio
import itertools
import random
import shutil
import time
from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import httpx
import torch
from rich import box
from rich.table import Table

from dora_cache.lab.models import write_adapter
from dora_cache.lab.serving.faulty import LIMITS, MARK, make_model
from dora_cache.lab.serving.processes import running
from dora_cache.serving import AdapterPool

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from dora_cache.lab.serving.processes import Running

__all__ = ["Faults", "as_dict", "measure_faults", "table"]

_STEADY = tuple(f"steady-{number}" for number in range(6))
_MOVING = ("moving-0", "moving-1")
_UNREADABLE = "unreadable-0"
_CORRUPT = "corrupt-0"
_PROMPTS = ((1, 2, 3), (40, 41, 42, 43, 44, 45), tuple(range(50, 80)), (100,))
_TOKENS = (4, 12, 32)
_BURST = 48  # requests at once, more than run and wait
_AT_ONCE = 16
_RANK = 4
_SAMPLES = 20
_GONE = 0  # in place of a status, where the client went

ALLOWED: dict[str, frozenset[int]] = {
    "plain": frozenset({200, 429}),
    "full queue": frozenset({200, 429}),
    "unknown adapter": frozenset({404}),
    "corrupt adapter": frozenset({404}),
    "oversize prompt": frozenset({413}),
    "client gone": frozenset({_GONE, 200, 429}),
    "moving adapter": frozenset({200, 404, 409, 429, 503}),
    "read error": frozenset({200, 429, 503}),
}
"""Which statuses are right, by kind of request.

Plain ones may meet a queue that others have filled. An adapter's files may be gone before the
server has noticed: then it is status 404, 409 or 503."""


@dataclass(frozen=True, slots=True)
class Faults:
    """The result.

    Attributes:
        requests: how many there were.
        statuses: by kind of request, how many had which status; 0: the client went before.
        wrong: texts that are not those of the request alone.
        unexpected: answers with a status that is not right for their kind, or without a reason.
        seconds: how long it took.
        rss: bytes of the server's process, after each twentieth of the requests.
        left: requests that ran or waited at the end, when nobody asked any more.
        exit_status: after SIGTERM.
    """

    requests: int
    statuses: dict[str, dict[int, int]]
    wrong: int
    unexpected: int
    seconds: float
    rss: tuple[int, ...]
    left: int
    exit_status: int | None

    @property
    def growth(self) -> int:
        """Bytes by which the process has grown in the second half."""
        half = self.rss[len(self.rss) // 2 :]
        return half[-1] - half[0]


def measure_faults(
    folder: Path, *, requests: int, share: float, seed: int, move: Callable[[int], None]
) -> Faults:
    """Send requests to a server of a small model, and check every answer.

    Args:
        folder: an empty one, for adapters.
        requests: how many.
        share: of them that are faulty, from 0 to 1.
        seed: of the order of requests.
        move: called with how many are done.
    """
    served, versions = folder / "served", folder / "versions"
    model = make_model()
    expected = _write(model, served, versions)
    with AdapterPool(model) as pool:
        pool.add("one", served / _STEADY[0])
        with pool.use("one"):
            cap = pool.stats().device_bytes * 4  # of nine adapters
    command = ["-m", "dora_cache.lab.serving.faulty", str(served), "PORT", str(cap)]
    with running(command, threads=1) as server:
        clients = _Clients(server, served, versions, expected, random.Random(seed))  # noqa: S311
        start = time.monotonic()
        asyncio.run(clients.run(requests, share, move))
        seconds = time.monotonic() - start
        health = httpx.get(f"{server.url}/health", timeout=60).json()
    statuses = {kind: dict(sorted(found.items())) for kind, found in clients.statuses.items()}
    return Faults(
        requests=sum(sum(found.values()) for found in statuses.values()),
        statuses=statuses,
        wrong=clients.wrong,
        unexpected=clients.unexpected,
        seconds=seconds,
        rss=tuple(clients.rss),
        left=health["running"] + health["waiting"],
        exit_status=server.exit_status,
    )


_Key = tuple[str, tuple[int, ...]]


def _write(model: Any, served: Path, versions: Path) -> dict[_Key, list[str]]:
    """Write all adapters; return the texts that are right, by adapter and prompt."""
    from peft import PeftModel

    made = itertools.count(1)

    def write(path: Path) -> Path:
        number = next(made)
        write_adapter(model, path, rank=_RANK, dora=number % 2 == 0, seed=number)
        return path

    paths: dict[str, list[Path]] = {name: [write(served / name)] for name in _STEADY}
    paths[_UNREADABLE] = [write(served / _UNREADABLE)]
    for name in _MOVING:
        paths[name] = [write(versions / f"{name}.{number}") for number in range(2)]
    weights = write(served / _CORRUPT) / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    expected: dict[_Key, list[str]] = {}
    everything: dict[str, list[Path | None]] = {
        "base": [None],
        **{k: [*v] for k, v in paths.items()},
    }
    for name, versions_of in everything.items():
        for path in versions_of:
            alone: Any = make_model()
            if path is not None:
                alone = PeftModel.from_pretrained(alone, path).eval()
            for prompt in _PROMPTS:
                ids = torch.tensor([prompt])
                found = alone.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=max(_TOKENS),
                    do_sample=False,
                )
                text = "".join(f"{one} " for one in found[0, len(prompt) :].tolist())
                expected.setdefault((name, prompt), []).append(text)
    for prompt in _PROMPTS:
        texts = [one for (_, asked), found in expected.items() if asked == prompt for one in found]
        if len(set(texts)) < len(texts):
            raise RuntimeError(f"two adapters have one text for {prompt}: choose other weights")
    return expected


class _Clients:
    """Clients of one server."""

    def __init__(
        self,
        server: Running,
        served: Path,
        versions: Path,
        expected: dict[_Key, list[str]],
        chance: random.Random,
    ) -> None:
        self.statuses: dict[str, Counter[int]] = {kind: Counter() for kind in ALLOWED}
        self.wrong = self.unexpected = 0
        self.rss: list[int] = []
        self._server = server
        self._served = served
        self._versions = versions
        self._expected = expected
        self._chance = chance
        self._left = 0

    async def run(self, requests: int, share: float, move: Callable[[int], None]) -> None:
        self._left = requests
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(
            base_url=self._server.url, timeout=120, limits=limits
        ) as self._http:
            changing = asyncio.create_task(self._change())
            watching = asyncio.create_task(self._watch(requests, move))
            async with asyncio.TaskGroup() as group:
                for _ in range(_AT_ONCE):
                    group.create_task(self._work(share))
            changing.cancel()
            watching.cancel()
            await asyncio.gather(changing, watching, return_exceptions=True)
            await asyncio.sleep(1)  # until the server has noticed who is gone
            self.rss.append(self._server.rss)

    async def _watch(self, requests: int, move: Callable[[int], None]) -> None:
        """Note the server's memory after each part of the requests."""
        while True:
            done = requests - self._left
            move(done)
            if done * _SAMPLES >= len(self.rss) * requests:
                self.rss.append(self._server.rss)
            await asyncio.sleep(0.05)

    async def _change(self) -> None:
        """Have adapters come, go and change, and files be unreadable now and then."""
        for turn in itertools.count():
            name = _MOVING[turn % 2]
            await asyncio.to_thread(shutil.rmtree, self._served / name, ignore_errors=True)
            if turn % 3:
                # At once, as whoever deploys adapters should do it.
                new = self._served.parent / "new"
                source = self._versions / f"{name}.{turn // 2 % 2}"
                await asyncio.to_thread(shutil.copytree, source, new)
                new.rename(self._served / name)
            mark = self._served / MARK
            if turn % 2:
                mark.write_text(_UNREADABLE, "utf-8")
            else:
                mark.unlink(missing_ok=True)
            await asyncio.sleep(0.3)

    async def _work(self, share: float) -> None:
        faults = [kind for kind in ALLOWED if kind != "plain"]
        # A burst is many requests: it begins so much more rarely.
        weights = [1 / _BURST if kind == "full queue" else 1 for kind in faults]
        begun = sum(weights)  # faults that begin, for as many faulty requests as there are kinds
        odds = share * begun / (share * begun + (1 - share) * len(faults))
        while self._left > 0:
            if self._chance.random() >= odds:
                await self._ask("plain")
                continue
            kind = self._chance.choices(faults, weights)[0]
            if kind == "full queue":
                async with asyncio.TaskGroup() as group:
                    for _ in range(_BURST):
                        group.create_task(self._ask(kind))
            else:
                await self._ask(kind)

    async def _ask(self, kind: str) -> None:
        self._left -= 1
        chance = self._chance
        names = {
            "unknown adapter": ("steady-9", "../versions/moving-0.0", "kitchen"),
            "corrupt adapter": (_CORRUPT,),
            "moving adapter": _MOVING,
            "read error": (_UNREADABLE,),
        }
        name = chance.choice(names.get(kind, ("base", *_STEADY)))
        prompt = chance.choice(_PROMPTS)
        given = list(range(LIMITS.max_prompt + 1)) if kind == "oversize prompt" else list(prompt)
        size = chance.choice(_TOKENS)
        body = {
            "model": name,
            "prompt": given,
            "max_tokens": size,
            "temperature": 0,
            "stream": chance.random() < 0.5,  # noqa: PLR2004
        }
        if kind == "client gone":
            # Before it is accepted, while it waits, or while it runs.
            sending = asyncio.wait_for(self._send(body), chance.choice((0.001, 0.01, 0.03)))
        else:
            sending = self._send(body)
        try:
            status, text, clear = await sending
        except TimeoutError:
            status, text, clear = _GONE, "", True
        self.statuses[kind][status] += 1
        if status not in ALLOWED[kind] or not clear:
            self.unexpected += 1
        elif status == httpx.codes.OK:
            right = [one.split()[:size] for one in self._expected[name, prompt]]
            self.wrong += text.split() not in right

    async def _send(self, body: dict[str, Any]) -> tuple[int, str, bool]:
        """Return the status, the text, and whether the answer is whole or says what is wrong."""
        response = await self._http.post("/v1/completions", json=body)
        status = response.status_code
        if status != httpx.codes.OK:
            clear = bool(response.json()["error"]["message"])
            if status == httpx.codes.TOO_MANY_REQUESTS:
                clear = clear and int(response.headers["Retry-After"]) > 0
            return status, "", clear
        if not body["stream"]:
            return status, response.json()["choices"][0]["text"], True
        events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
        pieces = [httpx.Response(200, text=one).json() for one in events[:-1]]
        whole = events[-1] == "[DONE]" and all("choices" in one for one in pieces)
        text = "".join(one["choices"][0]["text"] for one in pieces if "choices" in one)
        return status, text, whole


def table(faults: Faults) -> Table:
    """Return a table of the statuses by kind of request."""
    codes = sorted({code for found in faults.statuses.values() for code in found})
    shown = Table(box=box.SIMPLE_HEAD)
    shown.add_column("")
    for code in codes:
        shown.add_column("gone" if code == _GONE else str(code), justify="right")
    for kind, found in faults.statuses.items():
        shown.add_row(kind, *(f"{found[code]:,}" if code in found else "" for code in codes))
    return shown


def as_dict(faults: Faults) -> dict[str, Any]:
    """Return the result for a JSON file."""
    return {**asdict(faults), "growth": faults.growth}
