"""What a decode worker lends of a reservation, and for how long its blocks are held."""

from __future__ import annotations

import pytest

from baton.worker.session_server import StreamKey
from kv_transfer.keys import TransferKey
from tests.unit.decode_workers.test_decode_worker import KEY, TRANSFER, DecodeRig

LEND = TRANSFER.way_back
INPUT = list(range(14))


async def reserved() -> tuple[DecodeRig, list[int]]:
    """A rig that holds the first 12 tokens of a stream it receives; their blocks."""
    rig = DecodeRig()
    rig.worker.open(rig.stream(list(range(12)), key=StreamKey(1, 1), local=True, most=1))
    for _ in range(2):
        await rig.step()
    stream = rig.stream([*range(12), 90, 91])
    rig.worker.open(stream)
    await rig.step()
    assert stream.sequence.num_shared_tokens == 12
    return rig, stream.sequence.block_table[:3]


def test_the_way_back_exchanges_the_epochs() -> None:
    assert TransferKey(TRANSFER.transfer_id, 0, b"d" * 16, b"p" * 16) == LEND
    assert LEND.way_back == TRANSFER


async def test_what_is_held_beyond_the_prefill_workers_is_offered_whole() -> None:
    rig, blocks = await reserved()
    rig.worker.lends.asked(LEND, 4)
    await rig.settle()
    assert rig.lender.calls == [
        ("offer", (LEND,), {"start_token": 4, "num_tokens": 12}),
        ("ready", (LEND, 12, blocks), {}),
        ("commit", (LEND, 0, 0), {}),
    ]


@pytest.mark.parametrize("start_token", [12, 16, 5])
async def test_what_is_not_held_is_refused(start_token: int) -> None:
    rig, _ = await reserved()
    rig.worker.lends.asked(LEND, start_token)
    await rig.settle()
    assert rig.lender.names() == ["refuse"]
    assert not rig.worker.lends


async def test_request_that_is_over_lends_nothing() -> None:
    rig, _ = await reserved()
    rig.worker.cancel(KEY)
    rig.worker.lends.asked(LEND, 0)
    await rig.settle()
    assert rig.lender.names() == ["refuse"]


@pytest.mark.parametrize("ends", ["cancelled", "handed over"])
async def test_lent_blocks_are_held_until_the_lend_is_over_whatever_becomes_of_the_stream(
    ends: str,
) -> None:
    rig, _ = await reserved()
    rig.worker.lends.asked(LEND, 4)
    if ends == "cancelled":
        rig.worker.cancel(KEY)
        rig.worker.drained(TRANSFER)
    else:
        rig.worker.handed_over(TRANSFER, 99, 0, 2)
        rig.worker.cancel(KEY)
    await rig.step()
    assert rig.states() == (2, 0), "blocks that are lent can be taken by others"
    assert rig.kv.pool.allocate(rig.kv.pool.num_available) is not None
    assert not rig.worker.idle
    rig.worker.lends.over(LEND)
    await rig.step()
    assert rig.worker.idle
    assert rig.kv.pool.counts().cached == 2
