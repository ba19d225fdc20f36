"""Workers of three ranks each: the real model's answers are those of one process, also when
its KV comes from or goes to workers of one; and a rank that is killed or stopped costs its
worker, nobody's stream.

Run with ``-s`` to see how soon the worker was gone and replaced.
"""

from __future__ import annotations

import functools
import os
import signal
import time
from collections.abc import Callable

import pytest
from e2e.conftest import Oracle, Serving
from support.server import BatonServer, wait_until
from support.streams import streaming
from support.transports import needs_nixl

from cluster.procfs import descendants, name_of

NUM_TOKENS = 24
PROMPTS = [
    f"{number}. " + " ".join(f"Item {i} costs {i * 7 + number} euros." for i in range(6))
    for number in range(3)
]
ENGINE = {"dtype": "float32", "kv_cache_bytes": 134_217_728, "hang_s": 6.0}
RANKS = {"tensor_parallel_size": 3}


def epochs(server: BatonServer) -> dict[str, str]:
    return {w["worker_id"]: w["epoch"] for w in server.status()["workers"] if w["ready"]}


def num_ranks(server: BatonServer) -> dict[str, int]:
    """As the gateway says."""
    return {w["worker_id"]: w["num_ranks"] for w in server.status()["workers"]}


def ranks_of(server: BatonServer, worker_id: str) -> list[int]:
    """Pids of all three, the leader's first."""
    leader = server.worker_pid(worker_id)
    return [leader, *(process.pid for process in descendants(leader))]


def gone(pids: list[int]) -> Callable[[], bool]:
    return lambda: not any(name_of(pid) for pid in pids)


def exact_answers(server: BatonServer, oracle: Oracle) -> list[list[int]]:
    with streaming(server, PROMPTS, max_tokens=NUM_TOKENS) as streams:
        answers = streams.results()
    for text, answer in zip(PROMPTS, answers, strict=True):
        theirs = oracle.greedy(oracle.encode(text), NUM_TOKENS)  # ends with an end of sequence
        assert answer[: len(theirs)] == theirs
    return answers


POOLS: dict[str, dict[str, dict[str, int]]] = {
    "three to one": {"prefill": RANKS, "decode": {}},
    "one to three": {"prefill": {}, "decode": RANKS},
}
EXHAUSTIVE = pytest.mark.exhaustive


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("degrees", "transport"),
    [
        ("three to one", "shared_memory"),
        ("one to three", "gloo"),
        pytest.param("three to one", "gloo", marks=EXHAUSTIVE),
        pytest.param("one to three", "shared_memory", marks=EXHAUSTIVE),
        pytest.param("three to one", "nixl", marks=[EXHAUSTIVE, needs_nixl]),
        pytest.param("one to three", "nixl", marks=[EXHAUSTIVE, needs_nixl]),
    ],
)
def test_handoff_between_three_ranks_and_one_is_exact(
    serving: Serving, oracle: Oracle, degrees: str, transport: str
) -> None:
    server = serving(
        settings={
            "engine": ENGINE,
            "pools": POOLS[degrees],
            "kv_transfer": {"verify": True, "transport": transport},
            "routing": {"local_prefill_max_tokens": 0},
        }
    )
    exact_answers(server, oracle)
    assert server.metric("baton_kv_handoffs_total", outcome="ready") == len(PROMPTS)
    assert server.metric("baton_kv_handoff_bytes_total", transport=transport) > 0


Started = tuple[BatonServer, list[list[int]]]


@pytest.fixture(scope="module")
def server_on(serving: Serving, oracle: Oracle) -> Callable[[str], Started]:
    """A server by its backend, started once, and each answer when nothing dies."""

    @functools.cache
    def start(backend: str) -> Started:
        pools = {"prefill": {}, "decode": RANKS, "more": {"role": "decode"}}
        server = serving(backend=backend, settings={"engine": ENGINE, "pools": pools})
        return server, exact_answers(server, oracle)

    return start


KILLED = "rank 2 of decode-0 was killed by SIGKILL; this worker ends"
HUNG = "no progress for 6 s"


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("backend", "number", "reason"),
    [
        pytest.param("processes", signal.SIGKILL, KILLED, marks=pytest.mark.exhaustive),
        ("processes", signal.SIGSTOP, HUNG),
        ("ray", signal.SIGKILL, KILLED),
    ],
    ids=["killed", "stopped", "killed on Ray"],
)
def test_answers_are_exact_though_a_rank_falls(
    server_on: Callable[[str], Started], backend: str, number: signal.Signals, reason: str
) -> None:
    server, expected = server_on(backend)
    before, fallen = epochs(server), ranks_of(server, "decode-0")
    assert len(fallen) == 3
    with streaming(server, PROMPTS, max_tokens=NUM_TOKENS, cache_salt=number.name) as streams:
        streams.wait_all_flow(4)
        assert not streams.all_ended, "too late to be a test"
        assert server.metric("baton_sequences_running", worker="decode-0") > 0
        os.kill(fallen[2], number)
        began = time.monotonic()
        wait_until(gone(fallen), timeout_s=40, what="the end of all the worker's ranks")
        gone_s = time.monotonic() - began
        assert streams.results() == expected
    wait_until(
        lambda: epochs(server).keys() == before.keys() and epochs(server) != before,
        timeout_s=60,
        what="another decode-0",
    )
    healed_s = time.monotonic() - began
    log = (server.folder / "state" / "default" / "logs" / "decode-0.log").read_text()
    assert reason in log
    assert num_ranks(server) == {"prefill-0": 1, "decode-0": 3, "more-0": 1}
    server.wait_at_rest()
    print(
        f"\nthe worker was gone after {gone_s * 1000:.0f} ms, longest gap "
        f"{streams.longest_gap_s:.2f} s, whole again after {healed_s:.1f} s"
    )
