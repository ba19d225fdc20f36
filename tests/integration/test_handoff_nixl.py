"""NIXL's own troubles: reads that nobody can stop, agents that die, networks that are missing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
import psutil
import pytest

from baton.config import KvTransferConfig
from baton.errors import BatonError, ConfigurationError
from kv_transfer.keys import TransferKey
from kv_transfer.receiver import ReceiverState
from kv_transfer.transports import nixl, nixl_links, nixl_reader, ucx
from kv_transfer.transports.base import LinkError
from kv_transfer.transports.nixl_links import NixlPull, NixlPullLink, NixlServe
from tests.support.handoff import (
    LAYOUT,
    Decode,
    FaultsAt,
    PoolMemory,
    Prefill,
    PrefillProcess,
    key_between,
    sample,
    until,
)
from tests.support.transports import needs_nixl

AUTO = KvTransferConfig(attach_s=5, lease_s=5, operation_s=5)
NIXL = AUTO.model_copy(update={"transport": "nixl"})
SOURCE_BLOCKS = [7, 2, 9, 4]
BLOCKS = [3, 8, 1, 10]


class Gate:
    """Holds the copying thread before the range that comes after so many."""

    def __init__(self, *, after: int) -> None:
        self.reached = threading.Event()
        self.open = threading.Event()
        self._num_left = after

    def __call__(self) -> None:
        self._num_left -= 1
        if self._num_left == -1:
            self.reached.set()
            assert self.open.wait(20)


@pytest.fixture
def tcp(monkeypatch: pytest.MonkeyPatch) -> None:
    """UCX reads over TCP: over what one host shares it would copy out of a stopped process."""
    monkeypatch.setenv("UCX_TLS", "tcp,self")


@pytest.fixture
async def ends() -> AsyncIterator[contextlib.AsyncExitStack]:
    async with contextlib.AsyncExitStack() as stack:
        yield stack


async def prefill_in(ends: contextlib.AsyncExitStack, config: KvTransferConfig) -> Prefill:
    prefill = await Prefill.start(config)
    ends.push_async_callback(prefill.close)
    return prefill


async def decode_in(ends: contextlib.AsyncExitStack, *args: object, **kwargs: object) -> Decode:
    decode = await Decode.start(*args, **kwargs)  # type: ignore[arg-type]
    ends.push_async_callback(decode.close)
    return decode


async def half_read(
    ends: contextlib.AsyncExitStack,
    other: Prefill | None = None,
    config: KvTransferConfig = NIXL,
) -> tuple[PrefillProcess, Decode, TransferKey, Gate]:
    """Tokens [0, 8) have come from another process; the next 8 are about to be read."""
    gate = Gate(after=2 if other else 1)
    process = await PrefillProcess.start(config)
    decode = await decode_in(ends, config, faults=FaultsAt(decode_copy=gate))
    ends.push_async_callback(process.close)
    if other is not None:
        await hand_over(other, decode)
    key = key_between(process, decode, 9)
    decode.begin(key, process, start_token=0, num_tokens=16, block_ids=BLOCKS)
    await process.tell("offer", key, start_token=0, num_tokens=16)
    await process.tell("ready", key, end_token=8, block_ids=SOURCE_BLOCKS[:2])
    machine = decode.receiver._transfers[key].machine
    await until(lambda: machine._copied_tokens == 8)
    await process.tell("ready", key, end_token=16, block_ids=SOURCE_BLOCKS)
    await until(gate.reached.is_set)
    return process, decode, key, gate


async def stopped_read(
    ends: contextlib.AsyncExitStack, config: KvTransferConfig = NIXL
) -> tuple[PrefillProcess, Decode, TransferKey]:
    """The second read is posted, to a process that is stopped."""
    process, decode, key, gate = await half_read(ends, config=config)
    link = decode.receiver._transfers[key].link
    assert isinstance(link, NixlPullLink)
    process.stop()
    gate.open.set()
    await until(lambda: link._posted)
    return process, decode, key


async def hand_over(prefill: Prefill, decode: Decode, number: int = 1) -> None:
    key = key_between(prefill, decode, number)
    prefill.sender.offer(key, start_token=0, num_tokens=6)
    decode.begin(key, prefill, start_token=0, num_tokens=6, block_ids=[5, 6])
    prefill.compute(key, 6, [3, 0])
    await until(lambda: key in decode.ready and (key, "released") in prefill.freed)
    np.testing.assert_array_equal(decode.pool.tokens[5], prefill.pool.before[3])


# ---------------------------------------------------------------- reads that nobody can stop


@needs_nixl
@pytest.mark.usefixtures("tcp")
async def test_blocks_of_a_cancelled_read_stay_quarantined_while_bytes_can_still_come(
    ends: contextlib.AsyncExitStack,
) -> None:
    process, decode, key = await stopped_read(ends)
    machine = decode.receiver._transfers[key].machine
    decode.receiver.cancel(key)
    assert machine.state is ReceiverState.QUARANTINED
    with pytest.raises(TimeoutError):
        await until(lambda: decode.drained, within_s=0.3)
    np.testing.assert_array_equal(decode.pool.tokens[BLOCKS[2:]], decode.pool.before[BLOCKS[2:]])
    process.signal(signal.SIGCONT)
    await until(lambda: decode.drained == [key])
    source = PoolMemory(LAYOUT, seed=1).before
    np.testing.assert_array_equal(decode.pool.tokens[BLOCKS[2:]], source[SOURCE_BLOCKS[2:]])


@needs_nixl
@pytest.mark.usefixtures("tcp")
async def test_prefill_killed_amid_a_read_fails_the_transfer_and_drains_it(
    ends: contextlib.AsyncExitStack,
) -> None:
    process, decode, key = await stopped_read(ends)
    process.signal(signal.SIGKILL)
    await until(lambda: decode.drained == [key], within_s=8)
    assert decode.failed[key].retriable
    assert not decode.ready
    await hand_over(await prefill_in(ends, NIXL), decode)


@needs_nixl
@pytest.mark.usefixtures("tcp")
async def test_link_and_worker_are_not_closed_before_their_reads_have_ended(
    ends: contextlib.AsyncExitStack,
) -> None:
    """Letting go of an unfinished read over TCP makes UCX end the peer's process."""
    process, decode, key = await stopped_read(ends)
    link = decode.receiver._transfers[key].link
    assert link is not None
    closing = [asyncio.create_task(link.close()), asyncio.create_task(decode.close())]
    done, _ = await asyncio.wait(closing, timeout=0.3)
    assert not done
    process.signal(signal.SIGCONT)
    await asyncio.gather(*closing)
    assert decode.drained == [key]
    assert process.process.returncode is None


@needs_nixl
@pytest.mark.usefixtures("tcp")
async def test_read_that_does_not_end_loses_its_link_and_ends_with_the_agent(
    ends: contextlib.AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its peer goes on after it was given up; others are read from before and afterwards."""
    monkeypatch.setattr(nixl_reader, "_GIVE_UP_S", 3.0)
    other = await prefill_in(ends, NIXL)
    config = NIXL.model_copy(update={"operation_s": 1.0})
    process, decode, key = await stopped_read(ends, config)
    await until(lambda: key in decode.failed)
    assert "no read has ended in 1 s" in str(decode.failed[key])
    machine = decode.receiver._transfers[key].machine
    assert machine.state is ReceiverState.QUARANTINED
    await hand_over(other, decode)
    assert not decode.drained
    await until(lambda: decode.drained == [key], within_s=8)
    before = decode.pool.tokens[BLOCKS[2:]].copy()
    process.signal(signal.SIGCONT)
    await hand_over(other, decode, 2)
    await asyncio.sleep(0.5)
    np.testing.assert_array_equal(decode.pool.tokens[BLOCKS[2:]], before)


@needs_nixl
async def test_agent_whose_read_failed_is_read_from_again_by_the_next_link(
    ends: contextlib.AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill, decode = await prefill_in(ends, NIXL), await decode_in(ends, NIXL)
    await hand_over(prefill, decode)
    is_done, failures = nixl.Agent.is_done, [LinkError("failed by the test")]

    def fails_once(agent: nixl.Agent, handle: int) -> bool:
        done = is_done(agent, handle)
        if done and failures:
            raise failures.pop()
        return done

    monkeypatch.setattr(nixl.Agent, "is_done", fails_once)
    failing, again = key_between(prefill, decode, 2), key_between(prefill, decode, 3)
    on_failed = decode.receiver._on_failed

    def tries_again(key: TransferKey, error: BatonError) -> None:
        on_failed(key, error)
        if key == failing:
            offer(again, [7, 8])

    def offer(key: TransferKey, block_ids: list[int]) -> None:
        prefill.sender.offer(key, start_token=0, num_tokens=6)
        decode.begin(key, prefill, start_token=0, num_tokens=6, block_ids=block_ids)
        prefill.compute(key, 6, [3, 0])

    monkeypatch.setattr(decode.receiver, "_on_failed", tries_again)
    offer(failing, [5, 6])
    await until(lambda: again in decode.ready and (again, "released") in prefill.freed)
    assert "failed by the test" in str(decode.failed[failing])
    np.testing.assert_array_equal(decode.pool.tokens[7], prefill.pool.before[3])


@needs_nixl
async def test_answer_that_gets_lost_costs_a_link_seconds_and_no_transfer(
    ends: contextlib.AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_done, probe, lost = nixl.Agent.is_done, nixl.Agent.probe, []

    def loses_the_first(agent: nixl.Agent, *args: Any) -> int:
        handle = probe(agent, *args)
        if not lost:
            lost.append((agent, handle))
        return handle

    monkeypatch.setattr(nixl.Agent, "probe", loses_the_first)
    monkeypatch.setattr(
        nixl.Agent, "is_done", lambda agent, at: (agent, at) not in lost and is_done(agent, at)
    )
    prefill, decode = await prefill_in(ends, NIXL), await decode_in(ends, NIXL)
    await hand_over(prefill, decode)
    assert lost
    assert not decode.failed


@needs_nixl
@pytest.mark.usefixtures("tcp")
async def test_peer_that_answers_nothing_keeps_no_other_from_being_read(
    ends: contextlib.AsyncExitStack,
) -> None:
    process, decode = await PrefillProcess.start(NIXL), await decode_in(ends, NIXL)
    ends.push_async_callback(process.close)
    reader = decode.receiver._settings.transports["nixl"]._reader
    connecting = key_between(process, decode, 9)
    connect, asked = reader.connect, asyncio.Event()

    def stops(*args: Any, **kwargs: Any) -> None:
        process.stop()
        connect(*args, **kwargs)
        asked.set()

    reader.connect = stops
    decode.begin(connecting, process, start_token=0, num_tokens=16, block_ids=BLOCKS)
    await asyncio.wait_for(asked.wait(), 20)
    reader.connect = connect
    other = await prefill_in(ends, NIXL)
    await hand_over(other, decode)
    await until(lambda: decode.drained == [connecting])  # the agent was made anew meanwhile
    await hand_over(other, decode, 2)


@needs_nixl
async def test_read_in_doubt_ends_with_its_agent_and_other_peers_never_notice(
    ends: contextlib.AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one host a read from a dead process fails while it is posted."""
    doomed: list[PrefillProcess] = []
    close, read = nixl.Agent.close, nixl.Agent.read

    def read_from_the_dead(agent: nixl.Agent, *args: Any) -> int:
        for process in doomed:
            process.signal(signal.SIGKILL)
            # Its memory lives as long as the last of its threads, the first being a zombie by then.
            with contextlib.suppress(psutil.NoSuchProcess, FileNotFoundError):
                while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
                    time.sleep(0.001)
                while len(os.listdir(f"/proc/{process.pid}/task")) > 1:
                    time.sleep(0.001)
        doomed.clear()
        return read(agent, *args)

    monkeypatch.setattr(nixl.Agent, "read", read_from_the_dead)
    other = await prefill_in(ends, NIXL)
    process, decode, key, gate = await half_read(ends, other)
    (peer,) = [each for each in decode.receiver._peers.values() if each.epoch == other.epoch]
    link, closed_before_drained = peer.link, []

    def closes(agent: nixl.Agent) -> None:
        closed_before_drained.append(not decode.drained)
        close(agent)

    monkeypatch.setattr(nixl.Agent, "close", closes)
    doomed.append(process)
    gate.open.set()
    await until(lambda: decode.drained == [key], within_s=8)
    assert closed_before_drained == [True]
    assert decode.failed[key].retriable
    await hand_over(other, decode, 2)
    assert peer.link is link


@needs_nixl
def test_agent_that_something_refers_to_is_not_closed() -> None:
    agent = nixl.Agent(
        "referred to",
        layout=LAYOUT,
        memory=PoolMemory(LAYOUT, seed=1).memory,
        environment=ucx.environment("127.0.0.1", "any", {}),
        serves=False,
    )
    try:
        agent.read("nobody", np.zeros((1, 3), np.uint64), np.zeros((1, 3), np.uint64))
    except LinkError as error:
        kept = error
    assert "cannot read from the peer" in str(kept)
    referring = agent._agent.getLocalMD
    with pytest.raises(RuntimeError, match="something refers to NIXL's agent"):
        agent.close()
    agent._agent = referring.__self__
    del referring
    agent.close()  # though the error lives on, with the frames that it went through


@needs_nixl
async def test_stream_that_breaks_is_followed_by_a_link_to_the_same_agent(
    ends: contextlib.AsyncExitStack,
) -> None:
    prefill, decode = await prefill_in(ends, NIXL), await decode_in(ends, NIXL)
    await hand_over(prefill, decode)
    for number in range(2, 5):
        (connection,) = prefill.sender._servicer._connections
        (peer,) = decode.receiver._peers.values()
        link = peer.link
        connection.lose("broken by the test")
        # Both sides have to have noticed, or the loss would be the next transfer's.
        await until(lambda: not prefill.sender._servicer._connections)
        await until(lambda peer=peer, link=link: peer.link is not link)  # type: ignore[misc]
        await hand_over(prefill, decode, number)


# ------------------------------------------------------------------- which network, or none


@needs_nixl
async def test_ucx_listens_on_the_loopback_address_alone(ends: contextlib.AsyncExitStack) -> None:
    process = psutil.Process()

    def listening() -> set[tuple[str, int]]:
        found = process.net_connections(kind="inet")
        return {tuple(each.laddr) for each in found if each.status == psutil.CONN_LISTEN}

    before = listening()
    agent = nixl.Agent(
        "listens",
        layout=LAYOUT,
        memory=PoolMemory(LAYOUT, seed=1).memory,
        environment=ucx.environment("127.0.0.1", "any", {}),
        serves=True,
    )
    ends.callback(agent.close)
    opened = listening() - before
    assert opened
    assert {host for host, _ in opened} == {"127.0.0.1"}


async def test_forced_nixl_that_is_not_installed_refuses_to_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(nixl, "PACKAGES", ("no_such_package",))
    for start in (Prefill.start, Decode.start):
        with pytest.raises(ConfigurationError, match=r"pip install 'baton\[nixl\]'"):
            await start(NIXL)


async def test_required_rdma_that_is_missing_refuses_to_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = AUTO.model_copy(update={"network": "rdma"})
    monkeypatch.setattr(nixl, "PACKAGES", ("no_such_package",))
    for start in (Prefill.start, Decode.start):
        with pytest.raises(ConfigurationError, match="needs the package nixl-cu12"):
            await start(config)
    monkeypatch.setattr(nixl_links, "installed", lambda: True)
    monkeypatch.setattr(ucx, "rdma_ports", lambda _: [])
    for start in (Prefill.start, Decode.start):
        with pytest.raises(ConfigurationError, match="no port that is up"):
            await start(config)


@needs_nixl
async def test_two_hosts_use_nixl_where_it_is_installed(
    ends: contextlib.AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill = await prefill_in(ends, AUTO)
    monkeypatch.setattr("kv_transfer.client.host_id", lambda: "elsewhere")
    decode = await decode_in(ends, AUTO)
    await hand_over(prefill, decode)
    assert moved(decode, "nixl")


def fail_to_connect(monkeypatch: pytest.MonkeyPatch) -> None:
    async def connect(*_: object, **__: object) -> None:
        raise LinkError("not reachable")

    monkeypatch.setattr(NixlPull, "connect", connect)


def fail_to_open(monkeypatch: pytest.MonkeyPatch) -> None:
    async def open_(*_: object, **__: object) -> None:
        raise LinkError("no device")

    monkeypatch.setattr(NixlServe, "open", open_)


@pytest.mark.parametrize("fails", [fail_to_connect, fail_to_open])
async def test_nixl_that_does_not_work_gives_way_to_gloo_unless_rdma_is_required(
    ends: contextlib.AsyncExitStack,
    monkeypatch: pytest.MonkeyPatch,
    fails: Callable[[pytest.MonkeyPatch], None],
) -> None:
    monkeypatch.setattr(nixl_links, "installed", lambda: True)
    monkeypatch.setattr("kv_transfer.client.host_id", lambda: "elsewhere")
    fails(monkeypatch)
    decode = await decode_in(ends, AUTO)
    await hand_over(await prefill_in(ends, AUTO), decode)
    assert moved(decode, "gloo")

    monkeypatch.setattr(nixl_links, "check", lambda *_: None)
    monkeypatch.setattr("kv_transfer.handshake.required_transports", lambda _: ())
    rdma = AUTO.model_copy(update={"network": "rdma", "attach_s": 0.5})
    strict, prefill = await decode_in(ends, rdma), await prefill_in(ends, rdma)
    key = key_between(prefill, strict)
    prefill.sender.offer(key, start_token=0, num_tokens=6)
    strict.begin(key, prefill, start_token=0, num_tokens=6, block_ids=[5, 6])
    prefill.compute(key, 6, [3, 0])
    await until(lambda: strict.drained or strict.ready)
    assert strict.drained == [key]
    np.testing.assert_array_equal(strict.pool.tokens, strict.pool.before)


def moved(decode: Decode, transport: str) -> bool:
    name = "baton_kv_handoff_bytes_total"
    return sample(decode.registry, name, transport=transport) == 6 * LAYOUT.token_bytes
