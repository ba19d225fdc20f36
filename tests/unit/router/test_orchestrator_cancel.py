"""Clients that leave, deadlines that pass, gateways that go away: nothing is left behind."""

from __future__ import annotations

import asyncio
import gc

import pytest

from baton.errors import (
    DeadlineExceededError,
    OverloadedError,
    ReservationError,
)
from baton.v1 import session_pb2 as pb
from router.choice_run import ChoiceRun
from tests.support.fake_cluster import choice, fake_cluster, wait_until
from tests.support.fake_worker import FakeStream


async def test_client_that_leaves_cancels_once_on_both_workers_and_late_events_do_nothing() -> None:
    async with fake_cluster() as cluster:
        prefill, decode = await cluster.add_pair()
        client = cluster.ask(choice())
        streams = [await prefill.next_open(), await decode.next_open()]
        await client.leave()
        await wait_until(lambda: all(stream.num_cancels == 1 for stream in streams))
        for stream in streams:
            stream.reserve()
            stream.tokens(0, 1, 2, 3)
            stream.close(pb.CLOSE_REASON_CANCELLED)
        other = cluster.ask(choice())
        await prefill.next_open()
        stream = await decode.next_open()
        stream.tokens(0, 9)
        stream.close(pb.CLOSE_REASON_STOP)
        await other.end()
        assert other.token_ids == [9]
        assert [stream.num_cancels for stream in streams] == [1, 1]


async def test_generator_closed_between_two_outputs_cancels() -> None:
    async with fake_cluster() as cluster:
        worker = await cluster.add("decode-0", "decode")
        outputs = cluster.orchestrator.generate(choice())
        first = asyncio.ensure_future(anext(outputs))
        stream = await worker.next_open()
        stream.tokens(0, 50)
        assert (await first).token_ids == (50,)
        await outputs.aclose()
        await wait_until(stream.cancelled.is_set)


async def test_generator_that_is_dropped_cancels() -> None:
    async with fake_cluster() as cluster:
        worker = await cluster.add("decode-0", "decode")
        outputs = cluster.orchestrator.generate(choice())
        first = asyncio.ensure_future(anext(outputs))
        stream = await worker.next_open()
        stream.tokens(0, 50)
        await first
        del outputs, first
        gc.collect()
        await wait_until(stream.cancelled.is_set)


async def test_worker_that_has_closed_a_stream_is_not_asked_to_cancel_it() -> None:
    async with fake_cluster() as cluster:
        worker = await cluster.add("decode-0", "decode", cluster.scripts.decode)
        await cluster.ask(choice()).end()
        await cluster.ask(choice()).end()
        assert worker.num_received("cancel") == 0


async def test_deadline_cancels_on_the_workers_and_is_raised() -> None:
    async with fake_cluster() as cluster:
        worker = await cluster.add("decode-0", "decode")
        client = cluster.ask(choice(deadline_s=0.2))
        stream = await worker.next_open()
        stream.tokens(0, 50)
        with pytest.raises(DeadlineExceededError):
            await client.end()
        assert client.token_ids == [50]
        await wait_until(stream.cancelled.is_set)


async def test_deadline_cancels_on_the_workers_while_the_client_reads_nothing() -> None:
    async with fake_cluster() as cluster:
        worker = await cluster.add("decode-0", "decode")
        outputs = cluster.orchestrator.generate(choice(deadline_s=0.3))
        first = asyncio.ensure_future(anext(outputs))
        stream = await worker.next_open()
        stream.tokens(0, 50)
        await first
        await wait_until(stream.cancelled.is_set)
        with pytest.raises(DeadlineExceededError):
            await anext(outputs)


async def test_decode_is_let_go_at_once_when_prefill_ends_a_choice_whose_client_is_slow() -> None:
    async with fake_cluster() as cluster:
        prefill, decode = await cluster.add_pair()
        outputs = cluster.orchestrator.generate(choice())
        first = asyncio.ensure_future(anext(outputs))
        stream, reserved = await prefill.next_open(), await decode.next_open()
        stream.tokens(0, 50)
        await first
        stream.close(pb.CLOSE_REASON_STOP)
        await wait_until(reserved.cancelled.is_set)
        assert (await anext(outputs)).finish_reason == "stop"
        await outputs.aclose()


async def test_nothing_of_a_choice_is_kept_once_it_has_ended() -> None:
    async with fake_cluster() as cluster:
        worker = await cluster.add("decode-0", "decode", cluster.scripts.decode)
        await cluster.ask(choice(deadline_s=3600.0)).end()
        left = cluster.ask(choice(deadline_s=3600.0, max_tokens=1000))
        await wait_until(lambda: len(worker.streams) == 2)
        await left.leave()
        del left
        await asyncio.sleep(0)  # what woke this task still has the cancellation's traceback
        gc.collect()
        assert not [thing for thing in gc.get_objects() if type(thing) is ChoiceRun]


async def test_deadline_passes_while_no_worker_has_room() -> None:
    async with fake_cluster() as cluster:

        async def refuse(stream: FakeStream) -> None:
            stream.fail(ReservationError("no room"))

        await cluster.add("decode-0", "decode", refuse)
        with pytest.raises(DeadlineExceededError):
            await cluster.ask(choice(deadline_s=0.4)).end()


async def test_queue_bounds_refuse_and_serve_in_order() -> None:
    async with fake_cluster(gateway={"max_in_flight": 1, "max_queued": 1}) as cluster:
        worker = await cluster.add("decode-0", "decode")
        running = cluster.ask(choice(1))
        stream = await worker.next_open()
        waiting = cluster.ask(choice(2))
        await wait_until(lambda: cluster.sample("baton_choices_queued") == 1)
        with pytest.raises(OverloadedError) as refused:
            await cluster.ask(choice(3)).end()
        assert (refused.value.retry_after_s or 0) >= 1
        await running.leave()
        assert list((await worker.next_open()).message.prompt_token_ids) == [2]
        assert cluster.sample("baton_choices_queued") == 0
        await waiting.leave()
        await wait_until(stream.cancelled.is_set)
