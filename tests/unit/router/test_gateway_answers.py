"""Whole answers: their shape, their usage, and what the orchestrator was asked for."""

from __future__ import annotations

import time

import pytest
from support.fake_gateway import EOS, MODEL, Gateway, answer, error_of, ids_of, real_checkpoint

from baton.errors import (
    BatonError,
    DeadlineExceededError,
    InternalError,
    OverloadedError,
    UnavailableError,
    WorkerLostError,
)
from router.request import Arrival, ChoiceOutput, SamplingParams


async def test_chat_answer_has_the_openai_shape() -> None:
    body = (await Gateway().chat()).json()
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    assert body["model"] == MODEL
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello, world!", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert body["usage"] == {
        "prompt_tokens": 31, "completion_tokens": 5, "total_tokens": 36,
        "prompt_tokens_details": {"cached_tokens": 0},
    }  # fmt: skip


async def test_completion_answer_has_the_openai_shape() -> None:
    gateway = Gateway(lambda choice: answer(" Rome", end="length"))
    body = (await gateway.complete("The capital is")).json()
    assert body["object"] == "text_completion"
    assert body["choices"] == [
        {"index": 0, "text": " Rome", "logprobs": None, "finish_reason": "length"}
    ]


async def test_orchestrator_is_asked_for_what_the_client_set() -> None:
    gateway = Gateway()
    await gateway.complete(
        [7, 8], max_tokens=9, temperature=0.5, top_p=0.75, top_k=40, seed=-1,
        stop_token_ids=[11], cache_salt="tenant",
    )  # fmt: skip
    (choice,) = gateway.orchestrator.choices
    assert choice.prompt_token_ids == (7, 8)
    assert choice.max_tokens == 9
    assert choice.sampling == SamplingParams(seed=2**64 - 1, temperature=0.5, top_p=0.75, top_k=40)
    assert choice.stop_token_ids == {11, EOS}
    assert choice.cache_salt == "tenant"


@pytest.mark.parametrize("priority", [None, -(2**63), -1, 0, 2**63 - 1])
async def test_every_choice_has_the_requests_priority_which_is_0_by_default(
    priority: int | None,
) -> None:
    gateway = Gateway()
    for response in (
        await gateway.chat(priority=priority, n=2),
        await gateway.complete([[7], [8]], priority=priority, max_tokens=9),
    ):
        assert response.status_code == 200, response.text
    assert [choice.priority for choice in gateway.orchestrator.choices] == [priority or 0] * 4


async def test_orchestrator_is_asked_for_every_sampling_parameter() -> None:
    gateway = Gateway()
    response = await gateway.complete(
        seed=3, temperature=0.5, top_p=0.75, top_k=40, min_p=0.1, presence_penalty=-1.5,
        frequency_penalty=2, repetition_penalty=1.25, logit_bias={"5": -100, "49151": 0.5},
        min_tokens=3, max_tokens=3,
    )  # fmt: skip
    assert response.status_code == 200
    assert gateway.orchestrator.choices[0].sampling == SamplingParams(
        seed=3, temperature=0.5, top_p=0.75, top_k=40, min_p=0.1, presence_penalty=-1.5,
        frequency_penalty=2.0, repetition_penalty=1.25, logit_bias=((5, -100.0), (49151, 0.5)),
        min_tokens=3, num_logprobs=None,
    )  # fmt: skip


@pytest.mark.parametrize("min_tokens", [0, 1, 2, 3, 4])
async def test_stop_string_is_not_looked_for_in_the_first_min_tokens(min_tokens: int) -> None:
    gateway = Gateway(lambda choice: answer("a b c b d b"))
    body = (await gateway.complete(stop=" b", min_tokens=min_tokens)).json()
    assert len(ids_of("a b c b d b")) == 6
    expected = "a" if min_tokens < 2 else "a b c" if min_tokens < 4 else "a b c b d"
    assert body["choices"][0]["text"] == expected
    assert body["choices"][0]["finish_reason"] == "stop"


async def test_defaults_are_the_rest_of_the_context_and_plain_sampling() -> None:
    gateway = Gateway()
    await gateway.complete([7, 8])
    (choice,) = gateway.orchestrator.choices
    assert choice.max_tokens == real_checkpoint().config.max_position - 2
    assert (choice.sampling.temperature, choice.sampling.top_p, choice.sampling.top_k) == (1, 1, 0)
    assert choice.stop_token_ids == {EOS}


async def test_missing_seed_is_drawn_anew_for_each_request() -> None:
    gateway = Gateway()
    await gateway.complete(n=2)
    await gateway.complete()
    first, second, third = (choice.sampling.seed for choice in gateway.orchestrator.choices)
    assert first == second != third


@pytest.mark.parametrize("fields", [{"temperature": 1e-40}, {"top_p": 0}, {"temperature": 0}])
async def test_distribution_too_sharp_for_32_bit_floats_is_greedy(fields) -> None:
    gateway = Gateway()
    await gateway.complete(**fields)
    sampling = gateway.orchestrator.choices[0].sampling
    assert (sampling.temperature, sampling.top_p) == (0.0, 1.0)


async def test_chat_is_rendered_by_the_checkpoints_own_template() -> None:
    gateway = Gateway()
    await gateway.post(
        "/v1/chat/completions",
        {
            "model": MODEL,
            "messages": [
                {"role": "developer", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
                {"role": "assistant", "content": "Yes?", "refusal": None},
                {"role": "user", "content": "Bye"},
            ],
        },
    )
    expected = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nYes?<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert list(gateway.orchestrator.choices[0].prompt_token_ids) == ids_of(expected)


async def test_prompts_and_n_become_choices_in_order() -> None:
    gateway = Gateway(lambda choice: answer(f" {choice.choice_index}"))
    body = (await gateway.complete(["a", "b"], n=2)).json()
    assert [(c["index"], c["text"]) for c in body["choices"]] == [
        (0, " 0"), (1, " 1"), (2, " 2"), (3, " 3")
    ]  # fmt: skip
    prompts = {c.choice_index: c.prompt_token_ids for c in gateway.orchestrator.choices}
    a, b = tuple(ids_of("a")), tuple(ids_of("b"))
    assert prompts == {0: a, 1: a, 2: b, 3: b}


async def test_usage_counts_each_prompt_once_and_every_choices_tokens() -> None:
    def script(choice):
        return answer("one", cached=[16, 32, 0, 0][choice.choice_index])

    gateway = Gateway(script)
    usage = (await gateway.complete([[5] * 40, [6] * 20], n=2)).json()["usage"]
    assert usage == {
        "prompt_tokens": 60, "completion_tokens": 8, "total_tokens": 68,
        "prompt_tokens_details": {"cached_tokens": 16},
    }  # fmt: skip


async def test_stop_token_is_counted_and_returned_but_not_rendered() -> None:
    word = ids_of(" done")
    gateway = Gateway(lambda choice: [ChoiceOutput((*ids_of("ok"), *word), "stop")])
    body = (await gateway.complete(stop_token_ids=word, return_token_ids=True)).json()
    (choice,) = body["choices"]
    assert choice["text"] == "ok"
    assert choice["token_ids"] == [*ids_of("ok"), *word]
    assert body["usage"]["completion_tokens"] == 2


async def test_stop_token_whose_end_is_told_later_is_not_rendered_either() -> None:
    word = ids_of(" done")
    steps = [ChoiceOutput((*ids_of("ok"), *word)), ChoiceOutput((), "stop", 0)]
    gateway = Gateway(lambda choice: steps)
    assert (await gateway.complete(stop_token_ids=word)).json()["choices"][0]["text"] == "ok"


async def test_ignored_eos_is_no_stop_token() -> None:
    gateway = Gateway()
    await gateway.complete(ignore_eos=True, stop_token_ids=[11])
    assert gateway.orchestrator.choices[0].stop_token_ids == {11}


async def test_stop_string_cuts_the_text_and_cancels_the_choice() -> None:
    gateway = Gateway(lambda choice: answer("one two three four", end="length"))
    body = (await gateway.complete(stop=["two t", "x"], return_token_ids=True)).json()
    (choice,) = body["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("one ", "stop")
    assert choice["token_ids"] == ids_of("one two three")
    assert body["usage"]["completion_tokens"] == 3
    assert gateway.orchestrator.cancelled == [0]


async def test_stop_string_inside_one_output_drops_the_tokens_after_it() -> None:
    gateway = Gateway(lambda choice: answer("one two three four", size=4, end="length"))
    body = (await gateway.complete(stop=" two", return_token_ids=True)).json()
    assert body["choices"][0]["token_ids"] == ids_of("one two")
    assert body["choices"][0]["finish_reason"] == "stop"


async def test_stop_string_that_began_but_never_ended_is_text() -> None:
    gateway = Gateway(lambda choice: answer("one two", end="length"))
    choice = (await gateway.complete(stop="two three")).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("one two", "length")


async def test_character_that_stays_incomplete_is_replaced() -> None:
    gateway = Gateway(lambda choice: [ChoiceOutput(tuple(ids_of("a🦕")[:-1]), "length")])
    assert (await gateway.complete()).json()["choices"][0]["text"] == "a\ufffd"


async def test_token_ids_are_returned_only_on_request() -> None:
    body = (await Gateway().chat()).json()
    assert "token_ids" not in body["choices"][0]
    assert "prompt_token_ids" not in body
    gateway = Gateway()
    body = (await gateway.chat(return_token_ids=True)).json()
    assert body["prompt_token_ids"] == list(gateway.orchestrator.choices[0].prompt_token_ids)
    assert body["choices"][0]["token_ids"] == [*ids_of("Hello, world!"), EOS]


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (OverloadedError("full", retry_after_s=1.2), 429, "overloaded"),
        (UnavailableError("nobody"), 503, "unavailable"),
        (WorkerLostError("lost"), 503, "worker_lost"),
        (DeadlineExceededError("late"), 504, "deadline_exceeded"),
        (InternalError("bug"), 500, "internal_error"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_failure_before_the_first_output_has_its_own_status(
    error: BatonError, status: int, code: str, stream: bool
) -> None:
    gateway = Gateway(lambda choice: [error])
    response = await gateway.chat(stream=stream)
    assert response.status_code == status
    assert error_of(response)["code"] == code
    assert response.headers.get("retry-after") == ("2" if status == 429 else None)
    assert gateway.metric("baton_requests_total", outcome=code) == 1


async def test_failure_after_some_output_is_no_answer() -> None:
    gateway = Gateway(lambda choice: [ChoiceOutput((5,)), WorkerLostError("lost")])
    response = await gateway.chat()
    assert response.status_code == 503
    assert error_of(response)["code"] == "worker_lost"


async def test_failed_choice_cancels_the_others() -> None:
    def script(choice):
        if choice.choice_index == 1:
            return [WorkerLostError("lost")]
        return [ChoiceOutput((5,))] * 1000

    gateway = Gateway(script)
    assert (await gateway.complete(n=3)).status_code == 503
    assert sorted(gateway.orchestrator.cancelled) == [0, 2]
    assert gateway.orchestrator.num_running == 0


async def test_choice_that_ends_without_a_reason_is_a_failure() -> None:
    gateway = Gateway(lambda choice: [ChoiceOutput((5,))])
    response = await gateway.chat()
    assert response.status_code == 500
    assert error_of(response)["code"] == "internal_error"


@pytest.mark.parametrize("stream", [False, True])
async def test_crash_is_a_500_that_tells_nothing_and_is_logged(stream: bool, caplog) -> None:
    gateway = Gateway(lambda choice: [ZeroDivisionError("inner detail")])
    response = await gateway.chat(stream=stream)
    assert response.status_code == 500
    assert "inner detail" not in error_of(response)["message"]
    assert "inner detail" in caplog.text
    assert response.headers["x-request-id"] in caplog.text


async def test_latencies_are_measured_for_every_token() -> None:
    gateway = Gateway(lambda choice: answer("one two three four five six seven", size=3))
    await gateway.complete(n=2)
    first = gateway.metric("baton_time_to_first_token_seconds_count")
    between = gateway.metric("baton_inter_token_latency_seconds_count")
    # Eight tokens in outputs of 3, 3 and 2: the first output has no gap before it.
    assert (first, between) == (2, 10)


async def test_latencies_are_those_of_the_workers_messages_whoever_reads_them_when() -> None:
    at = time.perf_counter() + 100.0
    late = (Arrival(at + 1.0, 1), Arrival(at + 4.0, 2))
    gateway = Gateway(
        lambda choice: [
            ChoiceOutput((5,), arrivals=(Arrival(at, 1),)),
            ChoiceOutput((6, 7, 8), "length", arrivals=late),
        ]
    )
    await gateway.complete()
    between = "baton_inter_token_latency_seconds"
    assert gateway.metric(f"{between}_sum") == pytest.approx(4.0)
    assert gateway.metric(f"{between}_count") == 3
    assert gateway.metric(f"{between}_bucket", le="1.0") == 1
    assert gateway.metric("baton_time_to_first_token_seconds_sum") > 99.0
