"""Choices among workers that hold different numbers of tokens."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from baton.errors import ContextLengthError, UnavailableError
from tests.support.fake_cluster import FakeCluster, choice, fake_cluster, wait_until
from tests.support.fake_worker import FakeStream, FakeWorker
from tests.support.memory_cluster import Cluster, answer, leave, report, with_cluster
from tests.support.routing import ALL

LONG = (1,) * 300
TOO_LONG = ContextLengthError("it holds 256")


async def refuse(stream: FakeStream) -> None:
    stream.fail(TOO_LONG)


async def add_prefill(cluster: FakeCluster, name: str, max_model_len: int) -> FakeWorker:
    script = cluster.scripts.prefill
    return await cluster.add(name, "prefill", script, max_model_len=max_model_len)


async def add_decode(cluster: FakeCluster, name: str, max_model_len: int) -> FakeWorker:
    script = cluster.scripts.decode
    return await cluster.add(name, "decode", script, max_model_len=max_model_len)


@pytest.mark.parametrize("policy", ALL)
async def test_long_prompts_go_to_the_prefill_workers_that_hold_them(policy: str) -> None:
    async with fake_cluster(routing={"policy": policy}) as cluster:
        short = await add_prefill(cluster, "prefill-0", 256)
        long = await add_prefill(cluster, "prefill-long-0", 2048)
        await add_decode(cluster, "decode-0", 2048)
        for request in range(16):
            await cluster.ask(choice(request, *LONG)).end()
        assert (len(short.streams), len(long.streams)) == (0, 16)
        await asyncio.gather(*(cluster.ask(choice(n, 2, 3)).end() for n in range(16)))
        assert short.streams


@pytest.mark.parametrize(("num_prompt_tokens", "disaggregated"), [(255, True), (256, False)])
async def test_prefill_worker_holds_the_prompt_and_one_token_of_the_answer(
    num_prompt_tokens: int, disaggregated: bool
) -> None:
    """And what none of them holds a decode worker prefills by itself."""
    async with fake_cluster() as cluster:
        await add_prefill(cluster, "prefill-0", 256)
        decode = await add_decode(cluster, "decode-0", 2048)
        await cluster.ask(choice(*(1,) * num_prompt_tokens, max_tokens=400)).end()
        (stream,) = decode.streams.values()
        assert stream.message.HasField("handoff") == disaggregated


@pytest.mark.parametrize("policy", ALL)
@pytest.mark.parametrize("alone", [False, True])
async def test_decode_workers_hold_prompt_and_answer(policy: str, alone: bool) -> None:
    async with fake_cluster(routing={"policy": policy}) as cluster:
        if not alone:
            await add_prefill(cluster, "prefill-0", 2048)
        short = await add_decode(cluster, "decode-0", 8)
        long = await add_decode(cluster, "decode-long-0", 9)
        for request in range(8):
            await cluster.ask(choice(request, 2, 3, max_tokens=6)).end()
        assert (len(short.streams), len(long.streams)) == (0, 8)
        await asyncio.gather(*(cluster.ask(choice(n, 2, 3, max_tokens=5)).end() for n in range(8)))
        assert short.streams


async def test_input_that_has_grown_goes_to_a_prefill_worker_that_holds_it() -> None:
    """A repeated attempt brings tokens along, which count as input."""
    async with fake_cluster(routing={"policy": "round_robin"}) as cluster:
        dying = await cluster.add("decode-0", "decode")
        client = cluster.ask(choice(*(1,) * 253, max_tokens=6))
        first = await dying.next_open()
        first.tokens(0, 50, 51, 52)
        await wait_until(lambda: len(client.token_ids) == 3)
        short = await add_prefill(cluster, "prefill-0", 256)
        long = await add_prefill(cluster, "prefill-long-0", 257)
        await add_decode(cluster, "decode-1", 2048)
        await dying.stop()
        await client.end()
        assert (len(short.streams), len(long.streams)) == (0, 1)


async def test_refusal_for_length_moves_the_choice_and_uses_up_no_attempt() -> None:
    async with fake_cluster(
        gateway={"max_attempts": 1}, routing={"policy": "round_robin"}
    ) as cluster:
        refusing = [
            await cluster.add("prefill-0", "prefill", refuse),
            await cluster.add("decode-0", "decode", refuse),
        ]
        others = [
            await add_prefill(cluster, "prefill-1", 2048),
            await add_decode(cluster, "decode-1", 2048),
        ]
        for request in range(8):
            client = cluster.ask(choice(request, 2, 3))
            await client.end()
            assert len(client.token_ids) == 4
        assert all(worker.streams for worker in refusing)
        assert len(others[1].streams) >= 8
        assert all(s.message.attempt == 0 for w in others for s in w.streams.values())
        assert cluster.sample("baton_attempts_total", cause="context_length_exceeded") >= 1
        for worker in refusing:  # once more at most, where its partner's refusal came first
            asked = Counter(s.message.prompt_token_ids[0] for s in worker.streams.values())
            assert max(asked.values()) <= 2


async def test_decode_prefills_what_every_prefill_worker_refuses() -> None:
    async with fake_cluster(gateway={"max_attempts": 1}) as cluster:
        for number in range(2):
            await cluster.add(f"prefill-{number}", "prefill", refuse)
        decode = await add_decode(cluster, "decode-0", 2048)
        await cluster.ask(choice()).end()
        assert [s.message.HasField("handoff") for s in decode.streams.values()][-1] is False


async def test_refusal_of_the_last_decode_worker_is_final() -> None:
    async with fake_cluster() as cluster:
        workers = [await cluster.add(f"decode-{n}", "decode", refuse) for n in range(2)]
        with pytest.raises(ContextLengthError, match="it holds 256"):
            await cluster.ask(choice()).end()
        assert [len(worker.streams) for worker in workers] == [1, 1]


@with_cluster
async def test_new_choice_that_no_ready_worker_holds_waits_then_gets_the_limit(
    cluster: Cluster,
) -> None:
    for worker in cluster.workers("decode"):
        cluster.hold(worker, 256)
    client = await cluster.ask(*LONG)
    await asyncio.sleep(4.9)
    assert not client.task.done()
    await asyncio.sleep(0.2)
    with pytest.raises(ContextLengthError, match=r"304 tokens; .* hold 256 at most"):
        await client.end()


@with_cluster
async def test_new_choice_takes_the_first_worker_that_holds_it(cluster: Cluster) -> None:
    short, long = cluster.workers("decode")
    for worker in (short, long):
        cluster.hold(worker, 256)
    client = await cluster.ask(*LONG)
    await asyncio.sleep(4.0)
    cluster.hold(long, 304)
    await asyncio.sleep(0.01)
    (message,) = long.opens()
    answer(long, message)
    await client.end()
    assert short.opens() == []


@with_cluster
async def test_choice_whose_long_worker_is_lost_is_unavailable_not_too_long(
    cluster: Cluster,
) -> None:
    short, long = cluster.workers("decode")
    cluster.hold(short, 256)
    client = await cluster.ask(*LONG)
    leave(long, long.opens()[0])
    await asyncio.sleep(59.0)
    assert not client.task.done()
    await asyncio.sleep(2.0)
    with pytest.raises(UnavailableError, match="that holds 304 tokens is ready"):
        await client.end()
    assert short.opens() == []


@with_cluster
async def test_choice_that_waits_for_room_does_not_move_where_it_does_not_fit(
    cluster: Cluster,
) -> None:
    short, full = cluster.workers("decode")
    cluster.hold(short, 256)
    report(short, num_free=90)
    report(full, num_free=0, num_waiting=1)
    client = await cluster.ask(*LONG)
    await asyncio.sleep(20.0)
    assert (len(full.opens()), len(short.opens())) == (1, 0)
    cluster.hold(short, 304)
    await asyncio.sleep(1.0)
    assert len(short.opens()) == 1
    await client.leave()


async def test_prefill_workers_that_hold_less_than_decode_degrade() -> None:
    async with fake_cluster() as cluster:
        await add_prefill(cluster, "prefill-0", 256)
        await add_decode(cluster, "decode-0", 200)
        assert cluster.orchestrator.status().degraded == ()
        await add_decode(cluster, "decode-long-0", 2048)
        status = cluster.orchestrator.status()
        assert status.max_model_len == 2048
        (sentence,) = status.degraded
        assert "a prompt of more than 255 tokens" in sentence
        await add_prefill(cluster, "prefill-long-0", 2048)
        assert cluster.orchestrator.status().degraded == ()
