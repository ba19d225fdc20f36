"""The arrays that a CUDA graph of decodes reads: they stay where they are, step after step.

Row i of each is one sequence. A sequence keeps its row while its place is below the number of
those that run, so that of its block table only the blocks that it has taken since are copied.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import numpy as np
import numpy.typing as npt
import torch

from baton.kv_layout import KvLayout
from engine.batch import Batch
from engine.gpu.transfers import to_device
from engine.sequence import Sequence

_NUMBERS = 4


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
        staging = torch.zeros(_NUMBERS, max_num_seqs, dtype=torch.int32)
        self._staging = staging.pin_memory() if device.type == "cuda" else staging
        self._clear()
        numbers.copy_(self._staging)
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
        rows = self._rows_of(sequences)
        self._show_blocks(sequences, rows)
        size = self._layout.block_size
        scratch = self._layout.scratch_block
        host = self._clear()
        positions = [seq.num_computed_tokens for seq in sequences]
        blocks = [
            scratch if position < seq.num_shared_tokens else seq.block_table[position // size]
            for seq, position in zip(sequences, positions, strict=True)
        ]
        host[0, rows] = [seq.token_ids[at] for seq, at in zip(sequences, positions, strict=True)]
        host[1, rows] = positions
        host[2, rows] = [
            block * size + at % size for block, at in zip(blocks, positions, strict=True)
        ]
        host[3, rows] = [at + 1 for at in positions]
        self._numbers.copy_(self._staging, non_blocking=True)
        return rows

    def show(self, batch: Batch) -> None:
        """Puts the tokens of a step of decodes into the first rows, as they are packed, and whole
        block tables: what every rank of a worker can do, having no sequences. No ``fill`` may
        rely on rows of before."""
        num = len(batch.spans)
        host = self._clear()
        host[0, :num] = batch.token_ids.numpy()
        host[1, :num] = batch.positions.numpy()
        host[2, :num] = batch.slot_mapping.numpy()
        host[3, :num] = [span.num_context for span in batch.spans]
        self._numbers.copy_(self._staging, non_blocking=True)
        table = to_device(batch.block_table, self._device)
        self.block_table[:num, : table.shape[1]].copy_(table)
        self._shown = [None] * self.max_num_seqs

    def _clear(self) -> npt.NDArray[np.int32]:
        """The host's numbers, as of rows that no sequence has."""
        host: npt.NDArray[np.int32] = self._staging.numpy()
        host[:] = [[0], [0], [self._layout.scratch_block * self._layout.block_size], [1]]
        return host

    def _rows_of(self, sequences: SequenceOf[Sequence]) -> list[int]:
        num = len(sequences)
        row_of = {id(shown): row for row, shown in enumerate(self._shown[:num]) if shown}
        kept = [row_of.get(id(seq.block_table)) for seq in sequences]
        others = iter(sorted(set(range(num)).difference(kept)))
        return [next(others) if row is None else row for row in kept]

    def _show_blocks(self, sequences: SequenceOf[Sequence], rows: list[int]) -> None:
        width = self.block_table.shape[1]
        places: list[int] = []
        block_ids: list[int] = []
        for seq, row in zip(sequences, rows, strict=True):
            if self._shown[row] is not seq.block_table:
                self._shown[row], self._num_shown[row] = seq.block_table, 0
            count = self._layout.num_blocks_for(seq.num_computed_tokens + 1)
            first = self._num_shown[row]
            if first < count:
                places += range(row * width + first, row * width + count)
                block_ids += seq.block_table[first:count]
                self._num_shown[row] = count
        if places:
            at = to_device(torch.tensor(places), self._device)
            values = to_device(torch.tensor(block_ids, dtype=torch.int32), self._device)
            self.block_table.view(-1).index_copy_(0, at, values)
