"""The parts of OpenAI's interface that are served: what requests may say, and the answers."""

from __future__ import annotations

import time
import uuid
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Answer", "ChatRequest", "CompletionRequest", "Request", "explain"]

_MOST_STOPS = 4
_LONGEST_STOP = 256
_LONGEST_NAME = 256

_Stop: TypeAlias = Annotated[str, Field(min_length=1, max_length=_LONGEST_STOP)]


class _Strict(BaseModel):
    """What is not known is refused: it would not have the effect that was asked for."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class StreamOptions(_Strict):
    """What a stream has beside the text."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class Request(_Strict):
    """What both kinds of request have in common."""

    model: str = Field(max_length=_LONGEST_NAME)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: _Stop | Annotated[list[_Stop], Field(max_length=_MOST_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    # Only what these mean by default.
    n: Literal[1] | None = None
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None

    @property
    def stops(self) -> list[str]:
        """The stop sequences."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class CompletionRequest(Request):
    """The body of ``/v1/completions``."""

    prompt: str | list[Annotated[int, Field(ge=0, strict=True)]]
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    logprobs: None = None
    suffix: None = None


class TextPart(_Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """Return it as chat templates want it."""
        content = self.content
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ResponseFormat(_Strict):
    """The form of the answer."""

    type: Literal["text"]


class ChatRequest(Request):
    """The body of ``/v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    response_format: ResponseFormat | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: None = None


def explain(errors: Sequence[Any]) -> tuple[str, str | None]:
    """Return what is wrong with a body, and which parameter that is about.

    Args:
        errors: pydantic's.
    """
    first = errors[0]
    where = [part for part in first["loc"] if part != "body"]
    param = str(where[0]) if where else None
    if first["type"] == "extra_forbidden":
        named = ".".join(map(str, where))
        return f"the parameter {named[:100]!r} is not supported: leave it out", param
    if first["type"] == "json_invalid":
        return "the body is not JSON", None
    given = first.get("input")
    shown = f", not {str(given)[:40]!r}" if isinstance(given, str | int | float) else ""
    what = f"the parameter {param[:100]!r}" if param is not None else "the body"
    return f"{what}: {first['msg']}{shown}", param


class Answer:
    """Puts what was generated into the form of one kind of answer.

    Args:
        model: the name that the request gave.
        chat: whether it is an answer of ``/v1/chat/completions``.
    """

    def __init__(self, model: str, *, chat: bool) -> None:
        self.model = model
        self.chat = chat
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())

    def whole(self, text: str, reason: str, usage: dict[str, int]) -> dict[str, Any]:
        """Return the whole answer."""
        inner: dict[str, Any] = {"text": text}
        if self.chat:
            inner = {"message": {"role": "assistant", "content": text, "refusal": None}}
        kind = "chat.completion" if self.chat else "text_completion"
        return self._around(kind, [self._choice(inner, reason)], usage=usage)

    def chunk(self, text: str, reason: str | None = None, *, first: bool = False) -> dict[str, Any]:
        """Return a piece of a streamed answer.

        Args:
            text: it may be empty.
            reason: in the last piece, why it is that.
            first: whether it is the first piece.
        """
        inner: dict[str, Any] = {"text": text}
        if self.chat:
            delta = {"content": text} if text or first else {}
            inner = {"delta": {"role": "assistant", **delta} if first else delta}
        return self._around(self._streamed, [self._choice(inner, reason)])

    def usage(self, usage: dict[str, int]) -> dict[str, Any]:
        """Return what follows the last piece where usage was asked for."""
        return self._around(self._streamed, [], usage=usage)

    @property
    def _streamed(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _choice(self, inner: dict[str, Any], reason: str | None) -> dict[str, Any]:
        return {"index": 0, **inner, "logprobs": None, "finish_reason": reason}

    def _around(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            **more,
        }
