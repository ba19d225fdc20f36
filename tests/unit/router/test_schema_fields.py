"""The field table is complete, is what the docs say, and is obeyed."""

from __future__ import annotations

import typing
from pathlib import Path

import pytest
from openai.types import completion_create_params as completion_params
from openai.types.chat import chat_completion_message_param as message_params
from openai.types.chat import completion_create_params as chat_params
from openai.types.chat.chat_completion_content_part_text_param import (
    ChatCompletionContentPartTextParam,
)
from openai.types.chat.chat_completion_stream_options_param import (
    ChatCompletionStreamOptionsParam,
)

import router.gateway
from baton.errors import InvalidRequestError, UnsupportedError
from router.gateway import fields_page
from router.gateway.fields import (
    CHAT_FIELDS,
    COMPLETION_FIELDS,
    MESSAGE_FIELDS,
    PART_FIELDS,
    STREAM_OPTIONS_FIELDS,
    Treatment,
    honoured_fields,
)
from router.gateway.schema import (
    ChatRequest,
    CompletionRequest,
    Message,
    StreamOptions,
    TextPart,
    parse_chat,
    parse_completion,
)

DOCS = Path(router.gateway.__file__).parents[2] / "docs" / "api.md"

CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
COMPLETION = {"model": "m", "prompt": "Hi"}

CHAT_TYPES = [
    chat_params.CompletionCreateParamsNonStreaming, chat_params.CompletionCreateParamsStreaming,
]  # fmt: skip
COMPLETION_TYPES = [
    completion_params.CompletionCreateParamsNonStreaming,
    completion_params.CompletionCreateParamsStreaming,
]
MESSAGE_TYPES = typing.get_args(message_params.ChatCompletionMessageParam)


@pytest.mark.parametrize(
    ("table", "types"),
    [
        (CHAT_FIELDS, CHAT_TYPES),
        (COMPLETION_FIELDS, COMPLETION_TYPES),
        (MESSAGE_FIELDS, MESSAGE_TYPES),
        (PART_FIELDS, [ChatCompletionContentPartTextParam]),
        (STREAM_OPTIONS_FIELDS, [ChatCompletionStreamOptionsParam]),
    ],
    ids=["chat", "completion", "message", "part", "stream_options"],
)
def test_table_has_every_field_of_the_openai_package_and_no_other(table, types) -> None:
    theirs: set[str] = set()
    for kind in types:
        theirs |= set(typing.get_type_hints(kind))
    ours = {name for name, field in table.items() if not field.extension}
    assert len(theirs) > 1
    assert ours == theirs


@pytest.mark.parametrize(
    ("table", "model"),
    [
        (CHAT_FIELDS, ChatRequest), (COMPLETION_FIELDS, CompletionRequest),
        (MESSAGE_FIELDS, Message), (PART_FIELDS, TextPart), (STREAM_OPTIONS_FIELDS, StreamOptions),
    ],
    ids=["chat", "completion", "message", "part", "stream_options"],
)  # fmt: skip
def test_schema_has_the_honoured_fields_exactly(table, model) -> None:
    honoured = {name for name, f in table.items() if f.treatment is Treatment.HONOURED}
    assert set(model.model_fields) == honoured


def test_docs_show_the_tables_of_the_code() -> None:
    page = DOCS.read_text()
    assert fields_page.fill(page) == page
    assert "`cache_salt` (extension)" in page


def test_page_without_a_section_for_a_table_is_an_error() -> None:
    with pytest.raises(ValueError, match="chat"):
        fields_page.fill("no sections")


NEUTRAL = {
    "frequency_penalty": 0.0, "presence_penalty": 0, "logit_bias": {}, "functions": [],
    "function_call": "none", "logprobs": False, "top_logprobs": 0, "modalities": ["text"],
    "prompt_cache_options": {"mode": "implicit"}, "prompt_cache_retention": "in_memory",
    "reasoning_effort": "none", "response_format": {"type": "text"}, "service_tier": "auto",
    "store": False, "tool_choice": "auto", "tools": [], "verbosity": "medium",
    "user": "u", "metadata": {"a": "b"}, "prompt_cache_key": "k", "safety_identifier": "s",
    "parallel_tool_calls": True,
}  # fmt: skip


@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_value_changes_nothing(name: str) -> None:
    assert parse_chat(CHAT | {name: NEUTRAL[name]}) == parse_chat(CHAT)


@pytest.mark.parametrize(
    ("table", "parse", "body"),
    [(CHAT_FIELDS, parse_chat, CHAT), (COMPLETION_FIELDS, parse_completion, COMPLETION)],
)
def test_null_is_absent_in_every_field_that_is_not_required(table, parse, body) -> None:
    for name in table:
        if name not in body:
            assert parse(body | {name: None}) == parse(body)


REFUSED = {
    "audio": {"voice": "alloy", "format": "wav"}, "functions": [{"name": "f"}],
    "function_call": {"name": "f"},
    "modalities": ["text", "audio"], "moderation": {"model": "m"},
    "prediction": {"type": "content", "content": "x"}, "prompt_cache_options": {"ttl": "1h"},
    "prompt_cache_retention": "24h", "reasoning_effort": "high",
    "response_format": {"type": "json_object"}, "service_tier": "priority", "store": True,
    "tool_choice": "required", "tools": [{"type": "function", "function": {"name": "f"}}],
    "verbosity": "low", "web_search_options": {},
}  # fmt: skip


def test_every_neutral_row_has_its_refusal_tested() -> None:
    rows = {name for name, f in CHAT_FIELDS.items() if f.treatment is Treatment.NEUTRAL}
    assert rows == set(REFUSED)


@pytest.mark.parametrize("name", REFUSED)
def test_value_that_is_not_served_is_refused_by_name_with_a_sentence(name: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        parse_chat(CHAT | {name: REFUSED[name]})
    assert caught.value.param == name
    assert f"'{name}'" in caught.value.message
    assert "leave it out" in caught.value.message


@pytest.mark.parametrize(
    ("name", "value"),
    [("echo", True), ("suffix", "x"), ("best_of", 3), ("best_of", True)],
)
def test_completion_field_that_is_not_served_is_refused(name: str, value: object) -> None:
    with pytest.raises(UnsupportedError) as caught:
        parse_completion(COMPLETION | {"n": 2, name: value})
    assert caught.value.param == name


def test_best_of_equal_to_n_is_neutral() -> None:
    body = COMPLETION | {"n": 2}
    assert parse_completion(body | {"best_of": 2}) == parse_completion(body)
    assert parse_completion(COMPLETION | {"best_of": 1}) == parse_completion(COMPLETION)


@pytest.mark.parametrize("value", [0, 1, "false"])
def test_neutral_values_are_compared_with_their_types(value: object) -> None:
    with pytest.raises(UnsupportedError):
        parse_chat(CHAT | {"store": value})


@pytest.mark.parametrize(
    ("name", "value"), [("user", 5), ("metadata", {"a": 1}), ("parallel_tool_calls", 1)]
)
def test_ignored_field_of_a_wrong_type_is_refused(name: str, value: object) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parse_chat(CHAT | {name: value})
    assert caught.value.param == name


def test_unknown_field_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(InvalidRequestError, match="did you mean 'temperature'") as caught:
        honoured_fields({"temprature": 1}, CHAT_FIELDS)
    assert caught.value.param == "temprature"


def test_unknown_field_with_a_giant_name_is_not_echoed_whole() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        honoured_fields({"x" * 10_000: 1}, CHAT_FIELDS)
    assert len(caught.value.message) < 200


def test_text_parts_are_joined_by_line_feeds() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = parse_chat({"model": "m", "messages": [{"role": "user", "content": parts}]})
    assert request.messages[0].for_template() == {"role": "user", "content": "a\nb"}


def test_template_sees_optional_fields_of_a_message_only_when_sent() -> None:
    message = {"role": "tool", "content": "4", "tool_call_id": "c1", "name": None}
    request = parse_chat({"model": "m", "messages": [message]})
    assert request.messages[0].for_template() == {
        "role": "tool", "content": "4", "tool_call_id": "c1"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("prompt", "batch"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
def test_every_form_of_prompt_becomes_a_batch(prompt: object, batch: object) -> None:
    assert parse_completion({"model": "m", "prompt": prompt}).prompts == batch
