"""One choice: the orchestrator's tokens to text, up to its end or its stop string."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass

from baton.errors import InternalError
from baton.telemetry import GatewayMetrics
from router.gateway.logprobs import LoggedToken
from router.interfaces import Orchestrator
from router.request import ChoiceOutput, ChoiceRequest, FinishReason
from router.tokenization.detokenizer import Detokenizer
from router.tokenization.stop_strings import StopScanner


@dataclass(frozen=True, slots=True)
class Delta:
    """What is new of a choice. Its last one has a finish reason."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    first: bool
    finish_reason: FinishReason | None
    logged: tuple[LoggedToken, ...] = ()
    """One for each of ``token_ids``, where the client wants log-probabilities."""


class ChoiceStream:
    """Runs one choice; afterwards holds its counts."""

    def __init__(
        self,
        choice: ChoiceRequest,
        *,
        detokenizer: Detokenizer,
        scanner: StopScanner,
        metrics: GatewayMetrics,
        every_token: bool,
    ) -> None:
        """``every_token``: emit a delta for tokens that have no text to show yet, too."""
        self.choice = choice
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self._detokenizer = detokenizer
        self._scanner = scanner
        self._metrics = metrics
        self._every_token = every_token
        self._num_characters = 0
        self._last_token_at: float | None = None
        self._begun = False
        self._stopped = False

    async def run(self, orchestrator: Orchestrator, emit: Callable[[Delta], None]) -> None:
        """Ends with the choice, which a stop string cancels on all workers.

        Raises BatonError: the choice failed. Cancelling this cancels the choice.
        """
        submitted_at = time.perf_counter()
        finished = False
        async with aclosing(orchestrator.generate(self.choice)) as outputs:
            async for output in outputs:
                if finished:
                    continue
                self._measure(output, submitted_at)
                delta = self._apply(output)
                finished = delta.finish_reason is not None
                if finished or delta.first or delta.text or self._every_token:
                    emit(delta)
                if self._stopped:
                    return
        if not finished:
            raise InternalError("a choice ended without a finish reason")

    def _measure(self, output: ChoiceOutput, submitted_at: float) -> None:
        """By when tokens came from the workers: how fast the client reads is its own affair."""
        for arrival in output.arrivals:
            if self._last_token_at is None:
                self._metrics.time_to_first_token.observe(arrival.at - submitted_at)
            else:
                gap = (arrival.at - self._last_token_at) / arrival.num_tokens
                for _ in range(arrival.num_tokens):
                    self._metrics.inter_token_latency.observe(gap)
            self._last_token_at = arrival.at

    def _apply(self, output: ChoiceOutput) -> Delta:
        first, self._begun = not self._begun, True
        num_cached = min(output.num_cached_tokens, len(self.choice.prompt_token_ids))
        self.num_cached_tokens = max(self.num_cached_tokens, num_cached)
        offsets, texts = [], []
        for token_id in output.token_ids:
            offsets.append(self._num_characters)
            if token_id not in self.choice.stop_token_ids:
                texts.append(self._text(token_id, number=self.num_tokens + len(offsets)))
            if self._stopped:
                break
        taken = output.token_ids[: len(offsets)]
        if output.finish_reason is not None and not self._stopped:
            texts.append(self._scan(self._detokenizer.flush()))
            texts.append("" if self._stopped else self._scanner.flush())
        self.num_tokens += len(taken)
        return Delta(
            index=self.choice.choice_index,
            text="".join(texts),
            token_ids=taken,
            first=first,
            finish_reason="stop" if self._stopped else output.finish_reason,
            logged=self._logged(output, offsets),
        )

    def _text(self, token_id: int, *, number: int) -> str:
        """What may be shown after the ``number``-th token. No stop string is looked for in
        the first ``min_tokens``, as in vLLM."""
        text = self._detokenizer.push(token_id)
        self._num_characters += len(text)
        return text if number <= self.choice.sampling.min_tokens else self._scan(text)

    def _logged(self, output: ChoiceOutput, offsets: list[int]) -> tuple[LoggedToken, ...]:
        if self.choice.sampling.num_logprobs is None:
            return ()
        if len(output.logprobs) != len(output.token_ids):
            raise InternalError("a worker left log-probabilities out")
        each = zip(output.token_ids, output.logprobs, offsets, strict=False)
        return tuple(LoggedToken(*one) for one in each)

    def _scan(self, text: str) -> str:
        scanned = self._scanner.push(text)
        self._stopped = scanned.matched
        return scanned.text
