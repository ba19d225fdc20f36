"""How do a decode step's time and a worker's memory grow? By context and batch, and by blocks.

    python -m benchmarks.engine.curves
    python -m benchmarks.engine.curves --report     # results into docs/, runs nothing

Steps are timed in one process without a server; memory is that of a real server's worker.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from baton.config import DEFAULT_MODEL, EngineConfig
from baton.errors import BatonError
from benchmarks import page
from benchmarks.engine import bound, curves_report
from benchmarks.engine.curves_report import Memory, Results, Step
from benchmarks.engine.steps import SteppedEngine
from benchmarks.measured import measured_now
from benchmarks.server import BatonServer

SECTION = "curves"
KEPT, PLOT = page.KEPT / "curves.json", page.KEPT / "curves.svg"
_RESULTS = page.RESULTS / "curves.json"
CONTEXTS = (256, 512, 1024, 2048, 4096, 8000)
ROWS = (1, 8, 32)
"""With every one of these contexts."""
BATCHES = (1, 2, 4, 8, 16, 32, 64)
BATCH_CONTEXT = 512
_KV_SIZES = (64, 256, 512, 1024, 2048)
"""MiB, of the servers whose memory is measured."""
_MIB = 1 << 20


def steps(engine: SteppedEngine, *, count: int) -> Iterator[Step]:
    """Of every context and batch, each the median of so many."""
    pairs = [(rows, context) for rows in ROWS for context in CONTEXTS]
    pairs += [(rows, BATCH_CONTEXT) for rows in BATCHES]
    for rows, context in dict.fromkeys(pairs):
        yield Step(rows, context, round(engine.decode_ms(rows, context, steps=count), 3))


def memory(kv_mib: int, block_bytes: int) -> Memory:
    """Of a colocated worker that has just come up."""
    with tempfile.TemporaryDirectory(prefix="baton-curves-") as name:
        server = BatonServer(
            Path(name) / "baton",
            settings={
                "engine": {"kv_cache_bytes": kv_mib * _MIB, "dtype": "bfloat16"},
                "cluster": {"backend": "processes"},
            },
            arguments=("--prefill", "0", "--decode", "1"),
        )
        with server:
            children = psutil.Process(server.pid).children(recursive=True)
            largest = max(each.memory_full_info().pss for each in children)
    return Memory(kv_mib * _MIB // block_bytes, round(largest / 1e6, 1))


def section(kept: Path = KEPT) -> str:
    """Of docs/performance.md. Raises OSError or ValueError."""
    return curves_report.section(Results.read(kept), PLOT)


def main() -> None:
    module = "benchmarks.engine.curves"
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--steps", type=int, default=20, help="timed of each kind")
    parser.add_argument("--out", type=Path, default=_RESULTS, metavar="FILE")
    parser.add_argument(
        "--report", action="store_true", help="write docs/performance.md from those results"
    )
    given = parser.parse_args()
    if given.report:
        page.publish(Results, given.out, module=module, kept=KEPT, name=SECTION, section=section)
        curves_report.draw(Results.read(KEPT), PLOT)
        return
    measured = measured_now(shlex.join(["python", "-m", module, *sys.argv[1:]]))
    limits = bound.measure(
        DEFAULT_MODEL,
        rows=BATCHES,
        num_prompt_tokens=bound.CHUNK,
        chunk=bound.CHUNK,
        threads=torch.get_num_threads(),
    )
    # Room for the largest context and batch, and the steps that are timed.
    engine = SteppedEngine(
        EngineConfig(
            dtype="bfloat16",
            cpu_kernels="auto",
            kv_cache_bytes=max(ROWS) * (max(CONTEXTS) + 256) * 24 * 1024,
        )
    )
    taken = tuple(steps(engine, count=given.steps))
    token_bytes, block_bytes = engine.token_bytes, engine.block_bytes
    del engine
    results = Results(
        measured=measured,
        bound=limits.faster(),
        token_bytes=token_bytes,
        block_bytes=block_bytes,
        steps=taken,
        memory=tuple(memory(each, block_bytes) for each in _KV_SIZES),
    )
    results.write(given.out)
    print(f"{curves_report.section(Results.read(given.out), PLOT)}\n\nwritten: {given.out}")


if __name__ == "__main__":
    try:
        main()
    except BatonError as error:
        sys.exit(error.message)
    except (OSError, ValueError) as error:
        sys.exit(f"curves: {error}")
