"""What processes listen on, as the kernel says."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from cluster.procfs import ProcessName

LISTENING = "0A"


def listening_addresses(process: ProcessName) -> list[str]:
    """Hexadecimal addresses that this process listens on."""
    sockets = set()
    with contextlib.suppress(FileNotFoundError):
        for file in Path(f"/proc/{process.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                sockets.add(os.readlink(file))
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTENING and f"socket:[{fields[9]}]" in sockets:
                found.append(fields[1].partition(":")[0])
    return found
