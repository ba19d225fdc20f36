"""Attention over the paged pool by Triton kernels, where the pool lies on a GPU.

Decodes of a step are one launch, in which each context may be split over several programs where
there are few of them; its chunks are another. The index arrays that both need are made once a
step. In a CUDA graph, which replays launches with the addresses and sizes that they were recorded
with, ``decodes`` takes arrays that stay where they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from baton.errors import ConfigurationError
from baton.kv_layout import KvLayout
from engine.attention import triton_kernels
from engine.attention.interface import AttentionStep
from engine.batch import Batch, Span
from engine.gpu.transfers import to_device
from engine.parallel.shard import WHOLE

Windows = tuple[int | None, ...]

_PROGRAMS_PER_PROCESSOR = 2
"""Of a decode launch, below which contexts are split."""
_LEAST_SPLIT = 256
"""Tokens of a context that are worth a program of their own."""
_MOST_SPLITS = 64
_CPU_PROCESSORS = 8
"""Where Triton's interpreter runs."""
_LEAST_PAD = 16
"""Rows and columns that a product has at least."""


@dataclass(frozen=True, slots=True)
class _Tiling:
    """How one kind of launch is cut: rows of a product, tokens of a tile, warps of a program, and
    tiles that are loaded ahead."""

    rows: int
    tile: int
    warps: int
    stages: int


class TritonPagedAttention:
    """Attention over the pool ``kv`` (``layout.shape``) for ``num_heads`` query heads.

    The arguments are those of PagedCpuAttention. ``num_processors`` (by default the device's) are
    to be kept busy. Raises ConfigurationError for a pool of one part a token (latent attention).
    """

    def __init__(
        self,
        layout: KvLayout,
        kv: Tensor,
        num_heads: int,
        windows: Windows = (),
        *,
        kv_heads: slice = WHOLE,
        scale: float | None = None,
        num_processors: int | None = None,
    ) -> None:
        if layout.num_kv_parts != 2:
            raise ConfigurationError(
                "latent attention (DeepSeek) is not computed on GPUs yet; set engine.device: cpu"
            )
        own_heads = range(layout.num_kv_heads)[kv_heads]
        assert kv.shape == layout.shape
        assert num_heads % len(own_heads) == 0
        assert len(windows) in (0, layout.num_layers)
        self.layout = layout
        self.device = kv.device
        self.num_heads = num_heads
        self.num_kv_heads = len(own_heads)
        self.first_head = own_heads.start
        self.group = num_heads // len(own_heads)
        self.windows = windows or (None,) * layout.num_layers
        self.scale = layout.head_dim**-0.5 if scale is None else scale
        self.pools = [kv[:, :, layer] for layer in range(layout.num_layers)]
        self.num_processors = num_processors or _num_processors(kv.device)
        self.decode_tiling, self.chunk_tiling = _tilings(layout, kv.dtype, self.group)
        self.tokens_per_tile = self.chunk_tiling.rows // self.group
        self._shape = {
            "BLOCK_STRIDE": kv.stride(0),
            "HEAD_STRIDE": kv.stride(1),
            "BLOCK_SIZE": layout.block_size,
            "HEAD_DIM": layout.head_dim,
            "HEAD_PAD": _power_of_two(layout.head_dim),
        }
        # tf32 is the way of float32 products unless one asks for all of their bits.
        self._precision = "ieee" if kv.dtype == torch.float32 else "tf32"

    def begin(self, batch: Batch) -> AttentionStep:
        """The batch's tensors are on the host; what is needed of them goes to the device."""
        decodes, chunks = batch.spans[: batch.num_decodes], batch.spans[batch.num_decodes :]
        table = to_device(batch.block_table, self.device)
        step = _TritonStep(self, to_device(batch.slot_mapping, self.device))
        if decodes:
            contexts = torch.tensor([span.num_context for span in decodes], dtype=torch.int32)
            longest = max(span.num_context for span in decodes)
            step.add_decodes(table, to_device(contexts, self.device), longest)
        if chunks:
            tiles = chunk_tiles(chunks, batch.num_decodes, self.tokens_per_tile)
            step.add_chunks(table, to_device(tiles, self.device))
        return step

    def decodes(self, slots: Tensor, block_table: Tensor, contexts: Tensor) -> AttentionStep:
        """A step of decodes alone, whose arrays are on the device and read by every launch:
        ``slots`` int64 [spans], ``block_table`` int32 [spans, blocks], ``contexts`` int32
        [spans], none over what the table's width holds, and none 0."""
        step = _TritonStep(self, slots)
        step.add_decodes(block_table, contexts, block_table.shape[1] * self.layout.block_size)
        return step

    def num_splits(self, num_spans: int, longest: int) -> int:
        """Programs that share one context, the longest having so many tokens: a power of two,
        since each number is a kernel of its own, which is compiled when it is first wanted."""
        programs = num_spans * self.num_kv_heads
        wanted = -(-_PROGRAMS_PER_PROCESSOR * self.num_processors // programs)
        splits = max(1, min(wanted, -(-longest // _LEAST_SPLIT), _MOST_SPLITS))
        return 1 << (splits.bit_length() - 1)

    def write(self, layer: int, key_value: Tensor, slots: Tensor) -> None:
        """[tokens, 2, KV heads, head_dim], a token's own elements side by side, to ``slots``."""
        assert key_value[0].is_contiguous()
        grid = (len(slots), 2 * self.num_kv_heads)
        triton_kernels.write_kv[grid](
            key_value, key_value.stride(0), slots, self.pools[layer], self.first_head,
            NUM_HEADS=self.num_kv_heads, **self._shape, num_warps=1,
        )  # fmt: skip

    def attend_decodes(
        self,
        layer: int,
        query: Tensor,
        out: Tensor,
        *,
        block_table: Tensor,
        contexts: Tensor,
        num_splits: int,
    ) -> None:
        """The first ``len(contexts)`` rows of ``query`` and of ``out``."""
        num_spans, tiling = len(contexts), self.decode_tiling
        partial = log = out
        if num_splits > 1:
            shape = (num_spans, self.num_heads, num_splits)
            partial = out.new_empty(*shape, self.layout.head_dim, dtype=torch.float32)
            log = out.new_empty(shape, dtype=torch.float32)
        triton_kernels.attend_decodes[(num_spans, self.num_kv_heads, num_splits)](
            query, query.stride(0), self.pools[layer], self.first_head,
            block_table, block_table.stride(0), contexts, out, partial, log,
            self.scale * math.log2(math.e),
            NUM_SPLITS=num_splits, WINDOW=self.windows[layer] or 0, GROUP=self.group,
            ROWS=tiling.rows, TILE=tiling.tile, PRECISION=self._precision, **self._shape,
            num_warps=tiling.warps, num_stages=tiling.stages,
        )  # fmt: skip
        if num_splits > 1:
            triton_kernels.merge_splits[(num_spans * self.num_heads,)](
                partial, log, out, NUM_SPLITS=num_splits, SPLIT_PAD=_power_of_two(num_splits, 2),
                HEAD_DIM=self.layout.head_dim, HEAD_PAD=self._shape["HEAD_PAD"],
            )  # fmt: skip

    def attend_chunks(
        self, layer: int, query: Tensor, out: Tensor, *, block_table: Tensor, tiles: Tensor
    ) -> None:
        """The rows that ``tiles`` (``chunk_tiles``) name."""
        tiling = self.chunk_tiling
        triton_kernels.attend_chunks[(len(tiles), self.num_kv_heads)](
            query, query.stride(0), self.pools[layer], self.first_head,
            block_table, block_table.stride(0), tiles, out, self.scale * math.log2(math.e),
            WINDOW=self.windows[layer] or 0, GROUP=self.group, ROWS=tiling.rows,
            TILE=tiling.tile, PRECISION=self._precision, **self._shape,
            num_warps=tiling.warps, num_stages=tiling.stages,
        )  # fmt: skip


class _TritonStep:
    """``slots`` are those of all rows; decodes come first."""

    def __init__(self, attention: TritonPagedAttention, slots: Tensor) -> None:
        self._attention = attention
        self._slots = slots
        self._decodes: tuple[Tensor, Tensor, int] | None = None
        self._chunks: tuple[Tensor, Tensor] | None = None

    def add_decodes(self, block_table: Tensor, contexts: Tensor, longest: int) -> None:
        num_splits = self._attention.num_splits(len(contexts), longest)
        self._decodes = block_table, contexts, num_splits

    def add_chunks(self, block_table: Tensor, tiles: Tensor) -> None:
        self._chunks = block_table, tiles

    def paged_spans(self) -> None:
        return None

    def __call__(self, layer: int, query: Tensor, key_value: Tensor) -> Tensor:
        attention = self._attention
        assert query[0].is_contiguous()
        attention.write(layer, key_value, self._slots)
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        if self._decodes is not None:
            table, contexts, num_splits = self._decodes
            attention.attend_decodes(
                *(layer, query, out), block_table=table, contexts=contexts, num_splits=num_splits
            )
        if self._chunks is not None:
            table, tiles = self._chunks
            attention.attend_chunks(layer, query, out, block_table=table, tiles=tiles)
        return out


def chunk_tiles(chunks: tuple[Span, ...], first_table_row: int, tokens_per_tile: int) -> Tensor:
    """``chunks`` cut into pieces of at most so many tokens, as the kernel reads them: int32
    [tiles, 4]. The longest contexts come first: what is begun last should not last longest."""
    tiles = []
    for table_row, span in enumerate(chunks, first_table_row):
        first_position = span.num_context - span.num_tokens
        for first in range(0, span.num_tokens, tokens_per_tile):
            num_rows = min(tokens_per_tile, span.num_tokens - first)
            tiles.append((table_row, span.first_row + first, num_rows, first_position + first))
    tiles.sort(key=lambda tile: -tile[3])
    return torch.tensor(tiles, dtype=torch.int32)


def _tilings(layout: KvLayout, dtype: torch.dtype, group: int) -> tuple[_Tiling, _Tiling]:
    """Of decodes and of chunks. Float32 takes twice the memory and is there to be exact, not
    fast; so do large heads."""
    decode_rows = _power_of_two(group)
    if dtype == torch.float32 or layout.head_dim > 128:
        chunk_rows = max(32, decode_rows)
        return _Tiling(decode_rows, 32, 4, 2), _Tiling(chunk_rows, 32, 4, 2)
    chunk_rows = max(128, decode_rows)
    return _Tiling(decode_rows, 64, 4, 3), _Tiling(chunk_rows, 64, 8, 3)


def _power_of_two(number: int, least: int = _LEAST_PAD) -> int:
    return max(least, 1 << (number - 1).bit_length())


def _num_processors(device: torch.device) -> int:
    if device.type != "cuda":
        return _CPU_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
