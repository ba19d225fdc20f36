"""An engine that hangs is found, though its process answers, and its stream goes on elsewhere."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from e2e.conftest import Serving
from support.server import BatonServer, wait_until
from support.streams import streaming

NUM_TOKENS = 60
PROMPTS = [f"In the year {1900 + number}, there was" for number in range(4)]


@pytest.fixture(scope="module")
def server(serving: Serving) -> BatonServer:
    return serving(
        arguments=("--decode", "2"),
        settings={
            "engine": {"hang_s": 3.0, "dtype": "float32", "kv_cache_bytes": 134_217_728},
            "worker": {"drain_s": 3600.0},
        },
    )


def ask(server: BatonServer, number: int) -> list[int]:
    answer = server.complete(
        prompt=f"Count upwards from {number * 7}: {number * 7}, {number * 7 + 1},",
        max_tokens=NUM_TOKENS,
        ignore_eos=True,
    )
    choice: dict[str, Any] = answer["choices"][0]
    assert choice["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == NUM_TOKENS
    token_ids: list[int] = choice["token_ids"]
    return token_ids


def scale(server: BatonServer, wish: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "cluster.cli", "scale", wish, "--no-wait"],
        env=server.environment,
        check=True,
        timeout=60,
    )


def pools(server: BatonServer) -> dict[str, str]:
    return {w["worker_id"]: w["epoch"] for w in server.status()["workers"] if w["ready"]}


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_engine_that_hangs_is_found_and_its_streams_go_on(server: BatonServer) -> None:
    expected = ask(server, 1)
    before = pools(server)
    server.inject(prefill__chunk={"action": "delay", "seconds": 60.0})
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(ask, server, 1)
        wait_until(
            lambda: pools(server).get("prefill-0", before["prefill-0"]) != before["prefill-0"],
            timeout_s=60,
            what="another prefill-0",
        )
        server.inject()
        assert answer.result(60) == expected
    server.wait_at_rest()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_engine_that_hangs_while_its_worker_leaves_is_found_too(server: BatonServer) -> None:
    with streaming(server, PROMPTS, max_tokens=NUM_TOKENS) as streams:
        expected = streams.results()
    slowed = {"action": "delay", "seconds": 0.1, "worker": "decode-1"}
    server.inject(decode__step=slowed)
    with streaming(server, PROMPTS, max_tokens=NUM_TOKENS) as streams:
        streams.wait_all_flow(2)
        scale(server, "decode=1")
        server.inject(decode__step={**slowed, "seconds": 3600.0})
        assert streams.results() == expected, "nobody waited for the end of its drain"
    assert any(len(stream.attempts) == 2 for stream in streams.each), "none had to be moved"
    log = server.folder / "state" / "default" / "logs" / "decode-1.log"
    assert "no progress for 3 s" in log.read_text()
    wait_until(lambda: "decode-1" not in pools(server), timeout_s=20, what="decode-1 has left")
    server.inject()
    server.wait_at_rest()
