"""Packs what is scheduled into one step: tokens, positions, slots and block tables.

Rows of a step, one per token; a *span* is one sequence's rows::

    | decode span | decode span | ... |  chunk span  |   chunk span   | ...
      longest context first             in the order scheduled
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from baton.kv_layout import KvLayout
from engine.sequence import Scheduled, Sequence


class Span(NamedTuple):
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
    # Lists: a step's calls of numpy and torch on so few elements cost more than what they compute.
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    for seq, num_tokens in ordered:
        start = seq.num_computed_tokens
        own = range(start, start + num_tokens)
        spans.append(Span(len(token_ids), num_tokens, own.stop))
        token_ids += seq.token_ids[start : own.stop]
        positions += own
        slots += _slots(seq, own, layout)
    last_rows = {
        id(i.seq): s.first_row + s.num_tokens - 1 for i, s in zip(ordered, spans, strict=True)
    }
    sampled = tuple(item.seq for item in scheduled if item.num_tokens == item.seq.num_remaining)
    block_table = _block_table([item.seq for item in ordered], spans, layout)
    return Batch(
        token_ids=torch.tensor(token_ids),
        positions=torch.tensor(positions),
        slot_mapping=torch.tensor(slots),
        block_table=block_table,
        spans=tuple(spans),
        num_decodes=sum(map(_is_decode, ordered)),
        sampled=sampled,
        sampled_rows=torch.tensor([last_rows[id(seq)] for seq in sampled], dtype=torch.int64),
    )


def _check(item: Scheduled, layout: KvLayout) -> None:
    seq = item.seq
    assert 0 < item.num_tokens <= seq.num_remaining, f"{seq.key}: {item.num_tokens} tokens"
    num_context = seq.num_computed_tokens + item.num_tokens
    assert layout.num_blocks_for(num_context) <= len(seq.block_table), f"{seq.key}: no blocks"


def _is_decode(item: Scheduled) -> bool:
    """One token behind the prompt. A single one of the prompt is a chunk like the rest of it, whose
    attention rounds elsewhere: so a prompt's KV is the same wherever it is cut."""
    return item.num_tokens == 1 and item.seq.num_computed_tokens >= item.seq.num_prompt_tokens


def _place(item: Scheduled) -> tuple[bool, int]:
    """Decodes before chunks, the longest context first: neighbours are alike in length."""
    is_decode = _is_decode(item)
    return not is_decode, -item.seq.num_computed_tokens if is_decode else 0


def _block_table(seqs: list[Sequence], spans: list[Span], layout: KvLayout) -> Tensor:
    counts = [layout.num_blocks_for(span.num_context) for span in spans]
    width = max(counts)
    rows: list[int] = []
    for seq, count in zip(seqs, counts, strict=True):
        rows += seq.block_table[:count] + seq.block_table[:1] * (width - count)
    return torch.frombuffer(array("i", rows), dtype=torch.int32).view(len(seqs), width)


def _slots(seq: Sequence, positions: range, layout: KvLayout) -> list[int]:
    """slot = block_id * block_size + offset; a token in a shared block goes to scratch."""
    table, size, num_shared = seq.block_table, layout.block_size, seq.num_shared_tokens
    return [
        (table[at // size] if at >= num_shared else layout.scratch_block) * size + at % size
        for at in positions
    ]
