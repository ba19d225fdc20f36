"""Who may pull from whom: secrets, versions, transports, epochs, and many peers at once."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from baton.config import KvTransferConfig, SessionConfig
from baton.errors import BatonError, IncompatiblePeerError
from baton.faults import Faults
from baton.kv_layout import KvLayout
from baton.protocol import PROTOCOL_VERSION
from kv_transfer import handshake, peer
from kv_transfer.blocks import PoolView
from kv_transfer.keys import TransferKey
from kv_transfer.memory import KvMemory
from kv_transfer.transports import memory_socket, nixl_links, one_sided, shared_memory
from kv_transfer.transports.base import LinkError, UnansweredError
from kv_transfer.transports.rendezvous import Rendezvous
from kv_transfer.v1 import transfer_pb2 as pb
from tests.support import handoff
from tests.support.handoff import (
    LAYOUT,
    SECRET,
    Decode,
    Prefill,
    digest_of,
    key_between,
    sample,
    until,
)
from tests.support.transports import TRANSPORTS

AUTO = KvTransferConfig(attach_s=5, lease_s=5, operation_s=2)
SHARED = AUTO.model_copy(update={"transport": "shared_memory"})
GLOO = AUTO.model_copy(update={"transport": "gloo"})


@pytest.fixture
async def ends() -> AsyncIterator[contextlib.AsyncExitStack]:
    async with contextlib.AsyncExitStack() as stack:
        yield stack


async def prefill_in(ends: contextlib.AsyncExitStack, *args: object, **kwargs: object) -> Prefill:
    prefill = await Prefill.start(*args, **kwargs)  # type: ignore[arg-type]
    ends.push_async_callback(prefill.close)
    return prefill


async def decode_in(ends: contextlib.AsyncExitStack, *args: object, **kwargs: object) -> Decode:
    decode = await Decode.start(*args, **kwargs)  # type: ignore[arg-type]
    ends.push_async_callback(decode.close)
    return decode


async def hand_over(prefill: Prefill, decode: Decode, number: int = 1) -> TransferKey:
    key = key_between(prefill, decode, number)
    prefill.sender.offer(key, start_token=0, num_tokens=6)
    decode.begin(key, prefill, start_token=0, num_tokens=6, block_ids=[1, 2])
    prefill.compute(key, 6, [3, 0])
    await until(lambda: key in decode.ready and (key, "released") in prefill.freed)
    np.testing.assert_array_equal(decode.pool.tokens[1], prefill.pool.before[3])
    return key


async def refusal(prefill: Prefill, decode: Decode) -> BatonError:
    """The error of a transfer that must fail at once, long before ``attach_s``."""
    key = key_between(prefill, decode)
    prefill.sender.offer(key, start_token=0, num_tokens=6)
    decode.begin(key, prefill, start_token=0, num_tokens=6, block_ids=[1, 2])
    await until(lambda: decode.drained == [key], within_s=4)
    assert not decode.ready
    np.testing.assert_array_equal(decode.pool.tokens, decode.pool.before)
    error = decode.failed[key]
    assert error.retriable
    return error


# ---------------------------------------------------------------------------- refusals


async def test_wrong_secret_is_refused(ends: contextlib.AsyncExitStack) -> None:
    prefill = await prefill_in(ends, AUTO)
    error = await refusal(prefill, await decode_in(ends, AUTO, secret="another"))
    assert "secret" in error.message
    assert not prefill.sender._servicer._connections


async def test_other_weights_are_refused(ends: contextlib.AsyncExitStack) -> None:
    prefill = await prefill_in(ends, AUTO)
    decode = await decode_in(ends, AUTO, digest=digest_of(LAYOUT, weights="w2"))
    error = await refusal(prefill, decode)
    assert isinstance(error, IncompatiblePeerError)
    assert "digest" in error.message
    assert "weights revision" in error.message


async def test_another_rollout_generation_is_refused(ends: contextlib.AsyncExitStack) -> None:
    prefill = await prefill_in(ends, AUTO)
    error = await refusal(prefill, await decode_in(ends, AUTO, generation="1"))
    assert "rollout generation differs: 0 here, 1 at the peer" in error.message


async def test_another_protocol_version_is_refused_first(
    ends: contextlib.AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    def newer(*args: object) -> object:
        hello = make_hello(*args)  # type: ignore[arg-type]
        hello.protocol_version = 9
        return hello

    make_hello = handshake.make_hello
    prefill = await prefill_in(ends, AUTO)
    decode = await decode_in(ends, AUTO, generation="1", digest=b"x")
    monkeypatch.setattr(handshake, "make_hello", newer)
    error = await refusal(prefill, decode)
    differs = f"protocol version differs: {PROTOCOL_VERSION} here, 9 at the peer"
    assert differs in error.message


async def test_another_layout_under_an_equal_digest_is_refused(
    ends: contextlib.AsyncExitStack,
) -> None:
    prefill = await prefill_in(ends, AUTO, digest=b"same")
    layout = replace(LAYOUT, num_kv_heads=LAYOUT.num_kv_heads + 1)
    error = await refusal(prefill, await decode_in(ends, AUTO, digest=b"same", layout=layout))
    assert "KV layout (num_kv_heads) differs: 4 here, 3 at the peer" in error.message


async def test_transfer_of_another_decode_process_is_refused(
    ends: contextlib.AsyncExitStack,
) -> None:
    prefill, decode = await prefill_in(ends, AUTO), await decode_in(ends, AUTO)
    key = replace(key_between(prefill, decode), destination_epoch=b"old")
    decode.begin(key, prefill, start_token=0, num_tokens=6, block_ids=[1, 2])
    assert not decode.failed, "callbacks come later"
    await until(lambda: decode.drained == [key])
    assert "epoch differs" in decode.failed[key].message


async def test_refused_peer_is_asked_again_by_the_next_transfer(
    ends: contextlib.AsyncExitStack,
) -> None:
    """Nothing is remembered of a refusal: the peer may have been replaced."""
    prefill = await prefill_in(ends, AUTO)
    decode = await decode_in(ends, AUTO)
    stale = replace(key_between(prefill, decode), source_epoch=b"old")
    decode.begin(stale, prefill, start_token=0, num_tokens=6, block_ids=[1, 2])
    await until(lambda: decode.drained == [stale])
    assert "restarted: its epoch differs" in decode.failed[stale].message
    await hand_over(prefill, decode)


# -------------------------------------------------------------------------- transports


async def test_one_host_shares_memory(ends: contextlib.AsyncExitStack) -> None:
    decode = await decode_in(ends, AUTO)
    await hand_over(await prefill_in(ends, AUTO), decode)
    name = "baton_kv_handoff_bytes_total"
    assert sample(decode.registry, name, transport="shared_memory") == 6 * LAYOUT.token_bytes


async def test_two_hosts_use_gloo_where_nixl_is_not_installed(
    ends: contextlib.AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nixl_links, "installed", lambda: False)
    prefill = await prefill_in(ends, AUTO)
    monkeypatch.setattr("kv_transfer.client.host_id", lambda: "elsewhere")
    decode = await decode_in(ends, AUTO)
    await hand_over(prefill, decode)
    name = "baton_kv_handoff_bytes_total"
    assert sample(decode.registry, name, transport="gloo") == 6 * LAYOUT.token_bytes


async def test_shared_memory_that_does_not_work_gives_way_to_the_next(
    ends: contextlib.AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nixl_links, "installed", lambda: False)

    async def fails(*_: object, **__: object) -> None:
        raise LinkError("no such socket")

    monkeypatch.setattr(shared_memory, "fetch_memory", fails)
    decode = await decode_in(ends, AUTO)
    await hand_over(await prefill_in(ends, AUTO), decode)
    name = "baton_kv_handoff_bytes_total"
    assert sample(decode.registry, name, transport="gloo") == 6 * LAYOUT.token_bytes
    forced = await decode_in(ends, SHARED)
    error = await refusal(await prefill_in(ends, SHARED), forced)
    assert "shared_memory does not work: no such socket" in error.message


async def test_a_transport_that_failed_is_tried_again_after_a_while(
    ends: contextlib.AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a stream that is busy too, once no transfer is under way."""
    monkeypatch.setattr(nixl_links, "installed", lambda: False)
    fetch_memory, tries = shared_memory.fetch_memory, []

    async def fails_once(*args: object, **kwargs: object) -> object:
        tries.append(args)
        if len(tries) == 1:
            raise LinkError("the machine was busy")
        return await fetch_memory(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(shared_memory, "fetch_memory", fails_once)
    prefill, decode = await prefill_in(ends, AUTO), await decode_in(ends, AUTO)
    name = "baton_kv_handoff_bytes_total"
    for number in (1, 2):
        await hand_over(prefill, decode, number)
    assert sample(decode.registry, name, transport="gloo") == 2 * 6 * LAYOUT.token_bytes
    [own] = decode.receiver._peers.values()
    for failure in own._usable._failures.values():
        failure.until = 0.0
    await hand_over(prefill, decode, 3)  # over what there is; then it is let go
    await until(lambda: not decode.receiver._peers)
    await hand_over(prefill, decode, 4)
    assert sample(decode.registry, name, transport="shared_memory") == 6 * LAYOUT.token_bytes


@pytest.mark.parametrize("own", [SHARED, AUTO], ids=["forced on both sides", "forced at the peer"])
async def test_peer_that_is_busy_is_asked_again_where_no_other_transport_will_do(
    ends: contextlib.AsyncExitStack, monkeypatch: pytest.MonkeyPatch, own: KvTransferConfig
) -> None:
    fetch_memory, tries = shared_memory.fetch_memory, []

    async def busy_at_first(*args: object, **kwargs: object) -> object:
        tries.append(args)
        if len(tries) == 1:
            raise UnansweredError("the machine was busy")
        return await fetch_memory(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(shared_memory, "fetch_memory", busy_at_first)
    prefill, decode = await prefill_in(ends, SHARED), await decode_in(ends, own)
    await hand_over(prefill, decode)
    assert len(tries) == 2


async def test_memory_that_nobody_came_to_map_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its handshake was given up while the thread that maps was at another's."""
    ours, theirs = socket.socketpair()
    descriptor = os.open("/dev/null", os.O_RDONLY)

    async def fetched(*_: object, **__: object) -> tuple[int, socket.socket]:
        return descriptor, ours

    monkeypatch.setattr(shared_memory, "fetch_memory", fetched)
    memory = KvMemory(LAYOUT.num_bytes)
    pool = PoolView(LAYOUT, memory.buffer)
    pull = shared_memory.SharedMemoryPull(
        pool=pool, secret=SECRET, timeout_s=5, faults=Faults(None, "decode-0")
    )
    offered = pb.PeerWelcome(shared_memory=pb.SharedMemory(num_bytes=LAYOUT.num_bytes))
    go_on = threading.Event()
    pull._mapper.submit(go_on.wait, 10)
    try:
        connecting = asyncio.create_task(
            pull.connect(offered, LAYOUT, lambda _: None, Rendezvous(lambda *_: None))
        )
        await asyncio.sleep(0.05)
        connecting.cancel()
        await asyncio.wait([connecting])
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)
        assert ours.fileno() == -1
    finally:
        go_on.set()
        await pull.close()
        theirs.close()
        memory.close()


async def test_forced_transports_that_differ_are_refused(ends: contextlib.AsyncExitStack) -> None:
    error = await refusal(await prefill_in(ends, SHARED), await decode_in(ends, GLOO))
    assert "gloo: prefill is set to shared_memory" in error.message


async def test_forced_shared_memory_between_hosts_is_refused(
    ends: contextlib.AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill = await prefill_in(ends, SHARED)
    monkeypatch.setattr("kv_transfer.client.host_id", lambda: "elsewhere")
    error = await refusal(prefill, await decode_in(ends, AUTO))
    assert "share no host" in error.message


# ----------------------------------------------------------------------- memory socket


async def test_memory_is_not_passed_without_proof_of_the_secret(
    ends: contextlib.AsyncExitStack,
) -> None:
    prefill = await prefill_in(ends, SHARED)
    path = prefill.sender._servicer._transports["shared_memory"]._socket.path  # type: ignore[attr-defined]
    with pytest.raises(LinkError, match="another cluster secret"):
        await memory_socket.fetch_memory(path, secret="another", timeout_s=5)
    descriptor, connection = await memory_socket.fetch_memory(path, secret=SECRET, timeout_s=5)
    connection.close()
    socket.close(descriptor)


async def test_silent_peer_of_the_memory_socket_times_out(
    ends: contextlib.AsyncExitStack,
) -> None:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind("\0baton-test-silent")
    listener.listen()
    with contextlib.closing(listener), pytest.raises(LinkError, match="did not answer"):
        await memory_socket.fetch_memory("@baton-test-silent", secret=SECRET, timeout_s=0.1)


# ------------------------------------------------------------------------- many streams


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_32_decode_workers_shake_hands_at_once(
    ends: contextlib.AsyncExitStack, transport: str
) -> None:
    layout = KvLayout(
        num_blocks=2, num_kv_heads=1, num_layers=1, block_size=2, head_dim=4, dtype="bfloat16"
    )
    update = {"transport": transport, "attach_s": 20, "operation_s": 20}
    config = AUTO.model_copy(update=update)
    prefill = await prefill_in(ends, config, layout=layout)
    decodes = [await decode_in(ends, config, layout=layout) for _ in range(32)]
    for decode in decodes:
        key = key_between(prefill, decode)
        prefill.sender.offer(key, start_token=0, num_tokens=3)
        decode.begin(key, prefill, start_token=0, num_tokens=3, block_ids=[1, 0])
        prefill.compute(key, 3, [0, 1])
    await until(lambda: all(decode.ready for decode in decodes))
    await until(lambda: len(prefill.freed) == 32)
    for decode in decodes:
        np.testing.assert_array_equal(decode.pool.tokens[1], prefill.pool.before[0])
        np.testing.assert_array_equal(decode.pool.tokens[0, :, :1], prefill.pool.before[1, :, :1])


async def test_silent_peer_holds_up_no_other(ends: contextlib.AsyncExitStack) -> None:
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as silent:
        decode = await decode_in(ends, AUTO)
        prefill = await prefill_in(ends, AUTO)
        stuck = replace(key_between(prefill, decode, 2), source_epoch=b"silent")
        decode.receiver.begin(
            stuck,
            address=f"127.0.0.1:{silent.getsockname()[1]}",
            source_worker_id="prefill-1",
            start_token=0,
            num_tokens=6,
            block_ids=[5, 6],
        )
        await hand_over(prefill, decode)
        assert stuck not in decode.failed
        decode.receiver.cancel(stuck)
        await until(lambda: decode.drained == [stuck])


async def test_link_that_opens_while_its_worker_leaves_is_closed_before_its_transport(
    ends: contextlib.AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    opening, go_on, closed = asyncio.Event(), asyncio.Event(), []
    serve, link = shared_memory.SharedMemoryServe, one_sided.OneSidedServeLink
    open_, close_transport, close_link = serve.open, serve.close, link.close

    async def opens_late(*args: Any) -> object:
        opening.set()
        await go_on.wait()
        return await open_(*args)

    async def closes_transport(transport: shared_memory.SharedMemoryServe) -> None:
        closed.append("transport")
        await close_transport(transport)

    async def closes_link(own: one_sided.OneSidedServeLink) -> None:
        closed.append("link")
        await close_link(own)

    monkeypatch.setattr(serve, "open", opens_late)
    monkeypatch.setattr(serve, "close", closes_transport)
    monkeypatch.setattr(link, "close", closes_link)
    prefill, decode = await Prefill.start(SHARED), await decode_in(ends, SHARED)
    key = key_between(prefill, decode)
    decode.begin(key, prefill, start_token=0, num_tokens=6, block_ids=[1, 2])
    await asyncio.wait_for(opening.wait(), 5)
    leaving = asyncio.create_task(prefill.close())
    await asyncio.sleep(0.1)
    assert not closed
    go_on.set()
    await leaving
    assert closed == ["link", "transport"]


async def test_peer_that_dies_in_the_handshake_is_tried_again(
    ends: contextlib.AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill, decode = await prefill_in(ends, AUTO), await decode_in(ends, AUTO)
    tries = []

    async def dies_once(*args: object, **kwargs: object) -> object:
        tries.append(args)
        if len(tries) == 1:
            await decode_dies()
        return await connect(*args, **kwargs)  # type: ignore[arg-type]

    async def decode_dies() -> None:
        (connection,) = prefill.sender._servicer._connections
        connection.lose("killed by the test")
        await asyncio.sleep(0.05)
        raise peer.TransferError("the stream broke")

    connect = shared_memory.SharedMemoryPull.connect
    monkeypatch.setattr(shared_memory.SharedMemoryPull, "connect", dies_once)
    await hand_over(prefill, decode)
    assert len(tries) == 2


async def test_idle_stream_is_let_go_and_opened_again(ends: contextlib.AsyncExitStack) -> None:
    prefill, decode = await prefill_in(ends, AUTO), await decode_in(ends, AUTO, idle_s=0.05)
    await hand_over(prefill, decode)
    await until(lambda: not decode.receiver._peers)
    await until(lambda: not prefill.sender._servicer._connections)
    await hand_over(prefill, decode, 2)


async def test_quiet_stream_outlives_its_keep_alive_pings(
    ends: contextlib.AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that finds pings too frequent ends the connection after a few."""
    monkeypatch.setattr(handoff, "SESSION", SessionConfig(keepalive_s=0.1))
    prefill, decode = await prefill_in(ends, AUTO), await decode_in(ends, AUTO)
    await hand_over(prefill, decode)
    (before,) = decode.receiver._peers.values()
    await asyncio.sleep(3.5)
    await hand_over(prefill, decode, 2)
    assert list(decode.receiver._peers.values()) == [before]
