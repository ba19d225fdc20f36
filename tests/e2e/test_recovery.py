"""Kill or stop a worker under sixteen streams: every one of them ends with exactly its text.

Run with ``-s`` to see the longest gaps and how soon the pools were whole again.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable

import pytest
from e2e.conftest import Serving
from support.server import BatonServer, wait_until
from support.streams import streaming

NUM_STREAMS = 16
NUM_TOKENS = 60
PROMPTS = [
    f"{number}. "
    + " ".join(f"Item {number * 31 + i} costs {i * 7 + number} euros." for i in range(12))
    for number in range(NUM_STREAMS)
]
SETTINGS = {"engine": {"dtype": "float32", "kv_cache_bytes": 268_435_456}}


@pytest.fixture(scope="module", params=["processes", "ray"])
def server(request: pytest.FixtureRequest, serving: Serving) -> BatonServer:
    return serving(
        backend=request.param, arguments=("--prefill", "2", "--decode", "2"), settings=SETTINGS
    )


@pytest.fixture(scope="module")
def expected(server: BatonServer) -> list[list[int]]:
    """Each answer when nothing dies."""
    with streaming(server, PROMPTS, max_tokens=NUM_TOKENS) as streams:
        return streams.results()


def pools(server: BatonServer) -> dict[str, str]:
    return {w["worker_id"]: w["epoch"] for w in server.status()["workers"] if w["ready"]}


def hit(server: BatonServer, victim: str, number: signal.Signals) -> Callable[[], float]:
    """Signals the worker; the function waits for its replacement and says how long it took."""
    before = pools(server)
    os.kill(server.worker_pid(victim), number)
    began = time.monotonic()

    def whole_again() -> bool:
        now = pools(server)
        return now.keys() == before.keys() and now[victim] != before[victim]

    def wait() -> float:
        wait_until(whole_again, timeout_s=60, what=f"another {victim}")
        return time.monotonic() - began

    return wait


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("victim", ["decode-1", "prefill-0"])
def test_streams_outlive_a_killed_worker(
    server: BatonServer, expected: list[list[int]], victim: str
) -> None:
    if victim.startswith("prefill"):  # slowed down, so that it is hit in its work
        server.inject(prefill__chunk={"action": "delay", "seconds": 1.0})
    with streaming(server, PROMPTS, max_tokens=NUM_TOKENS, cache_salt=victim) as streams:
        if victim.startswith("decode"):
            streams.wait_all_flow(5)
        else:
            wait_until(
                lambda: (
                    server.metric("baton_sequences_waiting", worker=victim) > 0
                    or server.metric("baton_sequences_running", worker=victim) > 0
                    or streams.all_ended
                ),
                timeout_s=30,
                what=f"work on {victim}",
            )
        assert not streams.all_ended, "too late to be a test"
        wait_healed = hit(server, victim, signal.SIGKILL)
        server.inject()
        assert streams.results() == expected
    gap_s, healed_s = streams.longest_gap_s, wait_healed()
    server.wait_at_rest()
    print(f"\n{victim} killed: longest gap {gap_s:.2f} s, whole again after {healed_s:.1f} s")


def stop_for(server: BatonServer, expected: list[list[int]], victim: str, stopped_s: float) -> None:
    """Stops the worker under load; streams, pools and a later load must not suffer."""
    process = os.pidfd_open(server.worker_pid(victim))
    try:
        with streaming(server, PROMPTS, max_tokens=NUM_TOKENS) as streams:
            streams.wait_all_flow(5)
            assert not streams.all_ended, "too late to be a test"
            wait_healed = hit(server, victim, signal.SIGSTOP)
            wakes_at = time.monotonic() + stopped_s
            while not streams.all_ended and time.monotonic() < wakes_at:
                time.sleep(0.05)
            if not streams.all_ended:
                wake(process)
            assert streams.results() == expected
        time.sleep(max(0.0, wakes_at - time.monotonic()))
        wake(process)
    finally:
        os.close(process)
    healed_s = wait_healed()
    server.wait_at_rest()
    with streaming(server, PROMPTS, max_tokens=NUM_TOKENS) as again:
        assert again.results() == expected
    server.wait_at_rest()
    print(
        f"\n{victim} stopped for {stopped_s:g} s: longest gap {streams.longest_gap_s:.2f} s, "
        f"whole again after {healed_s:.1f} s"
    )


def wake(process: int) -> None:
    """Of a process that was killed meanwhile there is nobody to wake."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(process, signal.SIGCONT)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_streams_outlive_a_worker_that_is_stopped_until_it_is_fenced(
    server: BatonServer, expected: list[list[int]]
) -> None:
    stop_for(server, expected, "decode-0", 20.0)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("server", ["processes"], indirect=True)
def test_worker_that_wakes_after_its_lease_changes_nothing(
    server: BatonServer, expected: list[list[int]]
) -> None:
    stop_for(server, expected, "decode-1", 7.0)
