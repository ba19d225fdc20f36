"""What a choice does when workers refuse, fail, vanish, or were never there."""

from __future__ import annotations

import asyncio
import dataclasses
from functools import partial

import pytest

from baton.errors import (
    BatonError,
    InternalError,
    InvalidRequestError,
    OverloadedError,
    ReservationError,
    TransferError,
    UnavailableError,
    WorkerLostError,
)
from baton.logprobs import TokenLogprobs
from baton.v1 import session_pb2 as pb
from tests.support.fake_cluster import choice, fake_cluster, wait_until
from tests.support.fake_worker import FakeStream, FakeWorker, expected_token

STOP = pb.CLOSE_REASON_STOP
LENGTH = pb.CLOSE_REASON_LENGTH


async def test_choice_goes_on_elsewhere_with_its_tokens_when_decode_dies() -> None:
    async with fake_cluster() as cluster:
        await cluster.add("prefill-0", "prefill", cluster.scripts.prefill)
        workers = [await cluster.add(f"decode-{i}", "decode") for i in range(2)]
        client = cluster.ask(choice(max_tokens=6))
        await wait_until(lambda: any(worker.streams for worker in workers))
        dying, other = sorted(workers, key=lambda worker: not worker.streams)
        first = await dying.next_open()
        first.reserve()
        first.tokens(0, *(expected_token((1, 2, 3), position) for position in range(3)))
        await wait_until(lambda: len(client.token_ids) == 3)
        await dying.stop()
        second = await other.next_open()
        assert second.message.attempt == 1
        assert list(second.message.prompt_token_ids) == [1, 2, 3]
        assert list(second.message.emitted_token_ids) == client.token_ids
        assert second.message.max_tokens == 6
        assert second.message.stream_id != first.message.stream_id
        assert second.message.handoff.transfer_id != first.message.handoff.transfer_id
        second.tokens(3, *(expected_token((1, 2, 3), position) for position in range(3, 6)))
        second.close(LENGTH)
        await client.end()
        assert client.token_ids == [expected_token((1, 2, 3), p) for p in range(6)]
        assert cluster.sample("baton_attempts_total", cause="worker_lost") == 1


async def test_repeated_attempt_loses_and_repeats_no_log_probabilities() -> None:
    told = {position: TokenLogprobs(-float(position)) for position in range(6)}
    async with fake_cluster() as cluster:
        workers = [await cluster.add(f"decode-{i}", "decode") for i in range(2)]
        request = choice(max_tokens=6)
        sampling = dataclasses.replace(
            request.sampling, num_logprobs=0, min_tokens=2, logit_bias=((5, 0.5),)
        )
        client = cluster.ask(dataclasses.replace(request, sampling=sampling))
        await wait_until(lambda: any(worker.streams for worker in workers))
        dying, other = sorted(workers, key=lambda worker: not worker.streams)
        first = await dying.next_open()
        first.reserve()
        first.tokens(0, 50, 51, 52, logprobs={at: told[at] for at in range(3)})
        # One that waits for the token before it when its worker dies.
        first.tokens(4, 99, logprobs={4: TokenLogprobs(-99.0)})
        await wait_until(lambda: len(client.token_ids) == 3)
        await dying.stop()
        second = await other.next_open()
        assert second.message.sampling == first.message.sampling
        assert second.message.sampling.HasField("num_logprobs")
        assert list(second.message.emitted_token_ids) == [50, 51, 52]
        second.tokens(2, 52, 53, 54, 55, logprobs={at: told[at] for at in range(2, 6)})
        second.close(LENGTH)
        await client.end()
        assert client.token_ids == [50, 51, 52, 53, 54, 55]
        assert client.logprobs == list(told.values())


async def test_every_attempt_has_the_priority_of_its_request() -> None:
    async with fake_cluster() as cluster:
        workers = [await cluster.add(f"decode-{i}", "decode") for i in range(3)]
        client = cluster.ask(dataclasses.replace(choice(), priority=-(2**63)))
        for attempt in range(3):
            await wait_until(lambda: any(worker.streams for worker in workers))
            (worker,) = [worker for worker in workers if worker.streams]
            stream = await worker.next_open()
            assert (stream.message.attempt, stream.message.priority) == (attempt, -(2**63))
            if attempt == 2:
                stream.tokens(1, 51)
                stream.close(STOP)
                break
            workers.remove(worker)
            if attempt == 0:
                stream.tokens(0, 50)
                await wait_until(lambda: client.token_ids == [50])
                await worker.stop()
            else:
                stream.fail(TransferError("another failure"))
        await client.end()
        assert client.token_ids == [50, 51]


async def test_cached_tokens_are_those_of_the_attempt_that_gave_the_first_token() -> None:
    async with fake_cluster() as cluster:
        workers = [await cluster.add(f"decode-{i}", "decode") for i in range(3)]

        async def next_stream() -> FakeStream:
            opens = [asyncio.create_task(worker.next_open()) for worker in workers]
            done, rest = await asyncio.wait(opens, return_when=asyncio.FIRST_COMPLETED)
            for task in rest:
                task.cancel()
            await asyncio.gather(*rest, return_exceptions=True)
            return done.pop().result()

        client = cluster.ask(choice())
        (await next_stream()).fail(TransferError("before any token"))
        second = await next_stream()
        second.tokens(0, 50)
        second.close(STOP, num_computed_tokens=2)
        assert (await client.end()).num_cached_tokens == 1

        client = cluster.ask(choice())
        first = await next_stream()
        first.tokens(0, 50)
        await wait_until(lambda: client.token_ids == [50])
        first.fail(TransferError("after a token"))
        second = await next_stream()
        second.tokens(1, 51)
        second.close(STOP, num_computed_tokens=0)
        assert (await client.end()).num_cached_tokens == 0


async def test_prefill_lost_before_the_handoff_cancels_decode_and_pairs_anew() -> None:
    async with fake_cluster() as cluster:
        prefill, decode = await cluster.add_pair()
        client = cluster.ask(choice())
        first = await decode.next_open()
        await prefill.next_open()
        await prefill.stop()
        second = await decode.next_open()
        await wait_until(first.cancelled.is_set)
        assert not second.message.HasField("handoff")
        second.tokens(0, 50)
        second.close(STOP)
        await client.end()


async def test_failed_handoff_avoids_both_workers_where_others_exist() -> None:
    async with fake_cluster() as cluster:
        prefills = [await cluster.add(f"prefill-{i}", "prefill") for i in range(2)]
        decodes = [await cluster.add(f"decode-{i}", "decode") for i in range(2)]
        client = cluster.ask(choice())
        await wait_until(lambda: any(w.streams for w in decodes))
        failing = next(w for w in decodes if w.streams)
        first = await failing.next_open()
        first.fail(TransferError("the copy broke"))
        other = next(w for w in decodes if w is not failing)
        second = await other.next_open()
        assert second.message.handoff.prefill_epoch != first.message.handoff.prefill_epoch
        await wait_until(lambda: sum(len(w.streams) for w in prefills) == 2)
        second.tokens(0, 50)
        second.close(STOP)
        await client.end()


async def test_failed_handoff_of_the_only_pair_is_prefilled_by_decode_itself() -> None:
    async with fake_cluster() as cluster:
        _, worker = await cluster.add_pair()
        client = cluster.ask(choice())
        (await worker.next_open()).fail(TransferError("the copy broke"))
        second = await worker.next_open()
        assert not second.message.HasField("handoff")
        second.tokens(0, 50)
        second.close(STOP)
        await client.end()


async def test_token_that_waited_for_a_missing_one_is_forgotten_with_its_attempt() -> None:
    async with fake_cluster() as cluster:
        worker = await cluster.add("decode-0", "decode")
        client = cluster.ask(choice())
        first = await worker.next_open()
        first.tokens(1, 99)
        first.fail(TransferError("a gap"))
        second = await worker.next_open()
        assert list(second.message.emitted_token_ids) == []
        second.tokens(0, 50, 51)
        second.close(STOP)
        await client.end()
        assert client.token_ids == [50, 51]


async def test_after_each_pause_every_worker_that_had_refused_is_asked_once() -> None:
    asked: list[str] = []

    async def refuse(stream: FakeStream) -> None:
        asked.append(stream.worker.worker_id)
        stream.fail(ReservationError("no room"))

    async with fake_cluster() as cluster:
        for number in range(3):
            await cluster.add(f"decode-{number}", "decode", refuse)
        client = cluster.ask(choice())
        await wait_until(lambda: len(asked) >= 12)
        await client.leave()
        rounds = [set(asked[at : at + 3]) for at in range(0, 12, 3)]
        assert all(len(workers) == 3 for workers in rounds)


@pytest.mark.parametrize("refusal", [ReservationError("no room"), OverloadedError("queue full")])
async def test_refusal_pairs_anew_with_another_worker_in_the_same_attempt(
    refusal: BatonError,
) -> None:
    async with fake_cluster(gateway={"max_attempts": 1}) as cluster:
        workers = [await cluster.add(f"decode-{i}", "decode") for i in range(2)]
        client = cluster.ask(choice())
        await wait_until(lambda: any(worker.streams for worker in workers))
        full, other = sorted(workers, key=lambda worker: not worker.streams)
        (await full.next_open()).fail(refusal)
        second = await other.next_open()
        assert second.message.attempt == 0
        second.tokens(0, 50)
        second.close(STOP)
        await client.end()


async def test_refusal_of_the_only_worker_is_tried_again_until_there_is_room() -> None:
    async with fake_cluster(gateway={"max_attempts": 1}) as cluster:
        worker = await cluster.add("decode-0", "decode")
        client = cluster.ask(choice())
        for _ in range(3):
            (await worker.next_open()).fail(ReservationError("no room"))
        last = await worker.next_open()
        last.tokens(0, 50)
        last.close(STOP)
        assert (await client.end()).finish_reason == "stop"


async def test_failed_decode_worker_is_used_again_when_it_is_the_only_one() -> None:
    async with fake_cluster() as cluster:
        worker = await cluster.add("decode-0", "decode")
        client = cluster.ask(choice())
        (await worker.next_open()).reserve()
        worker.end_session()
        second = await worker.next_open()
        assert second.message.attempt == 1
        second.tokens(0, 50)
        second.close(STOP)
        await client.end()


@pytest.mark.parametrize("error", [InvalidRequestError("bad"), InternalError("a bug")])
async def test_failure_that_no_other_attempt_cures_is_raised_as_it_is(error: BatonError) -> None:
    async with fake_cluster() as cluster:
        prefill, decode = await cluster.add_pair()
        client = cluster.ask(choice())
        await prefill.next_open()
        (await decode.next_open()).fail(error)
        with pytest.raises(type(error), match=error.message):
            await client.end()
        await wait_until(lambda: prefill.num_received("cancel") == 1)
        assert decode.num_received("cancel") == 0


async def test_last_error_is_raised_when_attempts_are_used_up() -> None:
    async with fake_cluster(gateway={"max_attempts": 2}) as cluster:
        worker = await cluster.add("decode-0", "decode")
        client = cluster.ask(choice())
        (await worker.next_open()).fail(TransferError("the first"))
        (await worker.next_open()).fail(TransferError("the second"))
        with pytest.raises(TransferError, match=r"the second \(attempt 2 of 2; .* sent again\)"):
            await client.end()
        assert worker.num_received("open") == 2


async def test_workers_that_die_together_use_up_no_attempts() -> None:
    """Only the first was heard of; the others were gone before they could answer."""
    async with fake_cluster(gateway={"max_attempts": 2}) as cluster:
        workers = {f"decode-{i}": await cluster.add(f"decode-{i}", "decode") for i in range(3)}
        client = cluster.ask(choice())
        for number in range(3):
            await wait_until(lambda: any(worker.streams for worker in workers.values()))
            name = next(name for name, worker in workers.items() if worker.streams)
            dying = workers.pop(name)
            stream = await dying.next_open()
            assert stream.message.attempt == min(number, 1)
            if number == 0:
                stream.tokens(0, 50)
                await wait_until(lambda: client.token_ids == [50])
            await dying.stop()
        late = await cluster.add("decode-9", "decode")
        last = await late.next_open()
        last.tokens(1, 51)
        last.close(STOP)
        assert (await client.end()).finish_reason == "stop"


def _asked_since(counts: dict[FakeWorker, int]) -> list[FakeWorker]:
    """To proceed."""
    return [worker for worker, had in counts.items() if worker.num_received("proceed") > had]


async def test_prefill_workers_that_died_with_decode_use_up_no_attempts() -> None:
    """The decode worker that is left has room each time; prefill was gone before it was asked."""
    async with fake_cluster(gateway={"max_attempts": 2}) as cluster:
        prefills = [await cluster.add(f"prefill-{i}", "prefill") for i in range(3)]
        first = await cluster.add("decode-0", "decode")
        client = cluster.ask(choice())
        stream = await first.next_open()
        stream.reserve()
        stream.tokens(0, 50)
        await wait_until(lambda: client.token_ids == [50])
        last = await cluster.add("decode-1", "decode")
        await first.stop()
        for _ in range(2):
            again = await last.next_open()
            before = {each: each.num_received("proceed") for each in prefills}
            again.reserve()
            await wait_until(partial(_asked_since, before))
            (dying,) = _asked_since(before)
            prefills.remove(dying)
            await dying.stop()
        again = await last.next_open()
        again.tokens(1, 51)
        again.close(STOP)
        assert (await client.end()).finish_reason == "stop"


async def test_a_request_that_kills_who_takes_it_ends() -> None:
    async with fake_cluster(gateway={"max_attempts": 2}) as cluster:
        worker = await cluster.add("decode-0", "decode")
        client = cluster.ask(choice())
        for _ in range(4):
            await worker.next_open()
            worker.end_session()
        with pytest.raises(WorkerLostError, match="attempt 2 of 2"):
            await client.end()
        assert worker.num_received("open") == 4


async def test_stream_that_a_worker_gives_up_unasked_is_attempted_again() -> None:
    async with fake_cluster() as cluster:
        worker = await cluster.add("decode-0", "decode")
        client = cluster.ask(choice())
        (await worker.next_open()).close(pb.CLOSE_REASON_CANCELLED)
        second = await worker.next_open()
        second.tokens(0, 50)
        second.close(STOP)
        await client.end()


@pytest.mark.parametrize(
    ("max_tokens", "stop", "reason"),
    [(2, frozenset[int](), "length"), (9, frozenset({51}), "stop")],
)
async def test_worker_lost_right_after_the_last_token_does_not_start_another_attempt(
    max_tokens: int, stop: frozenset[int], reason: str
) -> None:
    async with fake_cluster() as cluster:
        worker = await cluster.add("decode-0", "decode")
        client = cluster.ask(choice(max_tokens=max_tokens, stop=stop))
        stream = await worker.next_open()
        stream.tokens(0, 50, 51)
        await wait_until(lambda: client.token_ids == [50, 51])
        worker.end_session()
        assert (await client.end()).finish_reason == reason
        assert worker.num_received("open") == 1


async def test_choice_waits_for_a_decode_worker_to_come() -> None:
    async with fake_cluster() as cluster:
        client = cluster.ask(choice())
        await cluster.add("decode-0", "decode", cluster.scripts.decode)
        await client.end()


async def test_choice_without_any_decode_worker_is_refused_after_a_bound() -> None:
    async with fake_cluster(session={"silence_s": 0.2}) as cluster:
        await cluster.add("prefill-0", "prefill")
        with pytest.raises(UnavailableError, match="no decode worker"):
            await cluster.ask(choice()).end()


async def test_replaced_worker_gets_nothing_new_while_its_streams_go_on() -> None:
    async with fake_cluster(session={"silence_s": 0.3}) as cluster:
        worker = await cluster.add("decode-0", "decode")
        running = cluster.ask(choice())
        stream = await worker.next_open()
        cluster.replace(worker)
        with pytest.raises(UnavailableError):
            await cluster.ask(choice()).end()
        stream.tokens(0, 50)
        stream.close(STOP)
        await running.end()
        assert worker.num_received("open") == 1


async def test_workers_of_different_digests_never_pair() -> None:
    async with fake_cluster() as cluster:
        worker = await cluster.add("decode-0", "decode")
        await cluster.add("prefill-0", "prefill", digest=b"\x02" * 16)
        client = cluster.ask(choice())
        stream = await worker.next_open()
        assert not stream.message.HasField("handoff")
        await client.leave()


async def test_lost_worker_is_named_when_nothing_is_left_to_try() -> None:
    async with fake_cluster(gateway={"max_attempts": 1}) as cluster:
        worker = await cluster.add("decode-0", "decode")
        client = cluster.ask(choice())
        (await worker.next_open()).tokens(0, 50)
        await wait_until(lambda: client.token_ids == [50])
        await worker.stop()
        with pytest.raises(WorkerLostError, match="decode-0 was lost"):
            await client.end()
