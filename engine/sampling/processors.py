"""What changes a sequence's logits before a token is drawn from them: the hook and its users.

A ``LogitsProcessor`` belongs to one sequence. Its state is a pure function of the
sampling parameters, the prompt and the emitted tokens, so nothing of it is ever
saved or sent: a sequence that is recomputed here, or goes on elsewhere from its
emitted tokens, has an equal one. All rows of a step with processors of one kind are
edited together.

What it takes to add a kind, a grammar for example:

1. What the client asks for becomes a field of ``Sampling`` in ``proto/`` and of
   ``SamplingParams``. What is dear to make of it (a compiled grammar) is made where the
   other values are checked, in ``engine/intake.py``, once, and never changed: sequences
   share it.
2. A subclass of ``LogitsProcessor`` here. Its state begins with ``of`` and moves on with
   ``advance`` alone, which sees every emitted token once and in order, those of other
   workers too. It knows no clock, no position in a batch, no other sequence, no random
   number of its own; ``apply`` leaves it as it is. Some token has to stay possible.
3. Its place in ``KINDS``, and in the settings of ``test_sampling_processors.py``, which
   hold its state against one made anew from the tokens.

The kinds apply in the order of ``KINDS``, which is vLLM's (the docstring of
``Sampler`` in its ``vllm/v1/sample/sampler.py``): what may not be drawn yet, biases,
then penalties; temperature, min_p, top_k and top_p follow in ``draw.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.gpu.transfers import to_device
from engine.sampling.params import SamplingParams

_FIRST_CAPACITY = 64
"""Emitted tokens that need no larger arrays; then these double."""


class LogitsProcessor(ABC):
    """One sequence's part in changing the logits of its next token: see the rules above."""

    @classmethod
    @abstractmethod
    def of(cls, params: SamplingParams, prompt_token_ids: Sequence[int]) -> LogitsProcessor | None:
        """The state before the first emitted token, though it may be made after many;
        None where nothing is asked for."""

    @abstractmethod
    def advance(self, token_id: int) -> None:
        """One more token has been emitted, the one after the last that it was told of."""

    @property
    def idle(self) -> bool:
        """The next token's logits stay as they are."""
        return False

    @staticmethod
    @abstractmethod
    def apply(logits: Tensor, rows: Sequence[int], processors: Sequence[Any]) -> None:
        """Changes ``logits[rows[i]]`` in place as ``processors[i]``, all of this kind, asks.

        ``logits``, float32 [batch, vocabulary], have been changed by the kinds before; -inf
        forbids a token. What a GPU is given for it goes there by ``to_device``: the host does
        not wait for the step.
        """


class MinTokens(LogitsProcessor):
    """Forbids the stop tokens until enough tokens are emitted."""

    def __init__(self, num_missing: int, token_ids: Sequence[int]) -> None:
        self.token_ids = torch.tensor(token_ids)
        self._num_missing = num_missing

    @classmethod
    def of(cls, params: SamplingParams, prompt_token_ids: Sequence[int]) -> MinTokens | None:
        if params.min_tokens == 0 or not params.stop_token_ids:
            return None
        return cls(params.min_tokens, params.stop_token_ids)

    def advance(self, token_id: int) -> None:
        self._num_missing -= 1

    @property
    def idle(self) -> bool:
        return self._num_missing <= 0

    @staticmethod
    def apply(logits: Tensor, rows: Sequence[int], processors: Sequence[MinTokens]) -> None:
        row_of = _repeat(rows, [len(each.token_ids) for each in processors], logits.device)
        token_ids = to_device(torch.cat([each.token_ids for each in processors]), logits.device)
        logits[row_of, token_ids] = logits.new_full((), -torch.inf)


class LogitBias(LogitsProcessor):
    """Adds to the logits of given tokens."""

    def __init__(self, bias: Sequence[tuple[int, float]]) -> None:
        self.token_ids = torch.tensor([token_id for token_id, _ in bias])
        self.values = torch.tensor([value for _, value in bias])

    @classmethod
    def of(cls, params: SamplingParams, prompt_token_ids: Sequence[int]) -> LogitBias | None:
        return cls(params.logit_bias) if params.logit_bias else None

    def advance(self, token_id: int) -> None:
        pass

    @staticmethod
    def apply(logits: Tensor, rows: Sequence[int], processors: Sequence[LogitBias]) -> None:
        row_of = _repeat(rows, [len(each.token_ids) for each in processors], logits.device)
        token_ids = to_device(torch.cat([each.token_ids for each in processors]), logits.device)
        values = to_device(torch.cat([each.values for each in processors]), logits.device)
        logits[row_of, token_ids] += values


class Penalties(LogitsProcessor):
    """Makes tokens that occurred before less likely, each in its own measure.

    - repetition, of prompt and emitted tokens: a positive logit is divided by it, any
      other multiplied (Keskar et al., 2019);
    - frequency, of emitted tokens: it is subtracted once for every occurrence;
    - presence, of emitted tokens: it is subtracted once (both as in the OpenAI API).
    """

    def __init__(self, params: SamplingParams, prompt_token_ids: Iterable[int]) -> None:
        self.repetition = params.repetition_penalty
        self.frequency = params.frequency_penalty
        self.presence = params.presence_penalty
        distinct = np.unique(np.fromiter(prompt_token_ids, dtype=np.int64))
        self._place = {token_id: place for place, token_id in enumerate(distinct.tolist())}
        capacity = len(distinct) + _FIRST_CAPACITY
        self._token_ids, self._counts = _zeros(capacity), _zeros(capacity)
        self._token_ids[: len(distinct)] = distinct

    @classmethod
    def of(cls, params: SamplingParams, prompt_token_ids: Sequence[int]) -> Penalties | None:
        if params.repetition_penalty != 1.0:
            return cls(params, prompt_token_ids)
        if params.frequency_penalty or params.presence_penalty:
            return cls(params, ())
        return None

    def advance(self, token_id: int) -> None:
        place = self._place.setdefault(token_id, len(self._place))
        if place == len(self._token_ids):
            self._token_ids = np.concatenate([self._token_ids, _zeros(place)])
            self._counts = np.concatenate([self._counts, _zeros(place)])
        self._token_ids[place] = token_id
        self._counts[place] += 1

    @property
    def idle(self) -> bool:
        return not self._place

    @property
    def token_ids(self) -> npt.NDArray[np.int64]:
        """Every token that occurred, once."""
        return self._token_ids[: len(self._place)]

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """How often each of ``token_ids`` was emitted."""
        return self._counts[: len(self._place)]

    @staticmethod
    def apply(logits: Tensor, rows: Sequence[int], processors: Sequence[Penalties]) -> None:
        lengths = [len(each.token_ids) for each in processors]
        device = logits.device
        row_of = _repeat(rows, lengths, device)
        ids = np.concatenate([each.token_ids for each in processors])
        token_ids = to_device(torch.from_numpy(ids), device)
        counts = np.concatenate([each.counts for each in processors])
        counts_of = to_device(torch.from_numpy(counts), device)
        repetition = _repeat([each.repetition for each in processors], lengths, device)
        frequency = _repeat([each.frequency for each in processors], lengths, device)
        presence = _repeat([each.presence for each in processors], lengths, device)
        values = logits[row_of, token_ids]
        values = torch.where(values > 0, values / repetition, values * repetition)
        values -= frequency * counts_of
        values -= presence * (counts_of > 0)
        logits[row_of, token_ids] = values


def _zeros(size: int) -> npt.NDArray[np.int64]:
    return np.zeros(size, dtype=np.int64)


def _repeat(
    values: Sequence[int] | Sequence[float], times: Sequence[int], device: torch.device
) -> Tensor:
    """``values[i]`` for ``times[i]`` times, one after another, on ``device``."""
    repeated = torch.tensor(values).repeat_interleave(torch.tensor(times))
    return to_device(repeated, device)


KINDS: tuple[type[LogitsProcessor], ...] = (MinTokens, LogitBias, Penalties)


class Processors:
    """One sequence's processors, at the token that they have seen last."""

    def __init__(self, params: SamplingParams, prompt_token_ids: Sequence[int]) -> None:
        made = ((kind, kind.of(params, prompt_token_ids)) for kind in KINDS)
        self._of_kind = {kind: processor for kind, processor in made if processor is not None}
        self._num_seen = len(prompt_token_ids)

    def at(self, token_ids: Sequence[int]) -> dict[type[LogitsProcessor], LogitsProcessor]:
        """The processors for the token that follows ``token_ids``: the prompt and every
        emitted token, those of the last call at its beginning. Idle ones are left out."""
        if not self._of_kind:
            return {}
        assert self._num_seen <= len(token_ids), "an emitted token was taken back"
        for token_id in token_ids[self._num_seen :]:
            for processor in self._of_kind.values():
                processor.advance(token_id)
        self._num_seen = len(token_ids)
        return {kind: each for kind, each in self._of_kind.items() if not each.idle}


def apply_all(
    logits: Tensor, rows: Iterable[tuple[int, dict[type[LogitsProcessor], LogitsProcessor]]]
) -> bool:
    """Changes the named rows of ``logits`` in place as their processors ask, if one does."""
    of_kind: dict[type[LogitsProcessor], list[tuple[int, LogitsProcessor]]] = defaultdict(list)
    for row, processors in rows:
        for kind, processor in processors.items():
            of_kind[kind].append((row, processor))
    for kind in KINDS:
        if edits := of_kind[kind]:
            kind.apply(logits, [row for row, _ in edits], [each for _, each in edits])
    return any(of_kind.values())
