"""Requests for many adapters of one model, served by a pool: what its caps keep, what a miss costs.

Adapters are asked for by Zipf's law, one a request. Each request is timed from before ``use`` until
its first token is there, and its logits are compared with those of plain PEFT in float64.
"""

from __future__ import annotations

import copy
import gc
import math
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from rich import box
from rich.table import Table

from dora_cache.lab.bench.measure import synchronize
from dora_cache.lab.models import write_adapter
from dora_cache.lab.simulator.bounds import optimum
from dora_cache.lab.simulator.traces import Trace
from dora_cache.serving import AdapterPool
from dora_cache.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor

__all__ = [
    "FirstTokens",
    "Served",
    "Tier",
    "Traffic",
    "as_dict",
    "measure_traffic",
    "tables",
    "write_adapters",
]

Place: TypeAlias = Literal["device", "host", "files"]
"""Where a request's adapter was before anything was done for the request."""

_TITLES: dict[Place, str] = {
    "device": "adapter was on the device",
    "host": "on the host",
    "files": "in its files",
}
_PLENTY = 1 << 62


@dataclass(frozen=True, slots=True)
class FirstTokens:
    """How long first tokens took.

    Attributes:
        count: the requests.
        p50_ms: the median, in milliseconds; None without requests.
        p99_ms: the 99th percentile.
    """

    count: int
    p50_ms: float | None
    p99_ms: float | None


@dataclass(frozen=True, slots=True)
class Tier:
    """A tier of the pool.

    Attributes:
        max_bytes: its cap.
        most_bytes: the most that it held after any load.
        hit_rate: requests whose adapter was there, or in the tier above, per request.
        optimum: the hit rate that no policy exceeds, even with foresight.
    """

    max_bytes: int
    most_bytes: int
    hit_rate: float
    optimum: float


@dataclass(frozen=True, slots=True)
class Served:
    """One way of serving all requests.

    Attributes:
        prefetched: whether each adapter was prefetched as soon as the request before had its first
            token.
        first: first tokens, by where the adapter was before that.
        further_ms: a further token, the median.
        device: the device's tier.
        host: the host's.
        cuda_growth: the most bytes by which what PyTorch has allocated on the device, without
            workspaces of cuBLAS, grew from before the pool was made; None on other devices.
        wrong: requests with a first token whose error is above the limit.
        largest_error: the largest error, as a share of the norm of the right logits.
    """

    prefetched: bool
    first: dict[Place, FirstTokens]
    further_ms: float
    device: Tier
    host: Tier
    cuda_growth: int | None
    wrong: int
    largest_error: float


@dataclass(frozen=True, slots=True)
class Traffic:
    """What was measured, and under what.

    Attributes:
        adapters: how many there are, half of them LoRA and half DoRA.
        requests: how many were served.
        tokens: of each.
        exponent: of Zipf's law.
        slots: adapters that the device's cap suffices for.
        host_slots: the same of the host.
        limit: the error above which an output is wrong.
        nearest: how far apart the right outputs of two adapters are at least, as the errors are
            measured: a request that got another one's adapter is further off than half of this.
        served: without prefetching and with it.
    """

    adapters: int
    requests: int
    tokens: int
    exponent: float
    slots: int
    host_slots: int
    limit: float
    nearest: float
    served: tuple[Served, ...]


def write_adapters(
    model: Any,
    folder: Path,
    count: int,
    *,
    rank: int = 8,
    move: Callable[[], object] = lambda: None,
) -> None:
    """Write random adapters, LoRA and DoRA in turn, each into a folder of its own.

    Args:
        model: a Transformers model without adapters.
        folder: gets theirs; so sorted, they are in the order in which they are written.
        count: how many.
        rank: of each.
        move: called after each.
    """
    digits = len(str(count - 1))
    for index in range(count):
        path = folder / f"{index:0{digits}}"
        write_adapter(model, path, rank=rank, dora=index % 2 == 1, seed=index)
        move()


def measure_traffic(
    model: Any,
    folder: Path,
    *,
    slots: int = 50,
    host_slots: int = 200,
    requests: int = 2000,
    exponent: float = 1.0,
    prompt: int = 16,
    tokens: int = 4,
    policy: str = "lru",
    seed: int = 0,
    move: Callable[[], object] = lambda: None,
) -> Traffic:
    """Serve the same requests without prefetching and with it.

    Args:
        model: a causal language model, without adapters.
        folder: has the adapters, see :func:`write_adapters`.
        slots: for how many adapters the device's cap suffices.
        host_slots: for how many the host's does.
        requests: how many.
        exponent: of Zipf's law, by which adapters are asked for.
        prompt: tokens of each prompt.
        tokens: new tokens of each request.
        policy: the pool's.
        seed: of requests and prompt.
        move: called after each request.
    """
    names = sorted(path.name for path in folder.iterdir())
    random = np.random.default_rng(seed)
    weights = 1 / np.arange(1, len(names) + 1) ** exponent
    # Names are in the order of their kinds: any of them may be asked for most.
    ranked = random.permutation(len(names))
    picks = ranked[random.choice(len(names), size=requests, p=weights / weights.sum())]
    inputs = random.integers(model.config.vocab_size, size=(1, prompt))
    ids = torch.from_numpy(inputs).to(model.device)
    asked = [names[pick] for pick in picks]
    expected = _expected(model, folder, sorted(set(asked)), ids)

    sizes = np.array([_sizes(model, folder / name, ids) for name in names[:2]])
    on_device, on_host = sizes[np.arange(len(names)) % 2].T  # their kinds take turns
    caps = slots * int(on_device.max()), host_slots * int(on_host.max())
    # An adapter takes at least as much on the device as on the host.
    best = _optimum(picks, on_device, caps[0]), _optimum(picks, on_host, sum(caps))
    limit = float(torch.finfo(model.dtype).eps) ** 0.5
    served = []
    for ahead in (False, True):
        gc.collect()  # of models and pools before: their memory is not to be freed later
        before = _allocated(ids.device)
        with AdapterPool(model, device_bytes=caps[0], max_bytes=caps[1], policy=policy) as pool:
            pool.add_folder(folder)
            seen = _Seen(pool, ids.device, before)
            for name, following in zip(asked, [*asked[1:], None], strict=True):
                _serve(model, ids, tokens, name, following if ahead else None, seen)
                seen.compare(expected[name])
                move()
        served.append(seen.result(caps, best, limit, prefetched=ahead))
    nearest = _nearest(list(expected.values()))
    return Traffic(
        len(names),
        requests,
        tokens,
        exponent,
        slots,
        host_slots,
        limit,
        nearest,
        tuple(served),
    )


def _expected(model: Any, folder: Path, names: Sequence[str], ids: Tensor) -> dict[str, Tensor]:
    """Return the logits of the first token by PEFT, each adapter alone: float64, on the CPU."""
    from peft import PeftConfig, get_peft_model, set_peft_model_state_dict
    from safetensors.torch import load_file

    exact = copy.deepcopy(model).double()
    wrapped: Any = None
    found = {}
    for name in names:
        config: Any = PeftConfig.from_pretrained(str(folder / name))
        weights = load_file(folder / name / "adapter_model.safetensors")
        kind = "dora" if config.use_dora else "lora"
        if wrapped is None:
            wrapped = get_peft_model(exact, config, adapter_name=kind).eval()
        elif kind not in wrapped.peft_config:
            wrapped.add_adapter(kind, config)
        set_peft_model_state_dict(wrapped, weights, adapter_name=kind)
        wrapped.double().set_adapter(kind)
        with torch.no_grad():
            found[name] = wrapped(input_ids=ids).logits[0, -1].cpu()
    return found


def _sizes(model: Any, path: Path, ids: Tensor) -> tuple[int, int]:
    """Return an adapter's bytes on the device and on the host; by then it has run."""
    with AdapterPool(model, max_bytes=_PLENTY) as pool, torch.no_grad():
        pool.add("one", path)
        with pool.use("one"):
            for _ in _generate(model, ids, 2):
                pass
        now = pool.stats()
        return now.device_bytes, now.host_bytes


def _optimum(picks: NDArray[np.int64], sizes: NDArray[np.int64], cap: int) -> float:
    trace = Trace("", "", sizes, np.ones(len(sizes)), picks)
    return optimum(trace, cap)[0] / len(picks)


def _nearest(outputs: Sequence[Tensor]) -> float:
    if len(outputs) == 1:
        return math.inf
    every = torch.stack(list(outputs))
    distances = torch.cdist(every, every) / every.norm(dim=1)
    return float(distances.fill_diagonal_(math.inf).min())


def _allocated(device: torch.device) -> int:
    """Return what PyTorch has allocated on a CUDA device, without workspaces of cuBLAS."""
    if device.type != "cuda":
        return 0
    torch._C._cuda_clearCublasWorkspaces()
    return torch.cuda.memory_allocated(device)


def _generate(model: Any, ids: Tensor, tokens: int) -> Iterator[Tensor]:
    """Generate greedily; yield the logits of each token, shape (vocabulary,)."""
    past = None
    for _ in range(tokens):
        output = model(input_ids=ids, past_key_values=past, use_cache=True)
        yield output.logits[0, -1]
        past, ids = output.past_key_values, output.logits[:, -1:].argmax(-1)


@torch.no_grad()
def _serve(
    model: Any, ids: Tensor, tokens: int, name: str, following: str | None, seen: _Seen
) -> None:
    """Serve one request; ask for the adapter of the following one after the first token."""
    device, pool = ids.device, seen.pool
    synchronize(device)
    began = time.perf_counter()
    with pool.use(name):
        for step, logits in enumerate(_generate(model, ids, tokens)):
            synchronize(device)
            spent = time.perf_counter() - began
            if step:
                seen.further.append(spent)
            else:
                seen.have_first(spent, logits)
                if following is not None:
                    pool.prefetch(following)
            began = time.perf_counter()


class _Seen:
    """What is seen while requests are served."""

    def __init__(self, pool: AdapterPool, device: torch.device, allocated: int) -> None:
        self.pool = pool
        self._device = device
        self.first: dict[Place, list[float]] = {place: [] for place in get_args(Place)}
        self.further: list[float] = []
        self._logits = torch.empty(0)
        self._errors: list[float] = []
        self._before = pool.stats()
        self._most = [0, 0]
        self._allocated = allocated
        self._growth = 0

    def have_first(self, seconds: float, logits: Tensor) -> None:
        """Note a first token. Since the one before, no adapter but this one's has been loaded."""
        before, now = self._before, self.pool.stats()
        if now.loads == before.loads:
            place: Place = "device"
        else:
            place = "host" if now.reads == before.reads else "files"
        self.first[place].append(seconds)
        self._before = now
        self._most = list(map(max, self._most, (now.device_bytes, now.host_bytes)))
        self._logits = logits.double().cpu()

    def compare(self, expected: Tensor) -> None:
        """Compare the last first token's logits; note the memory that the request has left."""
        self._errors.append(float((self._logits - expected).norm() / expected.norm()))
        self._growth = max(self._growth, _allocated(self._device) - self._allocated)

    def result(
        self, caps: tuple[int, int], best: tuple[float, float], limit: float, *, prefetched: bool
    ) -> Served:
        """Return all that was seen, in numbers."""
        count = len(self._errors)
        hits = len(self.first["device"]), count - len(self.first["files"])
        device, host = (
            Tier(cap, most, hit / count, possible)
            for cap, most, hit, possible in zip(caps, self._most, hits, best, strict=True)
        )
        return Served(
            prefetched,
            {place: _summary(seconds) for place, seconds in self.first.items()},
            1e3 * float(np.median(self.further)),
            device,
            host,
            self._growth if self._device.type == "cuda" else None,
            # An output that is not a number is wrong as well.
            sum(not error <= limit for error in self._errors),
            max(self._errors),
        )


def _summary(seconds: Sequence[float]) -> FirstTokens:
    if not seconds:
        return FirstTokens(0, None, None)
    p50, p99 = (1e3 * float(np.quantile(seconds, share)) for share in (0.5, 0.99))
    return FirstTokens(len(seconds), p50, p99)


def tables(found: Traffic) -> tuple[Table, Table]:
    """Return the times of first tokens, and what each tier had."""
    times = _table(
        "first token, ms", "requests", "p50", "p99", "prefetched:\nrequests", "p50", "p99"
    )
    for place, title in _TITLES.items():
        cells = []
        for one in found.served:
            first = one.first[place]
            spread = ["" if ms is None else f"{ms:.2f}" for ms in (first.p50_ms, first.p99_ms)]
            cells += [f"{first.count:,}", *spread]
        times.add_row(title, *cells)
    further = [f"{one.further_ms:.2f}" for one in found.served]
    times.add_row("each further token", "", further[0], "", "", further[1], "")
    held = _table("", "hit rate", "optimum", "of it", "cap", "most held")
    for title, tiers in {
        "device": [one.device for one in found.served],
        "device or host": [one.host for one in found.served],
    }.items():
        tier = tiers[0]
        held.add_row(
            title,
            f"{tier.hit_rate:.1%}",
            f"{tier.optimum:.1%}",
            f"{tier.hit_rate / tier.optimum:.1%}" if tier.optimum else "",
            format_bytes(tier.max_bytes),
            format_bytes(max(one.most_bytes for one in tiers)),
        )
    return times, held


def _table(first: str, *others: str) -> Table:
    rows = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, show_edge=False)
    rows.add_column(first, vertical="bottom")
    for column in others:
        rows.add_column(column, justify="right", vertical="bottom")
    return rows


def as_dict(found: Traffic) -> dict[str, Any]:
    """Return everything as JSON knows it; times in ms, sizes in bytes."""
    return asdict(found)
