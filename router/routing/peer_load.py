"""Gateways tell each other what they gave to which worker, through Redis.

1. CONNECTING: nobody is heard, nothing is told; tried again with a growing pause.
2. SHARING: own decisions leave in batches, others' are counted until they expire.

Nothing here is on a request's path: whoever decides leaves a note and goes on. A
gateway that dies says nothing more, and what it said expires.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

from redis.asyncio.client import PubSub
from redis.exceptions import RedisError

from baton.records import decisions_channel
from baton.telemetry import GatewayMetrics
from router.redis_client import ANSWER_S, redis_client
from router.routing.peer_ledger import (
    EXPIRE_S,
    MAX_BATCH,
    Announcement,
    Decision,
    PeerLedger,
    announce,
    decisions_of,
)
from router.routing.policy import PeerShare

logger = logging.getLogger(__name__)

BATCH_S = 0.02
"""How long a decision waits for others to travel with."""
MAX_PENDING = 8192
"""Own decisions that wait for Redis; beyond, the oldest give way."""
FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 1.0
COMPLAIN_S = 10.0
"""Pause between two log lines on malformed messages."""


class SharedLoad:
    """The ``PeerLoad`` of a gateway that may have peers; ``start`` before use."""

    def __init__(
        self,
        redis_url: str,
        *,
        cluster: str,
        gateway_id: str,
        clock: Callable[[], float],
        knows: Callable[[bytes], bool],
        alone: Callable[[], bool],
        metrics: GatewayMetrics,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """``knows`` says whether an epoch is one of a worker here, ``alone`` that there is
        nobody to tell. Raises ConfigurationError for a malformed URL."""
        self._redis = redis_client(redis_url)
        self._channel = decisions_channel(cluster)
        self._gateway_id = gateway_id
        self._sender = secrets.token_hex(16)
        self._clock = clock
        self._wall = wall
        self._alone = alone
        self._metrics = metrics
        self._ledger = PeerLedger(clock, knows)
        self._pending: deque[Decision] = deque(maxlen=MAX_PENDING)
        self._news = asyncio.Event()
        self._hears = False
        self._tells = True
        self._complaint: str | None = None
        self._complained_at = float("-inf")
        self._closed = False
        self._tasks: list[asyncio.Task[None]] = []
        metrics.peers_up.set(0)

    @property
    def up(self) -> bool:
        """Others are heard, and what was last to be told was told."""
        return self._hears and self._tells

    def given(self, epoch: bytes, num_tokens: int, num_blocks: int) -> None:
        """Notes a decision of this gateway, to be told to the others. Does not wait."""
        if not self._alone():
            self._pending.append(Decision(epoch, self._clock(), num_tokens, num_blocks))
            self._news.set()

    def since(self, epoch: bytes, load_at: float | None) -> PeerShare:
        """What the others gave that worker after ``load_at`` on the clock."""
        return self._ledger.since(epoch, load_at)

    def start(self) -> None:
        self._tasks = [
            asyncio.create_task(self._again(self._listen), name="peers: listen"),
            asyncio.create_task(self._again(self._tell), name="peers: tell"),
        ]

    async def close(self) -> None:
        """Ends both ways; what was not told yet is dropped."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._redis.aclose()

    async def _again(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Does it over and over, with pauses while Redis is away."""
        pause_s = FIRST_PAUSE_S
        # Cancelling is not enough: redis may swallow it (see the registry).
        while not self._closed:
            began = self._clock()
            try:
                await work()
            except (RedisError, OSError) as error:
                if str(error) != self._complaint:
                    self._complaint = str(error)
                    logger.warning("decisions are not shared with other gateways: %s", error)
            except Exception:
                logger.exception("sharing decisions with other gateways failed")
            if self._clock() - began > LONGEST_PAUSE_S:
                pause_s = FIRST_PAUSE_S
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    # ------------------------------------------------------------------- telling

    async def _tell(self) -> None:
        """Publishes until Redis fails."""
        while not self._closed:
            await self._news.wait()
            await asyncio.sleep(BATCH_S)
            # What could not be told may have arrived all the same, and is not told again; but
            # something is, though it be nothing new, to know when Redis answers.
            while (batch := self._take_batch()) or not self._tells:
                message = announce(
                    batch,
                    sender=self._sender,
                    gateway_id=self._gateway_id,
                    now=self._clock(),
                    wall=self._wall(),
                )
                try:
                    await self._redis.publish(self._channel, message)
                except BaseException:
                    self._set(tells=False)
                    self._news.set()
                    raise
                self._set(tells=True)
                self._metrics.peer_decisions.labels(direction="sent").inc(len(batch))

    def _take_batch(self) -> list[Decision]:
        """The next message's decisions; those that have expired already are dropped."""
        batch: list[Decision] = []
        oldest = self._clock() - EXPIRE_S
        while self._pending and len(batch) < MAX_BATCH:
            decision = self._pending.popleft()
            if decision.decided_at > oldest:
                batch.append(decision)
        if not self._pending:
            self._news.clear()
        return batch

    # ----------------------------------------------------------------- listening

    async def _listen(self) -> None:
        """Takes in what others say until Redis fails."""
        try:
            async with self._redis.pubsub() as pubsub:
                await pubsub.subscribe(self._channel)
                await self._hear(pubsub)
        finally:
            self._set(hears=False)

    async def _hear(self, pubsub: PubSub) -> None:
        """Raises RedisError when the connection breaks, or stays silent when spoken to."""
        asked = False
        while not self._closed:
            message = await pubsub.get_message(timeout=ANSWER_S)
            if message is not None:
                asked = False
                if message["type"] == "subscribe":
                    self._set(hears=True, tells=True)
                elif message["type"] == "message":
                    self._take(message["data"])
            elif asked:
                raise TimeoutError(f"Redis has been silent for {ANSWER_S:g} s")
            else:
                asked = True
                await pubsub.ping()

    def _take(self, data: bytes) -> None:
        try:
            said = Announcement.model_validate_json(data)
        except ValueError as error:
            now = self._clock()
            if now - self._complained_at >= COMPLAIN_S:
                self._complained_at = now
                logger.warning(
                    "ignored a malformed message on %s (%s)", self._channel, type(error).__name__
                )
            return
        if said.sender == self._sender:
            return
        self._metrics.peer_decisions.labels(direction="received").inc(len(said.decisions))
        self._ledger.add(decisions_of(said, now=self._clock(), wall=self._wall()))

    def _set(self, *, hears: bool | None = None, tells: bool | None = None) -> None:
        was_up = self.up
        self._hears = self._hears if hears is None else hears
        self._tells = self._tells if tells is None else tells
        if self.up != was_up:
            self._metrics.peers_up.set(int(self.up))
            if self.up:
                self._complaint = None
                logger.info("sharing decisions with other gateways")
