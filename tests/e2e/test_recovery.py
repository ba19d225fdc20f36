"""Kill or stop a worker under sixteen streams: every one of them ends with exactly its text.

How soon a stream goes on depends on the machine's speed; what is asserted is how soon the
gateway opened it elsewhere, with a margin for how long the machine kept this process from
running, and that no gap was much longer than first tokens had taken. Run with ``-s`` to see
the longest gaps and how soon the pools were whole again.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable

import pytest
from e2e.conftest import Serving
from support.server import BatonServer, wait_until
from support.streams import Streams, streaming

NUM_STREAMS = 16
NUM_TOKENS = 60
PROMPTS = [
    f"{number}. "
    + " ".join(f"Item {number * 31 + i} costs {i * 7 + number} euros." for i in range(22))
    for number in range(NUM_STREAMS)
]
TIGHT = "too little room on one worker"
KV_BYTES = {TIGHT: 2**27, "processes": 2**29, "ray": 2**29}
GAP_S = 3.0
"""On a machine that is fast enough."""
REOPEN_S = 3.0
"""From a worker's loss until its streams have been opened elsewhere."""
SILENCE_S = 5.0
"""``session.silence_s``: after that a worker that is stopped counts as lost."""


class Stalls:
    """How long the machine keeps a thread from running that wants little."""

    PERIOD_S = 0.01

    def __init__(self) -> None:
        self.longest_s = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._measure, daemon=True)

    def _measure(self) -> None:
        before = time.monotonic()
        while not self._ended.wait(self.PERIOD_S):
            now = time.monotonic()
            self.longest_s = max(self.longest_s, now - before - self.PERIOD_S)
            before = now

    def __enter__(self) -> Stalls:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


def assert_opened_elsewhere(
    streams: Streams, victim: str, lost_at: float, stalls: Stalls, *, within_s: float
) -> None:
    """Every attempt that ended by the victim's loss was followed by another one in time."""
    losses = ("worker_lost", "transfer_failed")
    took_s = [
        stream.asked_at + after["opened"] / 1000 - lost_at
        for stream in streams.each
        for before, after in itertools.pairwise(stream.attempts)
        if victim in (before["prefill"], before["decode"]) and before["error"] in losses
    ]
    assert took_s, f"{victim} had nothing to do"
    # The gateway's event loop, Session and client each wait for a processor.
    assert max(took_s) < within_s + 10 * stalls.longest_s, f"longest stall {stalls.longest_s} s"


@pytest.fixture(scope="module", params=["processes", "ray"])
def server(request: pytest.FixtureRequest, serving: Serving) -> BatonServer:
    """A decode worker alone has room for all streams, unless it is ``TIGHT``."""
    return serving(
        backend="ray" if request.param == "ray" else "processes",
        arguments=("--prefill", "2", "--decode", "2"),
        settings={"engine": {"dtype": "float32", "kv_cache_bytes": KV_BYTES[request.param]}},
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


MORE_ON_RAY = ["processes", pytest.param("ray", marks=pytest.mark.exhaustive)]
"""In the order of the fixture's: those that share a server come one after the other. That a worker
of Ray's dies under streams is in ``test_ranks.py`` too."""


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("server", MORE_ON_RAY, indirect=True)
def test_streams_outlive_a_killed_decode_worker(
    server: BatonServer, expected: list[list[int]]
) -> None:
    kill(server, expected, "decode-1")


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("server", MORE_ON_RAY, indirect=True)
def test_streams_outlive_a_killed_prefill_worker(
    server: BatonServer, expected: list[list[int]]
) -> None:
    kill(server, expected, "prefill-0")


def kill(server: BatonServer, expected: list[list[int]], victim: str) -> None:
    """Kills the worker under load."""
    if victim.startswith("prefill"):  # slowed down, so that it is hit in its work
        server.inject(prefill__chunk={"action": "delay", "seconds": 1.0})
    with (
        Stalls() as stalls,
        streaming(server, PROMPTS, max_tokens=NUM_TOKENS, cache_salt=victim) as streams,
    ):
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
        lost_at = time.monotonic()
        wait_healed = hit(server, victim, signal.SIGKILL)
        server.inject()
        assert streams.results() == expected
    assert_opened_elsewhere(streams, victim, lost_at, stalls, within_s=REOPEN_S)
    gap_s, first_s, healed_s = streams.longest_gap_s, streams.longest_ttft_s, wait_healed()
    print(
        f"\n{victim} killed: longest gap {gap_s:.2f} s (first tokens within {first_s:.2f} s), "
        f"whole again after {healed_s:.1f} s"
    )
    # Half of the prompts are computed again, beside what else the machine has to do.
    assert gap_s < max(GAP_S, 1.5 * first_s)
    server.wait_at_rest()


def stop_for(server: BatonServer, expected: list[list[int]], victim: str, stopped_s: float) -> None:
    """Stops the worker under load; streams, pools and a later load must not suffer."""
    process = os.pidfd_open(server.worker_pid(victim))
    try:
        with (
            Stalls() as stalls,
            streaming(server, PROMPTS, max_tokens=NUM_TOKENS) as streams,
        ):
            streams.wait_all_flow(5)
            assert not streams.all_ended, "too late to be a test"
            stopped_at = time.monotonic()
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
    assert_opened_elsewhere(streams, victim, stopped_at, stalls, within_s=SILENCE_S + REOPEN_S)
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
@pytest.mark.parametrize("server", MORE_ON_RAY, indirect=True)
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


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("server", [TIGHT], indirect=True)
def test_streams_without_room_go_on_at_the_replacement_as_soon_as_it_is_there(
    server: BatonServer, expected: list[list[int]]
) -> None:
    """What runs on the other worker is slowed down, and would keep its room for a minute."""
    survivor, victim = "decode-1", "decode-0"
    with streaming(server, PROMPTS, max_tokens=NUM_TOKENS) as streams:
        streams.wait_all_flow(5)
        server.inject(decode__step={"action": "delay", "seconds": 1.0})
        try:
            wait_healed = hit(server, victim, signal.SIGKILL)
            wait_until(
                lambda: server.metric("baton_sequences_waiting", worker=survivor) > 0,
                timeout_s=15,
                what=f"streams without room on {survivor}",
            )
            wait_healed()
            wait_until(
                lambda: server.metric("baton_sequences_running", worker=victim) > 0,
                timeout_s=10,
                what=f"streams on the replacement of {victim}",
            )
        finally:
            server.inject()
        assert streams.results() == expected
    attempts = [attempt for stream in streams.each for attempt in stream.attempts]
    assert any(a["cause"] == "room_elsewhere" and a["decode"] == victim for a in attempts)
    server.wait_at_rest()
