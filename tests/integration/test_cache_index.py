"""From a pool's blocks to a gateway's index: at rest they agree, hash for hash."""

from __future__ import annotations

import random

import pytest

from baton.v1 import session_pb2 as pb
from baton.worker import cache_feed
from baton.worker.cache_feed import CacheFeed
from engine.kv_cache.block_pool import BlockPool
from router.routing.kv_index import KvIndex

EPOCH = b"e" * 16
NUM_BLOCKS = 12
ALL = [bytes([number]) * 16 for number in range(30)]


def step(pool: BlockPool, held: list[list[int]], rng: random.Random) -> None:
    """What an engine step does to a pool: takes, publishes, gives back, quarantines."""
    blocks = pool.allocate(rng.randint(1, 4))
    if blocks is not None:
        for block_id, block_hash in zip(blocks, rng.sample(ALL, len(blocks)), strict=True):
            pool.publish(block_id, block_hash)
        held.append(blocks)
    if held and (blocks is None or rng.random() < 0.4):
        given_back = held.pop(rng.randrange(len(held)))
        if rng.random() < 0.2:
            pool.quarantine(given_back)
            pool.end_quarantine(given_back)
        else:
            pool.release(given_back)


@pytest.mark.parametrize("max_hashes", [1, 3, 1000])
@pytest.mark.parametrize("seed", range(10))
def test_index_equals_the_pool_at_rest(
    seed: int, max_hashes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_feed, "MAX_HASHES", max_hashes)
    rng = random.Random(seed)
    pool, held = BlockPool(NUM_BLOCKS), list[list[int]]()
    pool.watch()
    index = KvIndex(lambda: 0.0)

    def post(_: int, message: pb.WorkerMessage) -> None:
        received = pb.WorkerMessage.FromString(message.SerializeToString())
        assert not index.take(EPOCH, received.cache_events), "the index lost track"

    feed = CacheFeed(post)
    for number in range(60):
        if number % 20 == 5:  # a new Session with the gateway
            index.forget(EPOCH)
            feed.leave(1)
            index.join(EPOCH, num_blocks=NUM_BLOCKS)
            feed.join(1)
        step(pool, held, rng)
        if rng.random() < 0.7:
            feed.change(pool.take_changes())
        if number > 5 and rng.random() < 0.3:
            feed.change(pool.take_changes())
            told = {name for name in ALL if index.num_held_blocks(EPOCH, [name])}
            assert told == pool.published()
            assert index.num_indexed_blocks(EPOCH) == len(told)
