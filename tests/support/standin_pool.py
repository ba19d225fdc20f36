"""A prefill worker's place taken by a process that computes nothing.

``write_standin`` makes a package ``prefill_workers`` that shadows the real one for
processes which find its folder first on PYTHONPATH. Its ``serve`` notes its pid and its
configuration as ``FOLDER/<worker_id>.json``, ends when it is asked to, and notes that; with
a worker id that begins with ``fails`` it raises, ``deaf`` never ends.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_MAIN = """
import asyncio, json, os
from pathlib import Path
from baton.errors import CheckpointError
from baton.worker.process import run

async def serve(config, *, worker_id, secret, redis_url, stop):
    if worker_id.startswith("fails"):
        raise CheckpointError("the weights are missing")
    folder = Path({folder!r})
    facts = {{
        "pid": os.getpid(),
        "host": config.worker.host,
        "block_size": config.engine.block_size,
        "secret": secret,
        "environment": {{k: v for k, v in os.environ.items() if k.startswith(("BATON_", "OMP_"))}},
    }}
    scratch = folder / (worker_id + ".new")
    scratch.write_text(json.dumps(facts))
    scratch.replace(folder / (worker_id + ".json"))
    await stop.wait()
    (folder / (worker_id + ".asked")).touch()
    if worker_id.startswith("deaf"):
        await asyncio.Event().wait()

if __name__ == "__main__":
    run("prefill", serve)
"""


def write_standin(folder: Path) -> Path:
    """The folder to put first on PYTHONPATH; notes go to ``folder`` itself."""
    package = folder / "shadow" / "prefill_workers"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "main.py").write_text(_MAIN.format(folder=str(folder)))
    return package.parent


def noted(folder: Path, worker_id: str) -> dict[str, Any] | None:
    """What that worker noted at its start; None before."""
    file = folder / f"{worker_id}.json"
    facts: dict[str, Any] | None = json.loads(file.read_text()) if file.exists() else None
    return facts
