"""A rank other than the first, as a process: ``python -m engine.parallel.rank_main``.

Its leader starts it, and the kernel kills it when the leader dies.
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import os
import signal
import sys
from multiprocessing.connection import Connection

from baton.errors import BatonError
from baton.logs import configure

logger = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m engine.parallel.rank_main")
    parser.add_argument("--name", required=True, help="in its log lines")
    parser.add_argument("--leader", type=int, required=True, help="pid of its parent")
    parser.add_argument("--connection", type=int, required=True, help="descriptor to the leader")
    return parser


def _die_with(leader: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
        sys.exit(f"prctl(PR_SET_PDEATHSIG): {os.strerror(ctypes.get_errno())}")
    if os.getppid() != leader:
        sys.exit("the leader died first")


def main() -> None:
    arguments = _parser().parse_args()
    _die_with(arguments.leader)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's is for the leader
    configure(arguments.name)
    from engine.parallel.follower import follow  # loads torch, which takes long

    try:
        follow(Connection(arguments.connection))
    except EOFError:
        sys.exit("the leader is gone")
    except BatonError as error:
        logger.error("%s: %s", error.code, error.message)
        sys.exit(1)
    except Exception:
        logger.exception("this rank cannot go on")
        sys.exit(1)


if __name__ == "__main__":
    main()
