"""An engine that hangs is found, though its process answers, and its stream goes on elsewhere."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from e2e.conftest import Serving
from support.server import BatonServer, wait_until

NUM_TOKENS = 60


def ask(server: BatonServer, number: int) -> list[int]:
    answer = server.complete(
        prompt=f"Count upwards from {number * 7}: {number * 7}, {number * 7 + 1},",
        max_tokens=NUM_TOKENS,
        ignore_eos=True,
    )
    choice: dict[str, Any] = answer["choices"][0]
    assert choice["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == NUM_TOKENS
    token_ids: list[int] = choice["token_ids"]
    return token_ids


def pools(server: BatonServer) -> dict[str, str]:
    return {w["worker_id"]: w["epoch"] for w in server.status()["workers"] if w["ready"]}


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_engine_that_hangs_is_found_and_its_streams_go_on(serving: Serving) -> None:
    server = serving(
        settings={"engine": {"hang_s": 3.0, "dtype": "float32", "kv_cache_bytes": 134_217_728}}
    )
    expected = ask(server, 1)
    before = pools(server)
    server.inject(prefill__chunk={"action": "delay", "seconds": 60.0})
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(ask, server, 1)
        wait_until(
            lambda: pools(server).get("prefill-0", before["prefill-0"]) != before["prefill-0"],
            timeout_s=60,
            what="another prefill-0",
        )
        server.inject()
        assert answer.result(60) == expected
    server.wait_at_rest()
