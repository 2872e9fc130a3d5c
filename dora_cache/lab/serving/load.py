"""Clients of the openai package at once: every answer compared, and tokens per second."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from threading import Event, Thread
from typing import TYPE_CHECKING, Any, TypeAlias

import httpx
import openai
import torch
from rich import box
from rich.table import Table

from dora_cache.lab.bench.measure import Spread
from dora_cache.lab.serving.processes import running

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

_Job: TypeAlias = tuple[str | None, str]
"""An adapter's name, or None for the base model, and a prompt."""

__all__ = ["Load", "Way", "as_dict", "measure_load", "table"]

_LOOK = 0.25  # seconds between two looks at what adapters have on the device
_PROMPTS = (
    "Shall I compare thee to a summer's day?",
    "To make a good soup, first",
    "The sea at night is",
    "Take two eggs and",
)


@dataclass(frozen=True, slots=True)
class Way:
    """What one server has done.

    Attributes:
        name: of the server and what it served.
        rates: tokens per second of each turn.
        wrong: answers that differ from the same request alone; None where they were not compared.
        answers: how many there were.
        rss: bytes that its process had in memory at the end.
    """

    name: str
    rates: tuple[float, ...]
    wrong: int | None
    answers: int
    rss: int


@dataclass(frozen=True, slots=True)
class Load:
    """The result.

    Attributes:
        clients: how many asked at once.
        tokens: of each answer.
        ways: the servers, in their order.
        device_bytes: the most that adapters had on the device when it was looked at.
        cap: of these.
        exit_status: of the pool's server after SIGTERM.
    """

    clients: int
    tokens: int
    ways: tuple[Way, ...]
    device_bytes: int
    cap: int
    exit_status: int | None


def measure_load(
    model: Path,
    adapters: Path,
    lora: Path,
    *,
    clients: int,
    requests: int,
    tokens: int,
    turns: int,
    cap: int,
    threads: int,
    move: Callable[[], None],
) -> Load:
    """Serve one model by a pool and by Transformers' own server, in turns.

    The pool's server has all adapters and the base model mixed; Transformers' has one LoRA adapter,
    and for comparison the pool's has that one alone as well.

    Args:
        model: the base model's folder.
        adapters: the folder of the adapters; one of them is named as ``lora``'s folder.
        lora: a LoRA adapter in it, which Transformers' server gets.
        clients: how many ask at once.
        requests: of each turn.
        tokens: of each answer.
        turns: how often each server is measured; two more warm up.
        cap: ``device_bytes`` of the pool.
        threads: of PyTorch, in each server.
        move: called once for each turn.
    """
    names = sorted(one.name for one in adapters.iterdir())
    mixed = [None, *(name for name in names if name != lora.name)]
    jobs: dict[str, list[_Job]] = {
        "mixed": [(mixed[i % len(mixed)], _PROMPTS[i % len(_PROMPTS)]) for i in range(requests)],
        "lora": [(lora.name, _PROMPTS[i % len(_PROMPTS)]) for i in range(requests)],
    }
    expected = _alone(model, adapters, {*jobs["mixed"], *jobs["lora"]}, tokens)
    ours = [
        "-m", "dora_cache", "serve", str(model), "--adapters", str(adapters), "--port", "PORT",
        "--device-bytes", str(cap), "--batch", str(clients), "--dtype", "fp32",
        "--max-prompt", "512", "--kv-tokens", "4096", "--name", "base",
    ]  # fmt: skip
    theirs = [
        "-m", "dora_cache.lab.serving.transformers_server", str(model), str(lora), "PORT",
        str(4096 // 256), "512",
    ]  # fmt: skip
    rates: dict[str, list[float]] = {"mixed": [], "lora": [], "theirs": []}
    wrong = dict.fromkeys(rates, 0)
    held = 0
    with running(theirs, threads=threads) as other, running(ours, threads=threads) as own:
        for turn in range(turns + 1):
            for way, measured in rates.items():
                server = other if way == "theirs" else own
                asked = jobs["lora" if way == "theirs" else way]
                named = [str(model) if way == "theirs" else name or "base" for name, _ in asked]
                prompts = [prompt for _, prompt in asked]
                with _watching(own.url) as most:
                    seconds, texts = _ask(server.url, named, prompts, tokens, clients)
                right = [expected[one][0] for one in asked]
                wrong[way] += sum(a != b for a, b in zip(texts, right, strict=True))
                if turn:  # the first one warms up
                    measured.append(sum(expected[one][1] for one in asked) / seconds)
                held = max(held, *most)
                move()
        rss = {way: (other if way == "theirs" else own).rss for way in rates}
    titles = {
        "mixed": f"dora-cache serve, {len(mixed) - 1} DoRA adapters and the base mixed",
        "lora": "dora-cache serve, one LoRA adapter",
        "theirs": "transformers serve, one LoRA adapter",
    }
    answers = requests * (turns + 1)
    ways = tuple(
        Way(titles[way], tuple(rates[way]), wrong[way], answers, rss[way]) for way in rates
    )
    return Load(clients, tokens, ways, held, cap, own.exit_status)


def _ask(
    url: str, names: Sequence[str], prompts: Sequence[str], tokens: int, clients: int
) -> tuple[float, list[str]]:
    """Return how many seconds the requests took, and the texts."""
    with (
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=600, max_retries=0) as client,
        ThreadPoolExecutor(clients) as pool,
    ):

        def one(name: str, prompt: str) -> str:
            found = client.completions.create(
                model=name, prompt=prompt, max_tokens=tokens, temperature=0
            )
            return found.choices[0].text

        start = time.perf_counter()
        texts = list(pool.map(one, names, prompts))
        return time.perf_counter() - start, texts


def _alone(
    model: Path, adapters: Path, asked: set[_Job], tokens: int
) -> dict[_Job, tuple[str, int]]:
    """Return each request's text alone with PEFT, and how many tokens it has.

    Each adapter has a model of its own, within PEFT's ``DoraCaching``: nothing changes that could
    make its values stale. Without it, PEFT would take minutes.
    """
    from peft import PeftModel
    from peft.helpers import DoraCaching
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    found: dict[_Job, tuple[str, int]] = {}
    for name in {name: None for name, _ in asked}:
        alone: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        if name is not None:
            alone = PeftModel.from_pretrained(alone, adapters / name)
        alone.eval()
        for prompt in [prompt for one, prompt in asked if one == name]:
            ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
            with DoraCaching():
                output = alone.generate(input_ids=ids, max_new_tokens=tokens, do_sample=False)
            new = output[0, ids.shape[1] :]
            found[name, prompt] = (tokenizer.decode(new, skip_special_tokens=True), len(new))
    return found


@contextmanager
def _watching(url: str) -> Iterator[list[int]]:
    """Note in a list what adapters have on the device, some times each second and at the end."""
    found: list[int] = []
    done = Event()

    def watch() -> None:
        while not done.wait(_LOOK):
            found.append(_held(url))

    watcher = Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()
        found.append(_held(url))


def _held(url: str) -> int:
    """Return the bytes that adapters have on the device, as the server reports them."""
    lines = httpx.get(f"{url}/metrics", timeout=60).text.splitlines()
    found = [line for line in lines if line.startswith("dora_cache_pool_used_bytes{")]
    return sum(int(float(line.split()[-1])) for line in found if 'tier="device"' in line)


def table(load: Load) -> Table:
    """Return a table of the servers."""
    shown = Table(box=box.SIMPLE_HEAD)
    for title in ("", "tokens/s (quartiles)", "answers", "wrong", "RSS, MiB"):
        shown.add_column(title, justify="left" if not title else "right")
    for way in load.ways:
        rate = str(Spread.quartiles(way.rates))
        shown.add_row(way.name, rate, str(way.answers), str(way.wrong), f"{way.rss / 2**20:.0f}")
    return shown


def as_dict(load: Load) -> dict[str, Any]:
    """Return the result for a JSON file."""
    return asdict(load)
