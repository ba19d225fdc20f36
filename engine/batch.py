"""Packs what is scheduled into one step: tokens, positions, slots and block tables.

Rows of a step, one per token; a *span* is one sequence's rows::

    | decode span | decode span | ... |  chunk span  |   chunk span   | ...
      longest context first             in the order scheduled
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from operator import itemgetter
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
    whose input is complete with this step, ``sampled_rows`` their last rows (int64). Of
    ``Batches`` the arrays are valid until it builds the next.
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
    decodes = [item for item in scheduled if _is_decode(item)]
    # The longest context first: neighbours are alike in length.
    decodes.sort(key=_num_computed, reverse=True)
    ordered = [*decodes, *(item for item in scheduled if not _is_decode(item))]
    spans: list[Span] = []
    last_rows: dict[int, int] = {}
    # Lists: a step's calls of numpy and torch on so few elements cost more than what they compute.
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    for seq, num_tokens in ordered:
        start = seq.num_computed_tokens
        own = range(start, start + num_tokens)
        assert 0 < num_tokens <= seq.num_remaining, f"{seq.key}: {num_tokens} tokens"
        assert own.stop <= len(seq.block_table) * layout.block_size, f"{seq.key}: no blocks"
        spans.append(Span(len(token_ids), num_tokens, own.stop))
        token_ids += seq.token_ids[start : own.stop]
        positions += own
        slots += _slots(seq, own, layout)
        last_rows[id(seq)] = len(token_ids) - 1
    assert len(last_rows) == len(scheduled), "a sequence comes twice"
    sampled = tuple(seq for seq, num_tokens in scheduled if num_tokens == seq.num_remaining)
    return Batch(
        token_ids=torch.tensor(token_ids),
        positions=torch.tensor(positions),
        slot_mapping=torch.tensor(slots),
        block_table=_block_table([seq for seq, _ in ordered], spans, layout.block_size),
        spans=tuple(spans),
        num_decodes=len(decodes),
        sampled=sampled,
        sampled_rows=torch.tensor([last_rows[id(seq)] for seq in sampled], dtype=torch.int64),
    )


class Batches:
    """Packs one engine's steps. One that decodes the sequences of the step before it, in the same
    order, is that step moved on by a token: to pack it anew takes several times as long.

    The arrays of a Batch are valid until the next one is built.
    """

    def __init__(self, layout: KvLayout) -> None:
        self._layout = layout
        self._last: Batch | None = None
        self._rows: list[tuple[Sequence, list[int]]] = []
        """Of ``_last``, if that can be moved on: each row's sequence and its block table. One that
        loses its blocks gets another list, though it may come back to the same position."""

    def build(self, scheduled: SequenceOf[Scheduled]) -> Batch:
        """As ``build_batch``."""
        batch = self._moved_on(scheduled)
        if batch is None:
            batch = build_batch(scheduled, self._layout)
            self._rows = []
            if batch.num_decodes == len(scheduled) == len(batch.sampled):
                rows = zip(batch.sampled_rows.tolist(), batch.sampled, strict=True)
                by_row = sorted(rows, key=itemgetter(0))
                self._rows = [(seq, seq.block_table) for _, seq in by_row]
        self._last = batch
        return batch

    def _moved_on(self, scheduled: SequenceOf[Scheduled]) -> Batch | None:
        last = self._last
        if last is None or not self._rows or len(scheduled) != len(self._rows):
            return None
        for (seq, num_tokens), before in zip(scheduled, last.sampled, strict=True):
            if seq is not before or num_tokens != 1:
                return None
        size, width = self._layout.block_size, last.block_table.shape[1]
        if last.spans[0].num_context + 1 > width * size:
            return None
        token_ids: list[int] = []
        for (seq, block_table), (_, _, context) in zip(self._rows, last.spans, strict=True):
            if (
                seq.block_table is not block_table
                or seq.num_computed_tokens != context
                or len(seq.token_ids) != context + 1
                or len(block_table) * size <= context
            ):
                return None
            token_ids.append(seq.token_ids[-1])
        positions, slots = last.positions.numpy(), last.slot_mapping.numpy()
        positions += 1
        slots += 1
        # A token that went to the scratch block was the last of its own: the next begins another.
        for row in (positions % size == 0).nonzero()[0].tolist():
            index = positions[row] // size
            block = self._rows[row][1][index]
            slots[row] = block * size
            last.block_table[row, index] = block
        return Batch(
            token_ids=torch.tensor(token_ids),
            positions=last.positions,
            slot_mapping=last.slot_mapping,
            block_table=last.block_table,
            spans=tuple([Span(row, 1, context + 1) for row, _, context in last.spans]),
            num_decodes=last.num_decodes,
            sampled=last.sampled,
            sampled_rows=last.sampled_rows,
        )


def _is_decode(item: Scheduled) -> bool:
    """One token behind the prompt. A single one of the prompt is a chunk like the rest of it, whose
    attention rounds elsewhere: so a prompt's KV is the same wherever it is cut."""
    return item.num_tokens == 1 and item.seq.num_computed_tokens >= item.seq.num_prompt_tokens


def _num_computed(item: Scheduled) -> int:
    return item.seq.num_computed_tokens


def _block_table(seqs: list[Sequence], spans: list[Span], block_size: int) -> Tensor:
    counts = [-(-span.num_context // block_size) for span in spans]
    width = max(counts)
    rows = array("i")
    for seq, count in zip(seqs, counts, strict=True):
        rows.extend(seq.block_table[:count] + seq.block_table[:1] * (width - count))
    return torch.frombuffer(rows, dtype=torch.int32).view(len(seqs), width)


def _slots(seq: Sequence, positions: range, layout: KvLayout) -> list[int]:
    """slot = block_id * block_size + offset; a token in a shared block goes to scratch."""
    table, size, num_shared = seq.block_table, layout.block_size, seq.num_shared_tokens
    return [
        (table[at // size] if at >= num_shared else layout.scratch_block) * size + at % size
        for at in positions
    ]
