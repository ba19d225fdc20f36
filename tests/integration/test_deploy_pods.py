"""What the chart's pods run, run for real: commands, environments, probes and preStop out of
the rendered manifests, programs out of the environments that the install script made."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.installed import Installed
from support.release import POOLS, Release, release

from baton.worker.leave import living

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

QUESTION = "What is the capital of France?"


@pytest.fixture(scope="module")
def up(installed: Installed) -> Iterator[Release]:
    with release(installed) as own:
        yield own


def headers(up: Release, name: str, variable: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {up.variable(name, variable)}"}


def gateway(up: Release) -> httpx.Client:
    key = headers(up, "gateway", "BATON_API_KEY")
    return httpx.Client(base_url=up.url("gateway"), headers=key, timeout=90)


def controller(up: Release) -> httpx.Client:
    token = headers(up, "controller", "BATON_CONTROLLER_TOKEN")
    return httpx.Client(base_url=up.url("controller"), headers=token, timeout=30)


def body(question: str = QUESTION, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}]
    return {"model": "smollm2-135m-instruct", "temperature": 0, "messages": messages, **more}


def ready_workers(up: Release) -> list[str]:
    with gateway(up) as api:
        return sorted(w["worker_id"] for w in api.get("/status").json()["workers"] if w["ready"])


def pools(up: Release) -> dict[str, Any]:
    with controller(up) as api:
        found: dict[str, Any] = api.get("/v1/pools").json()["pools"]
        return found


def test_chat_goes_through_both_pools_and_needs_the_key(up: Release) -> None:
    up.wait_until(
        lambda: ready_workers(up) == ["decode-0", "prefill-0"],
        timeout_s=60,
        what="a worker in each pod",
    )
    with gateway(up) as api:
        answer = api.post("/v1/chat/completions", json=body())
        assert answer.status_code == 200, answer.text
        assert (
            answer.json()["choices"][0]["message"]["content"] == "The capital of France is Paris."
        )
        assert (
            api.post(
                "/v1/chat/completions", json=body(), headers={"Authorization": "Bearer x"}
            ).status_code
            == 401
        )


def test_each_pool_s_worker_lives_in_its_own_pod(up: Release) -> None:
    for pool in POOLS:
        locks = Path(up.variable(pool, "BATON_RUN_DIR")).glob("*.lock")
        assert [lock.stem for lock in locks] == [f"{pool}-0"]


def test_pools_are_scaled_through_the_controllers_api(up: Release) -> None:
    with controller(up) as api:
        assert (
            api.put("/v1/pools", json={"prefill": 0}, headers={"Authorization": ""}).status_code
            == 401
        )
        answer = api.put("/v1/pools", json={"prefill": 0})
        assert answer.status_code == 200, answer.text
        up.wait_until(
            lambda: ready_workers(up) == ["decode-0"] and pools(up)["prefill"]["running"] == 0,
            timeout_s=40,
            what="no prefill worker",
        )
        with gateway(up) as chat:
            assert chat.post("/v1/chat/completions", json=body(max_tokens=4)).status_code == 200
        assert api.put("/v1/pools", json={"prefill": 1}).status_code == 200
    up.wait_until(
        lambda: len(ready_workers(up)) == 2 and pools(up)["prefill"]["ready"] == 1,
        timeout_s=60,
        what="a prefill worker again",
    )
    assert pools(up)["prefill"]["desired"] == 1


def test_every_process_listens_on_loopback_alone(up: Release) -> None:
    """Else this test would not be safe to run; the chart's own addresses are overridden."""
    addresses = up.running.listening()
    assert len(addresses) > 10
    assert all(address.is_loopback for address in addresses), addresses


def test_controller_that_is_replaced_leaves_the_workers_as_they_are(up: Release) -> None:
    def epochs() -> dict[str, str]:
        with gateway(up) as api:
            return {w["worker_id"]: w["epoch"] for w in api.get("/status").json()["workers"]}

    before = epochs()
    assert up.end("controller") == 0
    with gateway(up) as api:
        assert api.post("/v1/chat/completions", json=body(max_tokens=4)).status_code == 200
    up.start("controller")
    up.wait_ready("controller")
    up.wait_until(
        lambda: all(pool["ready"] == 1 for pool in pools(up).values()),
        timeout_s=40,
        what="all workers adopted",
    )
    assert epochs() == before


class Stream:
    """A long answer, read by a thread of its own."""

    def __init__(self, up: Release, num_tokens: int) -> None:
        self.text = ""
        self.finish = ""
        self.began = threading.Event()
        more = {"stream": True, "max_tokens": num_tokens, "ignore_eos": True}
        self._body = body("Count from one to a hundred.", **more)
        self._up = up
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        with (
            gateway(self._up) as api,
            api.stream("POST", "/v1/chat/completions", json=self._body) as lines,
        ):
            for line in lines.iter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    self.finish = str(chunk["error"])
                for choice in chunk.get("choices", []):
                    self.text += choice["delta"].get("content") or ""
                    self.finish = choice["finish_reason"] or self.finish
                    if self.text:
                        self.began.set()

    def join(self) -> None:
        self._thread.join(90)
        assert not self._thread.is_alive()


def test_pods_that_end_drain_first_and_keep_their_grace_periods(up: Release) -> None:
    undisturbed = Stream(up, 48)
    undisturbed.join()
    assert undisturbed.finish == "length"

    stream = Stream(up, 48)
    assert stream.began.wait(30)
    took_s = up.pre_stop("decode")
    assert living(Path(up.variable("decode", "BATON_RUN_DIR"))) == []
    stream.join()
    assert (stream.finish, stream.text) == ("length", undisturbed.text)
    up.terminate("decode", after_s=took_s)
    assert not any(worker.startswith("decode") for worker in ready_workers(up))

    for name in ("prefill", "gateway", "controller", "head", "redis"):
        status = up.end(name)
        assert status == 0 or name not in ("gateway", "controller"), status


def test_nothing_is_written_outside_of_the_volumes(up: Release) -> None:
    """The containers' file systems are read-only."""
    assert up.pods["gateway"].container()["securityContext"]["readOnlyRootFilesystem"] is True
    assert [str(path) for path in up.home.rglob("*")] == []
    strays = [path for path in up.running.folder.iterdir() if path.suffix != ".log"]
    assert strays == []
