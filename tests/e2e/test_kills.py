"""Kill a worker under load: streams go on with exactly their text, and pools are whole again."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from e2e.conftest import Serving
from support.server import BatonServer, wait_until

NUM_STREAMS = 6
NUM_TOKENS = 60


@pytest.fixture(scope="module")
def server(serving: Serving) -> BatonServer:
    return serving(
        arguments=("--prefill", "1", "--decode", "2"),
        settings={"engine": {"dtype": "float32", "kv_cache_bytes": 134_217_728}},
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


@pytest.fixture(scope="module")
def expected(server: BatonServer) -> list[list[int]]:
    """Each answer when nothing dies and nobody else asks."""
    return [ask(server, number) for number in range(NUM_STREAMS)]


def worker_pid(server: BatonServer, worker_id: str) -> int:
    """Of the process whose command line names the worker; Ray has no part in this test."""
    for pid in server.descendants():
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            if worker_id.encode() in file.read().split(b"\0"):
                return pid
    raise AssertionError(f"no process is {worker_id}")


def pools(server: BatonServer) -> dict[str, str]:
    return {w["worker_id"]: w["epoch"] for w in server.status()["workers"] if w["ready"]}


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("victim", ["decode-0", "decode-1", "prefill-0"])
def test_streams_survive_the_kill_of_a_worker_and_the_pool_heals(
    server: BatonServer, expected: list[list[int]], victim: str
) -> None:
    before = pools(server)
    with ThreadPoolExecutor(NUM_STREAMS) as threads:
        answers = [threads.submit(ask, server, number) for number in range(NUM_STREAMS)]
        wait_until(
            lambda: (
                server.metric("baton_sequences_running", worker=victim) > 0
                or server.metric("baton_sequences_waiting", worker=victim) > 0
                or all(answer.done() for answer in answers)
            ),
            timeout_s=30,
            what=f"work on {victim}",
        )
        os.kill(worker_pid(server, victim), signal.SIGKILL)
        assert [answer.result(120) for answer in answers] == expected

    def whole_again() -> bool:
        now = pools(server)
        return now.keys() == before.keys() and now[victim] != before[victim]

    wait_until(whole_again, timeout_s=60, what=f"another {victim}")
    server.wait_at_rest()


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_engine_that_hangs_is_found_and_its_streams_go_on(serving: Serving) -> None:
    server = serving(
        settings={"engine": {"hang_s": 3.0, "dtype": "float32", "kv_cache_bytes": 134_217_728}}
    )
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
