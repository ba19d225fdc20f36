"""A small server of OpenAI's streaming chat API that counts what it does and fails on demand."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

NUM_TOKENS = 6


class OpenAIStandin:
    """``behave(number, body)`` names what request ``number`` (from 0) meets:

    - ``whole``: NUM_TOKENS tokens, the last three in one write
    - ``cut``: the connection breaks in the middle
    - ``short``: a clean end, but without finish_reason and [DONE]
    - ``error``: an error event after the first token
    - ``refuse``: status 429
    - ``stall``: one token, then nothing until the client leaves
    """

    def __init__(self, behave: Callable[[int, dict[str, Any]], str]) -> None:
        self.done: Counter[str] = Counter()
        """Requests by behaviour, counted when they are over."""
        self.bodies: list[dict[str, Any]] = []
        self.arrived_at: list[float] = []
        self._behave = behave
        self._lock = threading.Lock()
        standin = self

        class Handler(_Handler):
            server_of = standin

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> OpenAIStandin:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def begin(self, body: dict[str, Any]) -> str:
        with self._lock:
            self.bodies.append(body)
            self.arrived_at.append(time.perf_counter())
            return self._behave(len(self.bodies) - 1, body)

    def end(self, behaviour: str) -> None:
        with self._lock:
            self.done[behaviour] += 1


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server_of: OpenAIStandin

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._json(200, {"data": [{"id": "standin", "max_model_len": 2048}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        behaviour = self.server_of.begin(body)
        if behaviour == "refuse":
            self._json(429, {"error": {"code": "overloaded", "message": "full"}})
        else:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            try:
                getattr(self, f"_{behaviour}")(body)
            except OSError:  # the client left
                self.close_connection = True
        self.server_of.end(behaviour)

    def _whole(self, body: dict[str, Any]) -> None:
        for _ in range(NUM_TOKENS - 3):
            self._write(_token())
            time.sleep(0.005)
        self._write(_token() + _token() + _token(reason="stop"))
        num_prompt = sum(len(message["content"].split()) for message in body["messages"])
        usage = {"prompt_tokens": num_prompt, "completion_tokens": NUM_TOKENS}
        self._write(_event({"choices": [], "usage": usage}) + b"data: [DONE]\n\n")
        self._write(b"")

    def _cut(self, _: dict[str, Any]) -> None:
        self._write(_token() + _token())
        self.close_connection = True

    def _short(self, _: dict[str, Any]) -> None:
        self._write(_token())
        self._write(b"")

    def _error(self, _: dict[str, Any]) -> None:
        self._write(_token())
        self._write(_event({"error": {"code": "worker_lost", "message": "gone"}}))
        self._write(b"")

    def _stall(self, _: dict[str, Any]) -> None:
        self._write(_token())
        self.connection.settimeout(30.0)
        self.rfile.read(1)

    def _write(self, data: bytes) -> None:
        """One HTTP chunk; the empty one ends the body."""
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def _json(self, status: int, value: dict[str, Any]) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n\n"


def _token(reason: str | None = None) -> bytes:
    choice = {"index": 0, "delta": {"content": "word "}, "finish_reason": reason}
    return _event({"choices": [choice]})
