"""Replicas with more adapters than they have room for: what is resident, and a replica killed."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import httpx
import psutil
import torch
from rich import box
from rich.table import Table

from dora_cache.lab.models import write_adapter
from dora_cache.lab.serving.faulty import make_model
from dora_cache.lab.serving.processes import running
from dora_cache.serving import AdapterPool

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from dora_cache.lab.serving.processes import Running

__all__ = ["Killed", "Replicas", "Way", "as_dict", "measure_replicas", "table"]

_PROMPTS = ("1 2 3", "40 41 42 43 44 45", " ".join(map(str, range(50, 80))))
_TOKENS = 8
_LIMITS = {"max_prompt": 64, "max_tokens": 32, "batch": 4, "queue": 64, "kv_tokens": 1024}
_RANK = 4
_CLIENTS = 8
_REPLICAS = 2
_TITLE = "ray::ServeReplica:dora-cache:replica"  # of a replica's process
_PATIENCE = 120.0  # seconds until a killed replica has been replaced


@dataclass(frozen=True, slots=True)
class Way:
    """What replicas have done for the same requests in one way of routing.

    Attributes:
        multiplexed: whether requests went where their adapter was.
        requests: how many were answered.
        resident: share that found their adapter on the device when they came.
        loads: adapters brought to a device.
        seconds: how long it took.
        wrong: texts that are not those of the request alone.
    """

    multiplexed: bool
    requests: int
    resident: float
    loads: int
    seconds: float
    wrong: int


@dataclass(frozen=True, slots=True)
class Killed:
    """What happened to requests while a replica was killed.

    Attributes:
        requests: how many were answered in the end, all of them.
        again: answers after which a client sent its request again, by status.
        wrong: texts that are not those of the request alone.
        longest: seconds, the longest time without any answer.
        replaced: seconds after which there were as many replicas as before.
    """

    requests: int
    again: dict[int, int]
    wrong: int
    longest: float
    replaced: float


@dataclass(frozen=True, slots=True)
class Replicas:
    """The result.

    Attributes:
        adapters: how many there are.
        room: adapters that fit on the device of one replica.
        exponent: of Zipf's law.
        ways: of routing.
        killed: what happened when a replica was killed.
        exit_statuses: of the servers after SIGTERM.
    """

    adapters: int
    room: int
    exponent: float
    ways: tuple[Way, ...]
    killed: Killed
    exit_statuses: tuple[int | None, ...]


def measure_replicas(
    folder: Path,
    *,
    adapters: int,
    room: int,
    exponent: float,
    requests: int,
    seed: int,
    move: Callable[[], None],
) -> Replicas:
    """Serve a small model from two replicas, once without multiplexing and once with it.

    Half of the requests warm up. With multiplexing, a replica is killed while more are sent.

    Args:
        folder: an empty one, for the model and the adapters.
        adapters: how many.
        room: adapters that fit on the device of one replica.
        exponent: of Zipf's law, by which adapters are asked for.
        requests: measured ones, of each way.
        seed: of the order of requests.
        move: called once for each request.
    """
    model = make_model()
    _write_model(model, folder / "model")
    names = [f"adapter-{number}" for number in range(adapters)]
    for number, name in enumerate(names):
        write_adapter(
            model, folder / "adapters" / name, rank=_RANK, dora=number % 2 == 0, seed=number + 1
        )
    expected = _alone(folder / "adapters", names)
    with AdapterPool(model) as pool:
        pool.add_folder(folder / "adapters")
        cap = max(map(pool.size, names)) * room
    ways, statuses = [], []
    killed: Killed | None = None
    for multiplexed in (False, True):
        settings = {
            "model": str(folder / "model"),
            "adapters": str(folder / "adapters"),
            "name": "base",
            "device_bytes": cap,
            "replicas": _REPLICAS,
            "multiplexed": multiplexed,
            "limits": {**_LIMITS, "batch_tokens": 128, "patience": 32},
        }
        command = ["-m", "dora_cache.lab.serving.replicated", json.dumps(settings), "PORT"]
        with running(command, threads=1) as server:
            clients = _Clients(server, expected, names, exponent, random.Random(seed), move)  # noqa: S311
            ways.append(asyncio.run(clients.measure(requests, multiplexed=multiplexed)))
            if multiplexed:
                killed = asyncio.run(clients.kill(requests))
        statuses.append(server.exit_status)
    assert killed is not None  # noqa: S101 - the second way has set it
    return Replicas(adapters, room, exponent, tuple(ways), killed, tuple(statuses))


_Key = tuple[str, str]


def _write_model(model: Any, folder: Path) -> None:
    """Write a model, with a tokenizer whose texts are the tokens' numbers."""
    from transformers import PreTrainedTokenizerFast

    model.save_pretrained(folder)
    words = {str(number): number for number in range(model.config.vocab_size)}
    whole = {
        "version": "1.0",
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "0"},
    }
    nothing = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder"))
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**whole, **nothing, "added_tokens": []}), encoding="utf-8")
    PreTrainedTokenizerFast(tokenizer_file=str(path)).save_pretrained(folder)


def _alone(adapters: Path, names: list[str]) -> dict[_Key, str]:
    """Return the texts that are right, by adapter and prompt; they differ between adapters."""
    from peft import PeftModel

    expected = {}
    for name in names:
        alone: Any = PeftModel.from_pretrained(make_model(), adapters / name).eval()
        for prompt in _PROMPTS:
            ids = torch.tensor([[int(one) for one in prompt.split()]])
            found = alone.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=_TOKENS,
                do_sample=False,
            )
            expected[name, prompt] = " ".join(map(str, found[0, ids.shape[1] :].tolist()))
    if len(set(expected.values())) < len(expected):
        raise RuntimeError("two adapters have one text: choose other weights")
    return expected


class _Clients:
    """Clients of one server, which send a request again where they are told to."""

    def __init__(
        self,
        server: Running,
        expected: dict[_Key, str],
        names: list[str],
        exponent: float,
        chance: random.Random,
        move: Callable[[], None],
    ) -> None:
        self._server = server
        self._expected = expected
        self._names = names
        self._weights = [1 / rank**exponent for rank in range(1, len(names) + 1)]
        self._chance = chance
        self._move = move
        self._wrong = 0
        self._again: Counter[int] = Counter()
        self._left = 0
        self._answered = 0.0  # when the last answer came
        self._longest = 0.0

    async def measure(self, requests: int, *, multiplexed: bool) -> Way:
        """Ask, and return what share of requests found their adapter."""
        await self._ask_all(requests // 2)
        before, wrong, start = await self._counts(), self._wrong, time.monotonic()
        await self._ask_all(requests)
        seconds = time.monotonic() - start
        gained = await self._counts() - before
        came = sum(gained[tier] for tier in ("device", "host", "files"))
        return Way(
            multiplexed,
            requests,
            gained["device"] / came,
            gained["loads"],
            seconds,
            self._wrong - wrong,
        )

    async def kill(self, requests: int) -> Killed:
        """Ask, and kill a replica when a third of the requests have been answered."""
        wrong, self._again, self._longest = self._wrong, Counter(), 0.0
        self._answered = time.monotonic()
        self._left = requests
        asking = asyncio.create_task(self._ask_all(requests))
        while self._left > requests - requests // 3 and not asking.done():  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        before = self._replicas()
        before[0].kill()
        replaced = await self._until_replaced(before, time.monotonic())
        await asking
        return Killed(requests, dict(self._again), self._wrong - wrong, self._longest, replaced)

    async def _until_replaced(self, before: list[psutil.Process], killed: float) -> float:
        while time.monotonic() < killed + _PATIENCE:
            with suppress(httpx.HTTPError):
                serving = (await self._pages())["requests_running"]
                if serving == len(before) and before[0] not in self._replicas():
                    return time.monotonic() - killed
            await asyncio.sleep(0.1)
        raise RuntimeError("the killed replica was not replaced")

    def _replicas(self) -> list[psutil.Process]:
        found = []
        for one in self._server.process.children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if one.status() != psutil.STATUS_ZOMBIE and _TITLE in " ".join(one.cmdline()):
                    found.append(one)
        return found

    async def _pages(self) -> Counter[str]:
        """Return how many replicas there are, as ``requests_running``, and sums of counters."""
        from prometheus_client.parser import text_string_to_metric_families

        async with httpx.AsyncClient(base_url=self._server.url, timeout=60) as http:
            text = (await http.get("/metrics")).raise_for_status().text
        found: Counter[str] = Counter()
        for family in text_string_to_metric_families(text):
            for one in family.samples:
                if one.name == "dora_cache_requests_running":
                    found["requests_running"] += 1
                elif one.name == "dora_cache_request_adapters_total":
                    found[one.labels["tier"]] += int(one.value)
                elif one.name == "dora_cache_pool_load_seconds_count":
                    found["loads"] += int(one.value)
        return found

    async def _counts(self) -> Counter[str]:
        """Return the sums of all replicas, of which one may be slow to answer."""
        for _ in range(100):
            found = await self._pages()
            if found["requests_running"] == _REPLICAS:
                return found
            await asyncio.sleep(0.1)
        raise RuntimeError("a replica does not tell its metrics")

    async def _ask_all(self, requests: int) -> None:
        jobs = [
            (name, self._chance.choice(_PROMPTS))
            for name in self._chance.choices(self._names, self._weights, k=requests)
        ]
        limits = httpx.Limits(max_connections=None)
        async with (
            httpx.AsyncClient(base_url=self._server.url, timeout=120, limits=limits) as http,
            asyncio.TaskGroup() as group,
        ):
            for _ in range(_CLIENTS):
                group.create_task(self._work(http, jobs))

    async def _work(self, http: httpx.AsyncClient, jobs: list[_Key]) -> None:
        while jobs:
            name, prompt = jobs.pop()
            body = {"model": name, "prompt": prompt, "max_tokens": _TOKENS, "temperature": 0}
            while (response := await http.post("/v1/completions", json=body)).is_error:
                if "Retry-After" not in response.headers:
                    raise RuntimeError(f"status {response.status_code}: {response.text[:300]}")
                self._again[response.status_code] += 1
                await asyncio.sleep(int(response.headers["Retry-After"]))
            now = time.monotonic()
            self._longest = max(self._longest, now - self._answered)
            self._answered = now
            text = response.json()["choices"][0]["text"]
            self._wrong += text.split() != self._expected[name, prompt].split()
            self._left -= 1
            self._move()


def table(found: Replicas) -> Table:
    """Return a table of the ways of routing."""
    shown = Table(box=box.SIMPLE_HEAD)
    titles = ("", "requests", "adapter resident", "loads", "requests/s", "wrong")
    for title in titles:
        shown.add_column(title, justify="left" if not title else "right")
    for way in found.ways:
        shown.add_row(
            "with multiplexing" if way.multiplexed else "without multiplexing",
            f"{way.requests:,}",
            f"{way.resident:.1%}",
            f"{way.loads:,}",
            f"{way.requests / way.seconds:.1f}",
            str(way.wrong),
        )
    return shown


def as_dict(found: Replicas) -> dict[str, Any]:
    """Return the result for a JSON file."""
    return asdict(found)
