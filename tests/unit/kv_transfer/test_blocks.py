"""Copying and checksumming blocks, against the plain definition byte by byte."""

from __future__ import annotations

import zlib

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.errors import TransferCorruptError
from baton.kv_layout import KvLayout
from kv_transfer.blocks import PoolView
from kv_transfer.ranges import BlockRange, valid_tokens

Bytes = npt.NDArray[np.uint8]

layouts = st.builds(
    KvLayout,
    num_blocks=st.integers(1, 4),
    num_kv_heads=st.integers(1, 3),
    num_layers=st.integers(1, 3),
    block_size=st.integers(1, 5),
    head_dim=st.integers(1, 6),
    dtype=st.sampled_from(["bfloat16", "float32"]),
    num_kv_parts=st.integers(1, 2),
)


def filled(layout: KvLayout, seed: int) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, layout.num_bytes, dtype=np.uint8)


def by_token(layout: KvLayout, memory: Bytes) -> Bytes:
    """``[block][head, layer, part][token][byte]``, from the layout's own shape."""
    rows = layout.num_kv_heads * layout.num_layers * layout.num_kv_parts
    return memory.reshape(layout.num_blocks + 1, rows, layout.block_size, -1)


@given(layout=layouts, data=st.data())
@settings(max_examples=150, deadline=None)
def test_copy_moves_the_valid_tokens_and_no_other_byte(
    layout: KvLayout, data: st.DataObject
) -> None:
    source, memory = filled(layout, 1), filled(layout, 2)
    blocks = st.integers(0, layout.num_blocks - 1)
    from_block, to_block = data.draw(blocks), data.draw(blocks)
    num_tokens = data.draw(st.integers(1, layout.block_size))
    expected = by_token(layout, memory).copy()
    expected[to_block, :, :num_tokens] = by_token(layout, source)[from_block, :, :num_tokens]
    pool = PoolView(layout, memoryview(memory))
    pool.copy_from(PoolView(layout, memoryview(source)), from_block, to_block, num_tokens)
    np.testing.assert_array_equal(by_token(layout, memory), expected)


@given(layout=layouts, data=st.data())
@settings(max_examples=100, deadline=None)
def test_range_is_copied_block_by_block_in_whatever_pieces(
    layout: KvLayout, data: st.DataObject
) -> None:
    source, memory = filled(layout, 1), filled(layout, 2)
    every = list(range(layout.num_blocks))
    num_tokens = data.draw(st.integers(0, layout.num_blocks * layout.block_size))
    counts = valid_tokens(0, num_tokens, layout.block_size)
    source_blocks = tuple(data.draw(st.permutations(every)))[: len(counts)]
    blocks = tuple(data.draw(st.permutations(every)))[: len(counts)]
    expected = by_token(layout, memory).copy()
    for source_block, block, count in zip(source_blocks, blocks, counts, strict=True):
        expected[block, :, :count] = by_token(layout, source)[source_block, :, :count]
    pool = PoolView(layout, memoryview(memory))
    whole = BlockRange(0, num_tokens, source_blocks, blocks)
    for part in whole.parts(data.draw(st.integers(1, 5)), layout.block_size):
        pool.copy_range(PoolView(layout, memoryview(source)), part)
    np.testing.assert_array_equal(by_token(layout, memory), expected)


def test_parts_keep_their_blocks_and_checksums() -> None:
    whole = BlockRange(32, 74, (5, 6, 7), (1, 2, 3), (11, 12, 13))
    assert list(whole.parts(2, 16)) == [
        BlockRange(32, 64, (5, 6), (1, 2), (11, 12)),
        BlockRange(64, 74, (7,), (3,), (13,)),
    ]


@given(layout=layouts, data=st.data())
@settings(max_examples=100, deadline=None)
def test_checksum_covers_the_valid_bytes_and_no_other(
    layout: KvLayout, data: st.DataObject
) -> None:
    memory = filled(layout, 3)
    num_tokens = data.draw(st.integers(1, layout.block_size))
    valid = by_token(layout, memory)[0, :, :num_tokens]
    pool = PoolView(layout, memoryview(memory))
    assert pool.checksum(0, num_tokens) == zlib.crc32(valid.tobytes())


def test_any_flipped_bit_is_corruption() -> None:
    layout = KvLayout(
        num_blocks=1, num_kv_heads=1, num_layers=1, block_size=2, head_dim=4, dtype="bfloat16"
    )
    memory = filled(layout, 4)
    pool = PoolView(layout, memoryview(memory))
    checksum = pool.checksum(0, 2)
    for bit in range(layout.block_bytes * 8):
        memory[bit // 8] ^= 1 << bit % 8
        with pytest.raises(TransferCorruptError, match="block 0 arrived"):
            pool.verify(0, 2, checksum)
        memory[bit // 8] ^= 1 << bit % 8
    pool.verify(0, 2, checksum)


def test_block_that_no_pool_has_is_an_error() -> None:
    layout = KvLayout(
        num_blocks=1, num_kv_heads=1, num_layers=1, block_size=2, head_dim=4, dtype="bfloat16"
    )
    pool = PoolView(layout, memoryview(filled(layout, 5)))
    with pytest.raises(IndexError):
        pool.copy_from(pool, 2, 0, 2)


@given(start=st.integers(0, 5), length=st.integers(0, 40), size=st.integers(1, 9))
def test_valid_tokens_fill_all_blocks_but_maybe_the_last(
    start: int, length: int, size: int
) -> None:
    counts = valid_tokens(start * size, start * size + length, size)
    assert sum(counts) == length
    assert all(count == size for count in counts[:-1])
    assert all(0 < count <= size for count in counts)
