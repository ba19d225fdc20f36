"""The arrays of recorded decode steps show each sequence's next token, in a row that it keeps."""

from __future__ import annotations

import torch
from support.tiny_engine import prompt, tokens

from baton.kv_layout import KvLayout
from engine.gpu.decode_inputs import DecodeInputs
from engine.sequence import Sequence

SCRATCH = 20
LAYOUT = KvLayout(SCRATCH, 2, 1, 16, 8, "float32")


def decode_inputs(max_num_seqs: int = 2) -> DecodeInputs:
    return DecodeInputs(LAYOUT, torch.device("cpu"), max_num_seqs=max_num_seqs, max_blocks=8)


def sequence(num_computed: int, blocks: list[int]) -> Sequence:
    seq = prompt(tokens(num_computed + 1, seed=num_computed))
    seq.num_computed_tokens, seq.block_table = num_computed, blocks
    return seq


def test_each_row_is_the_next_token_of_its_sequence() -> None:
    seqs = [sequence(17, [4, 9]), sequence(3, [7])]
    inputs = decode_inputs(4)
    assert inputs.fill(seqs) == [0, 1]
    assert inputs.token_ids.tolist() == [seqs[0].token_ids[17], seqs[1].token_ids[3], 0, 0]
    assert inputs.positions.tolist() == [17, 3, 0, 0]
    assert inputs.slots.tolist() == [9 * 16 + 1, 7 * 16 + 3, SCRATCH * 16, SCRATCH * 16]
    assert inputs.contexts.tolist() == [18, 4, 1, 1]
    assert inputs.block_table[:2, :2].tolist() == [[4, 9], [7, SCRATCH]]


def test_rows_that_nobody_has_write_to_the_scratch_block_from_the_beginning() -> None:
    """Graphs are recorded before there is a sequence."""
    inputs = decode_inputs()
    assert inputs.slots.tolist() == [SCRATCH * 16] * 2
    assert inputs.contexts.tolist() == [1, 1]
    assert (inputs.block_table == SCRATCH).all()


def test_a_sequence_keeps_its_row_while_there_are_so_many() -> None:
    inputs = decode_inputs(4)
    a, b, c, d = (sequence(n, [n]) for n in range(1, 5))
    assert inputs.fill([a, b, c, d]) == [0, 1, 2, 3]
    assert inputs.fill([d, c, b, a]) == [3, 2, 1, 0]
    assert inputs.fill([b, d]) == [1, 0]  # row 3 is none of two
    assert inputs.block_table[:2, 0].tolist() == [4, 2]
    assert inputs.fill([a, b, d]) == [2, 1, 0]


def test_a_token_in_a_shared_block_is_written_to_the_scratch_block() -> None:
    seq = sequence(31, [4, 9])
    seq.num_shared_tokens = 32
    inputs = decode_inputs()
    inputs.fill([seq])
    assert inputs.slots[0] == SCRATCH * 16 + 15
    assert inputs.block_table[0, :2].tolist() == [4, 9]


def test_only_new_blocks_are_copied() -> None:
    """Of a table that is shown already: 40 tokens in blocks of 16, then one more each step."""
    inputs = decode_inputs()
    seq = prompt(tokens(40))
    seq.num_computed_tokens, seq.block_table = 39, [7, 3, 9]
    assert inputs.fill([seq]) == [0]
    assert inputs.block_table[0, :4].tolist() == [7, 3, 9, 20]
    assert inputs.slots[:2].tolist() == [9 * 16 + 7, 20 * 16]
    assert inputs.contexts.tolist() == [40, 1]
    inputs.block_table[0, :3] = -1  # would be there again if the whole table was copied
    seq.block_table += [5]
    seq.token_ids += tokens(9)
    seq.num_computed_tokens = 48
    inputs.fill([seq])
    assert inputs.block_table[0, :4].tolist() == [-1, -1, -1, 5]
    seq.block_table = [4, 3, 9, 5]  # it lost its blocks, and took others
    inputs.fill([seq])
    assert inputs.block_table[0, :4].tolist() == [4, 3, 9, 5]
