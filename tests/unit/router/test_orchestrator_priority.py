"""Priorities in the gateway's line: who is opened first, and who is refused for whom."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

from baton.errors import OverloadedError
from baton.v1 import session_pb2 as pb
from tests.support.fake_cluster import Client, FakeCluster, choice, fake_cluster, wait_until
from tests.support.fake_worker import FakeStream, FakeWorker

LINE = {"max_in_flight": 1, "max_queued": 2}


def ask(cluster: FakeCluster, priority: int, *, index: int = 0) -> Client:
    request = dataclasses.replace(choice(), priority=priority, choice_index=index)
    return cluster.ask(request)


async def wait_queued(cluster: FakeCluster, number: int) -> None:
    await wait_until(lambda: cluster.sample("baton_choices_queued") == number)


async def end(stream: FakeStream, client: Client) -> None:
    stream.tokens(0, 50)
    stream.close(pb.CLOSE_REASON_STOP)
    await client.end()


async def served(worker: FakeWorker, *clients: Client) -> list[int]:
    """The priorities of who is opened, one after another, each served to its end."""
    seen = []
    for client in clients:
        stream = await worker.next_open()
        seen.append(stream.message.priority)
        await end(stream, client)
    return seen


async def test_better_priority_is_opened_before_who_waits_longer() -> None:
    async with fake_cluster(gateway=LINE) as cluster:
        worker = await cluster.add("decode-0", "decode")
        first, worse = ask(cluster, 0), ask(cluster, 5)
        await wait_queued(cluster, 1)
        better = ask(cluster, -5)
        await wait_queued(cluster, 2)
        assert await served(worker, first, better, worse) == [0, -5, 5]


async def test_better_priority_takes_the_place_of_a_worse_request_in_a_full_line() -> None:
    async with fake_cluster(gateway=LINE) as cluster:
        worker = await cluster.add("decode-0", "decode")
        first, worse, last = ask(cluster, 0), ask(cluster, 5), ask(cluster, 5)
        await wait_queued(cluster, 2)
        better = ask(cluster, 4)
        with pytest.raises(OverloadedError, match="better priority"):
            await last.end()
        with pytest.raises(OverloadedError, match="too many"):
            await ask(cluster, 5).end()
        assert await served(worker, first, better, worse) == [0, 4, 5]


async def test_request_that_has_begun_is_refused_for_none_of_its_other_choices() -> None:
    async with fake_cluster(gateway=LINE) as cluster:
        worker = await cluster.add("decode-0", "decode")
        choices = [ask(cluster, 5, index=index) for index in range(3)]
        await wait_queued(cluster, 2)
        with pytest.raises(OverloadedError, match="too many"):
            await ask(cluster, -5).end()
        assert await served(worker, *choices) == [5, 5, 5]
        await asyncio.sleep(0)
        assert cluster.sample("baton_choices_queued") == 0
