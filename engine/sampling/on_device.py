"""``sample`` for logits on a GPU: the token ids alone come to the host, and later.

The stages are those of sampler.py, and the tokens those that it would draw of the same logits,
but for sums of float64 that a GPU adds up in another order: at a random number within some 1e-15
of the border between two tokens the other one may be drawn. What the host knows beforehand, which
rows are random and which are limited, decides what is launched. Log-probabilities, for who wants
them, are read once the tokens are known: a second wait.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import Any

import torch
from torch import Tensor

from engine.gpu.transfers import to_device
from engine.sampling.draw import (
    LEAST_TEMPERATURE,
    NUM_CANDIDATES,
    Limit,
    candidates,
    invert,
    invert_in_id_order,
    supported,
    uniform,
)
from engine.sampling.logprobs import RawLogprobs
from engine.sampling.params import SamplingParams
from engine.sampling.processors import apply_all
from engine.sampling.sampler import processors_of
from engine.sequence import Sampled, Sequence

# Its stubs have no types for events.
_cuda: Any = torch.cuda


def begin_sample(logits: Tensor, seqs: SequenceOf[Sequence]) -> PendingSample:
    """Begins to draw the token after each sequence's last; ``logits``, float32 [len(seqs),
    vocabulary], are used up. Waits for nothing."""
    params = [seq.sampling for seq in seqs]
    raw = RawLogprobs.of(logits, params)
    edits = [(row, processors_of(seq).at(seq.token_ids)) for row, seq in enumerate(seqs)]
    apply_all(logits, edits)
    draw = DeviceDraw(logits, params, [seq.num_emitted_tokens for seq in seqs])
    return PendingSample(seqs, draw, raw)


class PendingSample:
    def __init__(
        self, seqs: SequenceOf[Sequence], draw: DeviceDraw, raw: RawLogprobs | None
    ) -> None:
        self._seqs = seqs
        self._draw = draw
        self._raw = raw

    def wait(self) -> list[Sampled]:
        """In the order of the sequences, which are left as they are."""
        token_ids = self._draw.wait()
        told = self._raw.of_tokens(token_ids) if self._raw is not None else {}
        return [
            Sampled(seq, token_id, told.get(row))
            for row, (seq, token_id) in enumerate(zip(self._seqs, token_ids, strict=True))
        ]


class DeviceDraw:
    """One token of each row, as ``draw`` has it, begun now and told by ``wait``."""

    def __init__(
        self, logits: Tensor, params: list[SamplingParams], positions: SequenceOf[int]
    ) -> None:
        self._logits = logits
        self._num_rows = len(params)
        token_ids = logits.argmax(dim=-1)
        unsure = torch.zeros(self._num_rows, dtype=torch.bool, device=logits.device)
        if any(param.temperature > 0 for param in params):
            self._prepare(params, positions)
            token_ids, unsure = self._draw(token_ids, NUM_CANDIDATES)
        self._greedy_or_drawn = token_ids
        self._told = _ToHost(torch.cat([token_ids, unsure.any().long()[None]]))

    def wait(self) -> list[int]:
        """The token ids; returns once the device has drawn them."""
        *token_ids, is_unsure = self._told.wait()
        if is_unsure:
            # Some row's support may reach beyond what was sorted: rare, and told at once.
            again, _ = self._draw(self._greedy_or_drawn, self._logits.shape[1])
            return _ToHost(again).wait()
        return token_ids

    def _prepare(self, params: list[SamplingParams], positions: SequenceOf[int]) -> None:
        """The rows' parameters go to the device in one copy."""
        vocab_size, device = self._logits.shape[1], self._logits.device
        limit = Limit.of(params, vocab_size)
        limited = limit.rows_in_force(vocab_size).tolist()
        self._largest = max((k for k in limit.top_k.tolist() if k < vocab_size), default=0)
        host = torch.tensor(
            [
                [param.temperature for param in params],
                [param.min_p for param in params],
                [uniform(param, at) for param, at in zip(params, positions, strict=True)],
                limit.top_p.tolist(),
                limit.top_k.tolist(),
            ],
            dtype=torch.float64,
        )
        rows = to_device(host, device)
        self._temperature = rows[0].float()[:, None]
        self._min_p = rows[1].float()[:, None]
        self._target = rows[2]
        self._limit = Limit(top_k=rows[4].long(), top_p=rows[3])
        self._limited = to_device(torch.tensor(limited), device) if limited else None

    def _draw(self, greedy: Tensor, num_candidates: int) -> tuple[Tensor, Tensor]:
        """Token ids of all rows, and whether a row may have needed more candidates."""
        logits, vocab_size = self._logits, self._logits.shape[1]
        temperature = self._temperature.clamp(min=LEAST_TEMPERATURE)
        weights = (logits - logits.amax(dim=-1, keepdim=True)).div_(temperature).exp_()
        weights.masked_fill_(weights < self._min_p, 0.0)
        chosen = invert(weights, self._target)
        unsure = torch.zeros_like(chosen, dtype=torch.bool)
        if self._limited is not None:
            rows = self._limited
            limit, own = self._limit.of_rows(rows), weights[rows]
            num = min(max(num_candidates, self._largest + 1), vocab_size)
            token_ids, num_certain = candidates(logits[rows], num)
            inside = supported(own, token_ids, limit)
            chosen[rows] = invert_in_id_order(own, token_ids, inside, self._target[rows])
            unsure[rows] = inside.sum(dim=-1) > num_certain
        is_random = self._temperature[:, 0] > 0
        return torch.where(is_random, chosen, greedy), unsure


class _ToHost:
    """A copy of int64 numbers to page-locked memory, under way."""

    def __init__(self, numbers: Tensor) -> None:
        self._host = numbers
        self._event: Any = None
        if numbers.is_cuda:
            self._host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._host.copy_(numbers, non_blocking=True)
            self._event = _cuda.Event()
            self._event.record()

    def wait(self) -> list[int]:
        if self._event is not None:
            self._event.synchronize()
        numbers: list[int] = self._host.tolist()
        return numbers
