"""Which order should a KV pool's axes have? What moving it costs in each, for two models' shapes.

    python -m benchmarks.handoff.layouts

prints tables: descriptors of a block (moved whole, and between tensor-parallel degrees), rates of
copying scattered blocks over shared memory and gloo, reading contexts as decode's attention does,
and what overlapping by layers could save. One thread on each side. Nothing is kept: docs/adr has
what was decided by it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

from baton.config import EngineConfig
from baton.kv_layout import KvLayout
from benchmarks import page
from benchmarks.engine.steps import SteppedEngine
from benchmarks.handoff.bare import PIECE_BYTES, GlooPair
from benchmarks.handoff.cases import COPY_CORE, PREFILL_CORE
from benchmarks.handoff.orders import AXES, ORDERS, canonical, num_resharded, sizes
from benchmarks.handoff.processes import pin
from benchmarks.handoff.shapes import SHAPES, Shape

POOL_BYTES = 512 << 20
"""Of each of two pools: far beyond the caches."""
_MOVED_BYTES = 192 << 20
_GLOO_POOL_BYTES, _GLOO_BYTES = 160 << 20, 48 << 20
_CHUNK = 512
_DEGREES = {"smollm2": ((1, 1), (1, 3), (3, 1)), "8b": ((1, 1), (1, 2), (2, 1), (2, 4), (4, 2))}
_CONTEXT, _SEQUENCES = 2048, 4


def _median_rate(move: Callable[[], int], rounds: int) -> float:
    """GB/s; the first time does not count."""
    rates = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        num_bytes = move()
        rates.append(num_bytes / (time.perf_counter() - began) / 1e9)
    return statistics.median(rates[1:])


class Pools:
    """A source and a target, laid out in one order, with blocks to move between them."""

    def __init__(self, order: str, layout: KvLayout) -> None:
        elements = int(np.prod(layout.shape))
        self.layout = layout
        self.source_memory = np.ones(elements, dtype=np.uint16)
        self.target_memory = np.zeros(elements, dtype=np.uint16)
        self.source = canonical(order, layout, self.source_memory)
        self.target = canonical(order, layout, self.target_memory)
        self._rng = np.random.default_rng(0)

    def pairs(self, num_bytes: int) -> list[tuple[int, int]]:
        """Source and target blocks for so many bytes, other ones each time."""
        number = min(self.layout.num_blocks, num_bytes // self.layout.block_bytes)
        ids = [self._rng.permutation(self.layout.num_blocks)[:number] for _ in range(2)]
        return [(int(a), int(b)) for a, b in zip(*ids, strict=True)]

    def copy(self, heads: int) -> int:
        """The first ``heads`` heads of scattered blocks, a call for each block; the bytes."""
        pairs = self.pairs(_MOVED_BYTES)
        for source_block, block in pairs:
            self.target[block, :heads] = self.source[source_block, :heads]
        return len(pairs) * self.layout.block_bytes * heads // self.layout.num_kv_heads


def _read_rate(order: str, layout: KvLayout, rounds: int) -> float:
    """Contexts read layer by layer, head by head, block by block, K and V, as decode's attention
    does: rows of elements gathered through a table, by one thread."""
    pools = Pools(order, layout)
    memory = torch.from_numpy(pools.source_memory.view(np.int16)).view(-1, layout.head_dim)
    size = sizes(layout)
    rows = torch.arange(memory.shape[0]).view([size[axis] for axis in order if axis != "D"])
    places = rows.permute([order.index(axis) for axis in AXES[:-1]])
    blocks = torch.from_numpy(np.random.default_rng(1).permutation(layout.num_blocks))
    table = blocks[: _SEQUENCES * _CONTEXT // layout.block_size].view(_SEQUENCES, -1)
    indices = [
        places[table][:, :, :, layer].transpose(1, 2).reshape(-1) for layer in range(size["L"])
    ]
    out = torch.empty(len(indices[0]), layout.head_dim, dtype=torch.int16)

    def read() -> int:
        for index in indices:
            torch.index_select(memory, 0, index, out=out)
        return len(indices) * out.nbytes

    return _median_rate(read, rounds)


# -------------------------------------------------------------------------------- gloo


def _gloo_rank(connection: Connection, store: str, shape: Shape) -> None:
    """The sending process: what it is told, until the pipe is closed."""
    pin(PREFILL_CORE)
    pair = GlooPair(store, 0)
    try:
        while True:
            order, heads, staged = connection.recv()
            pools = Pools(order, shape.layout_within(_GLOO_POOL_BYTES))
            while connection.recv():
                _through_gloo(pools, pools.source, heads, pair.send, staged=staged, gather=True)
    except EOFError:
        return


def _through_gloo(
    pools: Pools,
    side: Any,
    heads: int,
    move: Callable[[Sequence[torch.Tensor]], None],
    *,
    staged: bool,
    gather: bool,
) -> int:
    """One side of moving scattered blocks, piece by piece: each of its runs a message, or all of
    them through a buffer."""
    ids = [pair[0 if gather else 1] for pair in pools.pairs(_GLOO_BYTES)]
    per_piece = max(1, PIECE_BYTES // pools.layout.block_bytes)
    staging = np.empty((per_piece, *side[0, :heads].shape), dtype=np.uint16)
    for first in range(0, len(ids), per_piece):
        piece = ids[first : first + per_piece]
        buffer = staging[: len(piece)]
        if not staged:
            runs = [run for block in piece for run in _contiguous(side[block, :heads])]
            move([torch.from_numpy(run.view(np.int16)) for run in runs])
            continue
        if gather:
            for at, block in enumerate(piece):
                buffer[at] = side[block, :heads]
        move([torch.from_numpy(buffer.view(np.int16))])
        if not gather:
            for at, block in enumerate(piece):
                side[block, :heads] = buffer[at]
    return len(ids) * int(staging[0].nbytes)


def _contiguous(view: Any) -> list[Any]:
    """The fewest contiguous arrays that are parts of ``view``, in a fixed order."""
    order = sorted(range(view.ndim), key=lambda axis: -view.strides[axis])
    view = view.transpose(order)
    parts = [view]
    while not parts[0].flags.c_contiguous:
        parts = [part for whole in parts for part in whole]
    return parts


def _gloo_rates(shape: Shape, cases: Sequence[tuple[str, int, bool]], rounds: int) -> list[float]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    with tempfile.TemporaryDirectory(prefix="baton-layouts-") as folder:
        store = f"{folder}/store"
        process = context.Process(target=_gloo_rank, args=(theirs, store, shape), daemon=True)
        process.start()
        theirs.close()
        try:
            pair = GlooPair(store, 1)
            return [_gloo_rate(ours, pair, shape, case, rounds) for case in cases]
        finally:
            ours.close()
            process.join(10.0)
            process.kill()


def _gloo_rate(
    connection: Connection, pair: GlooPair, shape: Shape, case: tuple[str, int, bool], rounds: int
) -> float:
    order, heads, staged = case
    connection.send(case)
    pools = Pools(order, shape.layout_within(_GLOO_POOL_BYTES))

    def move() -> int:
        connection.send(True)
        return _through_gloo(pools, pools.target, heads, pair.receive, staged=staged, gather=False)

    rate = _median_rate(move, rounds)
    connection.send(False)
    return rate


# ------------------------------------------------------------------------------ tables


def descriptors(shape: Shape) -> str:
    degrees = _DEGREES[shape.name]
    lines: list[Sequence[str]] = [
        ("descriptors of a block", *(f"TP {a} to {b}" for a, b in degrees))
    ]
    for order, title in ORDERS.items():
        numbers = [num_resharded(order, shape.layout(2), a, b) for a, b in degrees]
        lines.append((title, *(f"{number:,}" for number in numbers)))
    return page.markdown_table(lines)


def rates(shape: Shape, rounds: int) -> str:
    layout = shape.layout_within(POOL_BYTES)
    every, share = layout.num_kv_heads, 1 if shape.name == "smollm2" else layout.num_kv_heads // 2
    cases = [
        (order, heads, staged)
        for order in ORDERS
        for heads, staged in ((every, False), (every, True), (share, False), (share, True))
    ]
    found = iter(_gloo_rates(shape, cases, rounds))
    named = "one head" if share == 1 else "half of the heads"
    lines: list[Sequence[str]] = [
        (
            *("GB/s", "whole, shared memory", f"{named}, shared memory"),
            *("whole, gloo by runs", "whole, gloo gathered"),
            *(f"{named}, gloo by runs", f"{named}, gloo gathered", "reading contexts"),
        )
    ]
    for order, title in ORDERS.items():
        copy = Pools(order, layout).copy
        copied = [_median_rate(partial(copy, heads), rounds) for heads in (every, share)]
        over_gloo = [next(found) for _ in range(4)]
        read = _read_rate(order, layout, rounds)
        lines.append((title, *(f"{rate:.2f}" for rate in (*copied, *over_gloo, read))))
    return page.markdown_table(lines)


def overlap(rounds: int) -> str:
    """What is left of a hand-off after the last chunk is computed, and after its last layer."""
    engine = SteppedEngine(
        EngineConfig.model_validate({"dtype": "bfloat16", "threads": 1, "cpu_kernels": "auto"})
    )
    shape = SHAPES["smollm2"]
    chunk_ms = engine.prompt_ms(_CHUNK, repeats=rounds)
    layout = shape.layout_within(POOL_BYTES)
    num_bytes = _CHUNK * layout.token_bytes
    pools = Pools("BHLPTD", layout)
    memory = _median_rate(lambda: pools.copy(layout.num_kv_heads), rounds)
    gloo = _gloo_rates(shape, [("BHLPTD", layout.num_kv_heads, False)], rounds)[0]
    lines: list[Sequence[str]] = [
        ("a chunk of 512 tokens", "ms", "of its compute", "if only the last layer were left")
    ]
    for name, rate in (("shared memory", memory), ("gloo", gloo)):
        copy_ms = num_bytes / rate / 1e6
        last = copy_ms / layout.num_layers
        lines.append(
            (f"copied over {name}", f"{copy_ms:.2f}", f"{copy_ms / chunk_ms:.1%}", f"{last:.2f} ms")
        )
    lines.append(
        (
            "computed, one core",
            f"{chunk_ms:.0f}",
            "",
            f"a layer: {chunk_ms / layout.num_layers:.1f} ms",
        )
    )
    return page.markdown_table(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.handoff.layouts", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    given = parser.parse_args()
    torch.set_num_threads(1)
    pin(COPY_CORE)
    for name in given.shapes:
        shape = SHAPES[name]
        print(
            f"{shape.title}\n\n{descriptors(shape)}\n\n{rates(shape, given.rounds)}\n", flush=True
        )
    print(overlap(given.rounds))


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, RuntimeError) as error:
        sys.exit(f"layouts: {error}")
