"""The hand-off's benchmark itself, in two real processes with tiny pools."""

from __future__ import annotations

import os

import numpy as np
import pytest
from support.transports import needs_nixl

from baton.errors import TransferError
from baton.kv_layout import KvLayout
from benchmarks.handoff.cases import Load
from benchmarks.handoff.decode_side import DecodeSide

LAYOUT = KvLayout(
    num_blocks=12, num_kv_heads=2, num_layers=2, block_size=16, head_dim=8, dtype="bfloat16"
)
LOAD = Load(tokens=48, requests=3, at_once=2)
NUM_BYTES = 3 * 48 * LAYOUT.token_bytes


async def test_every_contender_moves_the_blocks_that_it_says_it_moves() -> None:
    cores = os.sched_getaffinity(0)
    with DecodeSide.open(LAYOUT) as side:
        for transport in ("shared_memory", "gloo"):
            await side.add(transport)
        assert (side.transports, side.absent) == (["shared_memory", "gloo"], {})
        for transport in side.transports:
            moved = await side.hand_off(transport, LOAD)
            assert moved.num_bytes == NUM_BYTES
            assert 0 < moved.moved_s < moved.whole_s
            assert 0 < moved.ready_ms <= moved.whole_s * 1000
        for run in (side.memcpy, lambda load: side.gloo(load, contiguous=False)):
            blocks = side._free.peek(4)
            source_blocks = side._source_free.peek(4)
            side._pool[:] = 0
            assert run(LOAD).num_bytes == NUM_BYTES
            np.testing.assert_array_equal(side._pool[blocks], side._source[source_blocks])
        assert side.gloo(LOAD, contiguous=True).moved_s > 0
        side._pool[blocks[0], 3] += 1
        with pytest.raises(ValueError, match="not what was sent"):
            side._check([source_blocks], [blocks])
        await side.close()
    assert os.sched_getaffinity(0) == cores


@needs_nixl
async def test_nixl_alone_moves_the_blocks_that_it_says_it_moves() -> None:
    with DecodeSide.open(LAYOUT) as side:
        alone = side.nixl_alone()
        blocks, source_blocks = side._free.peek(4), side._source_free.peek(4)
        assert side.nixl(LOAD).num_bytes == NUM_BYTES
        moved = np.frombuffer(alone.memory, np.uint64).reshape(LAYOUT.num_blocks + 1, -1)
        np.testing.assert_array_equal(moved[blocks], side._source[source_blocks])
        alone._process.kill()
        with pytest.raises(TransferError, match="not come to its end"):
            side.nixl(LOAD)
        await side.close()
