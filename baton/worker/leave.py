"""Leaving a node: its workers are asked to drain, and waited for.

    python -m baton.worker.leave --timeout-s N

is what a worker pod runs before it is ended (``preStop``), because Ray tells its
actors nothing. It works through ``$BATON_RUN_DIR``, a folder of this node alone:

- ``<worker_id>.lock`` is held by ``flock`` for as long as that worker lives: the
  kernel lets go of it, however the worker ends. The file itself stays.
- ``leave`` asks every worker to drain. It is never taken back by Baton: a worker
  that starts where it lies refuses to. Remove it to use the node again.

Who leaves writes ``leave`` first and then looks at the locks; who starts takes its
lock first and then looks for ``leave``: so one always sees the other.
"""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import os
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from baton.errors import BatonError, ConfigurationError, DrainingError

RUN_DIR = "BATON_RUN_DIR"
POLL_S = 0.2


def run_folder() -> Path | None:
    """The node's folder; None where leaving is not set up."""
    value = os.environ.get(RUN_DIR, "")
    return Path(value) if value else None


@asynccontextmanager
async def stay(worker_id: str, stop: asyncio.Event) -> AsyncIterator[None]:
    """Holds the worker's lock within, and sets ``stop`` when the node is being left.

    Raises DrainingError where it is being left already, and ConfigurationError where
    the lock cannot be had.
    """
    folder = run_folder()
    if folder is None:
        yield
        return
    lock = _hold(folder, worker_id)
    try:
        leaving = folder / "leave"
        if _lies(leaving):
            raise DrainingError(
                f"this node is being left, so {worker_id} does not start; "
                f"to use the node again remove {leaving}"
            )
        watch = asyncio.create_task(_watch(leaving, stop), name="leave")
        try:
            yield
        finally:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)
    finally:
        os.close(lock)


def _hold(folder: Path, worker_id: str) -> int:
    path = folder / f"{worker_id}.lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigurationError(f"{RUN_DIR}: cannot write {path}: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ConfigurationError(
            f"another {worker_id} lives on this node and holds {path}; end it first"
        ) from None
    return descriptor


async def _watch(leaving: Path, stop: asyncio.Event) -> None:
    while True:
        if _lies(leaving):
            stop.set()
            return
        await asyncio.sleep(POLL_S)


def _lies(file: Path) -> bool:
    return file.exists()


def _is_held(lock: Path) -> bool:
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def living(folder: Path) -> list[str]:
    """Ids of the workers that live on the node of ``folder``."""
    return sorted(lock.stem for lock in folder.glob("*.lock") if _is_held(lock))


def leave(folder: Path, *, timeout_s: float) -> list[str]:
    """Asks every worker of this node to drain; returns once all have ended, or after
    ``timeout_s`` with the ids of those that have not. Raises ConfigurationError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "leave").touch(mode=0o600)
    except OSError as error:
        raise ConfigurationError(f"{RUN_DIR}: cannot write in {folder}: {error}") from error
    ends_at = time.monotonic() + timeout_s
    while remaining := living(folder):
        if time.monotonic() >= ends_at:
            return remaining
        time.sleep(min(POLL_S, max(0.0, ends_at - time.monotonic())))
    return []


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m baton.worker.leave",
        description="Has the workers of this node drain, and returns when they have ended.",
    )
    parser.add_argument("--timeout-s", type=float, required=True, help="how long to wait for them")
    timeout_s = parser.parse_args().timeout_s
    folder = run_folder()
    try:
        if folder is None:
            raise ConfigurationError(
                f"{RUN_DIR} is not set: set it, to a folder of this node alone, for its workers "
                "and for this command"
            )
        if not timeout_s >= 0:
            raise ConfigurationError(f"--timeout-s is {timeout_s:g}; use 0 or more")
        remaining = leave(folder, timeout_s=timeout_s)
    except BatonError as error:
        sys.exit(_say(error.message, status=2))
    if remaining:
        sys.exit(_say(f"not ended within {timeout_s:g} s: {', '.join(remaining)}", status=1))


def _say(sentence: str, *, status: int) -> int:
    print(sentence, file=sys.stderr)
    return status


if __name__ == "__main__":
    main()
