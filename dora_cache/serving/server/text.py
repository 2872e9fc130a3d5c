"""Text from tokens, as they come."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["TextStream"]

_INCOMPLETE = "\ufffd"  # what the decoder makes of the first bytes of a character


class TextStream:
    """Turns tokens into pieces of text, which end before a stop sequence.

    Nothing is handed out that later tokens could change: neither the bytes of an incomplete
    character nor what may be the beginning of a stop sequence.

    Args:
        tokenizer: of Transformers'.
        stop: the stop sequences.

    Attributes:
        stopped: whether a stop sequence has come.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._tokens: list[int] = []
        self._start = 0  # of the tokens that are decoded together
        self._read = 0  # those before it are text
        self._held = ""
        self.stopped = False

    def feed(self, tokens: list[int]) -> str:
        """Take new tokens and return the text that is certain with them."""
        self._tokens += tokens
        text = self._decode(self._start, len(self._tokens))
        if text.endswith(_INCOMPLETE):
            return ""
        known = self._decode(self._start, self._read)
        self._start, self._read = self._read, len(self._tokens)
        return self._cut(text[len(known) :], last=False)

    def end(self) -> str:
        """Return the text that is left when there are no more tokens."""
        known = self._decode(self._start, self._read)
        text = self._decode(self._start, len(self._tokens))
        return self._cut(text[len(known) :], last=True)

    def _decode(self, start: int, end: int) -> str:
        return str(
            self._tokenizer.decode(
                self._tokens[start:end],
                skip_special_tokens=True,
                clean_up_tokenization_spaces=False,
            )
        )

    def _cut(self, text: str, *, last: bool) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        self._held = ""
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped = True
            return text[: min(found)]
        if last:
            return text
        kept = max(
            (
                size
                for stop in self._stop
                for size in range(1, len(stop))
                if text.endswith(stop[:size])
            ),
            default=0,
        )
        if kept:
            text, self._held = text[:-kept], text[-kept:]
        return text
