"""Invariant 9 of the hand-off: a failure is never dressed as success. Whatever becomes of the
workers of its attempts, a client gets its whole answer with the reason for which it ended, or
an error; never a part with a finish reason. ``test_gateway_honest_endings.py`` has what HTTP makes
of an error.

Workers play fates on a fake clock, so that deadlines, verdicts and pauses cost no time.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from dataclasses import dataclass
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from baton.config import parse_config
from baton.errors import (
    BatonError,
    DeadlineExceededError,
    DrainingError,
    InternalError,
    OverloadedError,
    ReservationError,
    TransferError,
    UnavailableError,
    WorkerLostError,
)
from baton.faults import Faults
from baton.telemetry import GatewayMetrics
from baton.v1 import session_pb2 as pb
from router import attempt, choice_run, orchestrator
from router.attempt import Attempt
from router.choice_run import ChoiceRun
from router.request import ChoiceOutput, FinishReason
from router.routing.kv_index import KvIndex
from router.routing.policy import make_policy
from router.token_merge import TokenMerge
from router.workers.pool import WorkerPool
from tests.support.fake_cluster import choice
from tests.support.fake_worker import expected_token
from tests.support.memory_pool import Pool, Worker
from tests.support.skipping_loop import run_skipping

PROMPT = (1, 2, 3)
MAX_TOKENS = 5
TOKENS = tuple(expected_token(PROMPT, position) for position in range(MAX_TOKENS))
DEADLINE_S = 30.0
FAILURES: dict[str, type[BatonError]] = {
    error.code: error
    for error in (
        TransferError,
        ReservationError,
        OverloadedError,
        DrainingError,
        UnavailableError,
        WorkerLostError,
        DeadlineExceededError,
        InternalError,
    )
}
ENDINGS = ("finishes", "loses its last word", "dies", "gives up", "falls silent", "cuts off")


@dataclass(frozen=True)
class Fate:
    """What one worker does with one stream."""

    num_tokens: int
    """That it sends before its ending."""
    ending: str
    disorder: int | None
    """Seeds the order of its tokens, some of which then come twice."""
    num_rounds_late: int = 0
    leaves_first: bool = False
    """Decode leaves the first token of a hand-off to the prefill worker."""


FATES = st.builds(
    Fate,
    st.integers(0, MAX_TOKENS),
    st.sampled_from([*ENDINGS, *FAILURES]),
    st.none() | st.integers(0, 99),
    st.integers(0, 3),
    st.booleans(),
)


def random_fate(dice: random.Random) -> Fate:
    ending = dice.choice([*ENDINGS, *FAILURES])
    disorder = dice.randrange(100) if dice.random() < 0.5 else None
    late, leaves_first = dice.randrange(4), dice.random() < 0.5
    return Fate(dice.randrange(MAX_TOKENS + 1), ending, disorder, late, leaves_first)


class Stage:
    """Two pairs of workers, an orchestrator on them, and one client."""

    def __init__(self, fates: list[Fate], *, stop_at: int | None, local: bool) -> None:
        self.pool = Pool()
        self._fates = list(fates)
        stop = frozenset() if stop_at is None else frozenset({TOKENS[stop_at]})
        self.reason: FinishReason = "length" if stop_at is None else "stop"
        self.answer = TOKENS if stop_at is None else TOKENS[: stop_at + 1]
        self._local = local
        if local:
            for worker in self.pool.workers:
                worker.session.draining = worker.role == "prefill"
        config = parse_config({"routing": {"policy": "least_loaded"}})
        clock = asyncio.get_running_loop().time
        self._orchestrator = orchestrator.Orchestrator(
            config=config,
            pool=cast(WorkerPool, self.pool),
            policy=make_policy(config.routing, KvIndex(clock), random.Random(0), clock),
            metrics=GatewayMetrics(CollectorRegistry()),
            faults=Faults(None, "gateway-0"),
            registry_up=lambda: True,
            rng=random.Random(0),
        )
        self._choice = choice(*PROMPT, max_tokens=MAX_TOKENS, deadline_s=DEADLINE_S, stop=stop)
        self._begun: set[tuple[int, int]] = set()
        self._due: list[tuple[int, Worker, pb.Open, Fate]] = []
        self._num_rounds = 0
        self.outputs: list[ChoiceOutput] = []

    async def _client(self) -> None:
        async for output in self._orchestrator.generate(self._choice):
            self.outputs.append(output)

    async def play(self) -> str:
        """The outcome, once it is found to be honest."""
        client = asyncio.create_task(self._client())
        try:
            while not client.done():
                await asyncio.sleep(0.01)
                self._play_streams()
        finally:
            running = [worker.running for worker in self.pool.workers]
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
        return self._judged(client.exception())

    def _judged(self, error: BaseException | None) -> str:
        tokens = tuple(token for output in self.outputs for token in output.token_ids)
        reasons = [output.finish_reason for output in self.outputs]
        assert tokens == self.answer[: len(tokens)], "these are not the answer's tokens"
        if error is None:
            assert tokens == self.answer, "a cut-off answer passes for a whole one"
            assert reasons == [*[None] * (len(reasons) - 1), self.reason], "for the wrong reason"
            return "whole"
        assert isinstance(error, BatonError), repr(error)
        assert set(reasons) <= {None}, "an answer that failed has a finish reason"
        return error.code

    def _play_streams(self) -> None:
        self._num_rounds += 1
        due = [each for each in self._due if each[0] <= self._num_rounds]
        self._due = [each for each in self._due if each not in due]
        for _, worker, message, fate in due:
            if worker in self.pool.workers:  # else it has died meanwhile
                self._play(self.pool.workers.index(worker), worker, message, fate)
        for worker in self.pool.workers:
            for index, message in enumerate(worker.opens()):
                if (id(worker), index) not in self._begun and self._may_begin(worker, message):
                    self._begun.add((id(worker), index))
                    fate = self._fates.pop(0) if self._fates else Fate(0, "finishes", None)
                    due_at = self._num_rounds + fate.num_rounds_late
                    self._due.append((due_at, worker, message, fate))

    def _may_begin(self, worker: Worker, message: pb.Open) -> bool:
        told = [m.proceed.stream_id for m in worker.call.written if m.HasField("proceed")]
        return worker.role == "decode" or message.stream_id in told

    def _play(self, number: int, worker: Worker, message: pb.Open, fate: Fate) -> None:
        first, end = len(message.emitted_token_ids), len(self.answer)
        last = min(first + 1, end) if worker.role == "prefill" else end
        if worker.role == "decode" and fate.ending != ReservationError.code:
            worker.send(reserved=[pb.Reserved(stream_id=message.stream_id)])
        whole = fate.ending in ("finishes", "loses its last word")
        num = last - first if whole else min(fate.num_tokens, last - first)
        if fate.ending == "cuts off":
            num = min(num, end - first - 1)
        is_left = fate.leaves_first and worker.role == "decode" and message.HasField("handoff")
        positions = range(first + is_left, first + num)
        self._send_tokens(worker, message, positions, fate.disorder)
        if fate.ending in ("loses its last word", "dies"):
            self.pool.restart(number)
            self.pool.workers[number].session.draining = self._local and worker.role == "prefill"
        elif fate.ending != "falls silent":
            closed = self._last_word(fate.ending, ends=last == end)
            closed.stream_id = message.stream_id
            worker.send(closed=[closed])

    def _last_word(self, ending: str, *, ends: bool) -> pb.Closed:
        if ending == "finishes" and not ends:
            return pb.Closed(reason=pb.CLOSE_REASON_HANDED_OFF)
        if ending == "finishes":
            stop = self.reason == "stop"
            return pb.Closed(reason=pb.CLOSE_REASON_STOP if stop else pb.CLOSE_REASON_LENGTH)
        if ending == "cuts off":
            return pb.Closed(reason=pb.CLOSE_REASON_LENGTH)
        if ending == "gives up":
            return pb.Closed(reason=pb.CLOSE_REASON_CANCELLED)
        return pb.Closed(reason=pb.CLOSE_REASON_FAILED, error_code=ending)

    def _send_tokens(
        self, worker: Worker, message: pb.Open, positions: range, disorder: int | None
    ) -> None:
        order = list(positions)
        if disorder is not None:
            dice = random.Random(disorder)
            order += dice.choices(order, k=2) if order else []
            dice.shuffle(order)
        for position in order:
            tokens = {"positions": [position], "token_ids": [TOKENS[position]]}
            worker.send(tokens=pb.TokenBatch(stream_ids=[message.stream_id], **tokens))


def outcome_of(fates: list[Fate], *, stop_at: int | None = None, local: bool = False) -> str:
    outcome = ""

    async def main() -> None:
        nonlocal outcome
        outcome = await Stage(fates, stop_at=stop_at, local=local).play()

    run_skipping(main())
    return outcome


@settings(max_examples=200, deadline=None)
@given(
    fates=st.lists(FATES, max_size=8),
    stop_at=st.none() | st.integers(0, MAX_TOKENS - 1),
    local=st.booleans(),
)
def test_any_fate_of_the_workers_leads_to_the_whole_answer_or_to_an_error(
    fates: list[Fate], stop_at: int | None, local: bool
) -> None:
    outcome_of(fates, stop_at=stop_at, local=local)


def random_fates(num: int) -> Counter[str]:
    """How they ended."""
    seen: Counter[str] = Counter()
    for seed in range(num):
        dice = random.Random(seed)
        fates = [random_fate(dice) for _ in range(dice.randrange(1, 8))]
        stop_at = dice.choice([None, dice.randrange(MAX_TOKENS)])
        seen[outcome_of(fates, stop_at=stop_at, local=dice.random() < 0.3)] += 1
    return seen


def test_random_fates_lead_to_answers_and_to_errors_of_many_kinds() -> None:
    seen = random_fates(200)
    assert seen["whole"] > 50
    assert len(seen) > 4, seen


@pytest.mark.exhaustive
@pytest.mark.timeout(900)
def test_thousands_of_fates() -> None:
    random_fates(4000)


# ----------------------------------------------------------------- mutants of the choice


class EndsWithWhatItHas(ChoiceRun):
    def _finished_all_but(self, error: BatonError) -> FinishReason | None:
        return "length" if self._tokens.token_ids else None


class DeadlineIsALength(ChoiceRun):
    async def next(self) -> ChoiceOutput:
        try:
            return await super().next()
        except DeadlineExceededError:
            return ChoiceOutput((), "length")


class ForgetsAttempts(ChoiceRun):
    """The next attempt begins anew, and what it says comes after what was said."""

    async def _recover(self, attempt: Attempt, error: BatonError) -> None:
        await super()._recover(attempt, error)
        self._tokens = TokenMerge(self._choice.max_tokens)


class FinishesWithoutTheLast(Attempt):
    def _settle(self) -> None:
        if self._end is not None and not self._ended:
            self.finish_reason = self._end[0]
        super()._settle()


class BelievesAnyLength(Attempt):
    def _finish(self, side: Any, finish_reason: FinishReason) -> None:
        if side.end is not None:
            self._end = (finish_reason, side.end)
        self._settle()


class LostIsStopped(Attempt):
    def side_failed(self, side: Any, error: BatonError) -> None:
        if isinstance(error, WorkerLostError) and self.has_tokens:
            self._finish(side, "stop")
        else:
            super().side_failed(side, error)


class SkipsMissingTokens(TokenMerge):
    def add(self, position: int, token_id: int, at: float, logprobs: Any = None) -> None:
        if position >= self.num_in_order:
            super().add(self.num_in_order, token_id, at, logprobs)


def close_reasons_are_lengths() -> dict[int, FinishReason]:
    return {**attempt._FINISH, pb.CLOSE_REASON_CANCELLED: "length"}


def failures_are_lengths() -> dict[int, FinishReason]:
    return {**attempt._FINISH, pb.CLOSE_REASON_FAILED: "length"}


MUTANTS: list[tuple[Any, str, Any]] = [
    (orchestrator, "ChoiceRun", EndsWithWhatItHas),
    (orchestrator, "ChoiceRun", DeadlineIsALength),
    (orchestrator, "ChoiceRun", ForgetsAttempts),
    (choice_run, "Attempt", FinishesWithoutTheLast),
    (choice_run, "Attempt", BelievesAnyLength),
    (choice_run, "Attempt", LostIsStopped),
    (choice_run, "TokenMerge", SkipsMissingTokens),
    (attempt, "_FINISH", close_reasons_are_lengths),
    (attempt, "_FINISH", failures_are_lengths),
]


@pytest.mark.parametrize(
    ("module", "name", "mutant"), MUTANTS, ids=[mutant.__name__ for *_, mutant in MUTANTS]
)
def test_mutant_of_the_choice_is_killed(
    module: Any, name: str, mutant: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, name, mutant() if name == "_FINISH" else mutant)
    with pytest.raises(AssertionError):
        random_fates(400)
