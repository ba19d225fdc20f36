"""The decode scheduler: who runs, who waits, and who gives way."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.decode_streams import finish, scheduler, stream
from support.sequences import pretend_step, small_cache

from baton.worker.outbox import InputUse
from baton.worker.session_server import StreamKey
from decode_workers.scheduler import DecodeStream, StreamState


def test_reservation_takes_blocks_for_the_whole_input_before_it_is_granted() -> None:
    kv = small_cache(8)
    chosen = scheduler(kv)
    one = stream(1, list(range(10)), local=False)
    chosen.enqueue(one)
    assert chosen.admit() == [one]
    assert one.state is StreamState.RECEIVING
    assert len(one.sequence.block_table) == 3
    assert chosen.schedule() == []


def test_reservation_waits_in_order_when_there_is_no_room_above_the_watermark() -> None:
    kv = small_cache(8)
    chosen = scheduler(kv)
    big, next_one, small = (
        stream(1, list(range(20)), local=False),
        stream(2, list(range(100, 112)), local=False),
        stream(3, [200], local=False),
    )
    for item in (big, next_one, small):
        chosen.enqueue(item)
    assert chosen.admit() == [big]  # 5 of 8; 3 more would leave nothing
    assert chosen.queued == (next_one, small)
    assert kv.pool.counts().referenced == 5
    finish(kv, chosen, big)
    assert chosen.admit() == [next_one, small]


def test_streams_that_have_begun_get_room_first_and_each_group_in_order_of_arrival() -> None:
    kv = small_cache(8)
    chosen = scheduler(kv)
    running = stream(0, list(range(24)), local=False)
    chosen.enqueue(running)
    chosen.admit()
    fresh = [stream(n, [n * 50 + i for i in range(8)], local=False) for n in (1, 2)]
    begun = [stream(n, [n * 50 + i for i in range(8)], local=False, num_emitted=n) for n in (3, 4)]
    for item in (fresh[0], begun[0], fresh[1], begun[1]):
        chosen.enqueue(item)
    assert chosen.admit() == []
    assert chosen.queued == (*begun, *fresh)
    chosen.remove(begun[0])
    finish(kv, chosen, running)
    assert chosen.admit() == [begun[1], *fresh]


def test_preempted_stream_gets_room_before_one_that_begun_elsewhere() -> None:
    kv = small_cache(4)
    chosen = scheduler(kv)
    old, young = stream(1, [1, 2, 3, 4], local=True), stream(2, [5, 6, 7], local=True)
    for item in (old, young):
        chosen.enqueue(item)
    chosen.admit()
    moved = stream(3, list(range(50, 58)), local=True, num_emitted=2)
    chosen.enqueue(moved)
    while young.state is StreamState.RUNNING:
        pretend_step(kv, chosen.schedule(), 9)
    assert chosen.queued == (young, moved)


def test_stream_counts_as_running_from_when_it_has_its_blocks() -> None:
    kv = small_cache(4)
    chosen = scheduler(kv)
    receiving, waiting = stream(1, list(range(12)), local=False), stream(2, [1], local=False)
    for item in (receiving, waiting):
        chosen.enqueue(item)
    chosen.admit()
    assert (chosen.num_running, chosen.num_waiting) == (1, 1)


def test_decoding_streams_go_before_local_prefill_and_share_its_budget() -> None:
    kv = small_cache(32)
    chosen = scheduler(kv, budget=6)
    decoding, prefilling = stream(1, [1, 2], local=True), stream(2, list(range(9)), local=True)
    chosen.enqueue(decoding)
    chosen.admit()
    pretend_step(kv, chosen.schedule(), 7)
    chosen.enqueue(prefilling)
    chosen.admit()
    chunks = [(c.seq, c.num_tokens) for c in chosen.schedule()]
    assert chunks == [(decoding.sequence, 1), (prefilling.sequence, 5)]


def test_short_local_prefill_does_not_wait_for_the_chunks_of_a_long_one() -> None:
    kv = small_cache(64)
    chosen = scheduler(kv, budget=9)
    decoding, long = stream(1, [1, 2], local=True), stream(2, list(range(50, 150)), local=True)
    short = stream(3, [200, 201, 202], local=True)
    chosen.enqueue(decoding)
    chosen.admit()
    pretend_step(kv, chosen.schedule(), 7)
    for item in (long, short):
        chosen.enqueue(item)
    chosen.admit()
    chunks = [(c.seq, c.num_tokens) for c in chosen.schedule()]
    assert chunks == [(decoding.sequence, 1), (long.sequence, 5), (short.sequence, 3)]


def test_youngest_stream_gives_way_and_is_recomputed_with_its_emitted_tokens() -> None:
    kv = small_cache(4)
    chosen = scheduler(kv)
    old, young = stream(1, [1, 2, 3, 4], local=True), stream(2, [5, 6, 7], local=True)
    for item in (old, young):
        chosen.enqueue(item)
    chosen.admit()
    for _ in range(6):
        pretend_step(kv, chosen.schedule(), 9)
        chosen.admit()
        if young.state is StreamState.QUEUED:
            break
    assert young.state is StreamState.QUEUED
    assert young.sequence.block_table == []
    assert young.sequence.token_ids[:3] == [5, 6, 7]
    assert young.sequence.num_emitted_tokens > 0
    assert old.state is StreamState.RUNNING
    assert chosen.num_preemptions == 1
    finish(kv, chosen, old)
    chosen.admit()
    assert young.state is StreamState.RUNNING
    kv.pool.check()


def test_receiving_stream_is_never_preempted() -> None:
    kv = small_cache(4)
    chosen = scheduler(kv)
    receiving = stream(1, list(range(50, 58)), local=False)
    running = stream(2, [1, 2, 3], local=True)
    chosen.enqueue(receiving)
    chosen.enqueue(running)
    chosen.admit()
    for _ in range(12):
        pretend_step(kv, chosen.schedule(), 9)
    assert receiving.state is StreamState.RECEIVING
    assert len(receiving.sequence.block_table) == 2
    kv.pool.check()


@pytest.mark.parametrize("state", list(StreamState)[:3])
def test_removed_stream_is_in_no_list(state: StreamState) -> None:
    kv = small_cache(8)
    chosen = scheduler(kv)
    one = stream(1, [1, 2, 3], local=state is StreamState.RUNNING)
    chosen.enqueue(one)
    if state is not StreamState.QUEUED:
        chosen.admit()
    assert one.state is state
    finish(kv, chosen, one)
    assert (chosen.num_running, chosen.num_waiting, chosen.queued) == (0, 0, ())
    assert chosen.admit() == []
    assert chosen.schedule() == []
    assert kv.pool.counts().referenced == 0


@settings(max_examples=60, deadline=None)
@given(
    jobs=st.lists(
        st.tuples(
            st.integers(1, 20),
            st.integers(3, 12),
            st.booleans(),
            st.integers(0, 6),
            st.integers(0, 1),
            st.integers(0, 2),
        ),
        min_size=1,
        max_size=8,
    ),
    num_blocks=st.integers(8, 16),
)
def test_every_stream_ends_with_all_its_tokens_however_scarce_blocks_are(
    jobs: list[tuple[int, int, bool, int, int, int]], num_blocks: int
) -> None:
    kv = small_cache(num_blocks)
    chosen = scheduler(kv, budget=7, most=4)
    streams = [
        stream(
            n,
            [n * 50 + i for i in range(length)],
            max_tokens=most,
            local=local,
            num_emitted=min(num_emitted, length - 1),
            priority=priority,
        )
        for n, (length, most, local, _, num_emitted, priority) in enumerate(jobs)
    ]
    arrivals = {n: arrival for n, (_, _, _, arrival, _, _) in enumerate(jobs)}
    emitted: dict[StreamKey, int] = {}
    receiving: list[DecodeStream] = []
    for tick in range(2000):
        for n, item in enumerate(streams):
            if arrivals[n] == tick:
                chosen.enqueue(item)
        for item in receiving:  # handed over a step after it was granted
            kv.adopt(item.sequence, item.num_input_tokens)
            item.sequence.token_ids.append(3)
            chosen.received(item)
        line = chosen.queued
        admitted = chosen.admit()
        assert line[len(line) - len(chosen.queued) :] == chosen.queued, "somebody was passed"
        receiving = [item for item in admitted if item.state is StreamState.RECEIVING]
        running = [item for item in streams if item.state is StreamState.RUNNING]
        pretend_step(kv, chosen.schedule(), 3)
        kv.pool.check()
        gone = [item.priority for item in running if item.state is StreamState.QUEUED]
        kept = [item.priority for item in running if item.state is StreamState.RUNNING]
        assert not gone or not kept or min(gone) >= max(kept), "not the worst has given way"
        for item in streams:
            if (
                item.state is StreamState.RUNNING
                and item.sequence.num_emitted_tokens >= item.stop.max_tokens
            ):
                emitted[item.key] = item.sequence.num_emitted_tokens
                finish(kv, chosen, item)
        if len(emitted) == len(streams):
            break
    assert emitted == {item.key: item.stop.max_tokens for item in streams}
    counts = kv.pool.counts()
    assert (counts.referenced, counts.quarantined) == (0, 0)


def test_common_part_of_local_prefills_that_come_together_is_computed_once() -> None:
    kv = small_cache(64)
    chosen = scheduler(kv)
    streams = [stream(number, [*range(32), 90 + number], local=True) for number in range(3)]
    for each in streams:
        chosen.enqueue(each)
    chosen.admit()
    num_computed, sampled = 0, 0
    while sampled < 3:
        chunks = [c for c in chosen.schedule() if c.seq.num_emitted_tokens == 0]
        num_computed += sum(chunk.num_tokens for chunk in chunks)
        sampled += len(pretend_step(kv, chunks, 7))
        kv.pool.check()
    assert num_computed == 32 + 3
    assert [each.local_use for each in streams] == [
        InputUse(0, 33),
        InputUse(32, 1),
        InputUse(32, 1),
    ]


def test_what_a_preempted_prefill_has_computed_is_not_counted_as_cached() -> None:
    """Nor twice: blocks that it takes from another, loses and takes again."""
    each = stream(0, [*range(100)], local=True)
    each.computed += [range(32, 64), range(80, 96), range(48, 80), range(96, 100)]
    assert each.local_use == InputUse(num_cached_tokens=32, num_computed_tokens=68)


@pytest.mark.parametrize("budget", [1, 2, 4])
def test_streams_that_run_take_a_token_of_every_step(budget: int) -> None:
    """However few a step has: a stream that no step has room for would stand still."""
    kv = small_cache(64)
    chosen = scheduler(kv, budget=budget)
    streams = [stream(n, [n], local=True) for n in range(6)]
    for each in streams:
        chosen.enqueue(each)
    chosen.admit()
    for _ in range(6):
        chunks = chosen.schedule()
        assert sum(chunk.num_tokens for chunk in chunks) <= budget
        assert {id(chunk.seq) for chunk in chunks} == {
            id(each.sequence) for each in streams if each.state is StreamState.RUNNING
        }
        pretend_step(kv, chunks, 7)
