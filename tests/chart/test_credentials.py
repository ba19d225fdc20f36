"""Secrets of the values: what Baton or Ray would not start with is refused, and never shown."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from support.chart import GIVEN, refusal, render

from baton.credentials import API_KEY, CLUSTER_SECRET, CONTROLLER_TOKEN, credential
from baton.errors import ConfigurationError

Json = dict[str, Any]

VARIABLES = {"apiKey": API_KEY, "cluster": CLUSTER_SECRET, "controllerToken": CONTROLLER_TOKEN}

REFUSED = ["  ", "a b", "a\nb", "a\tb", "geheimnüs"]

EDGES = (
    *"\x01\x08\t\n\v\f\r\x0e\x1b\x1c\x1f !~\x7f\x80\x85\xa0\xa1\xad\xff",
    *"\u0100\u2003\u200b\u2028\u3000\ufeff",
)
"""Where one kind of character ends and another begins, and what some call whitespace."""


def _secret(name: str, value: str) -> Json:
    return {"secrets": {name: {"value": value}}}


@pytest.mark.parametrize("name", VARIABLES)
@pytest.mark.parametrize("value", REFUSED)
def test_what_baton_refuses_at_start_is_refused_without_being_shown(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(VARIABLES[name], value)
    with pytest.raises(ConfigurationError):
        credential(VARIABLES[name])
    said = refusal(_secret(name, value))
    assert f"secrets.{name}.value has to be one word of visible ASCII" in said
    assert not value.strip() or value not in said


@pytest.mark.parametrize("value", [" \ta-key\r\n", "".join(map(chr, range(0x21, 0x7F)))])
def test_what_baton_takes_is_in_the_secret_as_it_was_given(value: str) -> None:
    data = render(GIVEN, _secret("apiKey", value)).one("Secret", "-secrets")["data"]
    assert base64.b64decode(data["api-key"]).decode() == value


@pytest.mark.parametrize("character", EDGES, ids=ascii)
def test_chart_and_baton_agree_on_every_kind_of_character(
    monkeypatch: pytest.MonkeyPatch, character: str
) -> None:
    for value in (f"a{character}b", f"a{character}", f"{character}a"):
        monkeypatch.setenv(API_KEY, value)
        try:
            credential(API_KEY)
        except ConfigurationError:
            assert "secrets.apiKey.value has to be" in refusal(_secret("apiKey", value))
        else:
            assert render(GIVEN, _secret("apiKey", value)).documents


@pytest.mark.parametrize("name", ["rayToken", "huggingFace"])
@pytest.mark.parametrize("value", REFUSED)
def test_tokens_that_others_send_in_headers_are_held_to_the_same(name: str, value: str) -> None:
    """On a token that is not ASCII gRPC aborts Ray's processes."""
    said = refusal(_secret(name, value))
    assert f"secrets.{name}.value has to be one word of visible ASCII" in said


def test_a_key_that_nobody_is_asked_for_may_be_anything() -> None:
    over = {"secrets": {"apiKey": {"enabled": False, "value": "a b"}}}
    assert render(GIVEN, over).documents
