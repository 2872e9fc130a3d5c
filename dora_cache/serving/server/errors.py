"""What a request is answered with when it is refused or fails."""

from __future__ import annotations

from typing import Any

from dora_cache.errors import DoraCacheError

__all__ = ["RequestError"]


class RequestError(DoraCacheError):
    """A request that is refused or has failed, with its HTTP status.

    Args:
        status: the HTTP status, from 400.
        message: what is wrong and what to do.
        code: a word for programs.
        param: the parameter that is wrong.
        retry_after: seconds after which to try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """Return the error in the form of OpenAI's interface."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"  # noqa: PLR2004
        if self.status == 429:  # noqa: PLR2004
            kind = "rate_limit_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}
