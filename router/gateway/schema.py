"""The requests as typed values: strict about types, bounds and required fields.

The field table (``fields.py``) has its say first: what reaches the models below
are the honoured fields alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    ValidationError,
)

from baton.errors import InvalidRequestError, UnsupportedError
from router.gateway.fields import (
    CHAT_FIELDS,
    COMPLETION_FIELDS,
    MESSAGE_FIELDS,
    PART_FIELDS,
    STREAM_OPTIONS_FIELDS,
    honoured_fields,
)

_INT64 = 2**63
_TAG = "@"
"""Begins the names of union branches, which are no part of a field's path."""
_KEY = "[key]"
"""Ends the path to a key of an object that is no good itself."""

Count = Annotated[int, Field(ge=1, lt=_INT64)]
TokenId = Annotated[int, Field(ge=0, lt=2**32)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]
Text = Annotated[str, StringConstraints(min_length=1)]
StopString = Annotated[str, StringConstraints(min_length=1, max_length=1024)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
BiasedToken = Annotated[str, StringConstraints(pattern=r"^(0|[1-9][0-9]{0,9})$")]
Bias = Annotated[float, Field(ge=-100, le=100)]


def _text_or_list(value: Any) -> str | None:
    if isinstance(value, str):
        return "@text"
    return "@list" if isinstance(value, list) else None


def _prompt_kind(value: Any) -> str | None:
    if isinstance(value, str):
        return "@text"
    if not isinstance(value, list):
        return None
    first = value[0] if value else ""
    if isinstance(first, str):
        return "@texts"
    return "@batch" if isinstance(first, list) else "@ids"


def _union(kind: Any, expected: str) -> Discriminator:
    return Discriminator(
        kind, custom_error_type="union", custom_error_message=f"Input should be {expected}"
    )


class _Model(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class TextPart(_Model):
    """A piece of a message's content."""

    type: Literal["text"]
    text: str


Content = Annotated[
    Annotated[str, Tag("@text")] | Annotated[list[TextPart], Tag("@list")],
    _union(_text_or_list, "a string or a list of text parts"),
]
Stop = Annotated[
    Annotated[StopString, Tag("@text")]
    | Annotated[list[StopString], Field(max_length=16), Tag("@list")],
    _union(_text_or_list, "a string or a list of strings"),
]
Prompt = Annotated[
    Annotated[Text, Tag("@text")]
    | Annotated[TokenIds, Tag("@ids")]
    | Annotated[list[Text], Field(min_length=1), Tag("@texts")]
    | Annotated[list[TokenIds], Field(min_length=1), Tag("@batch")],
    _union(_prompt_kind, "a string, a list of strings, token ids, or a list of token ids"),
]


class Message(_Model):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Content
    name: str | None = None
    tool_call_id: str | None = None

    def for_template(self) -> dict[str, str]:
        """What the chat template sees: absent fields are absent there too."""
        content = self.content
        text = content if isinstance(content, str) else "\n".join(part.text for part in content)
        optional = {"name": self.name, "tool_call_id": self.tool_call_id}
        return {"role": self.role, "content": text} | {
            key: value for key, value in optional.items() if value is not None
        }


class StreamOptions(_Model):
    include_usage: bool = False


class GenerationRequest(_Model):
    """What chats and completions have in common."""

    model: str
    max_tokens: Count | None = None
    n: Count = 1
    seed: Annotated[int, Field(ge=-_INT64, lt=2 * _INT64)] | None = None
    stop: Stop | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1, lt=_INT64)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    frequency_penalty: Penalty = 0.0
    presence_penalty: Penalty = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    logit_bias: Annotated[dict[BiasedToken, Bias], Field(max_length=1024)] = {}
    min_tokens: Annotated[int, Field(ge=0, lt=_INT64)] = 0
    cache_salt: Annotated[str, StringConstraints(max_length=256)] = ""
    priority: Annotated[int, Field(ge=-_INT64, lt=_INT64)] = 0
    ignore_eos: bool = False
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] = []
    return_token_ids: bool = False

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(GenerationRequest):
    """The body of ``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0


class CompletionRequest(GenerationRequest):
    """The body of ``POST /v1/completions``."""

    prompt: Prompt
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """Always a batch."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        # The schema admits no mixture, so the first item tells of all.
        batch = [prompt] if isinstance(prompt[0], int) else prompt
        return batch


def parse_chat(body: Mapping[str, Any]) -> ChatRequest:
    """Raises InvalidRequestError (or UnsupportedError), naming the field."""
    data = _checked_options(honoured_fields(body, CHAT_FIELDS))
    if isinstance(data.get("messages"), list):
        data["messages"] = [_checked_message(*item) for item in enumerate(data["messages"])]
    try:
        request = ChatRequest.model_validate(data)
    except ValidationError as error:
        raise _invalid(error) from None
    _check_limits(request.max_tokens, request.max_completion_tokens)
    if request.top_logprobs and not request.logprobs:
        raise InvalidRequestError(
            "'top_logprobs' goes only with 'logprobs': true", param="top_logprobs"
        )
    return request


def parse_completion(body: Mapping[str, Any]) -> CompletionRequest:
    """Raises InvalidRequestError (or UnsupportedError), naming the field."""
    try:
        return CompletionRequest.model_validate(
            _checked_options(honoured_fields(body, COMPLETION_FIELDS))
        )
    except ValidationError as error:
        raise _invalid(error) from None


def _checked_options(data: dict[str, Any]) -> dict[str, Any]:
    options = data.get("stream_options")
    if isinstance(options, dict):
        path = "stream_options."
        data["stream_options"] = honoured_fields(options, STREAM_OPTIONS_FIELDS, path=path)
        if data.get("stream") is not True:
            raise InvalidRequestError(
                "'stream_options' goes only with 'stream': true", param="stream_options"
            )
    return data


def _checked_message(index: int, message: Any) -> Any:
    if not isinstance(message, dict):
        return message
    path = f"messages.{index}."
    data = honoured_fields(message, MESSAGE_FIELDS, path=path)
    if isinstance(data.get("content"), list):
        data["content"] = [
            _checked_part(f"{path}content.{place}.", part)
            for place, part in enumerate(data["content"])
        ]
    return data


def _checked_part(path: str, part: Any) -> Any:
    if not isinstance(part, dict):
        return part
    kind = part.get("type")
    if isinstance(kind, str) and kind != "text":
        raise UnsupportedError(
            f"'{path}type': parts of type {kind[:64]!r} are not served; only 'text' is",
            param=f"{path}type",
        )
    return honoured_fields(part, PART_FIELDS, path=path)


def _check_limits(old: int | None, new: int | None) -> None:
    if old is not None and new is not None and old != new:
        raise InvalidRequestError(
            f"'max_tokens' is {old} but 'max_completion_tokens' is {new}; send one of them",
            param="max_completion_tokens",
        )


def _invalid(error: ValidationError) -> InvalidRequestError:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    parts = [str(part) for part in first["loc"]]
    if parts[-1] == _KEY:
        path = ".".join(parts[:-2])
        return InvalidRequestError(f"'{path}': its keys should be token ids in digits", param=path)
    path = ".".join(part for part in parts if not part.startswith(_TAG))
    if first["type"] == "missing":
        return InvalidRequestError(f"'{path}' is required", param=path)
    message = first["msg"].replace(" after validation", "")  # what a validator calls it
    return InvalidRequestError(f"'{path}': {message[:1].lower()}{message[1:]}", param=path)
