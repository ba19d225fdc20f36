"""What tests of routing policies need: workers whose caches and reports they dictate."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Sequence
from typing import cast

from baton.config import RoutingConfig, SessionConfig
from baton.errors import WorkerLostError
from baton.logprobs import TokenLogprobs
from baton.protocol import new_epoch
from baton.records import Role
from baton.v1 import session_pb2 as pb
from router.routing.input_hashes import BlockNames, InputHashes
from router.routing.kv_index import KvIndex
from router.routing.peers import ALONE
from router.routing.policy import Pairing, PeerLoad, PeerShare, RoutingPolicy, make_policy
from router.workers.handshake import Call
from router.workers.session import WorkerSession
from tests.support.fake_worker import worker_record

NAMES = BlockNames(secret="secret", weights_revision="revision")
SIZE = 16
_stream_ids = itertools.count(1)
ALL = ("kv_aware", "round_robin", "least_loaded", "random")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Workers:
    """Sessions that nobody runs, an index, and a clock, in the test's hands."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.index = KvIndex(self.clock)
        self._number = 0

    def add(self, role: Role, *, digest: str = "one", generation: str = "0") -> WorkerSession:
        self._number += 1
        record = worker_record(f"{role}-{self._number}", role, new_epoch()).model_copy(
            update={"digest": digest, "generation": generation}
        )
        call = cast(Call, None)
        session = WorkerSession(record, call, SessionConfig(), kv_dtype="float32", index=self.index)
        self.index.join(session.epoch, num_blocks=record.num_blocks)
        self.index.take(session.epoch, pb.CacheEvents(sequence=1, snapshot=True))
        return session

    def several(self, role: Role, number: int, **facts: str) -> list[WorkerSession]:
        return [self.add(role, **facts) for _ in range(number)]

    def hold(self, session: WorkerSession, hashes: Sequence[bytes]) -> None:
        """The next event of the worker adds these."""
        sequence = self.index._parts[session.epoch].sequence + 1
        events = pb.CacheEvents(sequence=sequence, added=b"".join(hashes))
        assert not self.index.take(session.epoch, events)

    def policy(
        self, name: str, seed: int = 0, peers: PeerLoad = ALONE, **weights: float
    ) -> RoutingPolicy:
        config = RoutingConfig.model_validate({"policy": name, **weights})
        return make_policy(config, self.index, random.Random(seed), self.clock, peers)


class Unheard:
    """A stream's sink that nobody asks."""

    def on_reserved(self, num_held_tokens: int) -> None: ...

    def on_token(
        self, position: int, token_id: int, at: float, logprobs: TokenLogprobs | None
    ) -> None: ...

    def on_closed(self, closed: pb.Closed) -> None: ...

    def on_lost(self, error: WorkerLostError) -> None: ...


def report(
    session: WorkerSession,
    *,
    num_running: int = 0,
    num_tokens: int = 0,
    num_blocks: int = 0,
    num_opens: int = 0,
) -> None:
    """A report has come, which includes so many of the Session's Opens."""
    session.report = pb.Report(
        num_running=num_running,
        num_waiting_tokens=num_tokens,
        blocks=pb.BlockCounts(referenced=num_blocks),
    )
    session.given.reported(num_opens)


def input_of(*workers: WorkerSession, num_tokens: int = 10 * SIZE, first: int = 0) -> InputHashes:
    hashes = InputHashes(NAMES, cache_salt="")
    asyncio.run(hashes.prepare([first, *range(1, num_tokens)], workers))
    return hashes


def pick(
    policy: RoutingPolicy,
    prefill: Sequence[WorkerSession],
    decode: Sequence[WorkerSession],
    input_: InputHashes | None = None,
) -> Pairing:
    pairing = policy.pick(input_ or input_of(*prefill, *decode), prefill, decode)
    assert pairing is not None
    return pairing


def open_on(pairing: Pairing, *, num_tokens: int = 10 * SIZE) -> int:
    """Opens what was picked for so long an input; the stream's id."""
    stream_id = next(_stream_ids)
    message = pb.Open(stream_id=stream_id, prompt_token_ids=[1] * num_tokens)
    for session in pairing.sessions:
        session.open(message, Unheard())
    return stream_id


class Peers:
    """Other gateways, in the test's hands."""

    def __init__(self) -> None:
        self.told: list[tuple[bytes, int, int]] = []
        self.shares: dict[bytes, PeerShare] = {}
        self.asked: dict[bytes, float | None] = {}

    def given(self, epoch: bytes, num_tokens: int, num_blocks: int) -> None:
        self.told.append((epoch, num_tokens, num_blocks))

    def since(self, epoch: bytes, load_at: float | None) -> PeerShare:
        self.asked[epoch] = load_at
        return self.shares.get(epoch, PeerShare())
