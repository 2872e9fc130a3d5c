"""The server on more than one process or machine, by Ray Serve. Needs the extra ``ray``.

Each replica has the model, a pool and an engine, as ``dora-cache serve`` has. In front of them is
an ingress, which sends a request to a replica on whose device its adapter is.
"""

import asyncio
import dataclasses
import json
import logging
import os
import random
import signal
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

from dora_cache.extras import RAY, require

require("ray", RAY, "dora_cache.serving.ray")

import ray  # noqa: E402 - after the check
import xxhash  # noqa: E402
from fastapi import FastAPI, Request, Response  # noqa: E402
from fastapi.responses import StreamingResponse  # noqa: E402
from prometheus_client import CollectorRegistry, Metric  # noqa: E402
from pydantic import BaseModel, ConfigDict, Field, model_validator  # noqa: E402
from ray import serve  # noqa: E402
from ray.exceptions import RayActorError  # noqa: E402
from ray.serve.exceptions import (  # noqa: E402
    BackPressureError,
    DeploymentUnavailableError,
)
from ray.serve.request_router import (  # noqa: E402
    MultiplexMixin,
    PendingRequest,
    RequestRouter,
    RunningReplica,
)
from starlette.types import Message  # noqa: E402

from dora_cache.serving.pool import AdapterPool  # noqa: E402
from dora_cache.serving.server.app import (  # noqa: E402
    body_limit,
    create_app,
    error_response,
    metrics_response,
)
from dora_cache.serving.server.engine import Engine, Limits  # noqa: E402
from dora_cache.serving.server.errors import RequestError  # noqa: E402
from dora_cache.serving.server.folder import AdapterFolder  # noqa: E402
from dora_cache.serving.server.metrics import Merged, registry_of  # noqa: E402

__all__ = ["APPLICATION", "AdapterRouter", "Ingress", "Replica", "Settings", "deployment", "run"]

_log = logging.getLogger(__name__)

APPLICATION = "dora-cache"
"""What the application is called in a cluster."""

_METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
_SCOPE = ("type", "asgi", "http_version", "method", "path", "raw_path", "query_string", "headers")
_REPLICA = "replica"
_OK, _NOT_FOUND = 200, 404
_RETRY = 1  # seconds
_SCRAPE = 5.0  # seconds that replicas have to tell their metrics
_MOST_OF_INGRESS = 1000  # requests of one at once


class Settings(BaseModel):
    """What is deployed.

    Attributes:
        model: a folder that ``save_pretrained`` wrote, or the model's name on the Hub. Every
            machine must find the same there.
        adapters: the folder whose folders are adapters, on every machine.
        name: what requests call the base model; by default the last part of ``model``.
        device_bytes: cap on adapters on the device, of each replica.
        max_bytes: cap on adapters in the host's memory, of each replica.
        replicas: how many; or the fewest and the most, for autoscaling by the length of queues.
        ingresses: processes that pass requests on. With two, one may die without a gap.
        multiplexed: whether requests go where their adapter is.
        limits: of each replica; ``queue`` is that of each ingress. Beside these, as many may wait
            there as all replicas take: a burst waits there while it is handed out.
        refresh: seconds between looks at the adapters' folder; None to look once, at the start.
        drain: seconds for accepted requests when a replica is taken away.
        dtype: of the weights, such as ``"bfloat16"``; ``"auto"`` for the model's.
        attention: of Transformers', such as ``"sdpa"``; None for the default.
        num_cpus: of each replica, for Ray's scheduler.
        num_gpus: the same.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    adapters: Path
    name: str | None = None
    device_bytes: int | str | None = None
    max_bytes: int | str | None = None
    replicas: Annotated[int, Field(ge=1)] | tuple[int, int] = 1
    ingresses: int = Field(1, ge=1)
    multiplexed: bool = True
    limits: Limits = Limits()
    refresh: float | None = Field(5.0, gt=0)
    drain: float = Field(600.0, ge=0)
    dtype: str = "auto"
    attention: str | None = None
    num_cpus: float = Field(1.0, ge=0)
    num_gpus: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _check(self) -> "Settings":
        if isinstance(self.replicas, tuple) and not 1 <= self.replicas[0] <= self.replicas[1]:
            msg = f"replicas is {self.replicas}: give the fewest, at least 1, and the most"
            raise ValueError(msg)
        return self

    @property
    def base(self) -> str:
        """What requests call the base model."""
        return self.name or (Path(self.model).name if Path(self.model).is_dir() else self.model)


class AdapterRouter(MultiplexMixin, RequestRouter):
    """Chooses the replica of a request.

    First one that has the adapter, as far as is known. Else the one that is the adapter's home: the
    first of all replicas by a hash of both names. So requests for an adapter meet in one place
    before any news of it has spread, and where a replica comes or goes, only the adapters move that
    have their home there. A replica that has as many requests as it takes is passed over.
    """

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Return the replicas to try, two at most at a time, the best first."""
        anyone = random.sample(candidate_replicas, min(2, len(candidate_replicas)))
        if pending_request is None:
            return [anyone]
        pending_request.routing_context.should_backoff = True
        name = pending_request.metadata.multiplexed_model_id
        if not name:
            return [anyone]
        having = self.rank_replicas_via_multiplex(candidate_replicas, name)[0]
        having = random.sample(having, min(2, len(having)))
        homes = sorted(candidate_replicas, key=lambda one: _distance(name, one), reverse=True)
        return [having, homes[:1], homes[1:2], anyone]


def _distance(name: str, replica: RunningReplica) -> int:
    return xxhash.xxh3_64_intdigest(f"{name}\0{replica.replica_id.unique_id}".encode())


class Replica:
    """A model with its adapters; what ``dora-cache serve`` runs, without the sockets."""

    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc]  # Ray awaits it
        base, tokenizer = await asyncio.to_thread(_load, settings)
        self._pool = AdapterPool(
            base, device_bytes=settings.device_bytes, max_bytes=settings.max_bytes
        )
        folder = AdapterFolder(self._pool, settings.adapters, reserved=frozenset({settings.base}))
        await asyncio.to_thread(folder.refresh)
        for refused, reason in folder.refused.items():
            _log.warning("refused %s: %s", refused, reason)
        limits = dataclasses.replace(settings.limits, queue=_most_ongoing(settings.limits))
        self._engine = Engine(base, self._pool, folder, limits)
        self._name: str = serve.get_replica_context().replica_id.unique_id
        labels = {"replica": self._name}
        self._app = create_app(
            self._engine, tokenizer, model=settings.base, refresh=settings.refresh, labels=labels
        )
        self._registry = registry_of(self._engine, {"model": settings.base, **labels})
        self._lifespan = AsyncExitStack()
        await self._lifespan.enter_async_context(self._app.router.lifespan_context(self._app))
        self._tell: Callable[[str], Awaitable[str]] | None = None

    async def respond(
        self, scope: dict[str, Any], body: bytes, model: str | None
    ) -> AsyncIterator[Message]:
        """Answer a request; yield the messages of ASGI.

        Args:
            scope: of ASGI, as far as it can be sent.
            body: the whole body.
            model: which is asked for, if any.
        """
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        request: Iterator[Message] = iter([{"type": "http.request", "body": body}])
        gone = asyncio.Event()

        async def receive() -> Message:
            for message in request:
                return message
            await gone.wait()
            return {"type": "http.disconnect"}

        def ended(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and task.exception() is not None:
                _log.error("a request has failed", exc_info=task.exception())
            messages.put_nowait(None)

        answering = asyncio.ensure_future(self._app(scope, receive, messages.put))
        answering.add_done_callback(ended)
        try:
            while (message := await messages.get()) is not None:
                if model is not None and message.get("status") == _OK:
                    await self._came(model)
                yield message
        finally:
            gone.set()

    async def has(self, model: str) -> bool:
        """Tell whether there is an adapter of a name."""
        try:
            self._engine.folder.find(model)
        except RequestError:
            return False
        return True

    async def _came(self, model: str) -> None:
        """Have the router know that an adapter is on the device, and was used last."""
        if not await self.has(model):  # it is the base model
            return
        if self._tell is None:
            self._tell = serve.multiplexed(max_num_models_per_replica=self._room())(_itself)
        await self._tell(model)

    def _room(self) -> int:
        """Return how many adapters there is room for on the device; -1 for any number."""
        cap = self._pool.stats().max_device_bytes
        sizes = [self._pool.size(one.key) for one in self._engine.folder.versions]
        return -1 if cap is None or not any(sizes) else max(1, cap // max(sizes))

    async def stats(self) -> tuple[str, dict[str, Any]]:
        """Return the replica's name, and what its pool and its engine have done."""
        pool = dataclasses.asdict(self._pool.stats())
        now = {"running": self._engine.running, "waiting": self._engine.waiting}
        return self._name, pool | now | dict(self._engine.counts)

    async def metrics(self) -> list[Metric]:
        """Return what Prometheus reads of this replica."""
        return list(self._registry.collect())

    async def check_health(self) -> None:
        """Have Ray put another replica in the place of one that cannot answer."""
        if self._engine.failure is not None:
            raise RuntimeError(f"the engine has stopped: {self._engine.failure}")

    async def __del__(self) -> None:
        """End; by then Ray has let accepted requests be answered."""
        await self._lifespan.aclose()
        self._pool.close()


class Ingress:
    """Passes requests on to replicas, and answers back."""

    def __init__(self, settings: Settings) -> None:
        self._replicas: Any = serve.get_deployment_handle(_REPLICA).options(
            method_name="respond", stream=True
        )
        self._settings = settings
        self._limit = body_limit(settings.limits)
        self._known: set[str] = set()  # adapters

    def app(self) -> FastAPI:
        """Return what answers HTTP."""

        async def refused(_: Request, error: Exception) -> Response:
            assert isinstance(error, RequestError)  # noqa: S101 - for the type checker
            return error_response(error)

        app = FastAPI(title="dora-cache", openapi_url=None)
        app.add_api_route("/metrics", self.metrics, methods=["GET"], response_model=None)
        app.add_api_route("/{path:path}", self.forward, methods=_METHODS, response_model=None)
        app.add_exception_handler(RequestError, refused)
        return app

    async def forward(self, request: Request) -> Response:
        """Answer a request as a replica answers it."""
        body = await self._read(request)
        model = _model_of(body)
        replicas = self._replicas
        if model is not None and self._settings.multiplexed and await self._is_adapter(model):
            replicas = replicas.options(multiplexed_model_id=model)
        scope = {key: request.scope[key] for key in _SCOPE if key in request.scope}
        messages = _messages(replicas.remote(scope, body, model))
        start = await anext(messages)
        if start["status"] == _NOT_FOUND and model is not None:
            self._known.discard(model)
        headers = dict(start["headers"])
        answer: Response
        if headers.get(b"content-type", b"").startswith(b"text/event-stream"):
            answer = StreamingResponse(_events(messages), start["status"])
        else:  # all of it, so that one that breaks off is an error
            whole = b"".join([message["body"] async for message in messages])
            answer = Response(whole, start["status"])
        answer.raw_headers = start["headers"]
        return answer

    async def metrics(self, request: Request) -> Response:
        """Answer a scrape with the metrics of all replicas, which have the label ``replica``."""
        with _as_answers():
            asked = self._replicas.broadcast("metrics")
            pages = await asked.results_async(timeout_s=_SCRAPE, return_exceptions=True)
        registry = CollectorRegistry()
        registry.register(Merged(page for page in pages if not isinstance(page, BaseException)))
        return metrics_response(request, registry)

    async def _is_adapter(self, model: str) -> bool:
        """Tell whether there is such an adapter; Ray does not forget names that it is given."""
        if model not in self._known:
            asking = self._replicas.options(method_name="has", stream=False)
            with _as_answers():
                if not await asking.remote(model):
                    return False
            self._known.add(model)
        return True

    async def _read(self, request: Request) -> bytes:
        body = bytearray()
        async for piece in request.stream():
            body += piece
            if len(body) > self._limit:
                msg = f"the body has more than {self._limit} bytes"
                raise RequestError(413, msg, code="body_too_large")
        return bytes(body)


@contextmanager
def _as_answers() -> Iterator[None]:
    """Have a failure of Ray's be answered so that the client tries again."""
    try:
        yield
    except BackPressureError:
        msg = "too many requests are waiting already: try again later"
        raise RequestError(429, msg, code="queue_full", retry_after=_RETRY) from None
    except (DeploymentUnavailableError, TimeoutError):
        msg = "no replica can answer: try again later"
        raise RequestError(503, msg, code="unavailable", retry_after=_RETRY) from None
    except RayActorError as error:
        _log.warning("a replica was lost: %s", error)
        raise _lost() from None


def _lost() -> RequestError:
    msg = "the replica that had the request is gone: send the request again"
    return RequestError(503, msg, code="replica_lost", retry_after=_RETRY)


async def _messages(response: Any) -> AsyncIterator[Message]:
    """Yield the messages of a replica's answer, to the last one.

    Raises:
        RequestError: it has broken off.
    """
    try:
        with _as_answers():
            async for message in response:
                yield message
                if message["type"] == "http.response.body" and not message.get("more_body"):
                    return
    except (GeneratorExit, asyncio.CancelledError):  # the client has gone
        with suppress(Exception):  # it may have ended meanwhile
            response.cancel()
        raise
    raise _lost()


async def _events(messages: AsyncIterator[Message]) -> AsyncIterator[bytes]:
    try:
        async for message in messages:
            yield message["body"]
    except RequestError as error:
        yield f"data: {json.dumps(error.body())}\n\n".encode()


def _model_of(body: bytes) -> str | None:
    """Return which model a body asks for; what is wrong with it, a replica says."""
    try:
        found = json.loads(body)["model"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return found if isinstance(found, str) else None


async def _itself(model: str) -> str:
    return model


def _most_ongoing(limits: Limits) -> int:
    """Return how many requests a replica takes: a batch, and one whose adapters it brings ahead."""
    return 2 * limits.batch


def _load(settings: Settings) -> tuple[Any, Any]:
    """Return the model, in eval mode, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    more = {} if settings.attention is None else {"attn_implementation": settings.attention}
    model: Any = AutoModelForCausalLM.from_pretrained(settings.model, dtype=settings.dtype, **more)
    device = "cuda" if settings.num_gpus else "cpu"
    return model.to(device).eval(), AutoTokenizer.from_pretrained(settings.model)


def deployment(settings: Settings) -> serve.Application:
    """Return an application for ``serve.run``, ``serve run`` and the files of ``serve deploy``."""
    limits = settings.limits
    taken = _most_ongoing(limits)
    if isinstance(settings.replicas, int):
        most = settings.replicas
        number: dict[str, Any] = {"num_replicas": most}
    else:
        least, most = settings.replicas
        number = {
            "autoscaling_config": {
                "min_replicas": least,
                "max_replicas": most,
                "target_ongoing_requests": limits.batch,
            }
        }
    replicas = serve.deployment(
        name=_REPLICA,
        **number,
        max_ongoing_requests=taken,
        max_queued_requests=limits.queue + most * taken,
        graceful_shutdown_timeout_s=settings.drain,
        request_router_config={"request_router_class": AdapterRouter},
        logging_config={"enable_access_log": False},
        ray_actor_options={"num_cpus": settings.num_cpus, "num_gpus": settings.num_gpus},
    )(Replica)

    def app() -> FastAPI:
        return Ingress(settings).app()

    ingress = serve.deployment(
        name="ingress",
        num_replicas=settings.ingresses,
        max_ongoing_requests=_MOST_OF_INGRESS,
        graceful_shutdown_timeout_s=settings.drain,
        logging_config={"enable_access_log": False},
        ray_actor_options={"num_cpus": 0},
    )(serve.ingress(app)())
    return ingress.bind(replicas.bind(settings))


def run(settings: Settings, *, host: str = "127.0.0.1", port: int = 8000, **more: Any) -> None:
    """Serve until SIGTERM or SIGINT, then drain.

    It joins the cluster that ``RAY_ADDRESS`` names, or else makes one of this machine alone.

    Args:
        settings: what is served.
        host: the address to listen at.
        port: the port.
        more: of ``ray.init``.
    """
    asked = threading.Event()
    if not ray.is_initialized():
        ray.init(**{"address": os.environ.get("RAY_ADDRESS", "local"), **more})
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: asked.set())
    try:
        serve.start(http_options={"host": host, "port": port})
        serve.run(deployment(settings), name=APPLICATION)
        asked.wait()
        serve.delete(APPLICATION)  # it waits for what is accepted
    finally:
        serve.shutdown()  # type: ignore[no-untyped-call]
        ray.shutdown()
