"""Orders of a KV pool's axes, what is one run of bytes in them, and pools that are laid out so."""

from __future__ import annotations

from typing import Any

import numpy as np

from baton.kv_layout import KvLayout

AXES = "BHLPTD"
"""Block, KV head, layer, part (K or V), token, element: the canonical order of every view here."""
ORDERS = {
    "BHLPTD": "[block][kv_head][layer][K/V][token][dim], today's",
    "BLPHTD": "[block][layer][K/V][kv_head][token][dim]",
    "BLPTHD": "[block][layer][K/V][token][kv_head][dim], head-inner",
    "LPBHTD": "[layer][K/V][block][kv_head][token][dim], layer-outermost",
    "LPBTHD": "[layer][K/V][block][token][kv_head][dim], both",
}


def sizes(layout: KvLayout) -> dict[str, int]:
    """Of every axis; the dimension in elements."""
    return dict(zip("BHLPTD", layout.shape, strict=True))


def byte_strides(order: str, layout: KvLayout) -> dict[str, int]:
    """Bytes between neighbours along each axis."""
    found, stride = {}, layout.item_bytes
    for axis in reversed(order):
        found[axis] = stride
        stride *= sizes(layout)[axis]
    return found


def canonical(order: str, layout: KvLayout, memory: Any) -> Any:
    """``memory`` (elements, flat) of that order, seen as ``[B][H][L][P][T][D]``."""
    size = sizes(layout)
    stored = memory[: np.prod(layout.shape)].reshape([size[axis] for axis in order])
    return stored.transpose([order.index(axis) for axis in AXES])


def num_runs(order: str, source: KvLayout, target: KvLayout, heads: int) -> int:
    """Runs that are contiguous on both sides, where the first ``heads`` heads of one block go
    from a rank of ``source`` to one of ``target``: descriptors of a one-sided transport."""
    row_bytes = source.head_dim * source.item_bytes
    places = [_rows(order, layout, heads) for layout in (source, target)]
    sequence = np.argsort(places[0])
    neighbours = [np.diff(place[sequence]) == row_bytes for place in places]
    return int(1 + np.count_nonzero(~(neighbours[0] & neighbours[1])))


def num_resharded(order: str, layout: KvLayout, from_ranks: int, to_ranks: int) -> int:
    """Descriptors of one block of the whole model, between tensor-parallel degrees that divide
    its KV heads: each of a receiver's shares comes from one sender."""
    source, target = (_share(layout, ranks) for ranks in (from_ranks, to_ranks))
    heads = min(source.num_kv_heads, target.num_kv_heads)
    return max(from_ranks, to_ranks) * num_runs(order, source, target, heads)


def _share(layout: KvLayout, ranks: int) -> KvLayout:
    assert layout.num_kv_heads % ranks == 0
    return KvLayout(
        num_blocks=layout.num_blocks,
        num_kv_heads=layout.num_kv_heads // ranks,
        num_layers=layout.num_layers,
        block_size=layout.block_size,
        head_dim=layout.head_dim,
        dtype=layout.dtype,
        num_kv_parts=layout.num_kv_parts,
    )


def _rows(order: str, layout: KvLayout, heads: int) -> Any:
    """Where each row of ``head_dim`` elements of block 0 begins, in bytes."""
    stride = byte_strides(order, layout)
    counts = {**sizes(layout), "H": heads}
    place: Any = np.zeros(1, dtype=np.int64)
    for axis in "HLPT":
        place = (place[:, None] + np.arange(counts[axis]) * stride[axis]).ravel()
    return place
