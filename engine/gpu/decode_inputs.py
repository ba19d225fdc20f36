"""The arrays that a CUDA graph of decodes reads: they stay where they are, step after step.

Row i of each is one sequence. A sequence keeps its row while its place is below the number of
those that run, so that of its block table only the blocks that it has taken since are copied.

Most steps decode the sequences of the step before. So while one computes, the next one's inputs
are prepared, all but its tokens and what depends on blocks that nobody has taken yet.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from baton.kv_layout import KvLayout
from engine.batch import Batch
from engine.gpu.transfers import to_device
from engine.sequence import Sequence

_NUMBERS = 4


@dataclass(frozen=True, slots=True)
class _Next:
    """A step that may follow: its sequences, each with its block table, position and row."""

    sequences: SequenceOf[Sequence]
    tables: SequenceOf[list[int]]
    positions: SequenceOf[int]
    rows: list[int]
    late: SequenceOf[int]
    """Places of those whose next block was not taken yet."""

    def is_of(self, sequences: SequenceOf[Sequence]) -> bool:
        return len(sequences) == len(self.sequences) and all(
            seq is own and seq.block_table is table and seq.num_computed_tokens == position
            for seq, own, table, position in zip(
                sequences, self.sequences, self.tables, self.positions, strict=True
            )
        )


class DecodeInputs:
    """``token_ids``, ``positions``, ``slots``, ``contexts`` (int32 [max_num_seqs]) and
    ``block_table`` (int32 [max_num_seqs, max_blocks]), on ``device``.

    A row that no sequence has writes to the scratch block and attends to one token of whatever
    block its table names: its result is finite or not, and nobody's.
    """

    def __init__(
        self, layout: KvLayout, device: torch.device, *, max_num_seqs: int, max_blocks: int
    ) -> None:
        self.max_num_seqs = max_num_seqs
        self._layout = layout
        self._device = device
        numbers = torch.zeros(_NUMBERS, max_num_seqs, dtype=torch.int32, device=device)
        self._numbers = numbers
        self.token_ids, self.positions, self.slots, self.contexts = numbers
        shape = (max_num_seqs, max_blocks)
        self.block_table = torch.full(shape, layout.scratch_block, dtype=torch.int32, device=device)
        stagings = torch.zeros(2, _NUMBERS, max_num_seqs, dtype=torch.int32)
        # One is copied from while the other is written: by turns.
        self._copied, self._free = stagings.pin_memory() if device.type == "cuda" else stagings
        self._next: _Next | None = None
        self._clear()
        numbers.copy_(self._free)
        # Of each row: the block table that it shows, by identity, and how much of it. A list
        # that is kept here is no other sequence's, and its beginning never changes: a sequence
        # that loses its blocks gets another list.
        self._shown: list[list[int] | None] = [None] * max_num_seqs
        self._num_shown = [0] * max_num_seqs

    def fill(self, sequences: SequenceOf[Sequence]) -> list[int]:
        """Puts each sequence's next token into a row; its blocks are taken.

        Returns the rows, a permutation of ``range(len(sequences))``. The copies are under way on
        the current stream; not before they are over may this be called again.
        """
        prepared, self._next = self._next, None
        if prepared is not None and prepared.is_of(sequences):
            rows, positions = prepared.rows, prepared.positions
            late = [sequences[place] for place in prepared.late]
            late_rows = [rows[place] for place in prepared.late]
            late_positions = [positions[place] for place in prepared.late]
            self._place(late, late_rows, late_positions)
        else:
            rows = self._rows_of(sequences)
            positions = [seq.num_computed_tokens for seq in sequences]
            self._clear()
            self._place(sequences, rows, positions)
        self._host[0, rows] = [
            seq.token_ids[at] for seq, at in zip(sequences, positions, strict=True)
        ]
        self._copy()
        return rows

    def prepare(self, sequences: SequenceOf[Sequence], rows: list[int]) -> None:
        """For a step that follows that of the last ``fill``, of the same sequences and with the
        rows that it gave; the copies of new blocks come after that step on the current stream.

        Where another step follows after all, nothing is lost.
        """
        positions = [seq.num_computed_tokens + 1 for seq in sequences]
        size = self._layout.block_size
        known: list[int] = []
        late: list[int] = []
        for place, (seq, position) in enumerate(zip(sequences, positions, strict=True)):
            (known if position // size < len(seq.block_table) else late).append(place)
        self._clear()
        self._place(
            [sequences[place] for place in known],
            [rows[place] for place in known],
            [positions[place] for place in known],
        )
        tables = [seq.block_table for seq in sequences]
        self._next = _Next(list(sequences), tables, positions, rows, late)

    def show(self, batch: Batch) -> None:
        """Puts the tokens of a step of decodes into the first rows, as they are packed, and whole
        block tables: what every rank of a worker can do, having no sequences. No ``fill`` may
        rely on rows of before."""
        num = len(batch.spans)
        self._clear()
        host, self._next = self._host, None
        host[0, :num] = batch.token_ids.numpy()
        host[1, :num] = batch.positions.numpy()
        host[2, :num] = batch.slot_mapping.numpy()
        host[3, :num] = [span.num_context for span in batch.spans]
        self._copy()
        table = to_device(batch.block_table, self._device)
        self.block_table[:num, : table.shape[1]].copy_(table)
        self._shown = [None] * self.max_num_seqs

    @property
    def _host(self) -> npt.NDArray[np.int32]:
        """The host's numbers, int32 [_NUMBERS, max_num_seqs]."""
        host: npt.NDArray[np.int32] = self._free.numpy()
        return host

    def _clear(self) -> None:
        """Makes them those of rows that no sequence has."""
        self._host[:] = [[0], [0], [self._layout.scratch_block * self._layout.block_size], [1]]

    def _copy(self) -> None:
        self._numbers.copy_(self._free, non_blocking=True)
        self._copied, self._free = self._free, self._copied

    def _place(
        self, sequences: SequenceOf[Sequence], rows: list[int], positions: SequenceOf[int]
    ) -> None:
        """Where each sequence's token at its position goes, and the blocks that it attends to."""
        size, scratch = self._layout.block_size, self._layout.scratch_block
        blocks = [
            scratch if position < seq.num_shared_tokens else seq.block_table[position // size]
            for seq, position in zip(sequences, positions, strict=True)
        ]
        host = self._host
        host[1, rows] = positions
        host[2, rows] = [
            block * size + at % size for block, at in zip(blocks, positions, strict=True)
        ]
        host[3, rows] = [at + 1 for at in positions]
        self._show_blocks(sequences, rows, positions)

    def _rows_of(self, sequences: SequenceOf[Sequence]) -> list[int]:
        num = len(sequences)
        row_of = {id(shown): row for row, shown in enumerate(self._shown[:num]) if shown}
        kept = [row_of.get(id(seq.block_table)) for seq in sequences]
        others = iter(sorted(set(range(num)).difference(kept)))
        return [next(others) if row is None else row for row in kept]

    def _show_blocks(
        self, sequences: SequenceOf[Sequence], rows: list[int], positions: SequenceOf[int]
    ) -> None:
        width = self.block_table.shape[1]
        places: list[int] = []
        block_ids: list[int] = []
        for seq, row, position in zip(sequences, rows, positions, strict=True):
            if self._shown[row] is not seq.block_table:
                self._shown[row], self._num_shown[row] = seq.block_table, 0
            count = self._layout.num_blocks_for(position + 1)
            first = self._num_shown[row]
            if first < count:
                places += range(row * width + first, row * width + count)
                block_ids += seq.block_table[first:count]
                self._num_shown[row] = count
        if places:
            at = to_device(torch.tensor(places), self._device)
            values = to_device(torch.tensor(block_ids, dtype=torch.int32), self._device)
            self.block_table.view(-1).index_copy_(0, at, values)
