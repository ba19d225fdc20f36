"""The whole way from a worker's events to the worker that a choice goes to."""

from __future__ import annotations

import pytest

from baton.v1 import session_pb2 as pb
from tests.support.fake_cluster import NAMES, choice, fake_cluster, wait_until
from tests.support.fake_worker import KV_DTYPE, FakeWorker

PROMPT = tuple(range(100))
SIZE = 16


def prompt_hashes(salt: str = "salt") -> list[bytes]:
    domain = NAMES.domain(KV_DTYPE)
    return domain.chain(domain.root(cache_salt=salt), PROMPT, SIZE)


def tell(worker: FakeWorker, hashes: list[bytes]) -> None:
    events = pb.CacheEvents(sequence=1, snapshot=True, added=b"".join(hashes))
    worker.send(pb.WorkerMessage(cache_events=events))


@pytest.mark.parametrize("number", range(3))
async def test_a_choice_goes_to_the_workers_that_say_they_hold_it(number: int) -> None:
    async with fake_cluster(routing={"policy": "kv_aware"}) as cluster:
        prefill = [
            await cluster.add(f"prefill-{n}", "prefill", cluster.scripts.prefill) for n in range(3)
        ]
        decode = [
            await cluster.add(f"decode-{n}", "decode", cluster.scripts.decode) for n in range(3)
        ]
        chosen = [prefill[number], decode[(number + 1) % 3]]
        for worker in chosen:
            tell(worker, prompt_hashes())
        others = [worker for worker in (*prefill, *decode) if worker not in chosen]
        for worker in others:
            tell(worker, prompt_hashes("another tenant's salt"))
        await wait_until(
            lambda: all(cluster.index.num_indexed_blocks(w.epoch) == 6 for w in cluster.workers)
        )
        await cluster.ask(choice(*PROMPT)).end()
        assert [len(worker.streams) for worker in chosen] == [1, 1]
        assert [len(worker.streams) for worker in others] == [0] * 4


async def test_a_dead_worker_is_forgotten_and_the_choice_goes_on_elsewhere() -> None:
    async with fake_cluster(routing={"policy": "kv_aware"}) as cluster:
        dying = await cluster.add("decode-0", "decode")
        tell(dying, prompt_hashes())
        await wait_until(lambda: cluster.index.num_indexed_blocks(dying.epoch) == 6)
        other = await cluster.add("decode-1", "decode", cluster.scripts.decode)
        client = cluster.ask(choice(*PROMPT))
        stream = await dying.next_open()
        stream.tokens(0, 5)
        await wait_until(lambda: client.token_ids == [5])
        await dying.stop()
        await wait_until(lambda: len(other.streams) == 1)
        assert cluster.index.num_held_blocks(dying.epoch, prompt_hashes()) == 0
        (again,) = other.streams.values()
        assert list(again.message.emitted_token_ids) == [5]
        await client.end()
