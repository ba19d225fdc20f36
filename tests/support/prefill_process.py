"""A prefill worker's hand-off in a process of its own, driven line by line, to be killed.

Run as ``python -m tests.support.prefill_process CONFIG_JSON``; it prints one JSON
line ``{"address", "epoch", "pid"}`` and then obeys lines on its standard input::

    {"do": "offer", "key": [id hex, decode epoch hex], "start_token": 0, "num_tokens": 18}
    {"do": "ready", "key": ..., "end_token": 10, "block_ids": [...]}
    {"do": "commit", "key": ...}

The pool is filled from seed 1, like that of ``tests.support.handoff.Prefill``.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any

from baton.config import KvTransferConfig
from baton.faults import Faults
from kv_transfer.keys import TransferKey
from tests.support.handoff import Prefill


def obey(prefill: Prefill, order: dict[str, Any]) -> None:
    number, decode_epoch = (bytes.fromhex(part) for part in order["key"])
    key = TransferKey(number, 0, prefill.epoch, decode_epoch)
    match order["do"]:
        case "offer":
            prefill.sender.offer(
                key, start_token=order["start_token"], num_tokens=order["num_tokens"]
            )
        case "ready":
            prefill.sender.ready(key, order["end_token"], order["block_ids"])
        case "commit":
            prefill.sender.commit(key, 77, 0)


async def main() -> None:
    arguments = json.loads(sys.argv[1])
    port = arguments.pop("port", 0)
    prefill = await Prefill.start(
        KvTransferConfig(**arguments), port=port, faults=Faults.from_environment("prefill-0")
    )
    hello = {"address": prefill.address, "epoch": prefill.epoch.hex(), "pid": os.getpid()}
    print(json.dumps(hello), flush=True)
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        obey(prefill, json.loads(line))
    await prefill.close()


if __name__ == "__main__":
    asyncio.run(main())
