"""One attempt over two workers: who is told what, and how their tokens come together."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from baton.errors import InternalError, TransferError
from baton.logprobs import TokenLogprobs
from baton.timeline import Timeline
from baton.v1 import session_pb2 as pb
from tests.support.fake_cluster import Client, FakeCluster, choice, fake_cluster, wait_until
from tests.support.fake_worker import FakeStream

STOP = pb.CLOSE_REASON_STOP
LENGTH = pb.CLOSE_REASON_LENGTH
HANDED_OFF = pb.CLOSE_REASON_HANDED_OFF


async def opened(cluster: FakeCluster, **request: Any) -> tuple[FakeStream, FakeStream, Client]:
    """A choice that the two workers of a new pair have opened."""
    prefill, decode = await cluster.add_pair()
    client = cluster.ask(choice(**request))
    return await prefill.next_open(), await decode.next_open(), client


async def test_both_workers_are_opened_with_the_same_request_and_handoff() -> None:
    async with fake_cluster() as cluster:
        prefill, decode, client = await opened(cluster, stop=frozenset({9, 2}))
        message, handoff = decode.message, decode.message.handoff
        assert prefill.message == message
        assert list(message.prompt_token_ids) == [1, 2, 3]
        assert list(message.emitted_token_ids) == []
        assert list(message.stop_token_ids) == [2, 9]
        assert (message.request_id, message.attempt, message.max_tokens) == ("request-1", 0, 4)
        assert (message.sampling.seed, message.sampling.top_p) == (7, 1.0)
        assert (message.traceparent, message.cache_salt) == ("00-trace-span-01", "salt")
        assert 0 < message.remaining_ms <= 30_000
        assert len(handoff.transfer_id) == 16
        assert handoff.prefill_epoch == prefill.worker.epoch
        assert handoff.decode_epoch == decode.worker.epoch
        assert handoff.prefill_worker_id == "prefill-0"
        assert handoff.decode_worker_id == "decode-0"
        assert handoff.prefill_transfer_address == prefill.worker.record.address
        assert handoff.decode_transfer_address == decode.worker.record.address
        await client.leave()


async def test_prefill_proceeds_once_when_decode_has_reserved_and_knows_what_it_holds() -> None:
    async with fake_cluster() as cluster:
        prefill, decode, client = await opened(cluster)
        assert not prefill.held.done()
        decode.reserve(32)
        decode.reserve(48)
        assert await prefill.held == 32
        decode.tokens(0, 5)
        decode.close(STOP)
        await client.end()
        await wait_until(prefill.cancelled.is_set)
        assert prefill.worker.num_received("proceed") == 1


async def test_first_token_from_both_sides_is_given_once() -> None:
    async with fake_cluster() as cluster:
        prefill, decode, client = await opened(cluster)
        decode.reserve()
        await prefill.held
        told = {position: TokenLogprobs(-float(position)) for position in range(4)}
        prefill.tokens(0, 50, logprobs={0: told[0]})
        await wait_until(lambda: client.token_ids == [50])
        prefill.close(HANDED_OFF)
        decode.tokens(0, 50, 51, logprobs={0: told[0], 1: told[1]})
        decode.tokens(2, 52, 53, logprobs={2: told[2], 3: told[3]})
        decode.close(LENGTH)
        assert (await client.end()).finish_reason == "length"
        assert client.token_ids == [50, 51, 52, 53]
        assert client.logprobs == list(told.values())


async def test_token_ahead_of_a_missing_one_waits_and_so_does_the_end() -> None:
    async with fake_cluster() as cluster:
        prefill, decode, client = await opened(cluster)
        decode.tokens(1, 51, 52)
        decode.close(STOP)
        decode.worker.send(pb.WorkerMessage(report=pb.Report(num_running=3)))
        link = cluster.pool.sessions("decode")[0]
        await wait_until(lambda: link.report is not None and link.report.num_running == 3)
        assert client.token_ids == []
        prefill.tokens(0, 50)
        prefill.close(HANDED_OFF)
        assert (await client.end()).finish_reason == "stop"
        assert client.token_ids == [50, 51, 52]


async def test_choice_that_ends_with_its_first_token_cancels_decode_and_hands_nothing_over() -> (
    None
):
    async with fake_cluster() as cluster:
        prefill, decode, client = await opened(cluster)
        decode.reserve()
        await prefill.held
        prefill.tokens(0, 2)
        prefill.close(STOP, num_computed_tokens=3)
        last = await client.end()
        assert (client.token_ids, last.finish_reason) == ([2], "stop")
        await wait_until(decode.cancelled.is_set)
        assert (prefill.num_cancels, decode.num_cancels) == (0, 1)


async def test_end_with_the_first_token_stands_though_decode_hears_of_it_first() -> None:
    async with fake_cluster() as cluster:
        prefill, decode, client = await opened(cluster, max_tokens=1)
        decode.reserve()
        await prefill.held
        decode.fail(TransferError("prefill gave the hand-off up"))
        await wait_until(lambda: decode.worker.num_received("open") == 1)
        prefill.tokens(0, 50)
        prefill.close(LENGTH, num_computed_tokens=3)
        assert (await client.end()).finish_reason == "length"
        assert client.token_ids == [50]
        assert decode.worker.num_received("open") == 1


@pytest.mark.parametrize("word", ["handed over", "nothing"])
async def test_failed_handoff_is_attempted_again_whatever_prefill_says(word: str) -> None:
    async with fake_cluster() as cluster:
        prefill, decode, client = await opened(cluster)
        decode.reserve()
        await prefill.held
        prefill.tokens(0, 50)
        decode.fail(TransferError("its lease had run out"))
        if word == "handed over":
            prefill.close(HANDED_OFF, num_computed_tokens=3)
        again = await decode.worker.next_open()
        assert again.message.attempt == 1
        assert list(again.message.emitted_token_ids) == [50]
        again.tokens(1, 51)
        again.close(STOP)
        await client.end()
        assert client.token_ids == [50, 51]


async def test_prefill_that_ends_after_the_handoff_is_no_end_and_no_failure() -> None:
    async with fake_cluster() as cluster:
        prefill, decode, client = await opened(cluster)
        decode.reserve()
        prefill.tokens(0, 50)
        prefill.close(HANDED_OFF)
        decode.tokens(0, 50, 51)
        await wait_until(lambda: client.token_ids == [50, 51])
        decode.tokens(2, 52, 53)
        decode.close(LENGTH)
        await client.end()
        assert prefill.num_cancels == decode.num_cancels == 0
        assert cluster.sample("baton_attempts_total", cause="first") == 1


async def test_prefill_lost_after_decode_took_over_costs_nothing() -> None:
    async with fake_cluster() as cluster:
        prefill, decode, client = await opened(cluster)
        decode.tokens(0, 50)
        await wait_until(lambda: client.token_ids == [50])
        await prefill.worker.stop()
        await wait_until(lambda: not cluster.is_live(prefill.worker))
        decode.tokens(1, 51, 52, 53)
        decode.close(LENGTH)
        await client.end()
        assert client.token_ids == [50, 51, 52, 53]


@pytest.mark.parametrize(
    ("prefill_computed", "decode_computed", "cached"), [(1, 0, 2), (3, 0, 0), (1, 2, 1), (9, 0, 0)]
)
async def test_cached_tokens_are_those_that_no_worker_computed(
    prefill_computed: int, decode_computed: int, cached: int
) -> None:
    async with fake_cluster() as cluster:
        prefill, decode, client = await opened(cluster)
        decode.tokens(0, 50, 51)
        decode.close(STOP, num_computed_tokens=decode_computed)
        # The prefill side's account may come last: it travels over another Session.
        await wait_until(lambda: cluster.num_open() == 1)
        prefill.close(HANDED_OFF, num_computed_tokens=prefill_computed)
        assert (await client.end()).num_cached_tokens == cached


async def test_last_tokens_do_not_wait_for_the_prefill_sides_account() -> None:
    async with fake_cluster() as cluster:
        prefill, decode, client = await opened(cluster)
        closed = pb.Closed(stream_id=decode.message.stream_id, reason=STOP)
        batch = decode.batch(0, (50, 51))
        decode.worker.send_events(pb.Events(tokens=batch, closed=[closed]))
        await wait_until(lambda: client.token_ids == [50, 51])
        assert not client.task.done()
        prefill.close(HANDED_OFF, num_computed_tokens=1)
        assert (await client.end()).num_cached_tokens == 2


async def test_nothing_is_claimed_as_cached_where_prefill_never_says_what_it_computed() -> None:
    async with fake_cluster() as cluster:
        _, decode, client = await opened(cluster)
        decode.tokens(0, 50)
        decode.close(STOP)
        assert (await client.end()).num_cached_tokens == 0


async def test_timeline_tells_what_prefill_fetched_from_decode() -> None:
    async with fake_cluster() as cluster:
        pair = await cluster.add_pair()
        timeline = Timeline()
        client = cluster.ask(dataclasses.replace(choice(), timeline=timeline))
        prefill, decode = [await worker.next_open() for worker in pair]
        decode.tokens(0, 50)
        decode.close(STOP)
        prefill.close(HANDED_OFF, num_computed_tokens=1, num_received_tokens=2)
        assert (await client.end()).num_cached_tokens == 2
        assert timeline.report()["attempts"][0]["num_pulled_tokens"] == 2


async def test_without_a_prefill_worker_decode_is_asked_to_prefill_by_itself() -> None:
    async with fake_cluster() as cluster:
        worker = await cluster.add("decode-0", "decode")
        client = cluster.ask(choice())
        decode = await worker.next_open()
        assert not decode.message.HasField("handoff")
        decode.tokens(0, 50, 51)
        decode.close(STOP, num_computed_tokens=1)
        assert (await client.end()).num_cached_tokens == 2


async def test_workers_that_disagree_on_a_token_fail_the_choice() -> None:
    async with fake_cluster() as cluster:
        prefill, decode, client = await opened(cluster)
        prefill.tokens(0, 50)
        await wait_until(lambda: client.token_ids == [50])
        decode.tokens(0, 99)
        with pytest.raises(InternalError, match="disagree on the token at position 0"):
            await client.end()
        await wait_until(lambda: prefill.num_cancels == decode.num_cancels == 1)


@pytest.mark.parametrize("reason", [STOP, LENGTH, HANDED_OFF])
async def test_decode_that_ends_without_the_tokens_fails_the_choice(
    reason: pb.CloseReason.ValueType,
) -> None:
    async with fake_cluster() as cluster:
        _, decode, client = await opened(cluster)
        decode.close(reason)
        with pytest.raises(InternalError):
            await client.end()


async def test_end_with_a_token_that_nobody_sends_fails_instead_of_hanging() -> None:
    async with fake_cluster() as cluster:
        prefill, decode, client = await opened(cluster)
        decode.tokens(1, 51)
        decode.close(STOP)
        prefill.close(HANDED_OFF)
        with pytest.raises(InternalError, match="tokens are missing"):
            await client.end()


async def test_token_past_the_limit_fails_the_choice() -> None:
    async with fake_cluster() as cluster:
        _, decode, client = await opened(cluster, max_tokens=2)
        decode.tokens(0, 50, 51, 52)
        with pytest.raises(InternalError, match="limit of 2"):
            await client.end()
        assert client.token_ids == [50, 51]
