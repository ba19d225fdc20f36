"""Hand-offs over every transport: what arrives, what stays as it was, and what is counted.

``cuda_ipc`` moves between pools of a GPU that a stand-in for CUDA's driver makes up of this
process's memory; the real one is for ``tests/gpu``.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import numpy as np
import pytest

from baton.config import KvTransferConfig
from baton.errors import IncompatiblePeerError, TransferCorruptError
from baton.logprobs import TokenLogprobs
from kv_transfer.blocks import CheckedBlocks
from tests.support.cuda_standin import cuda_driver as cuda_driver
from tests.support.handoff import (
    LAYOUT,
    Decode,
    FaultsAt,
    PoolMemory,
    Prefill,
    key_between,
    sample,
    until,
)
from tests.support.transports import TRANSPORTS

SOURCE_BLOCKS = [7, 2, 9, 4, 0]
BLOCKS = [3, 8, 1, 10, 5]


@pytest.fixture(params=[*TRANSPORTS, "cuda_ipc"])
def config(request: pytest.FixtureRequest) -> KvTransferConfig:
    if request.param == "cuda_ipc":
        request.getfixturevalue("cuda_driver")
    return KvTransferConfig(transport=request.param, attach_s=5, lease_s=5, operation_s=3)


@pytest.fixture
async def pair(config: KvTransferConfig) -> AsyncIterator[tuple[Prefill, Decode]]:
    prefill, decode = await Prefill.start(config), await Decode.start(config)
    yield prefill, decode
    await decode.close()
    await prefill.close()


def assert_moved(source: PoolMemory, pool: PoolMemory, start_token: int, num_tokens: int) -> None:
    """Tokens [start, num) are equal, and no other byte of the destination changed."""
    expected = pool.before.copy()
    size = LAYOUT.block_size
    for token in range(start_token, num_tokens):
        block, slot = divmod(token, size)
        destination = BLOCKS[block - start_token // size]
        expected[destination, :, slot] = source.before[SOURCE_BLOCKS[block], :, slot]
    np.testing.assert_array_equal(pool.tokens, expected)
    np.testing.assert_array_equal(source.tokens, source.before)


@pytest.mark.parametrize(
    ("start_token", "num_tokens"),
    [(0, 16), (0, 18), (0, 1), (8, 19), (8, 16), (12, 12)],
    ids=["whole", "partial-last", "one-token", "held-partial", "held-whole", "all-held"],
)
async def test_missing_tokens_arrive_and_nothing_else_changes(
    pair: tuple[Prefill, Decode], config: KvTransferConfig, start_token: int, num_tokens: int
) -> None:
    prefill, decode = pair
    key = key_between(prefill, decode)
    needed = LAYOUT.num_blocks_for(num_tokens) - start_token // LAYOUT.block_size
    prefill.sender.offer(key, start_token=start_token, num_tokens=num_tokens)
    decode.begin(
        key, prefill, start_token=start_token, num_tokens=num_tokens, block_ids=BLOCKS[:needed]
    )
    prefill.compute(key, num_tokens, SOURCE_BLOCKS[: LAYOUT.num_blocks_for(num_tokens)])
    await until(lambda: decode.ready and prefill.freed)
    assert decode.ready == {key: (77, 0, num_tokens - start_token)}
    assert prefill.freed == [(key, "released")]
    assert not decode.failed
    assert not decode.drained
    assert_moved(prefill.pool, decode.pool, start_token, num_tokens)
    num_bytes = (num_tokens - start_token) * LAYOUT.token_bytes
    labels = {"transport": config.transport}
    name = "baton_kv_handoff_bytes_total"
    assert sample(prefill.registry, name, direction="sent", **labels) == num_bytes
    assert sample(decode.registry, name, direction="received", **labels) == num_bytes
    assert sample(decode.registry, "baton_kv_handoffs_total", outcome="ready") == 1
    assert sample(decode.registry, "baton_kv_handoff_seconds_count") == 1


async def test_chunks_move_whether_announced_before_or_after_attach(
    pair: tuple[Prefill, Decode],
) -> None:
    prefill, decode = pair
    key = key_between(prefill, decode)
    prefill.sender.offer(key, start_token=4, num_tokens=19)
    prefill.sender.ready(key, 10, SOURCE_BLOCKS[:3])  # ends inside a block
    decode.begin(key, prefill, start_token=4, num_tokens=19, block_ids=BLOCKS[:4])
    await until(lambda: (decode.pool.tokens[BLOCKS[0]] != decode.pool.before[BLOCKS[0]]).any())
    prefill.sender.ready(key, 17, SOURCE_BLOCKS)
    prefill.compute(key, 19, SOURCE_BLOCKS)
    await until(lambda: decode.ready and prefill.freed)
    assert_moved(prefill.pool, decode.pool, 4, 19)


@pytest.mark.parametrize(
    "logprobs", [None, TokenLogprobs(0.0), TokenLogprobs(-0.5, ((77, -0.5), (3, -2.0)))], ids=str
)
async def test_commit_record_carries_the_first_tokens_log_probabilities(
    pair: tuple[Prefill, Decode], logprobs: TokenLogprobs | None
) -> None:
    prefill, decode = pair
    key = key_between(prefill, decode)
    prefill.sender.offer(key, start_token=0, num_tokens=6)
    decode.begin(key, prefill, start_token=0, num_tokens=6, block_ids=BLOCKS[:2])
    prefill.compute(key, 6, SOURCE_BLOCKS[:2], logprobs)
    await until(lambda: decode.ready and prefill.freed)
    assert decode.first_logprobs == {key: logprobs}


async def test_attach_that_comes_before_the_offer_is_kept_for_it(
    pair: tuple[Prefill, Decode],
) -> None:
    prefill, decode = pair
    key = key_between(prefill, decode)
    decode.begin(key, prefill, start_token=0, num_tokens=6, block_ids=BLOCKS[:2])
    await until(lambda: prefill.sender._parked)
    prefill.sender.offer(key, start_token=0, num_tokens=6)
    assert not prefill.sender._parked
    prefill.compute(key, 6, SOURCE_BLOCKS[:2])
    await until(lambda: decode.ready and prefill.freed)
    assert_moved(prefill.pool, decode.pool, 0, 6)


async def test_many_transfers_share_one_stream(pair: tuple[Prefill, Decode]) -> None:
    prefill, decode = pair
    keys = [key_between(prefill, decode, number) for number in range(5)]
    for at, key in enumerate(keys):
        prefill.sender.offer(key, start_token=0, num_tokens=8)
        decode.begin(key, prefill, start_token=0, num_tokens=8, block_ids=[2 * at, 2 * at + 1])
    for at, key in enumerate(keys):
        prefill.compute(key, 8, [2 * at + 1, 2 * at])
    await until(lambda: len(decode.ready) == len(prefill.freed) == 5)
    assert len(decode.receiver._peers) == 1
    for at in range(5):
        moved = decode.pool.tokens[[2 * at, 2 * at + 1]]
        np.testing.assert_array_equal(moved, prefill.pool.before[[2 * at + 1, 2 * at]])
    np.testing.assert_array_equal(decode.pool.tokens[10:], decode.pool.before[10:])


async def hand_over(prefill: Prefill, decode: Decode, num_tokens: int) -> None:
    key = key_between(prefill, decode)
    needed = LAYOUT.num_blocks_for(num_tokens)
    prefill.sender.offer(key, start_token=0, num_tokens=num_tokens)
    decode.begin(key, prefill, start_token=0, num_tokens=num_tokens, block_ids=BLOCKS[:needed])
    prefill.compute(key, num_tokens, SOURCE_BLOCKS[:needed])
    await until(lambda: (decode.ready or decode.drained) and prefill.freed)


@pytest.mark.parametrize("token", [0, 9], ids=["whole-block", "partial-block"])
async def test_byte_that_flips_between_offer_and_copy_is_caught_with_verify(
    config: KvTransferConfig, token: int
) -> None:
    """Every transport reads the source after the copying thread began: flip it there."""
    config = config.model_copy(update={"verify": True})
    prefill = await Prefill.start(config)

    def flip() -> None:
        block, slot = divmod(token, LAYOUT.block_size)
        prefill.pool.tokens[SOURCE_BLOCKS[block], 5, slot, 3] ^= 0x10

    decode = await Decode.start(config, faults=FaultsAt(decode_copy=flip))
    await hand_over(prefill, decode, 10)
    assert not decode.ready
    assert [type(error) for error in decode.failed.values()] == [TransferCorruptError]
    assert sample(decode.registry, "baton_kv_handoffs_total", outcome="transfer_corrupt") == 1
    assert sample(decode.registry, "baton_kv_handoff_bytes_total") == 0
    assert [outcome for _, outcome in prefill.freed] == ["abandoned"]
    await decode.close()
    await prefill.close()


async def test_untouched_bytes_pass_verification(config: KvTransferConfig) -> None:
    config = config.model_copy(update={"verify": True})
    prefill, decode = await Prefill.start(config), await Decode.start(config)
    await hand_over(prefill, decode, 10)
    assert decode.ready
    assert_moved(prefill.pool, decode.pool, 0, 10)
    await decode.close()
    await prefill.close()


async def test_nothing_is_checksummed_without_verify(
    pair: tuple[Prefill, Decode], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unexpected(*_: object) -> int:
        raise AssertionError("a checksum was computed")

    monkeypatch.setattr(CheckedBlocks, "checksum", unexpected)
    monkeypatch.setattr("zlib.crc32", unexpected)
    await hand_over(*pair, 10)
    assert pair[1].ready


async def test_verify_on_decode_only_is_refused(config: KvTransferConfig) -> None:
    prefill = await Prefill.start(config)
    decode = await Decode.start(config.model_copy(update={"verify": True}))
    key = key_between(prefill, decode)
    decode.begin(key, prefill, start_token=0, num_tokens=4, block_ids=[1])
    await until(lambda: decode.drained)
    assert isinstance(decode.failed[key], IncompatiblePeerError)
    assert "kv_transfer.verify differs" in str(decode.failed[key])
    await decode.close()
    await prefill.close()
