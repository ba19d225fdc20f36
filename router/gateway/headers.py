"""What a request's headers carry: its id, its trace, its deadline, wishes for its answer."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass

from starlette.datastructures import Headers

from baton.config import GatewayConfig
from baton.errors import InvalidRequestError

REQUEST_ID = "x-request-id"
DEADLINE = "X-Baton-Deadline-Ms"
TIMELINE = "X-Baton-Timeline"

_REQUEST_ID = re.compile(r"[\x20-\x7e]{1,128}")
# W3C Trace Context, level 1, section 3.2: lower-case hexadecimal, neither id all zero.
_TRACEPARENT = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}"
)
_TRACESTATE = re.compile(r"[\x20-\x7e]{0,512}")


@dataclass(frozen=True, slots=True)
class TraceContext:
    """W3C trace context, as the client sent it or as it was begun here."""

    traceparent: str
    tracestate: str = ""


def request_id(headers: Headers) -> str:
    """The client's, if it is printable ASCII of at most 128 characters; else a fresh one."""
    given = headers.get(REQUEST_ID, "")
    if _REQUEST_ID.fullmatch(given) and given.strip():
        return given
    return f"req-{secrets.token_hex(16)}"


def trace_context(headers: Headers) -> TraceContext:
    """Begins a new trace, without a state, where the client's is missing or malformed."""
    parents = headers.getlist("traceparent")
    if len(parents) == 1 and _is_traceparent(parents[0]):
        state = ",".join(headers.getlist("tracestate"))
        return TraceContext(parents[0], state if _TRACESTATE.fullmatch(state) else "")
    return TraceContext(f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-00")


def _is_traceparent(value: str) -> bool:
    match = _TRACEPARENT.match(value)
    if match is None:
        return False
    rest = value[match.end() :]
    # Later versions may append fields, this one may not.
    return not rest or (value[:2] != "00" and rest.startswith("-") and len(value) <= 512)


def deadline_s(headers: Headers, config: GatewayConfig) -> float:
    """How long the request may take. Raises InvalidRequestError, naming the header."""
    given = headers.get(DEADLINE)
    if given is None:
        return config.default_deadline_s
    value = int(given) if re.fullmatch(r"[0-9]{1,15}", given) else 0
    if value < 1:
        raise InvalidRequestError(
            f"{DEADLINE} should be a positive number of milliseconds", param=DEADLINE
        )
    if value > config.max_deadline_s * 1000:
        raise InvalidRequestError(
            f"{DEADLINE} is {value}; at most {int(config.max_deadline_s * 1000)} is accepted",
            param=DEADLINE,
        )
    return value / 1000


def wants_timeline(headers: Headers) -> bool:
    """The answer is to tell where its time went. Raises InvalidRequestError, naming the header."""
    given = headers.getlist(TIMELINE)
    if given not in ([], ["1"]):
        raise InvalidRequestError(
            f"{TIMELINE} should be 1, which asks for the request's timeline, or be left out",
            param=TIMELINE,
        )
    return bool(given)
