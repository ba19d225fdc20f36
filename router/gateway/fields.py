"""Every field of a request, and what Baton does with it: the one table.

It covers the request types of the current ``openai`` package, and Baton's
extensions. A field is

- *honoured*: it does what the OpenAI API says;
- *ignored*: any valid value is accepted and changes nothing;
- *refused unless neutral*: only values that ask for nothing are accepted.

``null`` always counts as absent. What is not in the table is refused by name.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from baton.errors import InvalidRequestError, UnsupportedError

Body = Mapping[str, Any]


class Treatment(Enum):
    HONOURED = "honoured"
    IGNORED = "ignored"
    NEUTRAL = "refused unless neutral"


@dataclass(frozen=True, slots=True)
class Field:
    """One row. ``accepts`` judges a value, given the object that it stands in."""

    name: str
    treatment: Treatment
    values: str
    note: str
    accepts: Callable[[Any, Body], bool]
    extension: bool = False


Table = Mapping[str, Field]


def _honoured(name: str, values: str, note: str = "", *, extension: bool = False) -> Field:
    # The schema checks the values of honoured fields.
    return Field(name, Treatment.HONOURED, values, note, lambda value, body: True, extension)


def _ignored(name: str, values: str, accepts: Callable[[Any], bool], note: str) -> Field:
    return Field(name, Treatment.IGNORED, values, note, lambda value, body: accepts(value))


def _neutral(name: str, values: str, neutral: Iterable[Any], note: str) -> Field:
    kept = list(neutral)

    def accepts(value: Any, body: Body) -> bool:
        # By type too: True is no 1, and 0.0 is a 0 only where numbers are meant.
        return any(
            value == one and isinstance(value, bool) == isinstance(one, bool) for one in kept
        )

    return Field(name, Treatment.NEUTRAL, values, note, accepts)


def _table(fields: Iterable[Field]) -> Table:
    return {field.name: field for field in fields}


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_metadata(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(item, str) for item in value.values())


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


_TOOLS = "Tool calls are not built yet."
_CACHE = "Prefix caching is always on; `cache_salt` parts tenants."

_SHARED = (
    _honoured("model", "the served model's id", "Another id is answered 404 `model_not_found`."),
    _honoured("max_tokens", "1 or more", "By default all that the context has left."),
    _honoured("n", "1 or more", "Times the prompts at most `gateway.max_choices`."),
    _honoured("seed", "any 64-bit integer", "Equal requests with equal seeds draw equal tokens."),
    _honoured("stop", "a string, or up to 16", "None empty, none over 1,024 characters."),
    _honoured("stream", "`true`, `false`"),
    _honoured("stream_options", "an object", "Only with `stream: true`."),
    _honoured("temperature", "0 to 2", "0 is greedy; 1 by default."),
    _honoured("top_p", "0 to 1", "1 by default, which is off; 0 is greedy."),
    _ignored("user", "any string", _is_text, "Baton keeps nothing about users."),
    _honoured(
        "frequency_penalty", "-2 to 2", "Taken off a token's logit each time that it was emitted."
    ),
    _honoured("presence_penalty", "-2 to 2", "Taken off a token's logit once it was emitted."),
    _honoured(
        "logit_bias", "up to 1,024 token ids as strings, each with -100 to 100",
        "Added to these tokens' logits.",
    ),
    _honoured(
        "top_k", "-1, 0 or more", "Only the k likeliest tokens; 0 and -1 are off.", extension=True
    ),
    _honoured(
        "min_p", "0 to 1",
        "Only tokens at least so many times as likely as the likeliest; 0 is off.", extension=True,
    ),
    _honoured(
        "repetition_penalty", "0.01 to 100",
        "Divides the positive logits of tokens in prompt and answer, and multiplies their other "
        "ones; 1 is off.", extension=True,
    ),
    _honoured(
        "min_tokens", "0 to `max_tokens`",
        "No stop token and no stop string ends the choice before so many.", extension=True,
    ),
    _honoured(
        "cache_salt", "up to 256 characters",
        "Prompts share cached prefixes only under equal salts.", extension=True,
    ),
    _honoured(
        "priority", "any signed 64-bit integer",
        "Where requests wait, the lower value goes first; 0 by default.", extension=True,
    ),
    _honoured(
        "ignore_eos", "`true`, `false`", "Goes on past end-of-sequence tokens.", extension=True
    ),
    _honoured(
        "stop_token_ids", "up to 64 token ids",
        "Ends the choice at such a token, which is not rendered.", extension=True,
    ),
    _honoured(
        "return_token_ids", "`true`, `false`",
        "Adds `token_ids` to each choice, and `prompt_token_ids` to the response or the first "
        "chunk (a list of lists if there are several prompts).", extension=True,
    ),
)  # fmt: skip

CHAT_FIELDS = _table((
    _honoured("messages", "1 or more", "Rendered by the model's own chat template."),
    *_SHARED,
    _honoured(
        "max_completion_tokens", "1 or more", "The newer name of `max_tokens`; both must agree."
    ),
    _ignored("metadata", "an object of strings", _is_metadata, "Nothing is stored."),
    _ignored("prompt_cache_key", "any string", _is_text, _CACHE),
    _ignored("safety_identifier", "any string", _is_text, "Baton keeps nothing about users."),
    _ignored("parallel_tool_calls", "`true`, `false`", _is_flag, "There are no tools to call."),
    _neutral("audio", "`null`", [], "Baton serves text only."),
    _neutral("function_call", '`"none"`, `"auto"`', ["none", "auto"], _TOOLS),
    _neutral("functions", "`[]`", [[]], _TOOLS),
    _honoured("logprobs", "`true`, `false`", "Each token's log-probability, see below."),
    _honoured("top_logprobs", "0 to 20", "Those of the likeliest; only with `logprobs: true`."),
    _neutral("modalities", '`["text"]`', [["text"]], "Baton serves text only."),
    _neutral("moderation", "`null`", [], "Baton moderates nothing."),
    _neutral("prediction", "`null`", [], "Predicted outputs are not built yet."),
    _neutral(
        "prompt_cache_options", '`{}`, `{"mode": "implicit"}`', [{}, {"mode": "implicit"}], _CACHE
    ),
    _neutral("prompt_cache_retention", '`"in_memory"`', ["in_memory"], _CACHE),
    _neutral("reasoning_effort", '`"none"`', ["none"], "Reasoning effort cannot be set yet."),
    _neutral(
        "response_format", '`{"type": "text"}`', [{"type": "text"}],
        "Structured output is not built yet.",
    ),
    _neutral(
        "service_tier", '`"auto"`, `"default"`', ["auto", "default"], "There is one service tier."
    ),
    _neutral("store", "`false`", [False], "Baton stores no answers."),
    _neutral("tool_choice", '`"none"`, `"auto"`', ["none", "auto"], _TOOLS),
    _neutral("tools", "`[]`", [[]], _TOOLS),
    _neutral("verbosity", '`"medium"`', ["medium"], "Verbosity cannot be set."),
    _neutral("web_search_options", "`null`", [], "Baton searches nothing."),
))  # fmt: skip

COMPLETION_FIELDS = _table((
    _honoured(
        "prompt", "a string, token ids, or a list of either", "None empty; strings or ids, no mix."
    ),
    *_SHARED,
    Field(
        "best_of", Treatment.NEUTRAL, "equal to `n`", "Every choice that is computed is returned.",
        lambda value, body: type(value) is int and value == (body.get("n") or 1),
    ),
    _neutral("echo", "`false`", [False], "Echoing the prompt is not built yet."),
    _honoured(
        "logprobs", "0 to 5", "Each token's log-probability, and those of so many likeliest ones."
    ),
    _neutral("suffix", '`""`', [""], "Fill-in-the-middle is not built yet."),
))  # fmt: skip

MESSAGE_FIELDS = _table((
    _honoured("role", "system, developer, user, assistant, tool, function"),
    _honoured("content", "a string, or text parts", "Parts are joined by line feeds."),
    _honoured("name", "a string", "Given to the chat template."),
    _honoured("tool_call_id", "a string", "Given to the chat template."),
    _neutral("audio", "`null`", [], "Baton serves text only."),
    _neutral("function_call", "`null`", [], _TOOLS),
    _neutral("refusal", "`null`", [], "Refusals are not told apart from content."),
    _neutral("tool_calls", "`[]`", [[]], _TOOLS),
))  # fmt: skip

PART_FIELDS = _table((
    _honoured("type", '`"text"`', "Images, audio and files are refused."),
    _honoured("text", "a string"),
    _neutral("prompt_cache_breakpoint", "`null`", [], _CACHE),
))  # fmt: skip

STREAM_OPTIONS_FIELDS = _table((
    _honoured("include_usage", "`true`, `false`", "A last chunk with `usage` and no choices."),
    _ignored("include_obfuscation", "`true`, `false`", _is_flag, "Nothing is obfuscated."),
))  # fmt: skip


def honoured_fields(body: Body, table: Table, *, path: str = "") -> dict[str, Any]:
    """The honoured fields of one object that are present.

    ``path`` is where the object stands in the request, with its final dot.

    Raises:
        UnsupportedError: a known field asks for something that is not served.
        InvalidRequestError: an unknown field, or a wrong value of an ignored one.
    """
    kept = {}
    for name, value in body.items():
        field = table.get(name)
        if field is None:
            raise _unknown(name, table, path)
        if value is None:
            continue
        if field.treatment is Treatment.HONOURED:
            kept[name] = value
        elif not field.accepts(value, body):
            raise _refused(field, path)
    return kept


def _unknown(name: str, table: Table, path: str) -> InvalidRequestError:
    shown = name if len(name) <= 64 else f"{name[:64]}..."
    near = difflib.get_close_matches(shown, table, n=1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    return InvalidRequestError(f"unknown field '{path}{shown}'{hint}", param=f"{path}{shown}")


def _refused(field: Field, path: str) -> InvalidRequestError:
    name = f"{path}{field.name}"
    values = field.values.replace("`", "")
    if field.treatment is Treatment.IGNORED:
        return InvalidRequestError(f"'{name}' should be {values}", param=name)
    accepted = "leave it out" if values == "null" else f"leave it out, or send {values}"
    return UnsupportedError(
        f"'{name}' is not supported with this value. {field.note.replace('`', '')} "
        f"To go without: {accepted}.",
        param=name,
    )
