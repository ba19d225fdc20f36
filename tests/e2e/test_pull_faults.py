"""A worker is killed or stopped while prefill pulls an answer from decode: the request is answered
all the same, at fp32 with exactly its tokens, and at rest no block is held."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from e2e.conftest import Serving
from support.server import BatonServer, wait_until

BLOCK_SIZE = 16
MOST_TRIES = 5
SLOW = {"action": "delay", "seconds": 1.0}
"""Computing, so that a pull pays, however busy the machine is."""
PREFILL, DECODE = "prefill-0", "decode-0"
CASES = [
    ("pull.copy", PREFILL, "kill"),
    pytest.param("lend.offer", DECODE, "kill", marks=pytest.mark.exhaustive),
    pytest.param("pull.release", PREFILL, "stop", marks=pytest.mark.exhaustive),
    pytest.param("lend.commit", DECODE, "stop", marks=pytest.mark.exhaustive),
]
ANSWER: dict[str, Any] = {"max_tokens": 10 * BLOCK_SIZE, "ignore_eos": True}


@pytest.fixture(scope="module")
def server(serving: Serving) -> BatonServer:
    return serving(
        settings={
            "engine": {"dtype": "float32"},
            "routing": {"local_prefill_max_tokens": 0},
        },
        arguments=("--prefill", "1", "--decode", "1"),
    )


def all_are_ready(server: BatonServer) -> bool:
    workers = server.status()["workers"]
    return {w["worker_id"] for w in workers if w["ready"]} == {PREFILL, DECODE}


def second_turn(server: BatonServer, first_token: int) -> list[int]:
    """The prompt of one, whose answer decode alone holds."""
    prompt = [first_token + 3 * token for token in range(5 * BLOCK_SIZE + 3)]
    answer = server.complete(prompt=prompt, **ANSWER)["choices"][0]["token_ids"]
    server.wait_at_rest()
    return [*prompt, *answer, 200, 201]


@pytest.mark.slow
@pytest.mark.parametrize(("point", "victim", "action"), CASES)
def test_pull_whose_worker_goes_costs_no_token(
    server: BatonServer, tmp_path: Path, point: str, victim: str, action: str
) -> None:
    first_token = 1000 + 500 * len(point)
    server.inject(prefill__chunk=SLOW)
    server.complete(prompt=second_turn(server, first_token), max_tokens=1)  # workers connect
    reached, pid = tmp_path / "reached", server.worker_pid(victim)
    fault = {"action": action, "worker": victim, "reached": str(reached)}
    server.inject(prefill__chunk=SLOW, **{point.replace(".", "__"): fault})
    try:
        for number in range(1, MOST_TRIES + 1):  # what has measured copies as slow is computed
            prompt = second_turn(server, first_token + 40 * number)
            answer = server.complete(prompt=prompt, max_tokens=8)["choices"][0]["token_ids"]
            if reached.exists():
                break
    finally:
        server.inject()
        if action == "stop":
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
    assert reached.exists(), "no pull came to that point"
    wait_until(lambda: all_are_ready(server), timeout_s=60, what="both workers")
    server.wait_at_rest(timeout_s=30.0)
    again = server.complete(prompt=prompt, max_tokens=8)["choices"][0]["token_ids"]
    assert answer == again
