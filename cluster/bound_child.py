"""Runs a command that the kernel kills when the process that asked for it dies.

    python -I -S bound_child.py PARENT_PID COMMAND [ARGUMENT...]

It asks for SIGKILL at its parent's death (``PR_SET_PDEATHSIG``, which lasts
across ``execve``) and then becomes the command. Done here rather than between
``fork`` and ``exec`` of the parent, where a process with threads may not run
Python safely. The parent's *thread* that forked must live as long as it does.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    parent, command = int(sys.argv[1]), sys.argv[2:]
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
        number = ctypes.get_errno()
        sys.exit(f"prctl(PR_SET_PDEATHSIG): {os.strerror(number)}")
    if os.getppid() != parent:
        sys.exit("the parent died first")
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(f"cannot run {command[0]}: {error.strerror}")


if __name__ == "__main__":
    main()
