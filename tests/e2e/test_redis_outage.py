"""Redis goes away under load, and comes back empty: nothing is lost, and one can see it."""

from __future__ import annotations

import os
import signal

import pytest
from e2e.conftest import Serving
from support.server import BatonServer, wait_until
from support.streams import streaming

NUM_TOKENS = 100
PROMPTS = [f"Once upon a time, in the year {1900 + number}," for number in range(8)]


@pytest.fixture(scope="module")
def server(serving: Serving) -> BatonServer:
    return serving(
        arguments=("--prefill", "1", "--decode", "2"),
        settings={"engine": {"dtype": "float32", "kv_cache_bytes": 134_217_728}},
    )


def epochs(server: BatonServer) -> dict[str, str]:
    return {w["worker_id"]: w["epoch"] for w in server.status()["workers"] if w["ready"]}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_redis_that_hangs_dies_and_comes_back_empty_costs_no_stream_and_no_worker(
    server: BatonServer,
) -> None:
    with streaming(server, PROMPTS, max_tokens=NUM_TOKENS) as streams:
        expected = streams.results()
    before = epochs(server)
    assert server.status()["degraded"] == []
    with streaming(server, PROMPTS, max_tokens=NUM_TOKENS) as streams:
        streams.wait_all_flow(2)
        redis = server.worker_pid("redis")
        os.kill(redis, signal.SIGSTOP)
        wait_until(
            lambda: any("Redis" in sentence for sentence in server.status()["degraded"]),
            timeout_s=20,
            what="a degraded status",
        )
        wait_until(  # it has several users, each with a patience of its own
            lambda: server.metric("baton_registry_up") == 0, timeout_s=20, what="a registry down"
        )
        asked_meanwhile = server.complete(prompt=PROMPTS[0], max_tokens=8, ignore_eos=True)
        os.kill(redis, signal.SIGKILL)
        assert streams.results() == expected
    assert asked_meanwhile["choices"][0]["token_ids"] == expected[0][:8]
    wait_until(
        lambda: server.status()["degraded"] == [], timeout_s=20, what="a status that is whole again"
    )
    assert server.worker_pid("redis") != redis
    with streaming(server, PROMPTS, max_tokens=NUM_TOKENS) as streams:
        assert streams.results() == expected
    assert epochs(server) == before, "a worker was replaced"
    server.wait_at_rest()
