"""The log-probabilities that requests ask for: of the model's own distribution.

They are log_softmax(logits) in float32, taken before any processor or limit has
changed the logits, as the OpenAI API and vLLM (``raw_logprobs``, its default) have it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from baton.logprobs import TokenLogprobs
from engine.gpu.transfers import to_device
from engine.sampling.params import SamplingParams


class RawLogprobs:
    """Of the rows that want them, kept from before their logits are changed."""

    def __init__(self, logits: Tensor, rows: list[int], num_top: list[int]) -> None:
        self._rows = rows
        self._num_top = num_top
        is_every = len(rows) == len(logits)
        chosen = logits if is_every else logits[to_device(torch.tensor(rows), logits.device)]
        self._values = chosen.log_softmax(dim=-1)

    @classmethod
    def of(cls, logits: Tensor, params: Sequence[SamplingParams]) -> RawLogprobs | None:
        """None where no row wants any: nothing is computed then."""
        wanted = [
            (row, param.num_logprobs)
            for row, param in enumerate(params)
            if param.num_logprobs is not None
        ]
        if not wanted:
            return None
        return cls(logits, [row for row, _ in wanted], [num for _, num in wanted])

    def of_tokens(self, token_ids: Sequence[int]) -> dict[int, TokenLogprobs]:
        """By row; ``token_ids`` are the tokens drawn of all rows."""
        drawn = torch.tensor([token_ids[row] for row in self._rows], device=self._values.device)
        own = self._values.gather(1, drawn[:, None])[:, 0].tolist()
        top_ids, top_values = self._top()
        return {
            row: TokenLogprobs(own[at], tuple(zip(top_ids[at][:num], top_values[at], strict=False)))
            for at, (row, num) in enumerate(zip(self._rows, self._num_top, strict=True))
        }

    def _top(self) -> tuple[list[list[int]], list[list[float]]]:
        """The likeliest tokens of each row in falling order, lower ids first among equals."""
        num_top = min(max(self._num_top), self._values.shape[1])
        token_ids = self._values.topk(num_top, dim=-1, sorted=False).indices.sort(dim=-1).values
        values, order = self._values.gather(1, token_ids).sort(dim=-1, descending=True, stable=True)
        return token_ids.gather(1, order).tolist(), values.tolist()
