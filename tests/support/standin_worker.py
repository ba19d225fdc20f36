"""In a worker's place: registers, notes its pid, and what it was given; ends on SIGTERM.

``STANDIN_BEHAVIOUR`` may be ``fails`` (dies at its start), ``deaf`` (ignores SIGTERM),
``hides`` (never becomes ready) or ``mute`` (never registers). The file ``WORKER.fails``
in its folder makes the next ones of that name die at their start.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import secrets
import signal
import sys
import time
from pathlib import Path

from baton.config import load_config
from baton.records import Role, WorkerRecord
from baton.worker.registration import Registration

FOLDER = Path(os.environ["STANDIN_FOLDER"])


def record(worker_id: str, role: Role) -> WorkerRecord:
    return WorkerRecord(
        worker_id=worker_id,
        role=role,
        epoch=secrets.token_hex(16),
        protocol_version=0,
        generation="0",
        address="nowhere:1",
        metrics_address="nowhere:2",
        model="standin",
        digest="00",
        block_size=16,
        num_blocks=0,
        max_model_len=1,
        pid=os.getpid(),
        host="here",
        started_at=time.time(),
    )


async def live(arguments: argparse.Namespace, behaviour: str) -> None:
    worker_id, stop = arguments.worker_id, asyncio.Event()
    if behaviour != "deaf":
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    config = load_config(arguments.config)
    role = config.pools[arguments.pool].role
    given = {"BATON_SECRET", "REDIS_URL"} <= os.environ.keys()
    if behaviour != "hides":
        (FOLDER / f"{worker_id}.worker").write_text(str(os.getpid()) if given else "")
    registration = Registration(os.environ["REDIS_URL"], record(worker_id, role), config.registry)
    if behaviour != "mute":
        await registration.start()
    stopped, lost = (asyncio.create_task(e.wait()) for e in (stop, registration.lost))
    await asyncio.wait({stopped, lost}, return_when=asyncio.FIRST_COMPLETED)
    await registration.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path)
    parser.add_argument("--pool")
    parser.add_argument("--worker-id")
    arguments = parser.parse_args()
    behaviour = os.environ.get("STANDIN_BEHAVIOUR", "")
    if behaviour == "fails" or (FOLDER / f"{arguments.worker_id}.fails").exists():
        sys.exit("the weights are missing")
    if behaviour == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    asyncio.run(live(arguments, behaviour))


if __name__ == "__main__":
    main()
