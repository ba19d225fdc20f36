"""What copying costs the decode steps beside it: the same process' engine steps on one core while
a thread copies blocks on the other, as the shared-memory transport does; and, to tell the
interpreter's lock from the memory's bandwidth, while another process copies as much.

    python -m benchmarks.handoff.beside --rounds 3

prints JSON. Copying goes on without a pause: a served hand-off copies a chunk in a millisecond.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from multiprocessing.connection import Connection

import numpy as np

from baton.config import EngineConfig
from benchmarks.engine.steps import SteppedEngine
from benchmarks.figures import percentile
from benchmarks.handoff.cases import COPY_CORE, PREFILL_CORE, FreeList, Load
from benchmarks.handoff.processes import pin
from benchmarks.handoff.report import Beside
from benchmarks.handoff.shapes import SHAPES
from engine.native.copies import native_copies
from engine.native.kernels import use_kernels
from kv_transfer.blocks import PoolView
from kv_transfer.memory import KvMemory
from kv_transfer.ranges import BlockRange
from kv_transfer.transports import shared_memory

ALONE, THREAD, PROCESS = "nothing", "a thread of it", "another process"
_POOL_BYTES = 256 << 20
_ROWS, _CONTEXT, _STEPS = 4, 256, 150


class Copier:
    """Copies scattered blocks of the real model's shape until it is stopped."""

    def __init__(self) -> None:
        layout = SHAPES["smollm2"].layout_within(_POOL_BYTES)
        self._memories = [KvMemory(layout.num_bytes) for _ in range(2)]
        np.frombuffer(self._memories[0].buffer, dtype=np.uint64)[:] = 1
        source, target = (each.buffer for each in self._memories)
        self._source = PoolView(layout, source)
        self._target = PoolView(layout, target, copy_blocks=native_copies())
        every = Load(layout.num_blocks * layout.block_size, 1, 1)
        of, to = (tuple(FreeList(layout, seed).take(every, 1)[0]) for seed in (1, 2))
        at_once = max(1, shared_memory.AT_ONCE_BYTES // layout.block_bytes)
        whole = BlockRange(0, every.tokens, of, to)
        self._parts = list(whole.parts(at_once, layout.block_size))
        self._block_bytes = layout.block_bytes
        self._stopped = False
        self._thread = threading.Thread(target=self._run)
        self.gb_s = 0.0

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> float:
        """GB/s."""
        self._stopped = True
        self._thread.join()
        return self.gb_s

    def _run(self) -> None:
        pin(COPY_CORE)
        num_copied, began = 0, time.perf_counter()
        for part in itertools.cycle(self._parts):
            if self._stopped:
                break
            self._target.copy_range(self._source, part)
            num_copied += len(part.blocks)
        self.gb_s = num_copied * self._block_bytes / (time.perf_counter() - began) / 1e9


def _copy_apart(connection: Connection) -> None:
    use_kernels("auto")
    copier = Copier()
    copier.start()
    connection.send("started")
    connection.recv()
    connection.send(copier.stop())


@contextmanager
def _copying(how: str, found: list[float]) -> Iterator[None]:
    """Appends the copier's rate in GB/s at the end."""
    if how == ALONE:
        yield
        found.append(0.0)
    elif how == THREAD:
        copier = Copier()
        copier.start()
        try:
            yield
        finally:
            found.append(copier.stop())
    else:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_copy_apart, args=(theirs,), daemon=True)
        process.start()
        ours.recv()
        try:
            yield
            ours.send("stop")
            found.append(ours.recv())
        finally:
            process.kill()
            process.join()


def measure(rounds: int) -> Iterator[Beside]:
    """All three in turn. A first round is not counted."""
    pin(PREFILL_CORE)
    settings = {"dtype": "bfloat16", "threads": 1, "cpu_kernels": "auto"}
    engine = SteppedEngine(EngineConfig.model_validate(settings))
    for number in range(-1, rounds):
        for how in (ALONE, THREAD, PROCESS):
            found: list[float] = []
            with _copying(how, found):
                times = engine.decode_times_ms(_ROWS, _CONTEXT, steps=_STEPS)
            p50, p99 = percentile(times, 50), percentile(times, 99)
            assert p50 is not None
            assert p99 is not None
            if number >= 0:
                yield Beside(how, round(p50, 3), round(p99, 3), round(found[0], 3))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.handoff.beside", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    print(json.dumps([asdict(each) for each in measure(given.rounds)]))


if __name__ == "__main__":
    main()
