"""A choice that waits for room on one decode worker while another has it, on a fake clock."""

from __future__ import annotations

import asyncio

from baton.v1 import session_pb2 as pb
from router.choice_run import ROOM_MOVE_PAUSE_S, ROOM_PATIENCE_S
from tests.support.memory_cluster import Cluster, answer, cancels, leave, report, with_cluster
from tests.support.memory_pool import Worker


@with_cluster
async def test_choice_that_waits_for_room_moves_to_a_worker_that_has_it(cluster: Cluster) -> None:
    client, full, other = await cluster.ask_full()
    await asyncio.sleep(20.0)
    assert other.opens() == [], "both are full"
    report(other, num_free=2, num_cached=2)
    await asyncio.sleep(1.0)
    (first,), (second,) = full.opens(), other.opens()
    assert cancels(full) == [first.stream_id]
    assert first.stream_id in [n for w in cluster.workers("prefill") for n in cancels(w)]
    assert second.handoff.decode_epoch == other.session.epoch
    assert second.attempt == 0
    assert cluster.num_moves == 1
    answer(other, second)
    await client.end()
    assert client.token_ids == [50, 51, 52, 53]


@with_cluster
async def test_choice_keeps_its_place_in_line_for_a_moment(cluster: Cluster) -> None:
    client, full, other = await cluster.ask_full()
    report(other, num_free=50)
    await asyncio.sleep(ROOM_PATIENCE_S - 0.1)
    assert other.opens() == []
    await asyncio.sleep(0.2)
    assert len(other.opens()) == 1
    await client.leave()
    assert len(full.opens()) == 1


@with_cluster
async def test_choice_that_has_its_room_stays_however_long_prefill_takes(cluster: Cluster) -> None:
    client, full, other = await cluster.ask_full()
    (message,) = full.opens()
    full.send(reserved=[pb.Reserved(stream_id=message.stream_id)])
    report(other, num_free=50)
    await asyncio.sleep(30.0)
    assert other.opens() == []
    answer(full, message)
    await client.end()


@with_cluster
async def test_choice_moves_only_where_nobody_waits_and_a_block_is_left_over(
    cluster: Cluster,
) -> None:
    client, _, other = await cluster.ask_full()
    report(other, num_free=50, num_waiting=1)
    await asyncio.sleep(5.0)
    report(other, num_free=2, num_cached=1)
    await asyncio.sleep(5.0)
    assert other.opens() == []
    await client.leave()


@with_cluster
async def test_choice_moves_at_most_once_in_a_while(cluster: Cluster) -> None:
    client, full, other = await cluster.ask_full()
    for worker in (full, other):
        report(worker, num_free=50)
    periods = 6
    await asyncio.sleep(ROOM_PATIENCE_S + (periods - 0.5) * ROOM_MOVE_PAUSE_S)
    assert cluster.num_moves == periods
    assert len(full.opens()) + len(other.opens()) == periods + 1
    await client.leave()


@with_cluster
async def test_no_more_choices_move_than_there_is_room_for(cluster: Cluster) -> None:
    client, full, other = await cluster.ask_full()
    for worker in cluster.workers("decode"):
        report(worker, num_free=0, num_waiting=1)
    clients = [client, *[await cluster.ask() for _ in range(5)]]
    there = len(other.opens())
    report(other, num_free=7)  # for two of them
    await asyncio.sleep(10.0)
    assert len(other.opens()) == there + 2
    assert cluster.num_moves == 2
    for each in clients:
        await each.leave()
    assert len(full.opens()) + there == 6


@with_cluster
async def test_choice_does_not_leave_a_line_to_join_it_again(cluster: Cluster) -> None:
    client, slow, _ = await cluster.ask_full()
    report(slow, num_free=50)
    await asyncio.sleep(20.0)
    assert cluster.num_moves == 0
    assert len(slow.opens()) == 1
    await client.leave()


@with_cluster
async def test_worker_that_a_choice_moved_from_is_not_shunned(cluster: Cluster) -> None:
    client, full, other = await cluster.ask_full()
    report(other, num_free=50)
    await asyncio.sleep(2.0)
    (moved,) = other.opens()
    busy = Worker("decode", 2)
    cluster.pool.workers.append(busy)
    report(busy, num_free=0, num_waiting=20)
    await asyncio.sleep(0.01)
    leave(other, moved)
    await asyncio.sleep(0.01)
    assert len(full.opens()) == 2
    assert busy.opens() == []
    await client.leave()


@with_cluster
async def test_stream_that_has_begun_finds_room_before_those_that_have_not(
    cluster: Cluster,
) -> None:
    client, gone, full = await cluster.ask_full()
    (message,) = gone.opens()
    batch = pb.TokenBatch(stream_ids=[message.stream_id], positions=[0], token_ids=[50])
    gone.send(tokens=batch)
    report(gone, num_free=0, num_waiting=20)
    await asyncio.sleep(0.01)
    fresh = [await cluster.ask() for _ in range(4)]  # they look every half second from here on
    assert len(full.opens()) == 4
    await asyncio.sleep(0.2)
    leave(gone, message)
    await asyncio.sleep(0.01)
    cluster.pool.restart(cluster.pool.workers.index(gone))
    await asyncio.sleep(3.1)
    (replacement,) = [w for w in cluster.workers("decode") if w is not full]
    report(replacement, num_free=4)
    await asyncio.sleep(1.0)
    (moved,) = replacement.opens()
    assert list(moved.emitted_token_ids) == [50]
    answer(replacement, moved)
    await client.end()
    assert client.token_ids == [50, 51, 52, 53]
    for each in fresh:
        await each.leave()
