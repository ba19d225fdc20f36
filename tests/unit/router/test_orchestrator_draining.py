"""What a choice does when a worker that it is on, or was meant for, is leaving."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest

from baton.errors import (
    BatonError,
    DrainingError,
    ReservationError,
    TransferError,
    UnavailableError,
    WorkerLostError,
)
from baton.records import Role
from baton.v1 import session_pb2 as pb
from tests.support.fake_cluster import Client, FakeCluster, choice, fake_cluster, wait_until
from tests.support.fake_worker import FakeStream, FakeWorker, Script

STOP = pb.CLOSE_REASON_STOP
LEAVING = DrainingError("going away")


def num_moves(cluster: FakeCluster) -> float:
    return cluster.sample("baton_attempts_total", cause="draining")


async def chosen(*workers: FakeWorker) -> tuple[FakeWorker, FakeStream]:
    """The worker among these that a stream was opened on, and the stream."""
    await wait_until(lambda: any(worker.streams for worker in workers), "a stream is opened")
    worker = next(worker for worker in workers if worker.streams)
    return worker, await worker.next_open()


async def test_stream_of_a_leaving_worker_goes_on_elsewhere_and_uses_up_no_attempt() -> None:
    async with fake_cluster(gateway={"max_attempts": 1}) as cluster:
        workers = [await cluster.add(f"decode-{i}", "decode") for i in range(2)]
        client = cluster.ask(choice())
        leaving, first = await chosen(*workers)
        first.tokens(0, 50, 51)
        await wait_until(lambda: client.token_ids == [50, 51])
        first.fail(LEAVING)
        other = next(worker for worker in workers if worker is not leaving)
        second = await other.next_open()
        assert list(second.message.emitted_token_ids) == [50, 51]
        second.tokens(2, 52)
        second.close(STOP)
        await client.end()
        assert client.token_ids == [50, 51, 52]
        assert num_moves(cluster) == 1


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_choice_refused_by_a_leaving_worker_is_paired_anew_at_once(role: Role) -> None:
    leaving: list[FakeWorker] = []
    async with fake_cluster(gateway={"max_attempts": 1}) as cluster:
        scripts: dict[Role, Script] = {
            "prefill": cluster.scripts.prefill,
            "decode": cluster.scripts.decode,
        }

        async def leave(stream: FakeStream) -> None:
            """The first of that role to be asked leaves."""
            if stream.worker in leaving or not leaving:
                leaving.append(stream.worker)
                stream.fail(LEAVING)
            else:
                await scripts[role](stream)

        for other, script in scripts.items():
            for number in range(2):
                await cluster.add(f"{other}-{number}", other, leave if other == role else script)
        await cluster.ask(choice()).end()
        assert len(leaving) == 1
        assert num_moves(cluster) == 1


async def test_worker_that_refused_as_leaving_gets_nothing_more_until_a_report_denies_it() -> None:
    async with fake_cluster() as cluster:
        workers = [await cluster.add(f"decode-{i}", "decode") for i in range(2)]
        for worker in workers:
            worker.reporting = False
        client = cluster.ask(choice())
        leaving, first = await chosen(*workers)
        other = next(worker for worker in workers if worker is not leaving)
        first.fail(LEAVING)
        (await other.next_open()).close(pb.CLOSE_REASON_CANCELLED)  # ends up there again
        for _ in range(4):
            cluster.ask(choice())
        await wait_until(lambda: len(other.streams) == 6)
        assert len(leaving.streams) == 1
        leaving.send(pb.WorkerMessage(report=pb.Report(draining=False)))
        await wait_until(lambda: cluster.is_live(leaving))
        await client.leave()
        for stream in list(other.streams.values())[1:]:
            stream.tokens(0, 50)
            stream.close(STOP)


async def test_worker_whose_report_says_leaving_keeps_its_streams_and_gets_no_new_ones() -> None:
    async with fake_cluster(session={"silence_s": 0.3}) as cluster:
        worker = await cluster.add("decode-0", "decode")
        running = cluster.ask(choice())
        stream = await worker.next_open()
        worker.report = pb.Report(draining=True)
        await wait_until(lambda: not cluster.is_live(worker))
        (shown,) = cluster.orchestrator.status().workers
        assert (shown.draining, shown.ready) == (True, False)
        with pytest.raises(UnavailableError):
            await cluster.ask(choice()).end()
        stream.tokens(0, 50)
        stream.close(STOP)
        await running.end()
        assert worker.num_received("open") == 1


async def test_choice_of_the_only_worker_that_leaves_waits_for_its_successor() -> None:
    async with fake_cluster(session={"silence_s": 0.2}, gateway={"max_attempts": 1}) as cluster:
        leaving = await cluster.add("decode-0", "decode")
        client = cluster.ask(choice())
        (await leaving.next_open()).fail(LEAVING)
        await wait_until(lambda: not cluster.is_live(leaving))
        leaving.report = pb.Report(draining=True)
        await asyncio.sleep(0.3)  # longer than a choice waits for a first worker
        assert not client.task.done()
        successor = await cluster.add("decode-1", "decode")
        stream = await successor.next_open()
        stream.tokens(0, 50)
        stream.close(STOP)
        await client.end()
        assert len(leaving.streams) == 1


async def test_choice_is_refused_when_no_successor_comes_in_time() -> None:
    async with fake_cluster(gateway={"recovery_s": 0.2}) as cluster:
        leaving = await cluster.add("decode-0", "decode")
        client = cluster.ask(choice())
        (await leaving.next_open()).fail(LEAVING)
        with pytest.raises(UnavailableError, match="no decode worker"):
            await client.end()
        # A report may say that it stays after all: this choice does not try it again.
        assert len(leaving.streams) == 1


@dataclass(frozen=True)
class Handoff:
    """A choice whose prefill is under way, KV being pulled."""

    client: Client
    prefill: FakeWorker
    decode: FakeWorker
    sending: FakeStream
    receiving: FakeStream


async def handing_over(cluster: FakeCluster) -> Handoff:
    prefill, decode = await cluster.add_pair()
    client = cluster.ask(choice())
    sending, receiving = await prefill.next_open(), await decode.next_open()
    receiving.reserve()
    await sending.held
    return Handoff(client, prefill, decode, sending, receiving)


@pytest.mark.parametrize("prefill_first", [True, False])
@pytest.mark.parametrize("word", [LEAVING, WorkerLostError("gone")])
async def test_handoff_from_a_leaving_prefill_worker_blames_it_and_not_decode(
    prefill_first: bool, word: BatonError
) -> None:
    """Decode passes on what its peer said, in the same words as if it left itself."""
    async with fake_cluster(gateway={"max_attempts": 1}) as cluster:
        handoff = await handing_over(cluster)
        client, prefill, decode = handoff.client, handoff.prefill, handoff.decode
        sending, receiving = handoff.sending, handoff.receiving

        async def prefill_speaks() -> None:
            if word is LEAVING:
                sending.fail(LEAVING)
            else:
                await prefill.stop()

        if word is not LEAVING:
            receiving.fail(LEAVING)
            await prefill_speaks()
        elif prefill_first:
            await prefill_speaks()
            await wait_until(lambda: not cluster.is_live(prefill))
            receiving.fail(LEAVING)
        else:
            receiving.fail(LEAVING)
            await asyncio.sleep(0.02)
            assert cluster.is_live(decode)
            await prefill_speaks()
        again = await decode.next_open()
        assert not again.message.HasField("handoff")
        again.tokens(0, 50)
        again.close(STOP)
        await client.end()
        assert cluster.is_live(decode)
        assert num_moves(cluster) == 1


@pytest.mark.parametrize("known", ["by its report", "by its answer"])
async def test_handoff_to_a_leaving_decode_worker_leaves_prefill_in_use(known: str) -> None:
    """Prefill only hears that the hand-off was abandoned."""
    async with fake_cluster(gateway={"max_attempts": 1}) as cluster:
        handoff = await handing_over(cluster)
        client, prefill, decode = handoff.client, handoff.prefill, handoff.decode
        sending, receiving = handoff.sending, handoff.receiving
        other = await cluster.add("decode-1", "decode")
        if known == "by its report":
            decode.report = pb.Report(draining=True)
            await wait_until(lambda: not cluster.is_live(decode))
        else:
            receiving.fail(LEAVING)
            await asyncio.sleep(0.02)
        sending.fail(TransferError("the hand-off ended: abandoned"))
        again = await other.next_open()
        assert again.message.HasField("handoff")
        assert again.message.handoff.prefill_epoch == prefill.epoch
        again.tokens(0, 50)
        again.close(STOP)
        await client.end()
        assert num_moves(cluster) == 1


async def test_leaving_word_of_decode_alone_blames_decode_after_a_moment() -> None:
    async with fake_cluster(gateway={"max_attempts": 1}) as cluster:
        handoff = await handing_over(cluster)
        other = await cluster.add("decode-1", "decode")
        handoff.receiving.fail(LEAVING)
        again = await other.next_open()
        assert len(handoff.decode.streams) == 1
        again.tokens(0, 50)
        again.close(STOP)
        await handoff.client.end()


async def test_full_worker_that_is_leaving_is_still_a_refusal() -> None:
    async with fake_cluster(gateway={"max_attempts": 1}) as cluster:
        workers = [await cluster.add(f"decode-{i}", "decode") for i in range(2)]
        client = cluster.ask(choice())
        full, stream = await chosen(*workers)
        full.report = pb.Report(draining=True)
        await wait_until(lambda: not cluster.is_live(full))
        stream.fail(ReservationError("full"))
        other = next(worker for worker in workers if worker is not full)
        second = await other.next_open()
        second.tokens(0, 50)
        second.close(STOP)
        await client.end()
        assert num_moves(cluster) == 0


async def test_worker_that_leaves_for_good_before_its_streams_were_told_uses_up_no_attempt() -> (
    None
):
    async with fake_cluster(gateway={"max_attempts": 1}) as cluster:
        workers = [await cluster.add(f"decode-{i}", "decode") for i in range(2)]
        client = cluster.ask(choice())
        leaving, _ = await chosen(*workers)
        leaving.report = pb.Report(draining=True)
        await wait_until(lambda: not cluster.is_live(leaving))
        await leaving.stop()
        other = next(worker for worker in workers if worker is not leaving)
        second = await other.next_open()
        second.tokens(0, 50)
        second.close(STOP)
        await client.end()
        assert num_moves(cluster) == 1
