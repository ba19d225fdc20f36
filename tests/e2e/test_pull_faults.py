"""A worker is killed, stopped or paused while prefill pulls an answer from decode: the request is
answered all the same, at fp32 with exactly its tokens, and at rest no block is held, and nobody has
memory of the one that is gone. Where the worker was replaced, the next answers are pulled again."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from e2e.conftest import Serving
from support.belongings import kv_memories, unattached_segments
from support.server import BatonServer, wait_until
from support.tiny_models import write_tiny_llama
from support.transports import needs_nixl

from baton.faults import POINTS
from cluster.procfs import descendants

BLOCK_SIZE = 16
MOST_TRIES = 5
STEP_TOKENS = 4 * BLOCK_SIZE
SLOW = {"action": "delay", "seconds": 0.5}
"""Each step of prefill: to compute an answer of ten blocks takes more than a second, so that a
pull pays, and is waited for that long, however busy the machine is."""
SETTINGS: dict[str, Any] = {
    "engine": {
        "dtype": "float32",
        "kv_cache_bytes": 4 * 1024 * 1024,
        "max_num_batched_tokens": STEP_TOKENS,
    },
    "routing": {"local_prefill_max_tokens": 0},
}
ANSWER: dict[str, Any] = {"max_tokens": 10 * BLOCK_SIZE, "ignore_eos": True}
PREFILL, DECODE = "prefill-0", "decode-0"
POINTS_OF_PULLS = sorted(point for point in POINTS if point.startswith(("lend.", "pull.")))
TO_CONNECT = ("greet", "link")
"""Points that are passed once, when the first pull has two workers connect."""
SHARED_MEMORY, GLOO, NIXL = "shared_memory", "gloo", "nixl"
ONLY_OVER_GLOO = ("lend.send",)
PAUSE_S = 2.5
"""Longer than a pull is waited for, so that the worker wakes when its tokens are computed."""
USUAL = (("pull.copy", "kill", SHARED_MEMORY), ("lend.link", "kill", SHARED_MEMORY))


@dataclass(frozen=True, slots=True)
class Case:
    point: str
    action: str
    transport: str

    @property
    def victim(self) -> str:
        return DECODE if self.point.startswith("lend.") else PREFILL

    def __str__(self) -> str:
        return f"{self.point}-{self.action}-{self.transport}"


CASES = [
    Case(point, action, transport)
    for transport in (SHARED_MEMORY, GLOO, NIXL)
    for point in POINTS_OF_PULLS
    if transport == GLOO or point not in ONLY_OVER_GLOO
    for action in ("kill", "stop", "pause")
]


def marks_of(case: Case) -> list[pytest.MarkDecorator]:
    is_usual = (case.point, case.action, case.transport) in USUAL
    marks = [] if is_usual else [pytest.mark.exhaustive]
    return [*marks, needs_nixl] if case.transport == NIXL else marks


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("model") / "tiny")


def epochs(server: BatonServer) -> dict[str, str]:
    """Of the workers that are ready."""
    return {w["worker_id"]: w["epoch"] for w in server.status()["workers"] if w["ready"]}


def second_turn(server: BatonServer, number: int) -> list[int]:
    """The prompt of one, whose answer decode alone holds; another for each number."""
    prompt = [3 + (number + 7 * token) % 250 for token in range(3 * BLOCK_SIZE + 3)]
    answer = server.complete(prompt=prompt, **ANSWER)["choices"][0]["token_ids"]
    server.wait_at_rest()
    return [*prompt, *answer, 200, 201]


def num_pools(server: BatonServer) -> int:
    """KV pools that any process of the server has open or mapped."""
    return len(kv_memories(process.pid for process in descendants(server.pid)))


def num_pulled(server: BatonServer) -> float:
    server.wait_at_rest()
    return server.metric("baton_kv_pulls_total", outcome="ready")


def wait_replaced(server: BatonServer, worker_id: str, epoch: str, stopped: int | None) -> None:
    """Until another process is that worker and both are ready. ``stopped`` goes on once its
    registration has run out: from then on it is nobody, and has to end."""

    def is_listed() -> bool:
        return epoch in {worker["epoch"] for worker in server.status()["workers"]}

    wait_until(lambda: not is_listed(), timeout_s=60, what=f"{worker_id} is missed")
    if stopped is not None:
        with contextlib.suppress(ProcessLookupError):  # it was fenced
            os.kill(stopped, signal.SIGCONT)
    both = {PREFILL, DECODE}
    wait_until(lambda: epochs(server).keys() == both, timeout_s=60, what="both workers are ready")


@contextlib.contextmanager
def waking(reached: Path, pid: int) -> Iterator[None]:
    """Lets the process go on ``PAUSE_S`` after it has been stopped."""

    def wake() -> None:
        wait_until(reached.exists, timeout_s=60, what="the pause")
        time.sleep(PAUSE_S)
        os.kill(pid, signal.SIGCONT)

    with ThreadPoolExecutor(1) as executor:
        waking = executor.submit(wake)
        yield
        waking.result()


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [pytest.param(case, id=str(case), marks=marks_of(case)) for case in CASES]
)
def test_pull_whose_worker_goes_costs_no_token_and_no_later_pull(
    serving_one_test: Serving, model: Path, tmp_path: Path, case: Case
) -> None:
    server = serving_one_test(
        settings={**SETTINGS, "kv_transfer": {"transport": case.transport}},
        arguments=("--model", str(model), "--prefill", "1", "--decode", "1"),
    )
    segments = unattached_segments()
    numbers = iter(range(1, 250))
    server.inject(prefill__chunk=SLOW)
    if not case.point.endswith(TO_CONNECT):
        server.complete(prompt=second_turn(server, next(numbers)), max_tokens=1)
    reached, epoch = tmp_path / "reached", epochs(server)[case.victim]
    pid = server.worker_pid(case.victim)
    action = "stop" if case.action == "pause" else case.action
    fault = {"action": action, "worker": case.victim, "reached": str(reached)}
    server.inject(prefill__chunk=SLOW, **{case.point.replace(".", "__"): fault})
    with waking(reached, pid) if case.action == "pause" else contextlib.nullcontext():
        for _ in range(MOST_TRIES):  # where the workers took long to connect it is computed
            prompt = second_turn(server, next(numbers))
            answer = server.complete(prompt=prompt, max_tokens=8)["choices"][0]["token_ids"]
            if reached.exists():
                break
    server.inject()
    assert reached.exists(), "no pull came to that point"
    if case.action != "pause":
        wait_replaced(server, case.victim, epoch, pid if case.action == "stop" else None)
    server.wait_at_rest(timeout_s=30.0)
    wait_until(
        lambda: num_pools(server) == 2 and unattached_segments() <= segments,
        timeout_s=30,
        what="two workers' memory and no other",
    )
    again = server.complete(prompt=prompt, max_tokens=8, cache_salt="computed")
    assert answer == again["choices"][0]["token_ids"]
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    if case.action == "pause":
        assert epochs(server)[case.victim] == epoch
        return
    server.inject(prefill__chunk=SLOW)
    before = num_pulled(server)
    for _ in range(MOST_TRIES):  # the first one has them connect
        server.complete(prompt=second_turn(server, next(numbers)), max_tokens=1)
        if num_pulled(server) > before:
            break
    else:
        pytest.fail("no answer is pulled any more")
