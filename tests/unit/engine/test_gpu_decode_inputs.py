"""The arrays of recorded decode steps show each sequence's next token, in a row that it keeps."""

from __future__ import annotations

import random

import pytest
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


def step_on(seqs: list[Sequence]) -> None:
    """As the engine does it: a token more each, and blocks where they are full."""
    for number, seq in enumerate(seqs):
        seq.num_computed_tokens += 1
        seq.token_ids = [*seq.token_ids[: seq.num_computed_tokens], 100 + number]
        while len(seq.block_table) * 16 <= seq.num_computed_tokens:
            seq.block_table.append(1 + sum(map(ord, repr((number, seq.block_table)))) % 19)


def shown(inputs: DecodeInputs, seqs: list[Sequence], rows: list[int]) -> list[object]:
    """Of each sequence, what its row says; of blocks, those that its token attends to."""
    numbers = torch.stack([inputs.token_ids, inputs.positions, inputs.slots, inputs.contexts])
    return [
        (
            numbers[:, row].tolist(),
            inputs.block_table[row, : seq.num_computed_tokens // 16 + 1].tolist(),
        )
        for seq, row in zip(seqs, rows, strict=True)
    ]


@pytest.mark.parametrize("seed", range(200))
def test_inputs_that_were_prepared_are_those_of_a_step_that_was_not(seed: int) -> None:
    """Whoever comes, goes, is preempted or takes a block meanwhile."""
    rng = random.Random(seed)
    prepared, plain = decode_inputs(4), decode_inputs(4)
    seqs = [sequence(rng.randrange(1, 40), [1, 2, 3]) for _ in range(3)]
    for seq in seqs:
        seq.block_table = seq.block_table[: seq.num_computed_tokens // 16 + 1]
        seq.num_shared_tokens = rng.choice([0, 0, seq.num_computed_tokens + 2])
    for _ in range(20):
        rows = prepared.fill(seqs)
        assert shown(prepared, seqs, rows) == shown(plain, seqs, plain.fill(seqs))
        others = sorted({*range(4)}.difference(rows))
        assert prepared.slots[others].tolist() == [SCRATCH * 16] * len(others)
        copied = prepared._copied.clone()
        prepared.prepare(seqs, rows)
        assert torch.equal(prepared._copied, copied), "it may still be on its way to the GPU"
        step_on(seqs)
        match rng.randrange(8):
            case 0 if len(seqs) < 4:
                seqs.append(sequence(rng.randrange(1, 16), [rng.randrange(20)]))
            case 1 if len(seqs) > 1:
                seqs.remove(rng.choice(seqs))
            case 2:
                rng.shuffle(seqs)
            case 3:
                rng.choice(seqs).block_table = [rng.randrange(20) for _ in range(5)]
            case 4:
                step_on(seqs[:1])


def test_a_step_of_the_same_sequences_reads_only_what_was_not_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs = decode_inputs(4)
    seqs = [sequence(15, [4]), sequence(3, [7])]
    placed = []
    place = inputs._place
    rows = inputs.fill(seqs)
    inputs.prepare(seqs, rows)
    step_on(seqs)
    monkeypatch.setattr(
        inputs, "_place", lambda late, *of: (placed.append(list(late)), place(late, *of))
    )
    assert inputs.fill(seqs) == rows
    assert placed == [seqs[:1]], "its block was taken after the step before"
    assert inputs.positions[:2].tolist() == [16, 4]
    assert inputs.slots[:2].tolist() == [seqs[0].block_table[1] * 16, 7 * 16 + 4]
