"""Where blocks lie in memory, as runs of bytes: for whoever copies by addresses."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from baton.kv_layout import KvLayout
from kv_transfer.ranges import BlockRange, valid_tokens

Runs = npt.NDArray[np.uint64]
"""Runs of memory, one a row: address, bytes, device."""


@dataclass(frozen=True, slots=True)
class Area:
    """Where a pool lies, in this process or in a peer's. ``device`` is that process's number of
    the GPU; 0 too for the host's memory."""

    layout: KvLayout
    address: int
    device: int = 0


def runs(blocks: BlockRange, into: Area, out_of: Area) -> tuple[Runs, Runs]:
    """What to read ``blocks`` into and out of, row by row.

    Whole blocks that follow each other on both sides are one run; of a last block in part,
    each (kv_head, layer, part) has one. Raises IndexError where a pool lacks a block.
    """
    mine, theirs = np.array(blocks.blocks), np.array(blocks.source_blocks)
    if not _has_all(into.layout, mine) or not _has_all(out_of.layout, theirs):
        raise IndexError(f"no such block: {blocks.source_blocks} into {blocks.blocks}")
    layout = into.layout
    counts = valid_tokens(blocks.start_token, blocks.end_token, layout.block_size)
    num_whole = len(counts) - (counts[-1] < layout.block_size)
    at, lengths = _consecutive(mine[:num_whole], theirs[:num_whole])
    offsets, lengths = np.zeros_like(at), lengths * layout.block_bytes
    if num_whole < len(counts):
        _, _, _, row_bytes, token_bytes, _ = layout.strides
        rows = np.arange(0, layout.block_bytes, row_bytes)
        at = np.concatenate([at, np.full_like(rows, num_whole)])
        offsets = np.concatenate([offsets, rows])
        lengths = np.concatenate([lengths, np.full_like(rows, counts[-1] * token_bytes)])
    return (
        _rows(into, mine[at] * layout.block_bytes + offsets, lengths),
        _rows(out_of, theirs[at] * layout.block_bytes + offsets, lengths),
    )


def _has_all(layout: KvLayout, blocks: npt.NDArray[np.int64]) -> bool:
    return bool(blocks.min() >= 0 and blocks.max() < layout.num_blocks)


def _consecutive(
    mine: npt.NDArray[np.int64], theirs: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Where runs of blocks begin that follow each other in both, and their lengths."""
    if not len(mine):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    breaks = (np.diff(mine) != 1) | (np.diff(theirs) != 1)
    at = np.concatenate([[0], np.flatnonzero(breaks) + 1])
    return at, np.diff(np.append(at, len(mine)))


def _rows(area: Area, offsets: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> Runs:
    addresses = np.uint64(area.address) + offsets.astype(np.uint64)
    devices = np.full_like(addresses, area.device)
    return np.stack([addresses, lengths.astype(np.uint64), devices], axis=1)
