"""Transformers' continuous batching, with the adapters of a pool.

The only module that knows how :mod:`transformers.generation.continuous_batching` works inside.
"""

from __future__ import annotations

import logging
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation import TemperatureLogitsWarper, TopPLogitsWarper
from transformers.generation.continuous_batching.continuous_api import (
    ContinuousBatchingManager,
    OutputRouter,
)
from transformers.generation.continuous_batching.model_runner import ModelRunner

from dora_cache.attributes import POOLED

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from dora_cache import AdapterPool

__all__ = ["Batcher", "Progress", "Sampler"]

_log = logging.getLogger(__name__)

_MOST_FAILURES = 5
"""Batches that may fail in a row before the engine is given up."""


class Progress(NamedTuple):
    """What has become of a request.

    Attributes:
        request: its number.
        tokens: all that it has generated.
        finished: whether there will be no more.
        error: why it failed.
        cancelled: whether it has left because it was cancelled.
    """

    request: str
    tokens: list[int]
    finished: bool
    error: str | None = None
    cancelled: bool = False


class Sampler:
    """Draws tokens for one request.

    Args:
        temperature: above 0.
        top_p: from 0, exclusive, to 1.
        seed: of the request's own generator; None for any.
        device: where the logits are.
    """

    def __init__(
        self, temperature: float, top_p: float, seed: int | None, device: torch.device
    ) -> None:
        self._warpers: list[Any] = [TemperatureLogitsWarper(temperature)]
        if top_p < 1:
            self._warpers.append(TopPLogitsWarper(top_p))
        self._generator = torch.Generator(device)
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)

    def __call__(self, logits: Tensor) -> Tensor:
        """Return a token, int64, shape (1,), for logits of shape (vocabulary,)."""
        scores = logits[None]
        for warp in self._warpers:
            scores = warp(None, scores)
        return torch.multinomial(scores[0].softmax(-1), 1, generator=self._generator)


class _Router(OutputRouter):
    """Hands outputs to one callback, in the generation thread."""

    def __init__(self, report: Callable[[list[Progress]], None]) -> None:
        super().__init__()
        self._report = report

    def deliver(self, output: Any) -> None:
        self.deliver_batch([output])

    def deliver_batch(self, outputs: list[Any]) -> None:
        self._report(
            [
                Progress(one.request_id, one.generated_tokens, one.is_finished(), one.error)
                for one in outputs
            ]
        )


class _Runner(ModelRunner):
    """Chooses the next token of each request in the request's own way."""

    samplers: Mapping[str, Sampler]

    def supports_logits_to_keep(self, model: Any) -> bool:
        # The output layer would get selected rows, and whose they are is not known there.
        head = model.get_output_embeddings()
        adapted = head is not None and POOLED in head.__dict__
        return not adapted and bool(super().supports_logits_to_keep(model))

    def _sample(self, scores: Tensor, output_ids: Tensor) -> None:
        chosen = scores[0].argmax(-1)
        new = [one.state for one in self.inputs_and_outputs.requests_in_batch if one.has_new_token]
        for row, state in enumerate(new):
            sampler = self.samplers.get(state.request_id)
            if sampler is not None:
                chosen[row : row + 1] = sampler(scores[0, row])
        output_ids[0, : len(chosen)].copy_(chosen)


class _BatchError(Exception):
    """One batch has failed; its cause is the error."""


class Batcher(ContinuousBatchingManager):
    """Generates for many requests at once, each with its adapter.

    Blocks of the key-value cache are not shared between requests: what a prefix leaves there
    follows from the adapter as well, not from its tokens alone.

    Args:
        model: a causal language model of Transformers'.
        pool: of that model.
        page: tokens in a block of the cache.
        kv_tokens: tokens that the cache is for.
        batch: requests that may be in a forward.
        batch_tokens: tokens that may be in a forward.
        eos: tokens that end a request.
        report: called in the generation thread with what has become of requests.
    """

    def __init__(
        self,
        model: Any,
        pool: AdapterPool,
        *,
        page: int,
        kv_tokens: int,
        batch: int,
        batch_tokens: int,
        eos: list[int],
        report: Callable[[list[Progress]], None],
    ) -> None:
        settings = ContinuousBatchingConfig(
            page_size=page,
            num_blocks=-(-kv_tokens // page),
            max_batch_tokens=batch_tokens,
            max_requests_per_batch=batch,
            max_memory_percent=0.95,
            allow_block_sharing=False,
            use_async_batching=False,
            use_cuda_graph=False,
            auto_switch_to_flash=False,
        )
        greedy = GenerationConfig(do_sample=False, eos_token_id=eos or -1)
        super().__init__(model, greedy, settings)
        self.output_router = _Router(report)
        self._report = report
        self._pool = pool
        self._adapters: dict[str, str] = {}
        self._samplers: dict[str, Sampler] = {}
        self._leaving: deque[str] = deque()
        self._failures = 0

    @property
    def failure(self) -> str | None:
        """Why there will be no more answers; None while there will."""
        error = self.background_thread_status.fatal_error
        if error is not None:
            return f"{type(error).__name__}: {error}"
        return None if self.is_running() else "the generation thread has stopped"

    def submit(
        self,
        request: str,
        tokens: list[int],
        *,
        adapter: str | None,
        sampler: Sampler | None,
        max_tokens: int,
    ) -> bool:
        """Begin a request; return False if there will be no answer.

        Args:
            request: its number.
            tokens: of the prompt, at least one.
            adapter: its name in the pool, which stays there until :meth:`forget`.
            sampler: None for greedy decoding.
            max_tokens: the most to generate.
        """
        if adapter is not None:
            self._adapters[request] = adapter
        if sampler is not None:
            self._samplers[request] = sampler
        taken = self.add_request(
            tokens, request_id=request, max_new_tokens=max_tokens, streaming=True
        )
        return taken is not None

    def cancel(self, request: str) -> None:
        """Have a request leave; a :class:`Progress` says when it has."""
        self.cancel_request(request)
        self._leaving.append(request)  # after the queue has it: the next turn takes both

    def forget(self, request: str) -> None:
        """Drop what is known of a request that has finished or left."""
        self._adapters.pop(request, None)
        self._samplers.pop(request, None)

    # In the generation thread

    def _create_batch_processor(self) -> Any:
        processor = super()._create_batch_processor()
        runner = processor.model_runner
        processor.model_runner = _Runner(
            logit_processor=runner.logit_processor,
            cb_config=runner.cb_config,
            cache=runner.cache,
            inputs_and_outputs=runner.inputs_and_outputs,
            do_sample=False,
            return_logprobs=False,
        )
        processor.model_runner.samplers = self._samplers
        return processor

    def _generation_loop_body(self, batch_processor: Any, bootstrapping: bool) -> bool:  # noqa: FBT001
        leaving = [self._leaving.popleft() for _ in range(len(self._leaving))]
        try:
            go_on = bool(super()._generation_loop_body(batch_processor, bootstrapping))
        except _BatchError as error:
            cause = error.__cause__
            _log.error("a batch failed", exc_info=cause)
            batch_processor.handle_batch_error(cause)
            self._failures += 1
            if self._failures >= _MOST_FAILURES:
                raise RuntimeError(f"{self._failures} batches failed in a row: {cause}") from cause
            go_on = True
        if leaving:
            self._report([Progress(one, [], finished=True, cancelled=True) for one in leaving])
        return go_on

    def _generation_step(self) -> None:
        inputs = self.batch_processor.inputs_and_outputs
        names: list[str | None] = []
        for one in inputs.requests_in_batch:
            names += [self._adapters.get(one.state.request_id)] * one.query_length
        names += [None] * (inputs.num_q_tokens - len(names))  # padding
        try:
            with self._pool.use(names[0] if len(set(names)) == 1 else names):
                super()._generation_step()
        except Exception as error:
            raise _BatchError from error
        self._failures = 0
