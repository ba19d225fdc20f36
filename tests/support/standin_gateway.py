"""In a gateway's place: answers ``/status`` with the stand-in workers that live."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

FOLDER = Path(os.environ["STANDIN_FOLDER"])


def rows() -> list[dict[str, Any]]:
    found = []
    for file in sorted(FOLDER.glob("*.worker")):
        pid = file.read_text()
        if pid and Path(f"/proc/{pid}").exists():
            role = file.stem.partition("-")[0]
            counts = ("running", "waiting")
            blocks = ("free_blocks", "cached_blocks", "referenced_blocks", "quarantined_blocks")
            numbers = {f"num_{name}": 0 for name in (*counts, *blocks, "blocks")}
            text = {
                "worker_id": file.stem,
                "role": role,
                "address": "nowhere:1",
                "model": "standin",
            }
            found.append({**text, **numbers, "ready": True, "block_size": 16, "num_ranks": 1})
    return found


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = json.dumps({"missing": [], "degraded": [], "workers": rows()}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path)
    parser.add_argument("--gateway-id")
    parser.add_argument("--port", type=int)
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    (FOLDER / f"{given.gateway_id}.gateway").write_text(str(os.getpid()))
    HTTPServer(("127.0.0.1", given.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
