"""Packs what is scheduled into one step: tokens, positions, slots and block tables.

Rows of a step, one per token; a *span* is one sequence's rows::

    | decode span | decode span | ... |  chunk span  |   chunk span   | ...
      longest context first             in the order scheduled
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from baton.kv_layout import KvLayout
from engine.sequence import Scheduled, Sequence


@dataclass(frozen=True, slots=True)
class Span:
    """The rows of one sequence: ``num_tokens`` of them from ``first_row`` on.

    ``num_context`` counts the tokens that the last of them attends to, itself included.
    """

    first_row: int
    num_tokens: int
    num_context: int


@dataclass(frozen=True, slots=True)
class Batch:
    """One packed step.

    ``token_ids``, ``positions`` and ``slot_mapping`` are int64 [tokens];
    ``block_table`` is int32 [spans, most blocks], padded with the span's own first block:
    what a wrong value in a block can reach is the sequence that holds it, never another.
    The first ``num_decodes`` spans have one token each. ``sampled`` are the sequences
    whose input is complete with this step, ``sampled_rows`` their last rows (int64).
    """

    token_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    block_table: Tensor
    spans: tuple[Span, ...]
    num_decodes: int
    sampled: tuple[Sequence, ...]
    sampled_rows: Tensor


def build_batch(scheduled: SequenceOf[Scheduled], layout: KvLayout) -> Batch:
    """Packs a step of at least one sequence; each must hold the blocks it needs."""
    assert len({id(item.seq) for item in scheduled}) == len(scheduled), "a sequence comes twice"
    for item in scheduled:
        _check(item, layout)
    ordered = sorted(scheduled, key=_place)
    spans: list[Span] = []
    token_ids: list[int] = []
    for item in ordered:
        start = item.seq.num_computed_tokens
        spans.append(Span(len(token_ids), item.num_tokens, start + item.num_tokens))
        token_ids += item.seq.token_ids[start : start + item.num_tokens]
    last_rows = {
        id(i.seq): s.first_row + s.num_tokens - 1 for i, s in zip(ordered, spans, strict=True)
    }
    sampled = tuple(item.seq for item in scheduled if item.num_tokens == item.seq.num_remaining)
    positions = torch.cat(
        [torch.arange(s.num_context - s.num_tokens, s.num_context) for s in spans]
    )
    block_table = _block_table([item.seq for item in ordered], spans, layout)
    return Batch(
        token_ids=torch.tensor(token_ids),
        positions=positions,
        slot_mapping=_slot_mapping(ordered, positions, block_table, layout),
        block_table=block_table,
        spans=tuple(spans),
        num_decodes=sum(item.num_tokens == 1 for item in ordered),
        sampled=sampled,
        sampled_rows=torch.tensor([last_rows[id(seq)] for seq in sampled], dtype=torch.int64),
    )


def _check(item: Scheduled, layout: KvLayout) -> None:
    seq = item.seq
    assert 0 < item.num_tokens <= seq.num_remaining, f"{seq.key}: {item.num_tokens} tokens"
    num_context = seq.num_computed_tokens + item.num_tokens
    assert layout.num_blocks_for(num_context) <= len(seq.block_table), f"{seq.key}: no blocks"


def _place(item: Scheduled) -> tuple[bool, int]:
    """Decodes before chunks, the longest context first: neighbours are alike in length."""
    is_chunk = item.num_tokens > 1
    return is_chunk, 0 if is_chunk else -item.seq.num_computed_tokens


def _block_table(seqs: list[Sequence], spans: list[Span], layout: KvLayout) -> Tensor:
    counts = [layout.num_blocks_for(span.num_context) for span in spans]
    width = max(counts)
    rows = [
        seq.block_table[:count] + seq.block_table[:1] * (width - count)
        for seq, count in zip(seqs, counts, strict=True)
    ]
    return torch.tensor(rows, dtype=torch.int32)


def _slot_mapping(
    ordered: list[Scheduled], positions: Tensor, block_table: Tensor, layout: KvLayout
) -> Tensor:
    """slot = block_id * block_size + offset; a token in a shared block goes to scratch."""
    # Torch's own repeat_interleave wakes all threads: 0.5 ms beside a busy neighbour.
    num_tokens = [item.num_tokens for item in ordered]
    span_of_row = torch.from_numpy(np.repeat(np.arange(len(ordered)), num_tokens))
    num_shared = torch.tensor([item.seq.num_shared_tokens for item in ordered])
    block_ids = block_table[span_of_row, positions // layout.block_size].long()
    is_shared = positions < num_shared[span_of_row]
    block_ids = torch.where(is_shared, layout.scratch_block, block_ids)
    return block_ids * layout.block_size + positions % layout.block_size
