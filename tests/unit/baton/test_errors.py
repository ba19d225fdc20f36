"""Every leaf of the error tree has its place in HTTP, gRPC and on the wire."""

from __future__ import annotations

import inspect

import grpc
import pytest

from baton import errors
from baton.errors import BatonError, InternalError, from_code

KINDS = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, BatonError) and kind is not BatonError
]


@pytest.mark.parametrize("kind", KINDS)
def test_leaf_maps_to_http_grpc_and_an_openai_body(kind: type[BatonError]) -> None:
    error = kind("what happened", param="messages.0")
    assert 400 <= error.http_status < 600
    assert isinstance(error.grpc_code, grpc.StatusCode)
    assert error.grpc_code is not grpc.StatusCode.OK
    body = error.body()["error"]
    assert body == {
        "message": "what happened",
        "type": error.openai_type,
        "param": "messages.0",
        "code": error.code,
    }


def test_codes_are_distinct() -> None:
    codes = [kind.code for kind in KINDS]
    assert len(codes) == len(set(codes))


@pytest.mark.parametrize("kind", KINDS)
def test_code_from_a_peer_becomes_the_same_error(kind: type[BatonError]) -> None:
    error = from_code(kind.code, "told by a peer")
    assert type(error) is kind
    assert error.message == "told by a peer"


def test_unknown_code_from_a_peer_is_an_internal_error_that_names_it() -> None:
    error = from_code("no_such_code", "odd")
    assert type(error) is InternalError
    assert "no_such_code" in error.message


def test_docstring_draws_the_whole_tree() -> None:
    assert errors.__doc__ is not None
    for kind in KINDS:
        assert kind.__name__ in errors.__doc__
