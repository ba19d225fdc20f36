"""Gateways share their decisions through a real Redis, which comes and goes."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import redis.asyncio
from prometheus_client import CollectorRegistry

from baton.protocol import new_epoch
from baton.records import decisions_channel
from baton.telemetry import GatewayMetrics
from router.routing.peer_load import MAX_PENDING, SharedLoad
from router.routing.policy import PeerShare
from tests.support.fake_cluster import wait_until
from tests.support.redis_server import RedisServer, redis_server

WORKER = new_epoch()
CLUSTER = "default"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with redis_server(tmp_path) as running:
        yield running


class Gateway:
    """One gateway's part, with a clock that the test may move on."""

    def __init__(self, url: str, gateway_id: str) -> None:
        self.late_s = 0.0
        self.alone = False
        self.samples = CollectorRegistry()
        loop = asyncio.get_running_loop()
        self.load = SharedLoad(
            url,
            cluster=CLUSTER,
            gateway_id=gateway_id,
            clock=lambda: loop.time() + self.late_s,
            knows=lambda epoch: epoch == WORKER,
            alone=lambda: self.alone,
            metrics=GatewayMetrics(self.samples),
        )

    def share(self) -> PeerShare:
        return self.load.since(WORKER, None)

    def counted(self, direction: str) -> float:
        labels = {"direction": direction}
        return self.samples.get_sample_value("baton_peer_decisions_total", labels) or 0.0


async def refused(*_: object) -> None:
    raise redis.exceptions.TimeoutError("no answer")


@asynccontextmanager
async def gateways(url: str, number: int = 2) -> AsyncIterator[list[Gateway]]:
    """That many, sharing already."""
    found = [Gateway(url, f"gateway-{n}") for n in range(number)]
    for gateway in found:
        gateway.load.start()
    try:
        await wait_until(lambda: all(gateway.load.up for gateway in found), "all share")
        yield found
    finally:
        for gateway in found:
            await gateway.load.close()


async def test_a_decision_is_known_to_all_other_gateways_and_not_to_its_own_twice(
    server: RedisServer,
) -> None:
    async with gateways(server.url, 3) as (one, two, three):
        one.load.given(WORKER, 100, 7)
        one.load.given(WORKER, 20, 2)
        one.load.given(new_epoch(), 5, 5)  # a worker that nobody else knows
        two.load.given(WORKER, 1000, 60)
        await wait_until(lambda: three.share() == PeerShare(1120, 69, 3))
        await wait_until(lambda: two.share() == PeerShare(120, 9, 2))
        await wait_until(lambda: one.share() == PeerShare(1000, 60, 1))
        assert (one.counted("sent"), one.counted("received")) == (3, 1)
        assert (three.counted("sent"), three.counted("received")) == (0, 4)


async def test_what_a_dead_gateway_gave_is_gone_after_the_expiry(server: RedisServer) -> None:
    async with gateways(server.url) as (dying, other):
        dying.load.given(WORKER, 100, 7)
        await wait_until(lambda: other.share().num_sequences == 1)
        await dying.load.close()
        other.late_s = 1.0
        assert other.share().num_sequences == 1
        other.late_s = 2.0
        assert other.share() == PeerShare()


async def test_sharing_pauses_while_redis_is_away_and_goes_on_when_it_is_back(
    server: RedisServer,
) -> None:
    async with gateways(server.url) as (one, two):
        server.stop()
        await wait_until(lambda: not one.load.up and not two.load.up, "both notice")
        assert one.samples.get_sample_value("baton_peers_up") == 0
        for _ in range(2 * MAX_PENDING):  # nobody waits for Redis, and memory is bounded
            one.load.given(WORKER, 1, 1)
        assert len(one.load._pending) == MAX_PENDING
        one.late_s = 3.0  # what was decided meanwhile is old by the time that it could be told
        server.start()
        await wait_until(lambda: one.load.up and two.load.up, "both share again")
        assert one.samples.get_sample_value("baton_peers_up") == 1
        one.load.given(WORKER, 5, 1)
        await wait_until(lambda: two.share() == PeerShare(5, 1, 1))
        assert one.counted("sent") == 1


async def test_sharing_goes_on_without_a_decision_once_redis_takes_what_it_refused(
    server: RedisServer,
) -> None:
    """The listeners' connections stay, so they do not notice."""
    async with gateways(server.url) as (one, two):
        publish = one.load._redis.publish
        one.load._redis.publish = refused
        one.load.given(WORKER, 100, 7)
        await wait_until(lambda: not one.load.up, "that it cannot tell")
        one.load._redis.publish = publish
        await wait_until(lambda: one.load.up, "that it can tell again")
        assert one.counted("sent") == two.counted("received") == 0
        one.load.given(WORKER, 20, 2)
        await wait_until(lambda: two.share() == PeerShare(20, 2, 1))


async def test_redis_that_hangs_is_noticed(server: RedisServer) -> None:
    async with gateways(server.url, 1) as (one,):
        assert server._process is not None
        server._process.send_signal(signal.SIGSTOP)
        await wait_until(lambda: not one.load.up)
        server._process.send_signal(signal.SIGCONT)
        await wait_until(lambda: one.load.up)


async def test_malformed_messages_are_ignored_with_one_line(
    server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with gateways(server.url) as (one, two):
        client = redis.asyncio.from_url(server.url)
        for message in (b"\xff", b"{}", b"[1]"):
            await client.publish(decisions_channel(CLUSTER), message)
        await client.aclose()
        one.load.given(WORKER, 5, 1)
        await wait_until(lambda: two.share().num_sequences == 1)
        assert two.load.up
        lines = [r for r in caplog.records if "malformed" in r.message]
        assert len(lines) == 2  # one of each gateway
        assert all(record.levelno == logging.WARNING for record in lines)


async def test_a_gateway_that_is_alone_tells_nobody(server: RedisServer) -> None:
    async with gateways(server.url) as (one, two):
        one.alone = True
        one.load.given(WORKER, 100, 1)
        one.alone = False
        one.load.given(WORKER, 5, 1)
        await wait_until(lambda: two.share().num_sequences > 0)
        assert two.share() == PeerShare(5, 1, 1)


async def test_gateway_without_redis_from_the_start_shares_later(server: RedisServer) -> None:
    server.stop()
    one, two = (Gateway(server.url, f"gateway-{n}") for n in range(2))
    for gateway in (one, two):
        gateway.load.start()
    try:
        await asyncio.sleep(0.2)
        assert not one.load.up
        server.start()
        await wait_until(lambda: one.load.up and two.load.up)
        one.load.given(WORKER, 5, 1)
        await wait_until(lambda: two.share().num_sequences == 1)
    finally:
        for gateway in (one, two):
            await gateway.load.close()
