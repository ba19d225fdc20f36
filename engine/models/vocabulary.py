"""The two ends of a decoder, whose rows are the vocabulary: embedding and head.

Where there are several ranks, each has a range of these rows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.layers import Linear
from engine.logits import Logits
from engine.parallel.group import RankGroups


def embedding_of(weight: Tensor, groups: RankGroups) -> Callable[[Tensor], Tensor]:
    """int64 [tokens] → [tokens, hidden], of ``weight`` [vocabulary, hidden]."""
    if groups.world.size == 1:
        return partial(F.embedding, weight=weight)
    own = groups.shard.vocabulary(len(weight))
    rows = weight[own].clone()  # not the file's pages of the other rows

    def embed(token_ids: Tensor) -> Tensor:
        is_own = (token_ids >= own.start) & (token_ids < own.stop)
        found = F.embedding(torch.where(is_own, token_ids - own.start, 0), rows)
        found = torch.where(is_own[:, None], found, 0)
        return groups.world.all_reduce_(found.float())

    return embed


def head_of(weight: Tensor, groups: RankGroups) -> Callable[[Tensor], Logits]:
    """[rows, hidden] → logits; on the first rank only. The next call overwrites them."""
    if groups.world.size == 1:
        return _Head(weight)
    vocab_size, shard = len(weight), groups.shard
    width = -(-vocab_size // shard.num_ranks)
    own = weight[shard.vocabulary(vocab_size)]
    padded = F.pad(own, (0, 0, 0, width - len(own)))
    head = _Head(padded)

    def logits(x: Tensor) -> Logits:
        parts = groups.world.gather(head(x).values)
        if parts is None:
            return Logits(torch.empty(0, vocab_size))
        return Logits(torch.cat(parts, dim=1)[:, :vocab_size])

    return logits


class _Head:
    """A matrix product in float32 whose large result always goes to the same memory.

    In bfloat16 the likeliest tokens are often equal, and the lowest id among them is another
    answer: SmolLM2 then says nothing of Paris, asked for the capital of France.
    """

    def __init__(self, weight: Tensor) -> None:
        self._linear = Linear(weight)
        panels = self._linear.panels
        self._logits = torch.empty(0, len(weight))
        self._highest = torch.empty(0, len(panels.weight)) if panels is not None else None

    def __call__(self, x: Tensor) -> Logits:
        if x.is_cuda:
            return Logits(self._linear.in_float32(x))
        rows = len(x)
        if len(self._logits) < rows:
            self._logits = torch.empty(rows, self._logits.shape[1])
            if self._highest is not None:
                self._highest = torch.empty(rows, self._highest.shape[1])
        highest = self._highest[:rows] if self._highest is not None else None
        return Logits(self._linear.in_float32(x, self._logits[:rows], highest), highest)
