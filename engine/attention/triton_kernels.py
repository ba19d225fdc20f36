"""The Triton kernels of triton_paged.py: attention over a paged KV pool, and the writes to it.

The pool comes as the view of one layer, [block][kv_head][part][token][dim]; its strides between
blocks and heads, in elements, are constants of a compiled kernel, and the parts of a token are
``BLOCK_SIZE * HEAD_DIM`` elements apart. A program reads a tile of ``TILE`` tokens at a time,
each token by its own entry of the block table, so a tile may span blocks of any size. The query
heads of one KV head are the rows of one product:

    row = token * GROUP + head within the group        (a decode: one token)

Softmax is taken online, in powers of two (Milakov and Gimelshein, 2018; Dao et al., 2022).
Scores, their sums and what is accumulated are float32; probabilities are rounded to the pool's
dtype before they meet the values.

Parameters in capitals are compile-time constants. ``HEAD_PAD`` is HEAD_DIM rounded up to a power
of two, of 16 at least, as products need it; ``PRECISION`` is that of float32 products. Other
parameters have no types: triton would take an annotation for a variable.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def write_kv(
    key_value,
    row_stride,
    slots,
    pool,
    first_head,
    NUM_HEADS: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
):
    """Program (token, part × NUM_HEADS + head): one row of ``key_value`` to the token's slot."""
    token = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1)
    part, head = row // NUM_HEADS, row % NUM_HEADS
    slot = tl.load(slots + token).to(tl.int64)
    dims = tl.arange(0, HEAD_PAD)
    inside = dims < HEAD_DIM
    values = tl.load(key_value + token * row_stride + row * HEAD_DIM + dims, mask=inside)
    place = (slot // BLOCK_SIZE) * BLOCK_STRIDE + (first_head + head) * HEAD_STRIDE
    place += (part * BLOCK_SIZE + slot % BLOCK_SIZE) * HEAD_DIM
    tl.store(pool + place + dims, values, mask=inside)


@triton.jit
def _attend_tile(
    accumulated,
    largest,
    total,
    query,
    first,
    end,
    positions,
    head,
    table,
    scale,
    WINDOW: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds the tokens from ``first`` to ``first + TILE``, none of them at ``end`` or behind it, to
    the running softmax of ``query`` [rows, HEAD_PAD] at ``positions``.

    Without ``MASKED`` every row sees every token of the tile. ``head`` points to the pool's head.
    """
    tokens = first + tl.arange(0, TILE)
    dims = tl.arange(0, HEAD_PAD)
    present = tokens < end
    inside = dims < HEAD_DIM
    # What lies behind a context may be anything, NaN too: it is not read.
    block = tl.load(table + tokens // BLOCK_SIZE, mask=present, other=0).to(tl.int64)
    place = block * BLOCK_STRIDE + (tokens % BLOCK_SIZE) * HEAD_DIM
    key_mask, value_mask = inside[:, None], inside[None, :]
    if MASKED:
        key_mask, value_mask = key_mask & present[None, :], value_mask & present[:, None]
    keys = tl.load(head + place[None, :] + dims[:, None], mask=key_mask, other=0.0)
    scores = tl.dot(query, keys, input_precision=PRECISION) * scale
    if MASKED:
        visible = present[None, :] & (tokens[None, :] <= positions[:, None])
        if WINDOW > 0:
            visible = visible & (tokens[None, :] > positions[:, None] - WINDOW)
        scores = tl.where(visible, scores, float("-inf"))
    new_largest = tl.maximum(largest, tl.max(scores, 1))
    # A row that has seen nothing yet: -inf less -inf would be NaN.
    shift = tl.where(new_largest == float("-inf"), 0.0, new_largest)
    weights = tl.exp2(scores - shift[:, None])
    kept = tl.exp2(largest - shift)
    total = total * kept + tl.sum(weights, 1)
    value_place = head + BLOCK_SIZE * HEAD_DIM + place[:, None] + dims[None, :]
    values = tl.load(value_place, mask=value_mask, other=0.0)
    weights = weights.to(values.dtype)
    accumulated = accumulated * kept[:, None]
    accumulated += tl.dot(weights, values, input_precision=PRECISION)
    return accumulated, new_largest, total


@triton.jit
def attend_decodes(
    query,
    row_stride,
    pool,
    first_head,
    block_table,
    table_stride,
    contexts,
    out,
    partial,
    partial_log,
    scale,
    NUM_SPLITS: tl.constexpr,
    WINDOW: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (span, KV head, split): one token's heads over one part of its context.

    ``scale`` has the factor log2(e) in it. With one split the result goes to ``out``; with more,
    each one's normalized sum to ``partial`` [spans, heads, NUM_SPLITS, HEAD_DIM] and the base-2
    logarithm of its weight to ``partial_log``, for ``merge_splits``.
    """
    span = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    num_heads = tl.num_programs(1) * GROUP
    context = tl.load(contexts + span)
    start = 0
    if WINDOW > 0:
        start = tl.maximum(0, context - WINDOW) // TILE * TILE
    length = tl.cdiv(tl.cdiv(context - start, TILE), NUM_SPLITS) * TILE
    first = start + split * length
    end = tl.minimum(first + length, context)

    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, HEAD_PAD)
    heads = kv_head * GROUP + rows
    is_row = (rows < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    places = heads[:, None] * HEAD_DIM + dims[None, :]
    own = tl.load(query + span * row_stride + places, mask=is_row, other=0.0)
    positions = tl.zeros([ROWS], tl.int32) + context - 1
    head = pool + (first_head + kv_head) * HEAD_STRIDE
    table = block_table + span * table_stride
    accumulated = tl.zeros([ROWS, HEAD_PAD], tl.float32)
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for token in range(first, end, TILE):
        accumulated, largest, total = _attend_tile(
            accumulated, largest, total, own, token, end, positions, head, table, scale,
            WINDOW, True, BLOCK_STRIDE, BLOCK_SIZE, HEAD_DIM, HEAD_PAD, TILE, PRECISION,
        )  # fmt: skip
    # A split with nothing in it: its largest score is -inf, and so it has weight 0.
    total = tl.where(total == 0.0, 1.0, total)
    result = accumulated / total[:, None]
    row_of = span * num_heads + heads
    if NUM_SPLITS == 1:
        place = row_of[:, None] * HEAD_DIM + dims[None, :]
        tl.store(out + place, result.to(out.dtype.element_ty), mask=is_row)
    else:
        row_of = row_of * NUM_SPLITS + split
        tl.store(partial + row_of[:, None] * HEAD_DIM + dims[None, :], result, mask=is_row)
        tl.store(partial_log + row_of, largest + tl.log2(total), mask=rows < GROUP)


@triton.jit
def merge_splits(
    partial,
    partial_log,
    out,
    NUM_SPLITS: tl.constexpr,
    SPLIT_PAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
):
    """Program (span × heads + head): the weighted mean of its splits ("flash decoding", Dao et
    al., 2023). ``SPLIT_PAD`` is NUM_SPLITS rounded up to a power of two."""
    row = tl.program_id(0).to(tl.int64)
    splits = tl.arange(0, SPLIT_PAD)
    dims = tl.arange(0, HEAD_PAD)
    is_split = splits < NUM_SPLITS
    inside = dims < HEAD_DIM
    logs = tl.load(partial_log + row * NUM_SPLITS + splits, mask=is_split, other=float("-inf"))
    weights = tl.exp2(logs - tl.max(logs, 0))
    places = (row * NUM_SPLITS + splits)[:, None] * HEAD_DIM + dims[None, :]
    sums = tl.load(partial + places, mask=is_split[:, None] & inside[None, :], other=0.0)
    merged = tl.sum(sums * weights[:, None], 0) / tl.sum(weights, 0)
    tl.store(out + row * HEAD_DIM + dims, merged.to(out.dtype.element_ty), mask=inside)


@triton.jit
def attend_chunks(
    query,
    row_stride,
    pool,
    first_head,
    block_table,
    table_stride,
    tiles,
    out,
    scale,
    WINDOW: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (tile of queries, KV head): consecutive tokens of one span, causally, with what is
    cached before them.

    ``tiles`` is int32 [tiles, 4]: the span's row of the block table, the first query row, how
    many there are (at most ROWS // GROUP), and the position of the first.
    """
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    num_heads = tl.num_programs(1) * GROUP
    table_row = tl.load(tiles + tile * 4).to(tl.int64)
    first_row = tl.load(tiles + tile * 4 + 1).to(tl.int64)
    num_rows = tl.load(tiles + tile * 4 + 2)
    first_position = tl.load(tiles + tile * 4 + 3)

    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, HEAD_PAD)
    tokens = rows // GROUP
    heads = kv_head * GROUP + rows % GROUP
    is_row = (tokens < num_rows)[:, None] & (dims < HEAD_DIM)[None, :]
    row_of = first_row + tokens
    places = row_of[:, None] * row_stride + heads[:, None] * HEAD_DIM + dims[None, :]
    own = tl.load(query + places, mask=is_row, other=0.0)
    # Rows of padding see what the first one sees: a softmax of nothing would be NaN.
    positions = first_position + tl.where(tokens < num_rows, tokens, 0)
    head = pool + (first_head + kv_head) * HEAD_STRIDE
    table = block_table + table_row * table_stride
    end = first_position + num_rows
    start = 0
    seen_by_all = (first_position + 1) // TILE * TILE
    if WINDOW > 0:
        start = tl.maximum(0, first_position + 1 - WINDOW) // TILE * TILE
        seen_by_all = start
    accumulated = tl.zeros([ROWS, HEAD_PAD], tl.float32)
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for token in range(start, seen_by_all, TILE):
        accumulated, largest, total = _attend_tile(
            accumulated, largest, total, own, token, end, positions, head, table, scale,
            WINDOW, False, BLOCK_STRIDE, BLOCK_SIZE, HEAD_DIM, HEAD_PAD, TILE, PRECISION,
        )  # fmt: skip
    for token in range(seen_by_all, end, TILE):
        accumulated, largest, total = _attend_tile(
            accumulated, largest, total, own, token, end, positions, head, table, scale,
            WINDOW, True, BLOCK_STRIDE, BLOCK_SIZE, HEAD_DIM, HEAD_PAD, TILE, PRECISION,
        )  # fmt: skip
    result = accumulated / total[:, None]
    place = (row_of[:, None] * num_heads + heads[:, None]) * HEAD_DIM + dims[None, :]
    tl.store(out + place, result.to(out.dtype.element_ty), mask=is_row)
