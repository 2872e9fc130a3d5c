"""The HTTP interface."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from jinja2 import TemplateError
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dora_cache.serving.server import protocol
from dora_cache.serving.server.engine import Engine, Generation, Limits, Sampling
from dora_cache.serving.server.errors import RequestError
from dora_cache.serving.server.metrics import registry_of
from dora_cache.serving.server.protocol import Answer, ChatRequest, CompletionRequest
from dora_cache.serving.server.text import TextStream

__all__ = ["body_limit", "create_app", "error_response", "metrics_response"]

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

_BYTES_PER_TOKEN = 64  # of a body, with room for ids, escapes and roles
_LEAST_BODY = 65536
_USUAL_TOKENS = 128  # where a request does not say how many
_CLIENT_GONE = 499  # nobody reads it; it is for logs


def create_app(
    engine: Engine,
    tokenizer: Any,
    *,
    model: str,
    refresh: float | None = 5.0,
    labels: Mapping[str, str] | None = None,
) -> FastAPI:
    """Make an app that serves an engine with OpenAI's interface.

    The engine starts and stops with the app.

    Args:
        engine: whose folder has the adapters.
        tokenizer: of Transformers'.
        model: the name of the base model.
        refresh: seconds between looks at the adapters' folder; None to look once, at the start.
        labels: further ones of all metrics, which have ``model`` and ``pool``.
    """
    served = _Served(engine, tokenizer, model)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await engine.start()
        looking = None if refresh is None else asyncio.create_task(_look(engine, refresh))
        try:
            yield
        finally:
            if looking is not None:
                looking.cancel()
            await engine.stop()

    app = FastAPI(title="dora-cache", lifespan=lifespan)
    app.add_middleware(_BodyLimit, limit=body_limit(engine.limits))
    app.add_exception_handler(RequestError, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _failed)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": served.models()}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        return served.one(name)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        tokens = served.encode(body.prompt)
        return await served.answer(request, body, tokens, body.max_tokens, chat=False)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        tokens = served.encode_chat([message.plain() for message in body.messages])
        most = body.max_completion_tokens or body.max_tokens
        return await served.answer(request, body, tokens, most, chat=True)

    @app.get("/health")
    async def health() -> JSONResponse:
        failure = engine.failure
        state = "failed" if failure else "draining" if engine.draining else "ok"
        content = {
            "status": state,
            "running": engine.running,
            "waiting": engine.waiting,
            "refused": engine.folder.refused,
        }
        return JSONResponse(content, 200 if state == "ok" else 503)

    registry = registry_of(engine, {"model": model, **(labels or {})})

    @app.get("/metrics")
    def metrics(request: Request) -> Response:
        return metrics_response(request, registry)

    return app


def metrics_response(request: Request, registry: CollectorRegistry) -> Response:
    """Answer a scrape in the format that it accepts."""
    encode, kind = choose_encoder(request.headers.get("accept", ""))
    return Response(encode(registry), headers={"Content-Type": kind})


def body_limit(limits: Limits) -> int:
    """Return how many bytes the body of a request may have."""
    return max(_LEAST_BODY, _BYTES_PER_TOKEN * limits.max_prompt)


class _Served:
    """One model and its adapters."""

    def __init__(self, engine: Engine, tokenizer: Any, model: str) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._model = model
        self._vocabulary = engine.model.get_input_embeddings().num_embeddings

    def models(self) -> list[dict[str, Any]]:
        base = {"id": self._model, "object": "model", "created": 0, "owned_by": "dora-cache"}
        each = self._engine.folder.versions
        more = [{"id": one.name, "created": one.created, "parent": self._model} for one in each]
        return [base, *({**base, **one} for one in more)]

    def one(self, name: str) -> dict[str, Any]:
        if name != self._model:
            self._engine.folder.find(name)  # or an error that says what is wrong
        return next(one for one in self.models() if one["id"] == name)

    def encode(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            return list(self._tokenizer(prompt)["input_ids"])
        if any(token >= self._vocabulary for token in prompt):
            msg = f"the prompt has a token that is not below {self._vocabulary}"
            raise RequestError(400, msg, code="invalid_token", param="prompt")
        return prompt

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        if getattr(self._tokenizer, "chat_template", None) is None:
            msg = "the model has no chat template: use /v1/completions"
            raise RequestError(400, msg, code="no_chat_template", param="messages")
        try:
            text = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            msg = f"the model's chat template refuses the messages: {error}"
            raise RequestError(400, msg, code="invalid_messages", param="messages") from None
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    async def answer(
        self,
        request: Request,
        body: protocol.Request,
        tokens: list[int],
        max_tokens: int | None,
        *,
        chat: bool,
    ) -> Response:
        """Generate, and answer; a streamed answer begins with the first token."""
        how = Sampling(
            1.0 if body.temperature is None else body.temperature,
            1.0 if body.top_p is None else body.top_p,
            body.seed,
        )
        name = None if body.model == self._model else body.model
        most = max_tokens or min(_USUAL_TOKENS, self._engine.limits.max_tokens)
        generation = self._engine.submit(tokens, name, how, most)
        writing = _Writing(generation, TextStream(self._tokenizer, body.stops))
        shape = Answer(body.model, chat=chat)
        watch = asyncio.create_task(_gone(request))
        try:
            if not body.stream:
                text = await _unless(watch, writing.whole())
                if text is None:
                    return Response(status_code=_CLIENT_GONE)
                return JSONResponse(shape.whole(text, writing.reason, writing.usage))
            pieces = aiter(writing)
            first = await _unless(watch, anext(pieces))
            if first is None:
                return Response(status_code=_CLIENT_GONE)
        finally:
            watch.cancel()
        usage = body.stream_options is not None and body.stream_options.include_usage
        return _Stream(generation, _events(shape, writing, first, pieces, usage=usage))


class _Writing:
    """The text of a request, piece by piece.

    Attributes:
        reason: why it ended.
        usage: tokens of the prompt and of the text.
    """

    def __init__(self, generation: Generation, text: TextStream) -> None:
        self._generation = generation
        self._text = text
        self._count = 0
        self.reason = "stop"

    @property
    def usage(self) -> dict[str, int]:
        prompt = len(self._generation.tokens)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self._count,
            "total_tokens": prompt + self._count,
        }

    async def __aiter__(self) -> AsyncIterator[str]:
        """Yield a piece for each step, which may be empty, and at least one."""
        async for tokens in self._generation:
            self._count += len(tokens)
            piece = self._text.feed(tokens)
            if self._text.stopped:
                self._generation.cancel()
                yield piece
                return
            yield piece
        piece = self._text.end()
        if not self._text.stopped:
            self.reason = self._generation.finish_reason or "stop"
        yield piece

    async def whole(self) -> str:
        return "".join([piece async for piece in self])


class _Stream(StreamingResponse):
    """A streamed answer; when its client goes, so does the request."""

    def __init__(self, generation: Generation, events: AsyncIterator[str]) -> None:
        super().__init__(
            events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
        )
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._generation.cancel()


async def _events(
    shape: Answer, writing: _Writing, first: str, pieces: AsyncIterator[str], *, usage: bool
) -> AsyncIterator[str]:
    try:
        yield _event(shape.chunk(first, first=True))
        async for piece in pieces:
            if piece:
                yield _event(shape.chunk(piece))
    except RequestError as error:
        yield _event(error.body())
        return
    yield _event(shape.chunk("", writing.reason))
    if usage:
        yield _event(shape.usage(writing.usage))
    yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


async def _gone(request: Request) -> None:
    """Return when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _unless(watch: asyncio.Task[None], work: Awaitable[_T]) -> _T | None:
    """Return what some work returns, or None if the watch ends first; the work is cancelled."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
    finally:
        task.cancel()
    with suppress(asyncio.CancelledError, RequestError):
        await task
    return None


async def _look(engine: Engine, seconds: float) -> None:
    """Look at the adapters' folder now and then."""
    while True:
        await asyncio.sleep(seconds)
        try:
            await engine.refresh()
        except Exception:  # noqa: BLE001 - the next look may succeed
            _log.exception("the adapters' folder cannot be read")


# Errors


def error_response(error: RequestError) -> JSONResponse:
    """Return what is answered for an error."""
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    return JSONResponse(error.body(), error.status, headers)


async def _refused(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestError)  # noqa: S101 - for the type checker
    return error_response(error)


async def _invalid(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)  # noqa: S101 - as above
    message, param = protocol.explain(error.errors())
    return error_response(RequestError(400, message, code="invalid_request", param=param))


async def _http(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)  # noqa: S101 - as above
    return error_response(RequestError(error.status_code, error.detail, code="http_error"))


async def _failed(_: Request, error: Exception) -> JSONResponse:
    msg = f"the server has failed: {type(error).__name__}"
    return error_response(RequestError(500, msg, code="internal_error"))


class _BodyLimit:
    """Refuses bodies above a number of bytes, before they are read as a whole."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        lengths = [value for name, value in scope["headers"] if name == b"content-length"]
        if lengths and lengths[0].isdigit() and int(lengths[0]) > self._limit:
            await error_response(self._error())(scope, receive, send)
            return
        read = 0

        async def bounded() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._limit:
                raise HTTPException(413, str(self._error()))
            return message

        await self._app(scope, bounded, send)

    def _error(self) -> RequestError:
        msg = f"the body has more than {self._limit} bytes"
        return RequestError(413, msg, code="body_too_large")
