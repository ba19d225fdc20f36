"""Two gateways before the same workers; one is killed."""

from __future__ import annotations

import os
import signal
import time

import httpx
import pytest
from e2e.conftest import Serving
from support.server import BatonServer, wait_until
from support.streams import streaming

from router.routing.peer_ledger import EXPIRE_S, MAX_TRANSIT_S

NUM_TOKENS = 70
PROMPTS = [f"Chapter {number}. It was a dark night, and" for number in range(4)]


@pytest.fixture(scope="module")
def server(serving: Serving) -> BatonServer:
    return serving(
        arguments=("--prefill", "1", "--decode", "2", "--gateways", "2"),
        settings={"engine": {"dtype": "float32", "kv_cache_bytes": 134_217_728}},
    )


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_killed_gateway_takes_its_own_streams_along_and_nothing_else(server: BatonServer) -> None:
    other = f"http://127.0.0.1:{server.port + 1}"

    def gateways() -> list[str]:
        seen: list[str] = server.status()["gateways"]
        return sorted(seen)

    wait_until(lambda: gateways() == ["gateway-0", "gateway-1"], timeout_s=20, what="both gateways")
    with streaming(server, PROMPTS, max_tokens=NUM_TOKENS) as streams:
        expected = streams.results()
    with streaming(server, PROMPTS, max_tokens=NUM_TOKENS, url=other) as streams:
        assert streams.results() == expected

    victim = server.worker_pid("gateway-1")
    with (
        pytest.raises(httpx.HTTPError),
        streaming(server, PROMPTS, max_tokens=NUM_TOKENS) as kept,
        streaming(server, PROMPTS, max_tokens=NUM_TOKENS, url=other) as lost,
    ):
        kept.wait_all_flow(5)
        lost.wait_all_flow(5)
        # Its last decisions are news to the survivor when it dies.
        with streaming(server, PROMPTS, max_tokens=NUM_TOKENS, url=other, cache_salt="last"):
            wait_until(
                lambda: told_by_others(server) > 0,
                timeout_s=20,
                what="load of gateway-1 in the view of gateway-0",
                poll_s=0.005,
            )
            os.kill(victim, signal.SIGKILL)
            time.sleep(EXPIRE_S + 2 * MAX_TRANSIT_S)
            assert told_by_others(server) == 0
        assert kept.results() == expected
        # Its work is off the workers, and out of the other's view, though it never said so.
        wait_until(
            lambda: (
                sum(w["num_running"] + w["num_waiting"] for w in server.status()["workers"]) == 0
            ),
            timeout_s=20,
            what="no sequence left",
        )
        lost.results()
    wait_until(
        lambda: (
            httpx.get(f"{other}/ready", trust_env=False).status_code == 200
            if gateway_answers(other)
            else False
        ),
        timeout_s=30,
        what="another gateway-1",
    )
    with streaming(server, PROMPTS, max_tokens=NUM_TOKENS, url=other) as streams:
        assert streams.results() == expected
    server.wait_at_rest()


def told_by_others(server: BatonServer) -> int:
    """What the first gateway adds to the workers' own reports, on other gateways' word."""
    kinds = ("num_peer_sequences", "num_peer_tokens", "num_peer_blocks")
    return sum(worker[kind] for worker in server.status()["workers"] for kind in kinds)


def gateway_answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False
