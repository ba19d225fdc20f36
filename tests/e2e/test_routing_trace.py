"""A trace of chats, shortened, through real servers: routing saves work and alters no answer."""

from __future__ import annotations

import asyncio

import pytest
from e2e.conftest import Serving

from benchmarks.routing import oracle, trace
from benchmarks.routing.run import Run, run_trace
from benchmarks.routing.sizing import BLOCK_SIZE, kv_cache_bytes

SECRET = "a-secret-that-the-test-and-its-servers-share"
NUM_USERS, NUM_TURNS = 5, 4
NUM_BLOCKS = 72
"""Of each worker: room for its half of the conversations, not for all of them."""


def replayed(serving: Serving, policy: str) -> Run:
    server = serving(
        arguments=("--prefill", "2", "--decode", "2"),
        settings={
            "engine": {"dtype": "float32", "kv_cache_bytes": kv_cache_bytes(NUM_BLOCKS)},
            "routing": {"policy": policy},
        },
        environment={"BATON_SECRET": SECRET},
    )
    chats = trace.load(trace.DEFAULT_TRACE)
    chats = trace.shortened(chats, num_users=NUM_USERS, num_turns=NUM_TURNS)
    return asyncio.run(run_trace(server.url, chats, secret=SECRET, time_scale=0.05))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_kv_aware_routing_computes_less_and_answers_the_same(serving: Serving) -> None:
    aware, turns = replayed(serving, "kv_aware"), replayed(serving, "round_robin")

    assert len(aware.answers) == NUM_USERS * NUM_TURNS
    assert aware.answers == turns.answers
    for run in (aware, turns):
        for worker_id, blocks in run.blocks.items():
            assert blocks.followed == blocks.snapshot, worker_id
            assert blocks.num_indexed == blocks.num_cached == len(blocks.snapshot), worker_id
        # A late account of a prefill worker counts as nothing cached; never is there more.
        assert 0.8 * run.num_not_computed < run.num_cached <= run.num_not_computed
        assert sum(len(blocks.snapshot) for blocks in run.blocks.values()) > NUM_BLOCKS

    best = oracle.infinite_cache([each.asked for each in aware.answered], BLOCK_SIZE)
    assert turns.num_cached < aware.num_cached <= best
    assert aware.num_cached >= 1.15 * turns.num_cached
    assert aware.num_cached >= 0.8 * best
