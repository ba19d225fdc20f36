"""How a step is packed: rows, positions, slots, tables."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_engine import prompt

from baton.kv_layout import KvLayout
from engine.batch import Batches, Span, build_batch
from engine.sequence import Scheduled, Sequence

LAYOUT = KvLayout(32, 1, 1, 4, 2, "float32")


def running(num_tokens: int, num_computed: int, block_table: list[int]) -> Sequence:
    """Its last token was drawn, where it alone is left to compute."""
    seq = prompt(list(range(100, 100 + num_tokens)))
    if num_computed == num_tokens - 1:
        seq.num_prompt_tokens = num_computed
    seq.num_computed_tokens = num_computed
    seq.block_table = block_table
    return seq


def test_decodes_come_first_longest_context_first() -> None:
    chunk = running(6, 2, [9, 3])
    short, long = running(3, 2, [5]), running(10, 9, [7, 1, 30])
    batch = build_batch([Scheduled(chunk, 3), Scheduled(short, 1), Scheduled(long, 1)], LAYOUT)
    assert batch.spans == (Span(0, 1, 10), Span(1, 1, 3), Span(2, 3, 5))
    assert batch.num_decodes == 2
    assert batch.token_ids.tolist() == [109, 102, 102, 103, 104]
    assert batch.positions.tolist() == [9, 2, 2, 3, 4]
    slots = [30 * 4 + 1, 5 * 4 + 2, 9 * 4 + 2, 9 * 4 + 3, 3 * 4 + 0]
    assert batch.slot_mapping.tolist() == slots
    assert batch.slot_mapping.dtype == torch.int64
    assert batch.block_table.dtype == torch.int32


def test_one_token_of_a_prompt_is_a_chunk() -> None:
    """Its attention rounds as that of the rest does."""
    last, decode = running(6, 5, [9, 3]), running(3, 2, [5])
    last.num_prompt_tokens = 6
    batch = build_batch([Scheduled(last, 1), Scheduled(decode, 1)], LAYOUT)
    assert batch.spans == (Span(0, 1, 3), Span(1, 1, 6))
    assert batch.num_decodes == 1


def test_sampled_are_the_complete_ones_in_the_order_scheduled() -> None:
    chunk, whole = running(8, 0, [0, 1]), running(5, 0, [2, 3])
    decode = running(3, 2, [4])
    batch = build_batch([Scheduled(chunk, 4), Scheduled(whole, 5), Scheduled(decode, 1)], LAYOUT)
    assert batch.sampled == (whole, decode)
    assert batch.sampled_rows.tolist() == [9, 0]


def test_a_table_is_padded_with_the_sequence_own_block() -> None:
    batch = build_batch(
        [Scheduled(running(10, 9, [7, 1, 30]), 1), Scheduled(running(3, 2, [5]), 1)], LAYOUT
    )
    assert batch.block_table.tolist() == [[7, 1, 30], [5, 5, 5]]


def test_blocks_reserved_ahead_are_not_read() -> None:
    batch = build_batch([Scheduled(running(3, 2, [5, 6, 8]), 1)], LAYOUT)
    assert batch.block_table.tolist() == [[5]]


def test_a_token_in_a_shared_block_is_written_to_scratch() -> None:
    seq = running(8, 7, [3, 4])
    seq.num_shared_tokens = 8
    batch = build_batch([Scheduled(seq, 1)], LAYOUT)
    assert batch.slot_mapping.tolist() == [LAYOUT.scratch_block * 4 + 3]
    assert batch.block_table.tolist() == [[3, 4]]


def test_tokens_behind_a_shared_prefix_are_written_to_their_own_block() -> None:
    seq = running(6, 4, [3, 4])
    seq.num_shared_tokens = 4
    assert build_batch([Scheduled(seq, 2)], LAYOUT).slot_mapping.tolist() == [16, 17]


@pytest.mark.parametrize(
    ("num_tokens", "block_table"), [(0, [0, 1]), (4, [0, 1]), (3, [0])], ids=str
)
def test_a_wrong_schedule_is_refused(num_tokens: int, block_table: list[int]) -> None:
    with pytest.raises(AssertionError):
        build_batch([Scheduled(running(6, 3, block_table), num_tokens)], LAYOUT)


def test_a_sequence_twice_in_a_step_is_refused() -> None:
    seq = running(6, 3, [0, 1])
    with pytest.raises(AssertionError, match="twice"):
        build_batch([Scheduled(seq, 1), Scheduled(seq, 1)], LAYOUT)


def computed(scheduled: list[Scheduled], free: list[int]) -> None:
    """What an engine and a scheduler do after and before a step."""
    for seq, num_tokens in scheduled:
        seq.num_computed_tokens += num_tokens
        if seq.num_remaining == 0:
            seq.token_ids.append(seq.token_ids[-1] % 97 + 1)
        if LAYOUT.num_blocks_for(seq.num_tokens) > len(seq.block_table):
            seq.block_table.append(free.pop())


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_steps_after_each_other_are_what_each_is_by_itself(data: st.DataObject) -> None:
    batches, free = Batches(LAYOUT), list(range(100, 1000))
    running: list[Sequence] = []
    for _ in range(data.draw(st.integers(1, 25))):
        what = data.draw(st.sampled_from(["step", "step", "step", "join", "leave", "lose", "swap"]))
        if what == "join" or not running:
            length = data.draw(st.integers(1, 9))
            seq = prompt([data.draw(st.integers(0, 96)) for _ in range(length)])
            seq.block_table = [free.pop() for _ in range(LAYOUT.num_blocks_for(length))]
            seq.num_prompt_tokens = data.draw(st.integers(1, length))
            # An input that is cached to its end has its last token computed into scratch.
            seq.num_shared_tokens = length if data.draw(st.booleans()) and length % 4 == 0 else 0
            seq.num_computed_tokens = max(0, seq.num_shared_tokens - 1)
            running.append(seq)
        elif what == "leave":
            running.pop(data.draw(st.integers(0, len(running) - 1)))
        elif what == "lose":
            lost = running[data.draw(st.integers(0, len(running) - 1))]
            lost.block_table = [free.pop() for _ in lost.block_table]
            if data.draw(st.booleans()):  # else all of it is found in the cache, elsewhere
                lost.num_computed_tokens = lost.num_shared_tokens = 0
        elif what == "swap":
            running.reverse()
        if not running:
            continue
        scheduled = [Scheduled(seq, seq.num_remaining) for seq in running]
        built, alone = batches.build(scheduled), build_batch(scheduled, LAYOUT)
        assert built.spans == alone.spans
        assert built.num_decodes == alone.num_decodes
        assert built.sampled == alone.sampled
        for name in ("token_ids", "positions", "slot_mapping", "sampled_rows"):
            assert torch.equal(getattr(built, name), getattr(alone, name)), name
        for row, span in enumerate(alone.spans):
            count = LAYOUT.num_blocks_for(span.num_context)
            own, wanted = built.block_table[row], alone.block_table[row]
            assert own[:count].tolist() == wanted[:count].tolist()
            assert set(own[count:].tolist()) <= {int(wanted[0])}
        if data.draw(st.integers(0, 9)):  # else the step has failed, and is tried again
            computed(scheduled, free)


def test_a_sequence_that_comes_back_to_its_place_with_other_blocks_is_packed_anew() -> None:
    """Preempted between two steps, it found its prefix in the cache again: in other blocks."""
    seq, batches = running(8, 7, [9, 3]), Batches(LAYOUT)
    batches.build([Scheduled(seq, 1)])
    computed([Scheduled(seq, 1)], [20])
    seq.block_table = [5, 6, 9]
    scheduled = [Scheduled(seq, 1)]
    built, alone = batches.build(scheduled), build_batch(scheduled, LAYOUT)
    assert built.block_table.tolist() == alone.block_table.tolist() == [[5, 6, 9]]
    assert built.slot_mapping.tolist() == alone.slot_mapping.tolist() == [36]


def test_a_step_of_the_same_decodes_is_the_one_before_it_moved_on() -> None:
    seqs = [running(6, 5, [9, 3]), running(3, 2, [5])]
    batches, free = Batches(LAYOUT), list(range(20, 30))
    first = batches.build([Scheduled(seq, 1) for seq in seqs])
    computed([Scheduled(seq, 1) for seq in seqs], free)
    second = batches.build([Scheduled(seq, 1) for seq in seqs])
    assert second.positions is first.positions
    assert second.positions.tolist() == [6, 3]
