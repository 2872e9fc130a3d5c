"""OpenTelemetry spans, if the application records them."""

from __future__ import annotations

import sys
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from types import TracebackType

    from opentelemetry.trace import Tracer

__all__ = ["Attributes", "span"]

Attributes = dict[str, Any]
"""Strings, numbers, booleans or tuples of these, by name; None for what is not known."""

_NONE: AbstractContextManager[Attributes | None] = nullcontext()


def span(name: str) -> AbstractContextManager[Attributes | None]:
    """Return a context within which a span is current, as a child of the current one.

    What is raised within is recorded and goes on. What a tracer or processor raises does not.

    Args:
        name: without the prefix ``dora_cache.``.

    Returns:
        It yields a dictionary for the span's attributes, which get the same prefix; None where no
        provider is configured, or the span is not sampled.
    """
    # Whoever configures a provider has imported the API; so nobody else has to.
    if "opentelemetry.trace" not in sys.modules:
        return _NONE
    from opentelemetry import trace

    with suppress(Exception):
        provider = trace.get_tracer_provider()
        if not isinstance(provider, trace.ProxyTracerProvider):
            return _Span(provider.get_tracer("dora_cache"), name)
    return _NONE


class _Span:
    def __init__(self, tracer: Tracer, name: str) -> None:
        self._tracer = tracer
        self._name = f"dora_cache.{name}"
        self._context: AbstractContextManager[Any] | None = None
        self._span: Any = None
        self._attributes: Attributes = {}

    def __enter__(self) -> Attributes | None:
        with suppress(Exception):
            context = self._tracer.start_as_current_span(self._name)
            self._span = context.__enter__()
            self._context = context
            return self._attributes if self._span.is_recording() else None
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._context is None:
            return
        with suppress(Exception):
            self._span.set_attributes(
                {
                    f"dora_cache.{name}": value
                    for name, value in self._attributes.items()
                    if value is not None
                }
            )
        with suppress(Exception):
            self._context.__exit__(kind, error, traceback)
