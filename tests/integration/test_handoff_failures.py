"""Hand-offs that fail: cancelled, aborted, expired, or with a peer that dies or hangs."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from baton.config import KvTransferConfig
from baton.errors import (
    CancelledError,
    DeadlineExceededError,
    InternalError,
    LeaseExpiredError,
    TransferError,
)
from kv_transfer.keys import TransferKey
from kv_transfer.receiver import ReceiverState
from kv_transfer.service import KvSender
from kv_transfer.transports.gloo_links import GlooPullLink
from kv_transfer.v1 import transfer_pb2 as pb
from tests.support.belongings import kv_memories
from tests.support.handoff import (
    Decode,
    FaultsAt,
    Prefill,
    PrefillProcess,
    key_between,
    sample,
    until,
)
from tests.support.transports import TRANSPORTS, needs_nixl

SOURCE_BLOCKS = [7, 2, 9, 4, 0]
BLOCKS = [3, 8, 1, 10, 5]
NUM_TOKENS = 18


@pytest.fixture(params=TRANSPORTS)
def config(request: pytest.FixtureRequest) -> KvTransferConfig:
    return KvTransferConfig(transport=request.param, attach_s=5, lease_s=5, operation_s=2)


class Gate:
    """Holds a thread at a fault point until the test lets it go."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.open = threading.Event()

    def __call__(self) -> None:
        self.reached.set()
        assert self.open.wait(20)


def second(gate: Gate) -> Callable[[], None]:
    """The gate for the second range that is copied, and for no other."""
    actions = iter([lambda: None, gate])
    return lambda: next(actions, lambda: None)()


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
async def pair(config: KvTransferConfig, gate: Gate) -> AsyncIterator[tuple[Prefill, Decode]]:
    """The decode side stops before it copies the range that begins at token 16."""
    prefill = await Prefill.start(config)
    decode = await Decode.start(config, faults=FaultsAt(decode_copy=second(gate)))
    yield prefill, decode
    gate.open.set()
    await decode.close()
    await prefill.close()


def begin(prefill: Prefill, decode: Decode, number: int = 1) -> TransferKey:
    key = key_between(prefill, decode, number)
    decode.begin(key, prefill, start_token=0, num_tokens=NUM_TOKENS, block_ids=BLOCKS)
    return key


async def attached(prefill: Prefill, decode: Decode) -> TransferKey:
    """A transfer that prefill computes and decode waits for."""
    key = begin(prefill, decode)
    prefill.sender.offer(key, start_token=0, num_tokens=NUM_TOKENS)
    await until(lambda: prefill.sender._offers[key].machine.attached)
    return key


def state_of(decode: Decode, key: TransferKey) -> ReceiverState:
    return decode.receiver._transfers[key].machine.state


async def works_again(prefill: Prefill, decode: Decode) -> None:
    """The same pair moves another transfer into the same blocks."""
    key = begin(prefill, decode, 99)
    prefill.sender.offer(key, start_token=0, num_tokens=NUM_TOKENS)
    prefill.compute(key, NUM_TOKENS, SOURCE_BLOCKS)
    await until(lambda: key in decode.ready and (key, "released") in prefill.freed)
    np.testing.assert_array_equal(decode.pool.tokens[BLOCKS[:4]], prefill.pool.before[[7, 2, 9, 4]])


# ------------------------------------------------------------------------------ cancel


async def connecting(prefill: Prefill, decode: Decode, key: TransferKey, gate: Gate) -> None:
    assert state_of(decode, key) is ReceiverState.RESERVED


async def unoffered(prefill: Prefill, decode: Decode, key: TransferKey, gate: Gate) -> None:
    await until(lambda: prefill.sender._parked)


async def computing(prefill: Prefill, decode: Decode, key: TransferKey, gate: Gate) -> None:
    await unoffered(prefill, decode, key, gate)
    prefill.sender.offer(key, start_token=0, num_tokens=NUM_TOKENS)
    prefill.sender.ready(key, 16, SOURCE_BLOCKS)
    machine = decode.receiver._transfers[key].machine
    await until(lambda: machine._copied_tokens == 16)


async def copying(prefill: Prefill, decode: Decode, key: TransferKey, gate: Gate) -> None:
    await computing(prefill, decode, key, gate)
    prefill.compute(key, NUM_TOKENS, SOURCE_BLOCKS)
    await until(gate.reached.is_set)


@pytest.mark.parametrize("reach", [connecting, unoffered, computing, copying])
async def test_cancel_drains_decode_and_frees_prefill(
    pair: tuple[Prefill, Decode],
    gate: Gate,
    reach: Callable[[Prefill, Decode, TransferKey, Gate], Awaitable[None]],
) -> None:
    prefill, decode = pair
    key = begin(prefill, decode)
    await reach(prefill, decode, key, gate)
    decode.receiver.cancel(key)
    decode.receiver.cancel(key)
    assert not decode.drained, "callbacks come later"
    if reach is copying:
        await asyncio.sleep(0)
        assert not decode.drained, "the copy is still at work"
        gate.open.set()
    await until(lambda: decode.drained == [key])
    if reach in (computing, copying):
        await until(lambda: prefill.freed == [(key, "abandoned")])
    await until(lambda: not prefill.sender._parked)
    last = BLOCKS[4]
    np.testing.assert_array_equal(decode.pool.tokens[last], decode.pool.before[last])
    gate.open.set()
    await works_again(prefill, decode)
    assert decode.drained == [key]
    assert not decode.failed
    assert key not in decode.ready
    assert sample(decode.registry, "baton_kv_handoffs_total", outcome="cancelled") == 1


async def test_cancel_while_release_is_unanswered(config: KvTransferConfig) -> None:
    answer = asyncio.Event()
    prefill = await Prefill.start(config, faults=FaultsAt(prefill_released=answer.wait))
    decode = await Decode.start(config)
    key = begin(prefill, decode)
    prefill.sender.offer(key, start_token=0, num_tokens=NUM_TOKENS)
    prefill.compute(key, NUM_TOKENS, SOURCE_BLOCKS)
    await until(lambda: state_of(decode, key) is ReceiverState.COMMITTING and prefill.freed)
    decode.receiver.cancel(key)
    answer.set()
    await until(lambda: decode.drained == [key])
    assert prefill.freed == [(key, "released")]
    await works_again(prefill, decode)
    assert key not in decode.ready
    await decode.close()
    await prefill.close()


# --------------------------------------------------------------------- abort and expiry


async def test_abort_reaches_decode_with_its_error(pair: tuple[Prefill, Decode]) -> None:
    prefill, decode = pair
    key = begin(prefill, decode)
    prefill.sender.offer(key, start_token=0, num_tokens=NUM_TOKENS)
    await until(lambda: state_of(decode, key) is ReceiverState.RECEIVING)
    prefill.sender.abort(key, DeadlineExceededError("too late"))
    await until(lambda: decode.drained == [key])
    assert isinstance(decode.failed[key], DeadlineExceededError)
    assert decode.failed[key].message == "too late"
    assert prefill.freed == [(key, "aborted")]


async def test_cancel_on_prefill_fails_for_who_waits_on_decode_and_counts_as_cancelled(
    pair: tuple[Prefill, Decode],
) -> None:
    prefill, decode = pair
    key = begin(prefill, decode)
    prefill.sender.offer(key, start_token=0, num_tokens=NUM_TOKENS)
    await until(lambda: state_of(decode, key) is ReceiverState.RECEIVING)
    prefill.sender.abort(key, CancelledError("the gateway has gone"))
    await until(lambda: decode.drained == [key])
    assert type(decode.failed[key]) is TransferError
    assert decode.failed[key].retriable
    assert "the gateway has gone" in decode.failed[key].message
    assert sample(decode.registry, "baton_kv_handoffs_total", outcome="cancelled") == 1
    assert not sample(decode.registry, "baton_kv_handoffs_total", outcome="transfer_failed")


async def test_attach_after_an_abort_learns_of_it(pair: tuple[Prefill, Decode]) -> None:
    prefill, decode = pair
    key = key_between(prefill, decode)
    prefill.sender.offer(key, start_token=0, num_tokens=NUM_TOKENS)
    prefill.sender.abort(key, DeadlineExceededError("too late"))
    assert not prefill.freed, "callbacks come later"
    await until(lambda: prefill.freed == [(key, "aborted")])
    begin(prefill, decode)
    await until(lambda: decode.drained == [key])
    assert isinstance(decode.failed[key], DeadlineExceededError)


async def test_different_views_of_the_held_prefix_fail(pair: tuple[Prefill, Decode]) -> None:
    prefill, decode = pair
    key = begin(prefill, decode)
    prefill.sender.offer(key, start_token=4, num_tokens=NUM_TOKENS)
    await until(lambda: decode.drained == [key])
    assert "4 tokens" in str(decode.failed[key])
    assert prefill.freed == [(key, "aborted")]


async def test_offer_that_nobody_attaches_to_expires(config: KvTransferConfig) -> None:
    config = config.model_copy(update={"attach_s": 0.2})
    prefill, decode = await Prefill.start(config), await Decode.start(config)
    key = key_between(prefill, decode)
    prefill.sender.offer(key, start_token=0, num_tokens=4)
    prefill.compute(key, 4, SOURCE_BLOCKS[:1])
    await until(lambda: prefill.freed == [(key, "lease_expired")])
    await until(lambda: not prefill.sender._offers)
    await decode.close()
    await prefill.close()


async def test_attach_that_nobody_offers_for_fails(config: KvTransferConfig) -> None:
    prefill = await Prefill.start(config.model_copy(update={"attach_s": 0.2}))
    decode = await Decode.start(config)
    key = begin(prefill, decode)
    await until(lambda: decode.drained == [key])
    assert "was not offered" in str(decode.failed[key])
    assert not prefill.sender._parked
    await decode.close()
    await prefill.close()


async def test_copy_that_outlasts_the_lease_is_discarded(config: KvTransferConfig) -> None:
    """A stalled receiver renews nothing; its blocks are good for nobody afterwards."""
    prefill = await Prefill.start(config.model_copy(update={"operation_s": 5}))
    config = config.model_copy(update={"lease_s": 1.5, "operation_s": 5})
    gate = Gate()
    decode = await Decode.start(config, faults=FaultsAt(decode_copy=gate))
    key = await attached(prefill, decode)
    prefill.compute(key, NUM_TOKENS, SOURCE_BLOCKS)
    await until(gate.reached.is_set)
    transfer = decode.receiver._transfers[key]
    # The last message: another one would start the clock again.
    await until(lambda: transfer.machine._commit is not None)
    assert transfer.timer is not None
    transfer.timer.cancel()
    await until(lambda: prefill.freed == [(key, "lease_expired")])
    await until(lambda: key in decode.failed)
    assert isinstance(decode.failed[key], LeaseExpiredError)
    assert not decode.drained
    gate.open.set()
    await until(lambda: decode.drained == [key])
    assert key not in decode.ready
    await decode.close()
    await prefill.close()


async def test_waiting_transfer_renews_its_lease(config: KvTransferConfig) -> None:
    config = config.model_copy(update={"lease_s": 0.3, "operation_s": 5})
    gate = Gate()
    prefill = await Prefill.start(config)
    decode = await Decode.start(config, faults=FaultsAt(decode_copy=gate))
    key = await attached(prefill, decode)
    prefill.compute(key, NUM_TOKENS, SOURCE_BLOCKS)
    await until(gate.reached.is_set)
    machine = prefill.sender._offers[key].machine
    first = machine._lease_until
    await until(lambda: machine._lease_until > first + 0.6)  # two leases later it is still held
    gate.open.set()
    await until(lambda: key in decode.ready and prefill.freed == [(key, "released")])
    await decode.close()
    await prefill.close()


@pytest.mark.parametrize("num_peers", [1, 2])
async def test_one_that_waits_for_copies_before_its_own_is_not_stuck(
    config: KvTransferConfig, num_peers: int
) -> None:
    config = config.model_copy(update={"operation_s": 1.5})
    slow = FaultsAt(decode_copy=lambda: time.sleep(0.5))
    prefill, decode = await Prefill.start(config), await Decode.start(config, faults=slow)
    other = await Prefill.start(config) if num_peers == 2 else prefill
    first, second = key_between(prefill, decode, 0), key_between(other, decode, 1)
    for peer, key, blocks in ((prefill, first, BLOCKS[:4]), (other, second, BLOCKS[4:])):
        num_tokens = 4 * len(blocks)
        peer.sender.offer(key, start_token=0, num_tokens=num_tokens)
        decode.begin(key, peer, start_token=0, num_tokens=num_tokens, block_ids=blocks)
    await until(lambda: state_of(decode, second) is ReceiverState.RECEIVING)
    for num_tokens in (4, 8, 12, 16):  # a copy each
        prefill.sender.ready(first, num_tokens, SOURCE_BLOCKS[: num_tokens // 4])
    prefill.sender.commit(first, 77, 0)
    copies = decode.receiver._transfers[first].machine
    await until(lambda: copies._announced_end == 16)
    other.compute(second, 4, SOURCE_BLOCKS[:1])
    await until(lambda: len(decode.ready) + len(decode.failed) == 2)
    assert not decode.failed
    await decode.close()
    await prefill.close()
    if other is not prefill:
        await other.close()


@pytest.mark.parametrize(
    "config", ["shared_memory", pytest.param("nixl", marks=needs_nixl)], indirect=True
)
@pytest.mark.parametrize("source_blocks", [[13, 2, 9, 4, 0], [7, 2, 9, 4, 2**31 - 1]], ids=str)
async def test_blocks_that_prefill_does_not_have_fail_the_transfer_and_no_more(
    pair: tuple[Prefill, Decode], gate: Gate, source_blocks: list[int]
) -> None:
    gate.open.set()
    prefill, decode = pair
    key = await attached(prefill, decode)
    prefill.sender.ready(key, NUM_TOKENS, source_blocks)
    await until(lambda: decode.drained == [key])
    assert "the copy failed: IndexError" in str(decode.failed[key])
    prefill.sender.abort(key, TransferError("the test is over"))
    await works_again(prefill, decode)


async def test_prefill_of_another_length_fails(pair: tuple[Prefill, Decode]) -> None:
    prefill, decode = pair
    key = begin(prefill, decode)
    prefill.sender.offer(key, start_token=0, num_tokens=4)
    prefill.compute(key, 4, SOURCE_BLOCKS[:1])
    await until(lambda: decode.drained == [key])
    assert "4 input tokens" in str(decode.failed[key])
    await until(lambda: prefill.freed == [(key, "abandoned")])


async def test_worker_that_leaves_fails_what_is_under_way(pair: tuple[Prefill, Decode]) -> None:
    prefill, decode = pair
    key = begin(prefill, decode)
    prefill.sender.offer(key, start_token=0, num_tokens=NUM_TOKENS)
    await until(lambda: state_of(decode, key) is ReceiverState.RECEIVING)
    await prefill.sender.close()
    assert prefill.freed == [(key, "aborted")]
    await until(lambda: decode.drained == [key])
    assert decode.failed[key].retriable


async def test_decode_that_leaves_frees_prefill_and_drains(pair: tuple[Prefill, Decode]) -> None:
    prefill, decode = pair
    key = begin(prefill, decode)
    prefill.sender.offer(key, start_token=0, num_tokens=NUM_TOKENS)
    await until(lambda: state_of(decode, key) is ReceiverState.RECEIVING)
    await decode.receiver.close()
    assert decode.failed[key].retriable
    assert decode.drained == [key]
    await until(lambda: prefill.freed)
    assert prefill.freed[0][1] in ("abandoned", "peer_lost")


async def test_unreachable_prefill_fails_within_attach_s(config: KvTransferConfig) -> None:
    prefill = await Prefill.start(config)
    await prefill.close()
    decode = await Decode.start(config.model_copy(update={"attach_s": 0.3}))
    key = begin(prefill, decode)
    await until(lambda: decode.drained == [key])
    assert "no connection" in str(decode.failed[key])
    assert decode.failed[key].retriable
    await until(lambda: not decode.receiver._peers)
    await decode.close()


# ------------------------------------------------------------------- death, hang, restart


async def begin_with_process(process: PrefillProcess, decode: Decode) -> TransferKey:
    key = key_between(process, decode)
    decode.begin(key, process, start_token=0, num_tokens=NUM_TOKENS, block_ids=BLOCKS)
    await process.tell("offer", key, start_token=0, num_tokens=NUM_TOKENS)
    await process.tell("ready", key, end_token=8, block_ids=SOURCE_BLOCKS)
    machine = decode.receiver._transfers[key].machine
    await until(lambda: machine._copied_tokens == 8)
    return key


async def test_killed_prefill_fails_its_transfers_at_once(
    config: KvTransferConfig,
) -> None:
    process, decode = await PrefillProcess.start(config), await Decode.start(config)
    key = await begin_with_process(process, decode)
    process.signal(signal.SIGKILL)
    await until(lambda: decode.drained == [key], within_s=4)
    assert isinstance(decode.failed[key], TransferError)
    assert decode.failed[key].retriable
    assert key not in decode.ready
    await process.close()
    await decode.close()


@pytest.fixture
def no_collection() -> Iterator[None]:
    """What only the collector of cyclic garbage would free, stays."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collection")
async def test_memory_of_a_killed_prefill_is_given_back_at_once() -> None:
    config = KvTransferConfig(transport="shared_memory")
    process, decode = await PrefillProcess.start(config), await Decode.start(config)
    before = kv_memories([os.getpid()])
    key = await begin_with_process(process, decode)
    mapped = kv_memories([os.getpid()]) - before
    assert len(mapped) == 1, "its pool"
    process.signal(signal.SIGKILL)
    await until(lambda: decode.drained == [key], within_s=4)
    assert decode.failed[key].__traceback__, "it keeps the frames it passed"
    await until(lambda: not mapped & kv_memories([os.getpid()]), within_s=4)
    await process.close()
    await decode.close()


@pytest.mark.parametrize("point", ["prefill.commit", "prefill.release", "prefill.released"])
async def test_prefill_killed_at_any_point_never_leads_to_ready(
    config: KvTransferConfig, tmp_path: Path, point: str
) -> None:
    faults = tmp_path / "faults.json"
    faults.write_text(f'{{"{point}": {{"action": "kill"}}}}')
    process = await PrefillProcess.start(config, faults_file=faults)
    decode = await Decode.start(config)
    key = key_between(process, decode)
    decode.begin(key, process, start_token=0, num_tokens=NUM_TOKENS, block_ids=BLOCKS)
    await process.tell("offer", key, start_token=0, num_tokens=NUM_TOKENS)
    await process.tell("ready", key, end_token=NUM_TOKENS, block_ids=SOURCE_BLOCKS)
    await process.tell("commit", key)
    await until(lambda: decode.drained == [key], within_s=8)
    assert decode.failed[key].retriable
    assert not decode.ready
    await process.close()
    await decode.close()


async def test_posted_receive_of_a_stopped_prefill_is_quarantined_until_it_ends() -> None:
    """Gloo only: nobody can take a posted receive back, so its blocks stay in doubt."""
    config = KvTransferConfig(transport="gloo", operation_s=5)
    gate = Gate()
    process = await PrefillProcess.start(config)
    decode = await Decode.start(config, faults=FaultsAt(decode_copy=second(gate)))
    key = await begin_with_process(process, decode)
    await process.tell("ready", key, end_token=16, block_ids=SOURCE_BLOCKS)
    await until(gate.reached.is_set)
    transfer = decode.receiver._transfers[key]
    process.stop()
    gate.open.set()
    assert isinstance(transfer.link, GlooPullLink)
    await until(lambda: transfer.link._posted)
    decode.receiver.cancel(key)
    assert transfer.machine.state is ReceiverState.QUARANTINED
    await asyncio.sleep(0.1)
    assert not decode.drained
    process.signal(signal.SIGCONT)
    await until(lambda: decode.drained == [key], within_s=4)
    await process.close()
    await decode.close()


async def test_receives_posted_for_a_transfer_that_is_over_end_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prefill aborts, and Fetch crosses its message: zeros come, the pair stays in order."""
    config = KvTransferConfig(transport="gloo", operation_s=20)
    gate = Gate()
    prefill = await Prefill.start(config)
    decode = await Decode.start(config, faults=FaultsAt(decode_copy=second(gate)))
    key = begin(prefill, decode)
    await computing(prefill, decode, key, gate)
    prefill.sender.ready(key, NUM_TOKENS, SOURCE_BLOCKS)
    await until(gate.reached.is_set)
    with monkeypatch.context() as patch:
        patch.setattr(KvSender, "_refuse", lambda *_: None)
        prefill.sender.abort(key, DeadlineExceededError("too late"))
    gate.open.set()
    transfer = decode.receiver._transfers[key]
    await until(lambda: not transfer.machine._copying)
    assert not decode.pool.tokens[BLOCKS[4], :, :2].any(), "zeros, not the freed blocks"
    decode.receiver.cancel(key)
    await until(lambda: decode.drained == [key])
    await works_again(prefill, decode)
    (peer,) = decode.receiver._peers.values()
    assert peer.link is transfer.link
    await decode.close()
    await prefill.close()


async def test_operation_that_times_out_drains_and_the_pair_is_rebuilt() -> None:
    config = KvTransferConfig(transport="gloo", operation_s=0.5)
    gate = Gate()
    process = await PrefillProcess.start(config)
    decode = await Decode.start(config, faults=FaultsAt(decode_copy=second(gate)))
    key = await begin_with_process(process, decode)
    await process.tell("ready", key, end_token=16, block_ids=SOURCE_BLOCKS)
    await until(gate.reached.is_set)
    process.stop()
    gate.open.set()
    await until(lambda: decode.drained == [key])
    assert decode.failed[key].retriable
    after = decode.pool.tokens.copy()
    process.signal(signal.SIGCONT)
    again = key_between(process, decode, 2)
    decode.begin(again, process, start_token=0, num_tokens=4, block_ids=[11])
    await process.tell("offer", again, start_token=0, num_tokens=4)
    await process.tell("ready", again, end_token=4, block_ids=SOURCE_BLOCKS)
    await process.tell("commit", again)
    await until(lambda: again in decode.ready)
    np.testing.assert_array_equal(decode.pool.tokens[:11], after[:11])
    await process.close()
    await decode.close()


async def test_restarted_prefill_is_another_peer_on_the_same_address(
    config: KvTransferConfig,
) -> None:
    first, decode = await PrefillProcess.start(config), await Decode.start(config)
    old = await begin_with_process(first, decode)
    port = int(first.address.rsplit(":", 1)[1])
    await first.close()
    second_life = await PrefillProcess.start(config, port=port)
    assert second_life.address == first.address
    await until(lambda: decode.drained == [old])
    stale = key_between(first, decode, 2)
    decode.begin(stale, first, start_token=0, num_tokens=NUM_TOKENS, block_ids=BLOCKS)
    await until(lambda: decode.drained == [old, stale], within_s=4)
    assert "restarted: its epoch differs" in str(decode.failed[stale])
    assert decode.failed[stale].retriable
    key = await begin_with_process(second_life, decode)
    await second_life.tell("ready", key, end_token=NUM_TOKENS, block_ids=SOURCE_BLOCKS)
    await second_life.tell("commit", key)
    await until(lambda: decode.ready)
    assert decode.ready == {key: (77, 0, NUM_TOKENS)}
    await second_life.close()
    await decode.close()


async def test_dead_decode_frees_its_transfers(config: KvTransferConfig) -> None:
    """The stream breaks without a word: the call is cancelled under the peer."""
    prefill, decode = await Prefill.start(config), await Decode.start(config)
    key = await attached(prefill, decode)
    (peer,) = decode.receiver._peers.values()
    peer.task.cancel()
    await until(lambda: prefill.freed == [(key, "peer_lost")])
    decode.receiver.cancel(key)
    await until(lambda: decode.drained == [key])
    await decode.close()
    await prefill.close()


async def test_late_messages_of_ended_transfers_are_ignored(pair: tuple[Prefill, Decode]) -> None:
    prefill, decode = pair
    key = await attached(prefill, decode)
    (connection,) = prefill.sender._servicer._connections
    (peer,) = decode.receiver._peers.values()
    decode.receiver.cancel(key)
    await until(lambda: prefill.freed and decode.drained)
    named = key.to_proto()
    for response in (
        pb.PullResponse(ready=pb.Ready(key=named, end_token=4, block_ids=[1])),
        pb.PullResponse(commit=pb.Commit(key=named, num_tokens=NUM_TOKENS)),
        pb.PullResponse(released=pb.Released(key=named, ok=True)),
        pb.PullResponse(aborted=pb.Aborted(key=named, error_code="nonsense")),
        pb.PullResponse(),
    ):
        connection.send(key, response)
    stranger = TransferKey(b"x", 7, b"y", b"z").to_proto()
    for name in (named, stranger):
        for request in (
            pb.PullRequest(renew=pb.Renew(key=name, lease_ms=10)),
            pb.PullRequest(release=pb.Release(key=name, num_bytes=1)),
            pb.PullRequest(abandon=pb.Abandon(key=name)),
            pb.PullRequest(attach=pb.Attach(key=name, lease_ms=10)),
            pb.PullRequest(),
        ):
            peer.send(key, request)
    await works_again(prefill, decode)
    assert (peer.task.done(), decode.drained, len(prefill.freed)) == (False, [key], 2)


@pytest.mark.parametrize(
    "point",
    ["prefill.offer", "prefill.commit", "prefill.release", "prefill.released",
     "decode.attach", "decode.copy", "decode.release", "decode.released"],
)  # fmt: skip
async def test_fault_at_any_point_fails_the_transfer_and_no_more(
    config: KvTransferConfig, point: str
) -> None:
    config = config.model_copy(update={"lease_s": 0.5})
    failing = [InternalError("injected")]

    def fail_once() -> None:
        if failing:
            raise failing.pop()

    faults = FaultsAt(**{point.replace(".", "_"): fail_once})
    prefill = await Prefill.start(config, faults=faults)
    decode = await Decode.start(config, faults=faults)
    key = await attached(prefill, decode) if "attach" not in point else begin(prefill, decode)
    if "attach" in point:
        prefill.sender.offer(key, start_token=0, num_tokens=NUM_TOKENS)
    prefill.compute(key, NUM_TOKENS, SOURCE_BLOCKS)
    await until(lambda: decode.drained == [key])
    assert decode.failed[key].retriable
    await works_again(prefill, decode)
    await decode.close()
    await prefill.close()
    assert len([freed for freed, _ in prefill.freed if freed == key]) == 1
