"""``X-Baton-Timeline: 1``, from the HTTP edge to scripted workers and back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest
from support.fake_gateway import MODEL, Gateway, answer, chat_body, error_of, events

from baton.errors import DrainingError
from baton.timeline import Timeline
from router.routing.input_hashes import InputHashes
from router.routing.policy import Candidate, Pairing, RoutingPolicy
from router.workers.session import WorkerSession
from tests.support.fake_cluster import FakeCluster, choice, fake_cluster, wait_until
from tests.support.fake_worker import FakeStream

ASKS = {"X-Baton-Timeline": "1"}
PARTS = ("queue", "route", "lost", "room", "prefill", "decode")


@asynccontextmanager
async def serving(
    *, disaggregated: bool = True, policy: RoutingPolicy | None = None
) -> AsyncIterator[tuple[Gateway, FakeCluster]]:
    """A gateway in front of scripted workers."""
    async with fake_cluster(policy=policy) as cluster:
        if disaggregated:
            await cluster.add("prefill-0", "prefill", cluster.scripts.prefill)
        await cluster.add("decode-0", "decode", cluster.scripts.decode)
        gateway = Gateway(orchestrator=cluster.orchestrator)
        yield gateway, cluster


async def complete(gateway: Gateway, *, headers: Any = ASKS, **fields: Any) -> httpx.Response:
    body = {"model": MODEL, "prompt": [11, 12, 13], "max_tokens": 6, "temperature": 0} | fields
    return await gateway.post("/v1/completions", body, headers=headers)


async def test_body_says_where_the_time_of_each_choice_went() -> None:
    async with serving() as (gateway, cluster):
        body = (await complete(gateway, n=2)).json()
        first, second = body["baton"]["timeline"]
        assert (first["index"], second["index"]) == (0, 1)
        for entry in (first, second):
            assert sum(entry[part] for part in PARTS) == pytest.approx(entry["total"], abs=0.01)
            assert entry["total"] > 0
            assert entry["room"] > 0
            assert entry["handoff_exposed"] >= 0
            assert (entry["num_prompt_tokens"], entry["num_cached_tokens"]) == (3, 0)
            (attempt,) = entry["attempts"]
            assert (attempt["prefill"], attempt["decode"]) == ("prefill-0", "decode-0")
            assert (attempt["cause"], attempt["num_tokens"]) == ("first", 6)
        assert cluster.sample("baton_handoff_exposed_seconds_count") == 2
        assert cluster.sample("baton_routing_decisions_total", kind="disaggregated") == 2
        assert cluster.sample("baton_routing_decision_seconds_count") == 2


async def test_colocated_answer_has_no_handoff_to_expose() -> None:
    async with serving(disaggregated=False) as (gateway, cluster):
        (entry,) = (await complete(gateway)).json()["baton"]["timeline"]
        assert entry["handoff_exposed"] is None
        assert entry["attempts"][0]["prefill"] is None
        assert cluster.sample("baton_handoff_exposed_seconds_count") == 0
        assert cluster.sample("baton_routing_decisions_total", kind="local") == 1


@pytest.mark.parametrize("with_usage", [True, False])
async def test_stream_says_it_in_its_last_chunk_and_in_no_other(with_usage: bool) -> None:
    async with serving() as (gateway, _):
        options = {"stream_options": {"include_usage": True}} if with_usage else {}
        response = await complete(gateway, stream=True, n=2, **options)
        *chunks, done = events(response.text)
        assert done == "data: [DONE]"
        assert ["baton" in chunk for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
        last = chunks[-1]
        assert [entry["index"] for entry in last["baton"]["timeline"]] == [0, 1]
        assert all(entry["total"] > 0 for entry in last["baton"]["timeline"])
        if with_usage:
            assert last["choices"] == []
            assert last["usage"]["completion_tokens"] == 12
        else:
            assert last["choices"][0]["finish_reason"] == "length"


async def test_answer_that_a_stop_string_ends_has_its_timeline_too() -> None:
    async with serving() as (gateway, _):
        whole = (await complete(gateway)).json()["choices"][0]["text"]
        response = await complete(gateway, stop=whole[3:5])
        body = response.json()
        assert body["choices"][0]["finish_reason"] == "stop"
        assert body["baton"]["timeline"][0]["total"] > 0


async def test_reader_that_is_slow_makes_no_token_late() -> None:
    async with fake_cluster() as cluster:
        await cluster.add("decode-0", "decode", cluster.scripts.decode)
        timeline, began = Timeline(), time.perf_counter()
        outputs = cluster.orchestrator.generate(
            replace(choice(1, 2, 3, max_tokens=6), timeline=timeline)
        )
        read = [await anext(outputs)]
        await wait_until(lambda: cluster.num_open() == 0, "all tokens have come")
        all_came_by = time.perf_counter()
        await asyncio.sleep(0.05)
        read += [output async for output in outputs]
        arrivals = [arrival for output in read for arrival in output.arrivals]
        assert sum(arrival.num_tokens for arrival in arrivals) == 6
        assert max(arrival.at for arrival in arrivals) <= all_came_by
        assert timeline.report()["attempts"][0]["num_tokens"] == 6
        assert timeline.report()["total"] <= (all_came_by - began) * 1000


async def test_nothing_is_said_unasked() -> None:
    async with serving() as (gateway, cluster):
        assert "baton" not in (await complete(gateway, headers={})).json()
        assert "baton" not in (await complete(gateway, headers={}, stream=True)).text
        # What operators want to know is measured all the same.
        assert cluster.sample("baton_handoff_exposed_seconds_count") == 2


@pytest.mark.parametrize("value", ["0", "true", "", "11", "1, 1"])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_other_value_of_the_header_is_refused_by_its_name(value: str, path: str) -> None:
    response = await Gateway().post(path, chat_body(), headers={"X-Baton-Timeline": value})
    assert response.status_code == 400
    assert error_of(response)["param"] == "X-Baton-Timeline"


async def test_attempts_elsewhere_are_told_with_their_cause() -> None:
    asked: list[str] = []

    async with fake_cluster(gateway={"max_attempts": 1}) as cluster:

        async def leave_first(stream: FakeStream) -> None:
            asked.append(stream.worker.worker_id)
            if len(asked) > 1:
                await cluster.scripts.decode(stream)
            else:
                stream.tokens(0, 500, 501)
                stream.fail(DrainingError("going away"))

        for number in range(2):
            await cluster.add(f"decode-{number}", "decode", leave_first)
        body = (await complete(Gateway(orchestrator=cluster.orchestrator))).json()
        (entry,) = body["baton"]["timeline"]
        first, second = entry["attempts"]
        assert (first["decode"], first["error"], first["num_tokens"]) == (asked[0], "draining", 2)
        assert (second["decode"], second["cause"]) == (asked[1], "draining")
        assert second["num_tokens"] == 4
        assert second["error"] is None


class Explaining:
    """A policy that says what it looked at."""

    def pick(
        self,
        input_: InputHashes,
        prefill: Sequence[WorkerSession],
        decode: Sequence[WorkerSession],
    ) -> Pairing | None:
        found = (Candidate("prefill-0", "decode-0", 1.5), Candidate(None, "decode-0", 7.0))
        return Pairing(prefill[0], decode[0], candidates=found) if decode else None


async def test_candidates_of_the_decision_are_told_with_their_costs() -> None:
    async with serving(policy=Explaining()) as (gateway, _):
        (entry,) = (await complete(gateway)).json()["baton"]["timeline"]
        assert entry["attempts"][0]["candidates"] == [
            {"prefill": "prefill-0", "decode": "decode-0", "cost": 1.5},
            {"prefill": None, "decode": "decode-0", "cost": 7.0},
        ]


async def test_openai_package_reads_answers_with_a_timeline() -> None:
    async with (
        Gateway(lambda choice: answer("Paris")).served() as url,
        openai.AsyncOpenAI(
            base_url=f"{url}/v1", api_key="none", max_retries=0, default_headers=ASKS
        ) as client,
    ):
        messages = [{"role": "user", "content": "The capital of France?"}]
        whole = await client.chat.completions.create(model=MODEL, messages=messages)
        assert whole.choices[0].message.content == "Paris"
        assert whole.model_extra is not None
        assert whole.model_extra["baton"]["timeline"][0]["index"] == 0
        async with client.chat.completions.stream(model=MODEL, messages=messages) as stream:
            completion = await stream.get_final_completion()
        assert completion.choices[0].message.content == "Paris"
        chunks = await client.completions.create(
            model=MODEL, prompt="a", stream=True, stream_options={"include_usage": True}
        )
        *_, last = [chunk async for chunk in chunks]
        assert last.usage is not None
        assert last.model_extra is not None
        assert last.model_extra["baton"]["timeline"][0]["num_prompt_tokens"] == 1


async def test_first_token_that_is_the_last_ends_the_timeline_with_prefill() -> None:
    async with serving() as (gateway, _):
        (entry,) = (await complete(gateway, max_tokens=1)).json()["baton"]["timeline"]
        assert entry["decode"] == 0
        assert entry["prefill"] > 0
        assert entry["handoff_exposed"] is None
