"""A controller that stands apart, driven line by line, to be killed.

Run as ``python ray_controller.py CONFIG ADDRESS [OPTION]``. It connects, prints
``{"adopted": [...]}`` and obeys lines like ``start prefill prefill-0``, ``stop ID``,
``kill ID``; each is answered by one line of JSON, and the end of a worker says so by itself
(``{"ended": ID, "code": ..., "reason": ...}``). ``close`` ends it as a controller ends.

Options: with ``remote`` it takes every process for one of another machine; with ``idle`` it
dies before it has begun a worker; with ``owner`` its workers are its own, as a launcher's
are, and where it may not start it prints ``{"refused": ...}``.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

from baton.config import load_config
from baton.errors import ConfigurationError
from cluster import ray_actor, ray_calls
from cluster.backend import Started
from cluster.ray_backend import RayBackend


def say(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


async def report(worker_id: str, process: Started) -> None:
    end = await process.wait()
    say(ended=worker_id, code=end.code, reason=end.reason)


async def obey(backend: RayBackend, workers: dict[str, Started], words: list[str]) -> None:
    what, *names = words
    if what == "start":
        workers[names[1]] = await backend.start(*names)
    else:
        await getattr(workers[names[0]], what)()


async def main() -> None:
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    option = sys.argv[3] if len(sys.argv) > 3 else None
    if option == "remote":
        ray_actor.Place.is_local = property(lambda _: False)  # type: ignore[assignment,method-assign]
    if option == "idle":
        ray_calls.Actor.begin = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign,assignment,return-value]
    config = load_config(Path(sys.argv[1]), {"cluster": {"ray_address": sys.argv[2]}})
    backend = RayBackend(
        config, secret="of-this-test", redis_url="redis://none", keep=option != "owner"
    )
    try:
        workers: dict[str, Started] = dict(await backend.adopt())
    except ConfigurationError as error:
        say(refused=error.message)
        await backend.close()
        return
    say(adopted=sorted(workers))
    tasks = [asyncio.create_task(report(*each)) for each in workers.items()]
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while (line := (await reader.readline()).decode().split()) and line != ["close"]:
        await obey(backend, workers, line)
        say(done=line)
        if line[0] == "start":
            tasks.append(asyncio.create_task(report(line[2], workers[line[2]])))
    for task in tasks:
        task.cancel()
    say(closed=await backend.close())


if __name__ == "__main__":
    asyncio.run(main())
