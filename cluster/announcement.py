"""What `baton serve` says once everything is ready."""

from __future__ import annotations

import json
from collections.abc import Mapping

from rich.table import Table

from baton.config import BatonConfig
from cluster.console import Progress
from cluster.server_client import ServerStatus, authorization
from cluster.state import RunFolder


def announce(
    status: ServerStatus,
    urls: Mapping[str, str],
    config: BatonConfig,
    folder: RunFolder,
    progress: Progress,
) -> None:
    """What a person wants to know now, down to a line to copy."""
    url = next(iter(urls.values()))
    model = status.workers[-1].model
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("pool", "worker", "address", "KV cache"):
        table.add_column(heading)
    for worker in status.workers:
        tokens = f"{worker.num_blocks * worker.block_size:,} tokens"
        table.add_row(worker.role, worker.worker_id, worker.address, tokens)
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "temperature": 0,
    }
    progress.done("ready\n")
    for heading, address in zip(("address", *[""] * len(urls)), urls.values(), strict=False):
        progress.say(f"{heading:7}  {address}/v1")
    progress.say(f"model    {model}")
    progress.say(f"backend  {config.cluster.backend}")
    progress.say(f"logs     {folder.logs}\n")
    progress.table(table)
    progress.say("\nTry it (or `baton chat`; Ctrl-C here stops everything):\n")
    header = "-H 'Content-Type: application/json'"
    if authorization():
        header += ' -H "Authorization: Bearer $BATON_API_KEY"'
    progress.say(f"  curl {url}/v1/chat/completions {header} -d '{json.dumps(body)}'\n")
