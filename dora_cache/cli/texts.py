"""Greedy text from a model, with a moving bar."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from dora_cache.cli.console import CliError, quiet

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["greedy"]


class _Ticker:
    """Gets each token as it is generated; the first call brings the prompt."""

    def __init__(self, tick: Callable[[], object]) -> None:
        self._tick = tick
        self._prompt = True

    def put(self, value: object) -> None:  # noqa: ARG002 - what Transformers calls it with
        if not self._prompt:
            self._tick()
        self._prompt = False

    def end(self) -> None:
        """Do nothing more."""


def greedy(
    model: Any,
    tokenizer: Any,
    prompt: str,
    tokens: int,
    tick: Callable[[], object],
    *,
    rows: int = 1,
) -> tuple[torch.Tensor, int]:
    """Generate the most likely text.

    Args:
        model: a causal language model, or a PEFT model of one.
        tokenizer: the model's.
        prompt: taken as it is; no chat template is applied.
        tokens: the most to generate.
        tick: called after each new token.
        rows: how often the prompt is in the batch.

    Returns:
        The ids of prompt and text, shape (rows, length), and how many of them are the prompt's.

    Raises:
        CliError: the prompt is empty.
    """
    from transformers import GenerationConfig

    ids = tokenizer(prompt)["input_ids"]
    if not ids:
        raise CliError('the prompt is empty: write for example --prompt "Once upon a time"')
    inputs = torch.tensor([ids] * rows, device=model.device)
    own = model.generation_config
    end = own.eos_token_id if own.eos_token_id is not None else tokenizer.eos_token_id
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=tokens,
        eos_token_id=end,
        pad_token_id=end[0] if isinstance(end, list) else end,
    )
    with quiet(), torch.inference_mode():
        found: torch.Tensor = model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            generation_config=config,
            streamer=_Ticker(tick),
        )
    return found, len(ids)
