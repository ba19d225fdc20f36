"""Priorities in the decode scheduler: who waits for whom, and who gives way to whom."""

from __future__ import annotations

from support.decode_streams import finish, scheduler, stream
from support.sequences import pretend_step, small_cache

from decode_workers.scheduler import DecodeScheduler, DecodeStream, StreamState
from engine.kv_cache.kv_cache import KvCache


def test_each_part_of_the_line_is_in_order_of_priority_and_then_of_arrival() -> None:
    kv = small_cache(8)
    chosen = scheduler(kv)
    running = stream(0, list(range(28)), local=False, priority=9)
    chosen.enqueue(running)
    chosen.admit()
    fresh = [stream(n, [n], local=False, priority=p) for n, p in ((1, 0), (2, -1), (3, 0))]
    begun = [
        stream(n, [n, n], local=False, priority=p, num_emitted=1)
        for n, p in ((4, 5), (5, 7), (6, 5))
    ]
    for item in (fresh[0], begun[1], fresh[1], begun[0], begun[2], fresh[2]):
        chosen.enqueue(item)
    assert chosen.admit() == [], "nobody who runs gives way to who waits"
    line = (begun[0], begun[2], begun[1], fresh[1], fresh[0], fresh[2])
    assert chosen.queued == line
    finish(kv, chosen, running)
    assert chosen.admit() == list(line)


def test_better_priority_without_room_is_not_passed_by_worse_ones_that_would_fit() -> None:
    kv = small_cache(8)
    chosen = scheduler(kv)
    running = stream(0, list(range(20)), local=False)
    chosen.enqueue(running)
    chosen.admit()
    small, big = (
        stream(1, [1], local=False),
        stream(2, list(range(50, 62)), local=False, priority=-1),
    )
    for item in (small, big):
        chosen.enqueue(item)
    assert chosen.admit() == []
    assert chosen.queued == (big, small)
    chosen.remove(big)
    assert chosen.admit() == [small]


def crowd(kv: KvCache, priorities: list[int]) -> tuple[DecodeScheduler, list[DecodeStream]]:
    """Streams of four tokens that decode; each needs another block for its next token."""
    chosen = scheduler(kv)
    streams = [
        stream(n, [n * 50 + i for i in range(4)], local=True, priority=priority, max_tokens=99)
        for n, priority in enumerate(priorities)
    ]
    for item in streams:
        chosen.enqueue(item)
        chosen.admit()
    assert chosen.num_running == len(streams)
    return chosen, streams


def states(streams: list[DecodeStream]) -> str:
    return "".join(item.state.name[0] for item in streams)


def test_worst_priority_gives_way_first_and_of_equal_ones_the_youngest() -> None:
    kv = small_cache(6)
    chosen, streams = crowd(kv, [0, 5, 5, 0, 9])
    seen = []
    while chosen.num_running > 1:
        pretend_step(kv, chosen.schedule(), 7)
        kv.pool.check()
        if not seen or seen[-1] != states(streams):
            seen.append(states(streams))
    assert seen == ["RRRRR", "RRQRQ", "RQQRQ", "RQQQQ"]
    assert chosen.queued == (streams[3], streams[1], streams[2], streams[4])


def test_worst_priority_gives_way_itself_though_it_is_the_oldest() -> None:
    kv = small_cache(4)
    chosen = scheduler(kv)
    worst, better = (
        stream(1, [1, 2, 3, 4], local=True, priority=1, max_tokens=99),
        stream(2, [5, 6, 7], local=True, max_tokens=99),
    )
    for item in (worst, better):
        chosen.enqueue(item)
        chosen.admit()
    while worst.state is StreamState.RUNNING:
        pretend_step(kv, chosen.schedule(), 9)
    assert better.state is StreamState.RUNNING
    tokens = list(worst.sequence.token_ids)
    finish(kv, chosen, better)
    chosen.admit()
    pretend_step(kv, chosen.schedule(), 9)
    assert worst.sequence.token_ids[: len(tokens)] == tokens


def test_preempted_stream_comes_before_its_equals_and_behind_better_ones() -> None:
    kv = small_cache(4)
    chosen = scheduler(kv)
    old, young = (
        stream(1, [1, 2, 3, 4], local=True),
        stream(2, [5, 6, 7], local=True, priority=3),
    )
    for item in (old, young):
        chosen.enqueue(item)
    chosen.admit()
    moved = {
        priority: stream(10 + priority, list(range(50, 58)), local=True, num_emitted=2)
        for priority in (2, 3, 4)
    }
    for priority, item in moved.items():
        item.priority = priority
        chosen.enqueue(item)
    while young.state is StreamState.RUNNING:
        pretend_step(kv, chosen.schedule(), 9)
    assert chosen.queued == (moved[2], young, moved[3], moved[4])


def test_local_prefill_of_the_best_priority_has_half_a_step_and_the_shortest_the_other() -> None:
    kv = small_cache(64)
    chosen = scheduler(kv, budget=10)
    streams = [
        stream(1, list(range(100)), local=True, priority=1),
        stream(2, [200, 201], local=True, priority=1),
        stream(3, list(range(300, 400)), local=True),
    ]
    for item in streams:
        chosen.enqueue(item)
        chosen.admit()
    chunks = [(c.seq, c.num_tokens) for c in chosen.schedule()]
    assert chunks == [(streams[2].sequence, 8), (streams[1].sequence, 2)]
