"""Reads a request's JSON body: bounded in size, strict in form."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import pydantic_core
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import Receive

from baton.errors import CancelledError, InvalidRequestError, RequestTooLargeError

_UTF8 = {"utf-8", "utf8", "us-ascii"}


async def read_body(headers: Headers, receive: Receive, *, limit: int) -> bytes:
    """The whole body.

    Raises:
        HTTPException: 415, the body is not declared as plain JSON.
        RequestTooLargeError: over ``limit`` bytes; the rest is not read.
        CancelledError: the client left while sending.
    """
    _check_media_type(headers)
    return await _read(headers, receive, limit)


def parse_object(body: bytes) -> dict[str, Any]:
    """The body as a JSON object.

    Raises InvalidRequestError: not JSON, or no object; names the field where it can.
    """
    try:
        data = pydantic_core.from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise _diagnose(body, str(error)) from None
    if not isinstance(data, dict):
        raise InvalidRequestError("the body should be a JSON object")
    return data


def refuse_repeated_names(body: bytes) -> None:
    """Of a body that ``parse_object`` has read, in which the last of equal names has won.

    Raises InvalidRequestError.
    """

    def look(pairs: list[tuple[str, Any]]) -> None:
        seen = set()
        for name, _ in pairs:
            if name in seen:
                raise InvalidRequestError(f"'{name}' is given more than once", param=name)
            seen.add(name)

    json.loads(body, object_pairs_hook=look, parse_int=str)


def _check_media_type(headers: Headers) -> None:
    declared = headers.get("content-type", "")
    kind, *parameters = (part.strip().lower() for part in declared.split(";"))
    if kind != "application/json":
        raise HTTPException(415, f"Content-Type should be application/json, not {kind[:64]!r}")
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name == "charset" and value.strip('"') not in _UTF8:
            raise HTTPException(415, f"JSON is UTF-8; charset {value[:64]!r} is not accepted")
    encoding = headers.get("content-encoding", "identity").lower()
    if encoding != "identity":
        raise HTTPException(415, f"Content-Encoding {encoding[:64]!r} is not accepted")


async def _read(headers: Headers, receive: Receive, limit: int) -> bytes:
    too_large = RequestTooLargeError(f"the body is over {limit} bytes")
    declared = headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > limit:
        raise too_large
    chunks, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise CancelledError("the client left while sending its request")
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > limit:
            raise too_large
        chunks.append(chunk)
        if not message.get("more_body", False):
            return b"".join(chunks)


def _diagnose(body: bytes, reason: str) -> InvalidRequestError:
    """Why the strict parser refused, with the field's name if it is only a value's fault.

    Python's own parser lets lone surrogates and NaN pass, so they can be found.
    """
    try:
        body.decode()
    except UnicodeDecodeError as error:
        return InvalidRequestError(f"the body is not UTF-8: byte {error.start} is invalid")
    try:
        for path, fault in _faults(json.loads(body), ""):
            message = f"'{path}': {fault}" if path else fault
            return InvalidRequestError(message, param=path or None)
    except (ValueError, RecursionError):
        pass
    return InvalidRequestError(f"the body is not valid JSON: {reason}")


def _faults(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """Values that Python's parser accepts and JSON does not have."""
    if isinstance(value, str) and not _is_unicode(value):
        yield path, "a lone surrogate is not a character"
    elif isinstance(value, float) and not math.isfinite(value):
        yield path, f"{value} is not a JSON number"
    elif isinstance(value, Mapping):
        for name, item in value.items():
            if not _is_unicode(name):
                yield path, "a field's name has a lone surrogate, which is not a character"
            yield from _faults(item, f"{path}.{name}" if path else name)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _faults(item, f"{path}.{index}" if path else str(index))


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
