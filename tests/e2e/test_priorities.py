"""Who is answered first when all have to wait, by the order of first tokens.

One decode slot, three places in the gateway and a line of four behind them: the line in the
gateway and that on the decode worker are both full of requests of low priority.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
from e2e.conftest import Serving
from support.server import BatonServer, wait_until

LOW, HIGH = 5, -5
NUM_TOKENS = 6


@pytest.fixture(scope="module")
def server(serving: Serving) -> BatonServer:
    return serving(
        settings={
            "gateway": {"max_in_flight": 3, "max_queued": 4},
            "session": {"report_s": 0.1},
            "kv_transfer": {"reserve_s": 120.0},
            "engine": {"kv_cache_bytes": 134_217_728},
            "pools": {"prefill": {}, "decode": {"engine": {"max_num_seqs": 1}}},
        }
    )


class Clients:
    """Each streams one answer; who has its first token is noted, in order."""

    def __init__(self, server: BatonServer, threads: ThreadPoolExecutor) -> None:
        self.order: list[str] = []
        self.leaves = threading.Event()
        """The first one goes away."""
        self._server = server
        self._model = server.model()
        self._threads = threads

    def ask(self, name: str, priority: int, max_tokens: int = NUM_TOKENS) -> Future[str]:
        """The result is the finish reason, or the code of the error."""
        body = {
            "model": self._model,
            "prompt": f"A story about {name} begins:",
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
            "priority": priority,
        }
        return self._threads.submit(self._follow, name, body)

    def _follow(self, name: str, body: dict[str, Any]) -> str:
        end = "cut"
        with (
            self._server.client() as client,
            client.stream("POST", "/v1/completions", json=body) as answer,
        ):
            if answer.status_code != 200:
                assert answer.status_code == 429
                assert int(answer.headers["retry-after"]) >= 1
                return str(json.loads(answer.read())["error"]["code"])
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    (choice,) = json.loads(line.removeprefix("data: "))["choices"]
                    if choice.get("token_ids") and name not in self.order:
                        self.order.append(name)
                    end = choice["finish_reason"] or end
                if name == "first" and self.leaves.is_set():
                    return "left"
        return end


@contextmanager
def clients_of(server: BatonServer) -> Iterator[Clients]:
    """Nothing holds them up once the block is left."""
    with ThreadPoolExecutor(9) as threads:
        clients = Clients(server, threads)
        try:
            yield clients
        finally:
            clients.leaves.set()
            server.inject()


@pytest.mark.slow
def test_high_priority_is_answered_before_the_low_ones_that_fill_every_line(
    server: BatonServer,
) -> None:
    reached = server.folder / "reached"

    def queued(number: int) -> None:
        wait_until(
            lambda: server.metric("baton_choices_queued") == number,
            timeout_s=30,
            what=f"{number} in the gateway's line",
        )

    slow = {"action": "delay", "seconds": 0.3}
    server.inject(decode__step={**slow, "reached": str(reached)})
    with clients_of(server) as clients:
        first = clients.ask("first", LOW, max_tokens=400)
        wait_until(reached.exists, timeout_s=30, what="the first one decodes")
        low: dict[str, Future[str]] = {}
        for number in (1, 2):
            low[f"low {number}"] = clients.ask(f"low {number}", LOW)
            wait_until(
                lambda number=number: (  # type: ignore[misc]
                    server.metric("baton_sequences_waiting", role="decode") == number
                ),
                timeout_s=30,
                what=f"{number} in the decode worker's line",
            )
        for number in (3, 4, 5, 6):
            low[f"low {number}"] = clients.ask(f"low {number}", LOW)
            queued(number - 2)
        assert clients.ask("too late", LOW).result(30) == "overloaded"
        high = clients.ask("high", HIGH)
        assert low.pop("low 6").result(30) == "overloaded", "its place was the last in line"
        queued(4)
        reached.unlink()
        server.inject(decode__step=slow, decode__open={**slow, "reached": str(reached)})
        clients.leaves.set()
        wait_until(reached.exists, timeout_s=30, what="the high one on the decode worker")
        server.inject(decode__step={**slow, "seconds": 0.1})  # so that each is read in its turn
        assert first.result(60) == "left"
        assert high.result(60) == "length"
        assert [each.result(60) for each in low.values()] == ["length"] * 5
    order = [name for name in clients.order if name != "first"]
    assert [name for name in order if name != "high"] == list(low)
    # Whether the decode worker hears first of the place or of who is to have it, nobody says.
    assert order.index("high") <= 1, order
    server.wait_at_rest()
