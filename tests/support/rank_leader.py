"""A worker's first rank, of three, that computes without end: ``python -m support.rank_leader``.

It prints the pids of the others, then ``step`` after each. With a second argument it takes
one step and closes.
"""

from __future__ import annotations

import itertools
import sys
import threading

import torch
from support.rank_pool import leads
from support.tiny_engine import prompt, run_step, tokens

from baton.logs import configure
from baton.parallelism import Parallelism
from engine.engine import Engine
from engine.parallel.rank_processes import RankProcesses


def compute(engine: Engine, *, once: bool) -> None:
    for round_ in itertools.count():
        seq = prompt(tokens(100, seed=round_))
        run_step(engine, seq)
        engine.kv.free(seq)
        print("step", flush=True)
        if once:
            break


def main() -> None:
    configure("decode-0")
    torch.set_num_threads(1)
    parallel = Parallelism(3)
    processes = RankProcesses(parallel.num_ranks - 1, worker_id="decode-0")
    print(*processes.pids, flush=True)
    with leads(processes.connections, sys.argv[1], parallel) as engine:
        try:
            compute(engine, once=len(sys.argv) > 2)
        except (OSError, RuntimeError):
            # A rank has died. As in a worker, the engine's death by itself ends nothing.
            threading.Event().wait()
    processes.close()


if __name__ == "__main__":
    main()
