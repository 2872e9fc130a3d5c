"""Requests: which wait, which run, and which adapters they need for that."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dora_cache.errors import (
    AdapterNotFoundError,
    CapError,
    ConfigError,
    PinError,
)
from dora_cache.serving.server.batching import Batcher, Progress, Sampler
from dora_cache.serving.server.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from dora_cache import AdapterPool
    from dora_cache.serving.server.folder import AdapterFolder, Version

__all__ = ["Engine", "Generation", "Limits", "Sampling"]

_log = logging.getLogger(__name__)

_PAGE = 32  # tokens in a block of the key-value cache
_AHEAD = 2  # adapters that are brought before their requests can run
_LONGEST_RETRY = 60  # seconds
_RETRY = 5  # seconds, where nothing tells how long it takes


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on requests.

    Attributes:
        max_prompt: the most tokens of a prompt.
        max_tokens: the most tokens that a request may generate.
        batch: requests that run at once.
        queue: requests that wait for that; beyond both, requests are refused.
        kv_tokens: tokens that the key-value cache is for, of all running requests together. Where
            they are too few, some requests are computed again later.
        batch_tokens: tokens of one forward; longer prompts are split.
        patience: requests that may run before one whose adapter has no room yet.
    """

    max_prompt: int = 2048
    max_tokens: int = 512
    batch: int = 16
    queue: int = 256
    kv_tokens: int = 16384
    batch_tokens: int = 512
    patience: int = 32

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if getattr(self, name) < (0 if name in {"queue", "patience"} else 1):
                raise ConfigError(f"{name} is {getattr(self, name)}: give a positive number")
        if self.kv_tokens < self.max_prompt + self.max_tokens:
            msg = (
                f"kv_tokens is {self.kv_tokens}, and one request may have "
                f"{self.max_prompt + self.max_tokens} tokens: give at least as many, or lower "
                "max_prompt or max_tokens"
            )
            raise ConfigError(msg)
        if self.batch_tokens < self.batch:
            msg = f"batch_tokens is {self.batch_tokens}: give at least batch={self.batch}"
            raise ConfigError(msg)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: 0 for greedy decoding.
        top_p: from 0, exclusive, to 1.
        seed: of the request's own generator; None for any.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None


class Generation:
    """One request; iterate over it to get lists of new tokens, as they come.

    Attributes:
        tokens: of the prompt.
        version: of its adapter; None for the base model.
        finish_reason: ``"stop"`` or ``"length"`` after the last token; None before.
    """

    def __init__(
        self,
        engine: Engine,
        number: str,
        tokens: list[int],
        version: Version | None,
        sampling: Sampling,
        max_tokens: int,
    ) -> None:
        self.number = number
        self.tokens = tokens
        self.version = version
        self.sampling = sampling
        self.max_tokens = max_tokens
        self.finish_reason: str | None = None
        self.overtaken = 0
        self.prefetched = False
        self.began = 0.0
        self._engine = engine
        self._sent = 0
        self._events: asyncio.Queue[list[int] | RequestError | None] = asyncio.Queue()

    @property
    def key(self) -> str | None:
        """The name of its adapter in the pool."""
        return None if self.version is None else self.version.key

    def cancel(self) -> None:
        """Give up its place; a no-op once it has ended."""
        self._engine.cancel(self)

    async def __aiter__(self) -> AsyncIterator[list[int]]:
        """Yield lists of new tokens.

        Raises:
            RequestError: it has failed.
        """
        try:
            while (event := await self._events.get()) is not None:
                if isinstance(event, RequestError):
                    raise event
                yield event
        finally:
            self.cancel()

    def take(self, tokens: list[int]) -> None:
        """Take note of all tokens so far."""
        if len(tokens) > self._sent:
            self._events.put_nowait(tokens[self._sent :])
            self._sent = len(tokens)

    def end(self, error: RequestError | None = None) -> None:
        """Take note that there will be no more."""
        self._events.put_nowait(error)


class Engine:
    """Runs requests on a model, each with its adapter, as many at once as fit.

    A request runs once its adapter is on the device, where it then stays to the request's end.
    Adapters of running requests together stay within the pool's ``device_bytes``. A request whose
    adapter has no room yet lets others pass whose adapters are there, up to ``limits.patience``.

    All methods belong to the thread of the event loop in which :meth:`start` was called.

    Args:
        model: a causal language model of Transformers'.
        pool: of that model; it belongs to the engine and the folder from here on.
        folder: whose adapters it serves.
        limits: bounds on requests.

    Attributes:
        draining: whether no requests are accepted any more.
        counts: requests by what has become of them; and those with an adapter, by the tier that had
            it when they came.

    Raises:
        ConfigError: the model cannot hold requests of such lengths.
    """

    def __init__(
        self, model: Any, pool: AdapterPool, folder: AdapterFolder, limits: Limits | None = None
    ) -> None:
        self.model = model
        self.pool = pool
        self.folder = folder
        self.limits = limits or Limits()
        self.draining = False
        self.counts: Counter[str] = Counter()
        self.eos = _ending(model)
        longest = getattr(model.config.get_text_config(), "max_position_embeddings", math.inf)
        wanted = self.limits.max_prompt + self.limits.max_tokens
        if wanted > longest:
            msg = (
                f"max_prompt + max_tokens is {wanted}, and the model's positions are {longest}: "
                "lower one of the two"
            )
            raise ConfigError(msg)
        self._batcher: Batcher | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._numbers = itertools.count(1)
        self._waiting: deque[Generation] = deque()
        self._running: dict[str, Generation] = {}  # those that are leaving included
        self._users: Counter[str] = Counter()  # running requests, by adapter
        self._loading: str | None = None
        self._tight = False  # whether the first that waits for room has to go on waiting
        self._freed = 0
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="dora-cache-load")
        self._looking = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._seconds = 0.0  # a moving mean of what a request takes

    async def start(self) -> None:
        """Begin to run requests."""
        self._loop = asyncio.get_running_loop()
        limits = self.limits
        self._batcher = Batcher(
            self.model,
            self.pool,
            page=_PAGE,
            kv_tokens=limits.kv_tokens,
            batch=limits.batch,
            batch_tokens=limits.batch_tokens,
            eos=self.eos,
            report=self._report,
        )
        self._batcher.start()

    @property
    def failure(self) -> str | None:
        """Why there will be no more answers; None while there will."""
        return "it has not started" if self._batcher is None else self._batcher.failure

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """How many requests run."""
        return len(self._running)

    def submit(
        self, tokens: list[int], model: str | None, sampling: Sampling, max_tokens: int
    ) -> Generation:
        """Accept a request.

        Args:
            tokens: of the prompt.
            model: the adapter's name; None for the base model.
            sampling: how tokens are chosen.
            max_tokens: the most to generate.

        Raises:
            RequestError: it is refused.
        """
        limits = self.limits
        if self.draining or self.failure is not None:
            why = "the server is shutting down" if self.draining else "the engine has stopped"
            raise RequestError(503, why, code="unavailable", retry_after=_RETRY)
        if not tokens:
            msg = "the prompt has no tokens: give a text that is not empty"
            raise RequestError(400, msg, code="empty_prompt", param="prompt")
        if len(tokens) > limits.max_prompt:
            msg = f"the prompt has {len(tokens)} tokens; the most is {limits.max_prompt}"
            raise RequestError(413, msg, code="prompt_too_long", param="prompt")
        if max_tokens > limits.max_tokens:
            msg = f"max_tokens is {max_tokens}; the most is {limits.max_tokens}"
            raise RequestError(400, msg, code="max_tokens_too_large", param="max_tokens")
        version = None if model is None else self.folder.find(model)
        if len(self._waiting) + len(self._running) >= limits.queue + limits.batch:
            self.counts["turned_away"] += 1
            msg = f"{len(self._waiting)} requests are waiting already: try again later"
            raise RequestError(429, msg, code="queue_full", retry_after=self._retry_after())
        number = str(next(self._numbers))
        one = Generation(self, number, tokens, version, sampling, max_tokens)
        if version is not None:
            self.folder.hold(version)
            self.counts[self.pool.tier(version.key)] += 1
        self._waiting.append(one)
        self._idle.clear()
        self._admit()
        return one

    def cancel(self, one: Generation) -> None:
        """Have a request give up its place; a no-op once it has ended."""
        if one in self._waiting:
            self._waiting.remove(one)
            self._leave(one, "cancelled")
            self._admit()
        elif self._running.get(one.number) is one and one.finish_reason is None:
            one.finish_reason = "cancelled"
            assert self._batcher is not None  # noqa: S101 - it runs
            self._batcher.cancel(one.number)

    async def refresh(self) -> None:
        """Look at the folder, and answer those that wait for adapters that are gone or changed."""
        async with self._looking:
            changes = await asyncio.to_thread(self.folder.look)
            self.folder.apply(changes, self._retired)
        self._admit()

    async def drain(self, seconds: float | None = None) -> None:
        """Accept no more requests, and wait until all have ended.

        Args:
            seconds: after these, those that are left fail; None to wait for as long as it takes.
        """
        self.draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), seconds)
        except TimeoutError:
            self._fail_all("the server is shutting down")

    async def stop(self) -> None:
        """End everything; whoever waits gets an error."""
        self.draining = True
        self._fail_all("the server is shutting down")
        if self._batcher is not None:
            await asyncio.to_thread(self._batcher.stop, hard_stop=True)
        for task in list(self._tasks):
            await asyncio.wait([task])
        await asyncio.sleep(0)  # what the generation thread has reported
        for one in list(self._running.values()):
            self._finish(one, "failed")
        self._loader.shutdown()

    # Admission

    def _admit(self) -> None:
        """Let requests run, in their order, as far as there is room."""
        first: Generation | None = None  # that waits for its adapter
        for one in list(self._waiting):
            beginning = self._loading is not None
            if len(self._running) + beginning >= self.limits.batch:
                break
            key = one.key
            if key is None or self._users[key]:
                if first is not None:
                    if first.overtaken >= self.limits.patience:
                        break
                    first.overtaken += 1
                self._waiting.remove(one)
                self._run(one)
            else:
                if first is None and not beginning and not self._tight:
                    self._loading = key
                    self._spawn(self._load(one))
                first = first or one
        self._prefetch()
        if not self._waiting and not self._running:
            self._idle.set()

    def _prefetch(self) -> None:
        """Begin to bring the adapters of requests that are next."""
        keys = dict.fromkeys(one.key for one in self._waiting if one.key not in self._users)
        ahead = [key for key in keys if key is not None and key != self._loading][:_AHEAD]
        for one in self._waiting:
            if one.key in ahead and not one.prefetched:
                one.prefetched = True
                ahead.remove(one.key)
                self.pool.prefetch(one.key)

    async def _load(self, one: Generation) -> None:
        """Bring the adapter of a request that waits, and keep it for the request."""
        key, freed = one.key, self._freed
        assert key is not None and self._loop is not None  # noqa: S101, PT018
        error: Exception | None = None
        try:
            await self._loop.run_in_executor(self._loader, self.pool.pin, key)
        except Exception as caught:  # noqa: BLE001 - the request is told
            error = caught
        self._loading = None
        if error is None:
            if one in self._waiting:
                self._waiting.remove(one)
                self._run(one)
            else:  # it was cancelled or refused meanwhile
                self._unpin(key)
        elif isinstance(error, PinError | CapError) and (self._users or freed != self._freed):
            self._tight = freed == self._freed
        elif one in self._waiting:
            await self._fail_load(one, error)
        self._admit()

    async def _fail_load(self, one: Generation, error: Exception) -> None:
        if not isinstance(error, CapError | PinError):
            await self.refresh()  # the files may have been replaced
        if one not in self._waiting:
            return
        assert one.version is not None  # noqa: S101 - it has an adapter
        _log.error("adapter not loaded", extra={"adapter": one.version.name}, exc_info=error)
        reason = str(error).replace(one.version.key, one.version.name)
        msg = f"the adapter {one.version.name!r} cannot be loaded: {_without(reason, self.folder)}"
        self._waiting.remove(one)
        self._leave(one, "failed", RequestError(503, msg, code="adapter_unreadable"))

    def _run(self, one: Generation) -> None:
        """Hand a request to the batch; its adapter is on the device, pinned."""
        assert self._batcher is not None  # noqa: S101 - it was accepted
        self._running[one.number] = one
        one.began = time.monotonic()
        if one.key is not None:
            self._users[one.key] += 1
        how = one.sampling
        sampler = None
        if how.temperature > 0:
            sampler = Sampler(how.temperature, how.top_p, how.seed, self.model.device)
        taken = self._batcher.submit(
            one.number,
            one.tokens,
            adapter=one.key,
            sampler=sampler,
            max_tokens=one.max_tokens,
        )
        if not taken:
            self._finish(one, "failed", _stopped())

    # Progress

    def _report(self, many: list[Progress]) -> None:
        """Take what the generation thread reports to the event loop."""
        assert self._loop is not None  # noqa: S101 - it runs
        try:
            self._loop.call_soon_threadsafe(self._take, many)
        except RuntimeError:
            _log.debug("the event loop is closed")

    def _take(self, many: list[Progress]) -> None:
        for progress in many:
            one = self._running.get(progress.request)
            if one is None:
                continue
            if progress.cancelled:
                self._finish(one, "cancelled")
            elif progress.error is not None:
                msg = f"generation has failed: {progress.error}"
                self._finish(one, "failed", RequestError(500, msg, code="generation_failed"))
            else:
                one.take(progress.tokens)
                if progress.finished:
                    stopped = bool(progress.tokens) and progress.tokens[-1] in self.eos
                    one.finish_reason = one.finish_reason or ("stop" if stopped else "length")
                    self._finish(one, "finished")
        self._admit()

    def _finish(self, one: Generation, what: str, error: RequestError | None = None) -> None:
        """End a request that the batch does not have any more."""
        assert self._batcher is not None  # noqa: S101 - it has run
        del self._running[one.number]
        self._batcher.forget(one.number)
        taken = time.monotonic() - one.began
        self._seconds = 0.9 * self._seconds + 0.1 * taken if self._seconds else taken
        if one.key is not None:
            self._users[one.key] -= 1
            if not self._users[one.key]:
                del self._users[one.key]
                self._unpin(one.key)
        self._leave(one, what, error)

    def _leave(self, one: Generation, what: str, error: RequestError | None = None) -> None:
        self.counts[what] += 1
        if one.version is not None:
            self.folder.release(one.version)
        one.end(error)
        if not self._waiting and not self._running:
            self._idle.set()

    def _unpin(self, key: str) -> None:
        self._freed += 1
        self._tight = False
        try:
            self.pool.unpin(key)
        except AdapterNotFoundError:
            _log.debug("adapter is gone", extra={"adapter": key})

    def _retired(self, version: Version, again: bool) -> None:  # noqa: FBT001
        """Answer those that wait for a version that is not there any more."""
        name = version.name
        if again:
            msg = f"the adapter {name!r} was replaced while the request waited: send it again"
            status, code = 409, "adapter_replaced"
        else:
            msg = f"the adapter {name!r} was removed while the request waited"
            status, code = 404, "model_not_found"
        for one in [one for one in self._waiting if one.version is version]:
            self._waiting.remove(one)
            self._leave(one, "refused", RequestError(status, msg, code=code, param="model"))

    def _fail_all(self, why: str) -> None:
        error = RequestError(503, why, code="unavailable", retry_after=_RETRY)
        while self._waiting:
            self._leave(self._waiting.popleft(), "failed", error)
        for one in list(self._running.values()):
            one.end(error)
            self.cancel(one)

    def _retry_after(self) -> int:
        """Return in how many seconds there should be a place, from 1."""
        seconds = self._seconds * len(self._waiting) / self.limits.batch
        return max(1, min(_LONGEST_RETRY, math.ceil(seconds)))

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _ending(model: Any) -> list[int]:
    """Return the tokens that end a text."""
    found = getattr(model.generation_config, "eos_token_id", None)
    if found is None:
        found = model.config.get_text_config().eos_token_id
    return [] if found is None else [found] if isinstance(found, int) else list(found)


def _stopped() -> RequestError:
    return RequestError(503, "the engine has stopped", code="unavailable", retry_after=_RETRY)


def _without(text: str, folder: AdapterFolder) -> str:
    """Leave out where the folder is: that is nobody's business outside."""
    return text if folder.path is None else text.replace(f"{folder.path}/", "")
