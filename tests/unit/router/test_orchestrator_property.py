"""Any schedule of workers' events, losses and clients' moves: exact tokens, empty tables.

The Sessions are the real ones over a stream in memory, so that hypothesis chooses
the order of everything.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from dataclasses import dataclass, replace
from typing import cast

from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from baton.config import parse_config
from baton.errors import (
    BatonError,
    DeadlineExceededError,
    DrainingError,
    InternalError,
    ReservationError,
    TransferError,
)
from baton.faults import Faults
from baton.telemetry import GatewayMetrics
from baton.v1 import session_pb2 as pb
from router.orchestrator import Orchestrator
from router.routing.kv_index import KvIndex
from router.routing.policy import make_policy
from router.workers.pool import WorkerPool
from tests.support.fake_cluster import Client, choice
from tests.support.fake_worker import expected_token
from tests.support.memory_pool import Pool, Worker

PROMPT = (1, 2, 3)
MAX_TOKENS = 5


def act(worker: Worker, message: pb.Open, action: str, position: int) -> None:
    """One event of a worker about one of the streams it ever saw, open or not."""
    stream_id, first = message.stream_id, len(message.emitted_token_ids)
    if action == "reserve":
        worker.send(reserved=[pb.Reserved(stream_id=stream_id, num_held_tokens=position)])
    elif action == "token":
        # Of any position: repeated, ahead, or the one that is due.
        at = min(first + position, MAX_TOKENS - 1)
        batch = pb.TokenBatch(
            stream_ids=[stream_id], positions=[at], token_ids=[expected_token(PROMPT, at)]
        )
        worker.send(tokens=batch)
    elif action in ("finish", "lacks its last word"):
        last = MAX_TOKENS if worker.role == "decode" else min(first + 1, MAX_TOKENS)
        positions = range(first, last)
        batch = pb.TokenBatch(
            stream_ids=[stream_id] * len(positions),
            positions=positions,
            token_ids=[expected_token(PROMPT, position) for position in positions],
        )
        if action != "finish":
            worker.send(tokens=batch)
            return
        ends = last == MAX_TOKENS
        reason = pb.CLOSE_REASON_LENGTH if ends else pb.CLOSE_REASON_HANDED_OFF
        worker.send(tokens=batch, closed=[pb.Closed(stream_id=stream_id, reason=reason)])
    else:
        errors = {"fail": TransferError, "refuse": ReservationError, "drain": DrainingError}
        error = errors[action]
        closed = pb.Closed(
            stream_id=stream_id, reason=pb.CLOSE_REASON_FAILED, error_code=error.code
        )
        worker.send(closed=[closed])


async def settle() -> None:
    for _ in range(12):
        await asyncio.sleep(0)


@dataclass(frozen=True)
class Step:
    action: str
    which: int
    """Which stream, worker or client it is about, from the newest on."""
    position: int
    settled: bool
    """Everything comes to rest before the next step."""


EVENTS = ["reserve", "token", "token", "token", "finish", "lacks its last word"]
FAILURES = ["fail", "refuse", "drain"]
STEPS = st.builds(
    Step,
    st.sampled_from([*EVENTS, *FAILURES, "ask", "leave", "restart", "expire"]),
    st.integers(0, 3),
    st.integers(0, MAX_TOKENS - 1),
    st.booleans(),
)


class Game:
    def __init__(self) -> None:
        self.pool = Pool()
        config = parse_config(
            {
                "gateway": {"max_in_flight": 2, "max_queued": 1},
                "routing": {"policy": "least_loaded"},
            }
        )
        clock = asyncio.get_running_loop().time
        metrics = GatewayMetrics(CollectorRegistry())
        self.orchestrator = Orchestrator(
            config=config,
            pool=cast(WorkerPool, self.pool),
            policy=make_policy(config.routing, KvIndex(clock), random.Random(0), clock),
            metrics=metrics,
            faults=Faults(None, "gateway-0"),
            registry_up=lambda: True,
            rng=random.Random(0),
        )
        self.clients: list[Client] = []
        self.dead: list[Worker] = []

    def ask(self, deadline_s: float = 60.0, *, priority: int = 0, index: int = 0) -> None:
        request = choice(*PROMPT, max_tokens=MAX_TOKENS, deadline_s=deadline_s)
        request = replace(request, priority=priority, choice_index=index)
        self.clients.append(Client(self.orchestrator.generate(request)))

    async def play(self, steps: list[Step]) -> None:
        self.ask()
        await settle()
        for step in steps:
            self.move(step)
            if step.settled:
                await settle()
                self.check_tables()
        await settle()
        self.check_tables()

    def move(self, step: Step) -> None:
        if step.action == "ask":
            self.ask(priority=step.position, index=step.which % 2)
        elif step.action == "expire":
            self.ask(deadline_s=0.0)
        elif step.action == "leave":
            self.clients[-1 - step.which % len(self.clients)].task.cancel()
        elif step.action == "restart":
            self.restart(step.which)
        else:
            streams = [(w, message) for w in self.pool.workers for message in w.opens()]
            streams.sort(key=lambda stream: stream[1].stream_id)
            if streams:
                worker, message = streams[-1 - step.which % len(streams)]
                act(worker, message, step.action, step.position)

    def restart(self, number: int) -> None:
        self.dead.append(self.pool.workers[number])
        self.pool.restart(number)

    def check_tables(self) -> None:
        """Nothing is open but what a running choice has open, on two workers at most."""
        num_open = sum(w.session.num_open for w in [*self.pool.workers, *self.dead])
        assert num_open <= 2 * self.orchestrator._admission.num_in_flight

    async def finish(self) -> None:
        """The workers complete whatever is still open; then clients must all have ended."""
        for _ in range(60):
            if all(client.task.done() for client in self.clients):
                return
            for number, worker in enumerate(self.pool.workers):
                for message in worker.opens():
                    act(worker, message, "finish", 0)
                if worker.session.draining:
                    self.restart(number)
            await asyncio.sleep(0.01)
        raise AssertionError("a choice neither finished nor failed")

    def check(self) -> None:
        expected = [expected_token(PROMPT, position) for position in range(MAX_TOKENS)]
        for client in self.clients:
            assert client.token_ids == expected[: len(client.token_ids)]
            if client.task.cancelled():
                continue
            error = client.task.exception()
            assert error is None or isinstance(error, BatonError)
            assert not isinstance(error, InternalError)
            if error is None:
                assert client.last is not None
                assert client.last.finish_reason == "length"
                assert client.token_ids == expected
        assert self.pool.watchers == []
        for worker in [*self.pool.workers, *self.dead]:
            assert worker.session.num_open == 0
            sent = [m.cancel.stream_id for m in worker.call.written if m.HasField("cancel")]
            assert all(count == 1 for count in Counter(sent).values())
            proceeds = [m.proceed.stream_id for m in worker.call.written if m.HasField("proceed")]
            assert all(count == 1 for count in Counter(proceeds).values())
        admission = self.orchestrator._admission
        assert (admission.num_in_flight, admission.num_queued) == (0, 0)
        ids = [m.stream_id for w in [*self.pool.workers, *self.dead] for m in w.opens()]
        # A choice opens the same id on its two workers, and on no others ever again.
        assert all(count <= 2 for count in Counter(ids).values())


async def scenario(steps: list[Step]) -> None:
    game = Game()
    try:
        await game.play(steps)
        await game.finish()
        await settle()
        game.check()
    finally:
        for client in game.clients:
            await client.leave()
        for worker in [*game.pool.workers, *game.dead]:
            worker.running.cancel()
            await asyncio.gather(worker.running, return_exceptions=True)
    rest = asyncio.all_tasks() - {asyncio.current_task()}
    assert not rest, f"tasks are left: {rest}"


@settings(max_examples=200, deadline=None)
@given(steps=st.lists(STEPS, max_size=30))
def test_after_any_schedule_tokens_are_exact_and_nothing_is_left(
    steps: list[Step],
) -> None:
    asyncio.run(scenario(steps))


def test_deadline_of_the_past_opens_nothing() -> None:
    async def expired() -> None:
        game = Game()
        client = Client(game.orchestrator.generate(choice(deadline_s=-1.0)))
        await settle()
        assert isinstance(client.task.exception(), DeadlineExceededError)
        assert all(worker.opens() == [] for worker in game.pool.workers)
        for worker in game.pool.workers:
            worker.running.cancel()

    asyncio.run(expired())
