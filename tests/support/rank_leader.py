"""A worker's first rank, of three, that computes without end: ``python -m support.rank_leader``.

It prints the pids of the others, then ``steps`` once they compute.
"""

from __future__ import annotations

import itertools
import sys

from support.rank_pool import leads
from support.tiny_engine import prompt, run_step, tokens

from baton.logs import configure
from baton.parallelism import Parallelism
from engine.parallel.rank_processes import RankProcesses


def main() -> None:
    configure("decode-0")
    parallel = Parallelism(3)
    processes = RankProcesses(parallel.num_ranks - 1, worker_id="decode-0")
    print(*processes.pids, flush=True)
    with leads(processes.connections, sys.argv[1], parallel) as engine:
        for round_ in itertools.count():
            seq = prompt(tokens(100, seed=round_))
            run_step(engine, seq)
            engine.kv.free(seq)
            if round_ == 0:
                print("steps", flush=True)
            if len(sys.argv) > 2:
                break
    processes.close()


if __name__ == "__main__":
    main()
