"""A served cluster that goes through one case of chaos after another, and must heal each time."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.belongings import Belongings, belongings, kv_memories, unattached_segments
from support.chaos_clients import Answer, Asking, asking
from support.handoff_schedule import (
    FENCED,
    HANDSHAKE,
    MODEL,
    SETTINGS,
    Ask,
    Case,
    Question,
    questions,
)
from support.server import BatonServer, wait_until
from support.tiny_models import write_tiny_llama

from cluster.procfs import descendants

WHOLE_S = 40.0
"""A worker starts in seconds, and later the sooner its predecessors have died."""
REST_S = 15.0
STILL_S = 0.35
"""Longer than a step and a report take."""
NUM_WAVES = 5
MODEL_NAME = "tiny"
_HELD = ("num_referenced_blocks", "num_quarantined_blocks", "num_running", "num_waiting")
_STATES = (
    "num_free_blocks",
    "num_cached_blocks",
    "num_referenced_blocks",
    "num_quarantined_blocks",
)


@dataclass(slots=True)
class Course:
    """How it went when something was done to workers."""

    answers: list[Answer]
    salt: str = ""
    """Of what was asked last."""
    reached: bool = False
    fault_at: float = field(default_factory=time.monotonic)
    answered_at: float = 0.0
    whole_s: float = 0.0
    """From the fault until every worker was there again."""
    rest_s: float = 0.0
    """From the last answer until every worker was there and no block was held."""

    @property
    def longest_gap_s(self) -> float:
        return max(answer.longest_gap_s for answer in self.answers)


class ChaosCluster:
    """Two prefill and two decode workers with a tiny model, over one transport."""

    def __init__(self, folder: Path, transport: str, seed: int, number_of_round: int) -> None:
        self._temporary = folder / "tmp"
        self._temporary.mkdir(parents=True)
        model = write_tiny_llama(folder / MODEL_NAME, **MODEL)
        settings = {**SETTINGS, "kv_transfer": {**SETTINGS["kv_transfer"], "transport": transport}}
        self.server = BatonServer(
            folder / "server",
            settings=settings,
            arguments=("--model", str(model)),
            environment={"TMPDIR": str(self._temporary)},
        )
        self._reached = folder / "reached"
        self._asked = questions(seed, number_of_round)
        self._expected: dict[Question, list[int]] = {}
        self._num_processes = 0
        self._files: set[Path] = set()
        self._segments = unattached_segments()
        self._num_blocks: dict[str, int] = {}
        self._waves = 0
        self._known: set[str] = set()
        """Epochs of processes that were there when something was asked: they have shaken
        hands."""
        self.broken = False
        """A case has failed on it: what later ones find may be its fault."""

    def start(self) -> ChaosCluster:
        """Returns when every question has been answered once, with nothing in its way."""
        self.server.start()
        asks = [Ask(question, 0.0, False, False) for question in self._asked]
        with asking(self.server.url, MODEL_NAME, asks, salt="undisturbed") as asked:
            answers = asked.answers()
        for answer in answers:
            assert answer.error is None, answer.error
            assert len(answer.token_ids) == answer.ask.question.max_tokens
            self._expected[answer.ask.question] = answer.token_ids
        self._num_blocks = {w["worker_id"]: w["num_blocks"] for w in self._workers()}
        assert len(self._num_blocks) == 4
        self._known = {*self._wait_whole().values()}
        self._num_processes, self._files = len(descendants(self.server.pid)), self._left_files()
        return self

    def stop(self) -> None:
        """AssertionError where anything of it is left."""
        processes = descendants(self.server.pid)
        status = self.server.stop()
        assert self.broken or status == 0, self.server.log
        left = [p.pid for p in processes if Path(f"/proc/{p.pid}").exists()]
        assert not left, f"processes left behind: {left}"

    # ------------------------------------------------------------------ one case

    def run(self, case: Case) -> Course:
        """The case, to where the cluster is whole and at rest. AssertionError for a wrong
        answer, a leak, a hang, or a point that nobody comes to."""
        self.broken = True
        course = self._disturb(case)
        assert course.reached, f"{case.victim} has not come to {case.point}"
        self.broken = False
        return course

    def lose_all_but(self, survivor: str, asks: Sequence[Ask]) -> Course:
        """Kills all others at once when the first token is there, and is whole again
        afterwards. AssertionError as ``run``."""
        self.broken = True
        before, course = self._wait_whole(), Course([], salt=f"all but {survivor}")
        lost = sorted(before.keys() - {survivor})
        had = [self._belongings(worker_id) for worker_id in lost]
        with asking(self.server.url, MODEL_NAME, asks, salt=course.salt) as asked:
            wait_until(lambda: asked.has_begun, timeout_s=20, what="a token", poll_s=0.005)
            for pid in [self.server.worker_pid(worker_id) for worker_id in lost]:
                os.kill(pid, signal.SIGKILL)
            self._finish(course, asked)
        self._wait_healed(course, before, lost, had)
        self.broken = False
        return course

    def _disturb(self, case: Case) -> Course:
        course = Course([])
        for _ in range(NUM_WAVES):
            before = self._wait_whole()
            if case.point in HANDSHAKE and before[case.victim] in self._known:
                os.kill(self.server.worker_pid(case.victim), signal.SIGKILL)
                before = self._wait_whole([before[case.victim]])
            had = self._belongings(case.victim)
            self._known |= {*before.values()}
            self._wave(case, course)
            if course.reached:
                break
        self.server.inject()
        replaced = [case.victim] if course.reached and case.is_replaced else []
        self._wait_healed(course, before, replaced, [had])
        return course

    def _wave(self, case: Case, course: Course) -> None:
        """Asks what the case asks, with the fault in wait; the next time all that can be asked
        at once, so that every worker has something to do."""
        self._reached.unlink(missing_ok=True)
        plan = {"action": case.action, "worker": case.victim, "hit": case.hit}
        if case.action == "delay":
            plan["seconds"] = case.seconds
        process = os.pidfd_open(self.server.worker_pid(case.victim))
        self._waves += 1
        asks = [Ask(question, 0.0, True, False) for question in self._asked]
        if not course.answers:
            asks = list(case.asks)
        is_warm = case.warm and not course.answers
        course.salt = "kept" if is_warm else f"{case.name} {self._waves}"
        point = case.point.replace(".", "__")
        self.server.inject(**{point: {**plan, "reached": str(self._reached)}})
        try:
            with asking(self.server.url, MODEL_NAME, asks, salt=course.salt) as asked:
                course.reached = self._wait_reached(asked)
                course.fault_at = time.monotonic()
                if course.reached:
                    if case.action != "delay":  # a plan that is taken back counts no further hits
                        self.server.inject()
                    if case.action == "stop" and case.how != FENCED:
                        time.sleep(case.seconds)
                        _wake(process)
                self._finish(course, asked)
        finally:
            os.close(process)

    def _wait_reached(self, asked: Asking) -> bool:
        """Whether the fault came. The last of a hand-off is done after the last answer."""
        gives_up_at = math.inf
        while not self._reached.exists():
            if asked.over:
                gives_up_at = min(gives_up_at, time.monotonic() + STILL_S)
            if time.monotonic() >= gives_up_at:
                return False
            time.sleep(0.005)
        return True

    # ------------------------------------------------------------- what it must be

    def _finish(self, course: Course, asked: Asking) -> None:
        answers = asked.answers()
        course.answers += answers
        self._check(answers)

    def _check(self, answers: Sequence[Answer]) -> None:
        """AssertionError where an answer is not what it was with nothing in its way."""
        faults = [
            f"{answer.ask}: {fault}"
            for answer in answers
            if (fault := answer.fault(self._expected[answer.ask.question]))
        ]
        assert not faults, "\n".join(faults)

    def _wait_healed(
        self,
        course: Course,
        before: Mapping[str, str],
        replaced: Sequence[str],
        had: Sequence[Belongings],
    ) -> None:
        """Until every worker is there, ``replaced`` in new processes, what was asked is
        answered from the caches as it was, no block is held, and nothing is left of
        ``before``'s processes that are gone."""
        self._wait_whole([before[worker_id] for worker_id in replaced])
        course.whole_s = time.monotonic() - course.fault_at
        asked_now = dict.fromkeys(answer.ask.question for answer in course.answers)
        again = [Ask(question, 0.0, False, False) for question in asked_now]
        with asking(self.server.url, MODEL_NAME, again, salt=course.salt) as asked:
            self._check(asked.answers())
        course.answered_at = time.monotonic()
        self._wait_at_rest()
        course.rest_s = time.monotonic() - course.answered_at
        now = self._wait_whole()
        gone = [each for each in had if before[each.owner] != now[each.owner]]
        self._wait_nothing_left(gone)

    def _workers(self) -> list[dict[str, Any]]:
        workers: list[dict[str, Any]] = self.server.status()["workers"]
        return [worker for worker in workers if worker["ready"]]

    def _wait_whole(self, others: Sequence[str] = ()) -> dict[str, str]:
        """Until every worker serves, none of them with an epoch of ``others``. Their epochs."""
        found: dict[str, str] = {}

        def whole() -> bool:
            nonlocal found
            found = {worker["worker_id"]: worker["epoch"] for worker in self._workers()}
            return found.keys() == self._num_blocks.keys() and not {*found.values()} & {*others}

        wait_until(whole, timeout_s=WHOLE_S, what="whole again", poll_s=0.03)
        return found

    def _wait_at_rest(self) -> None:
        """Until no block is held for longer than a report takes; none may ever be missing."""
        ends_at, since = time.monotonic() + REST_S, None
        while since is None or time.monotonic() - since < STILL_S:
            workers = [w for w in self._workers() if w["last_report_age_s"] is not None]
            for worker in workers:
                total = sum(worker[state] for state in _STATES)
                assert total == self._num_blocks[worker["worker_id"]], worker
            busy = len(workers) < len(self._num_blocks)
            busy |= any(worker[what] for worker in workers for what in _HELD)
            busy |= self.server.metric("baton_requests_in_flight") > 0
            assert not busy or time.monotonic() < ends_at, f"not at rest: {workers}"
            since = None if busy else since or time.monotonic()
            time.sleep(0.03)

    def _wait_nothing_left(self, of_gone: Sequence[Belongings]) -> None:
        ends_at = time.monotonic() + REST_S
        while left := [*self._extra(), *(what for each in of_gone for what in each.left())]:
            assert time.monotonic() < ends_at, f"left behind: {left}"
            time.sleep(0.05)

    def _extra(self) -> list[str]:
        processes = descendants(self.server.pid)
        memories = kv_memories(process.pid for process in processes)
        counts = [
            (len(memories), len(self._num_blocks), "KV pools"),
            (len(processes), self._num_processes, "processes"),
        ]
        return [
            *(f"{found} {what}, {due} are due" for found, due, what in counts if found != due),
            *(f"file {file}" for file in self._left_files() - self._files),
            *(f"segment {segment}" for segment in unattached_segments() - self._segments),
        ]

    def _belongings(self, worker_id: str) -> Belongings:
        return belongings(worker_id, self.server.worker_pid(worker_id), [self._temporary])

    def _left_files(self) -> set[Path]:
        """Beside logs, and what is rewritten in place."""
        folders = (self._temporary, self.server.folder / "state")
        found = {file for folder in folders for file in folder.rglob("*")}
        return {file for file in found if file.suffix != ".log"}


def _wake(process: int) -> None:
    """Of one that was killed meanwhile there is nobody to wake."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(process, signal.SIGCONT)
