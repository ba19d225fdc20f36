"""Pools grow and shrink under load: no error, no cut stream, and the new workers get work."""

from __future__ import annotations

import subprocess
import sys

import pytest
from e2e.conftest import Serving
from support.server import BatonServer, wait_until
from support.streams import streaming

NUM_TOKENS = 120
PROMPTS = [f"In the year {1900 + number}, there was" for number in range(6)]


@pytest.fixture(scope="module", params=["processes", "ray"])
def server(request: pytest.FixtureRequest, serving: Serving) -> BatonServer:
    return serving(
        backend=request.param,
        settings={
            "engine": {"dtype": "float32", "kv_cache_bytes": 134_217_728},
            "worker": {"drain_s": 1.0},
        },
    )


@pytest.fixture(scope="module")
def expected(server: BatonServer) -> list[list[int]]:
    with streaming(server, PROMPTS, max_tokens=NUM_TOKENS) as streams:
        return streams.results()


def scale(server: BatonServer, *wishes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cluster.cli", "scale", *wishes],
        env=server.environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def ready(server: BatonServer, role: str) -> set[str]:
    workers = server.status()["workers"]
    return {w["worker_id"] for w in workers if w["role"] == role and w["ready"]}


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_pool_grows_and_shrinks_under_load_and_no_stream_notices(
    server: BatonServer, expected: list[list[int]]
) -> None:
    untouched = {w["worker_id"]: w["epoch"] for w in server.status()["workers"]}
    with streaming(server, PROMPTS, max_tokens=NUM_TOKENS) as streams:
        streams.wait_all_flow(2)
        grown = scale(server, "decode=3")
        assert grown.returncode == 0, grown.stderr
        three = {"decode-0", "decode-1", "decode-2"}
        wait_until(lambda: ready(server, "decode") == three, timeout_s=10, what="Sessions with all")
        assert streams.results() == expected
    with streaming(server, PROMPTS, max_tokens=NUM_TOKENS) as streams:
        streams.wait_all_flow(2)
        for worker in ("decode-1", "decode-2"):
            wait_until(
                lambda w=worker: server.metric("baton_output_tokens_total", worker=w) > 0,
                timeout_s=10,
                what=f"tokens of {worker}",
            )
        shrunk = scale(server, "decode=1")
        assert shrunk.returncode == 0, shrunk.stderr
        assert streams.results() == expected
    wait_until(lambda: ready(server, "decode") == {"decode-0"}, timeout_s=20, what="one decode")
    assert server.metric("baton_attempts_total", cause="draining") > 0, "nothing had to be moved"
    assert {w["worker_id"]: w["epoch"] for w in server.status()["workers"]} == untouched
    server.wait_at_rest()


@pytest.mark.parametrize("server", ["processes"], indirect=True)
@pytest.mark.slow
@pytest.mark.timeout(200)
def test_prefill_pool_goes_to_nothing_and_comes_back(
    server: BatonServer, expected: list[list[int]]
) -> None:
    for wish, workers in (("prefill=0", set()), ("prefill=1", {"prefill-0"})):
        changed = scale(server, wish)
        assert changed.returncode == 0, changed.stderr
        wait_until(lambda w=workers: ready(server, "prefill") == w, timeout_s=20, what=wish)
        wait_until(lambda: server.status()["degraded"] == [], timeout_s=10, what="a good status")
        with streaming(server, PROMPTS[:4], max_tokens=NUM_TOKENS, cache_salt=wish) as streams:
            assert streams.results() == expected[:4]
    server.wait_at_rest()


@pytest.mark.parametrize("server", ["processes"], indirect=True)
@pytest.mark.slow
@pytest.mark.parametrize("wish", ["decode=0", "decode=65", "decode=x", "decode", "no-such-pool=1"])
def test_wish_that_cannot_be_is_refused_in_a_sentence(server: BatonServer, wish: str) -> None:
    before = server.status()["workers"]
    refused = scale(server, wish)
    assert refused.returncode in (1, 2)
    assert wish.partition("=")[0] in refused.stderr
    assert "Traceback" not in refused.stderr
    assert [w["epoch"] for w in server.status()["workers"]] == [w["epoch"] for w in before]
