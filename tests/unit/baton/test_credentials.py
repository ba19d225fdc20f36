"""How keys, tokens and secrets are read, shown and compared."""

from __future__ import annotations

import os

import pytest

from baton.credentials import (
    API_KEY,
    CLUSTER_SECRET,
    CONTROLLER_TOKEN,
    BearerCheck,
    bearer,
    credential,
    take_credential,
)
from baton.errors import ConfigurationError
from baton.worker.process import required_environment

ALL = (API_KEY, CLUSTER_SECRET, CONTROLLER_TOKEN)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("given", ["k3y", "k3y\n", "k3y\r\n", " \tk3y "])
def test_whitespace_around_it_is_none_of_it(
    monkeypatch: pytest.MonkeyPatch, name: str, given: str
) -> None:
    monkeypatch.setenv(name, given)
    assert credential(name) == "k3y"


@pytest.mark.parametrize("name", ALL)
def test_empty_is_as_good_as_unset(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "")
    assert credential(name) is None
    monkeypatch.delenv(name)
    assert credential(name) is None


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    ("given", "why"),
    [
        ("\n", "nothing but whitespace"),
        (" \t ", "nothing but whitespace"),
        ("two words", "whitespace inside"),
        ("two\nlines", "whitespace inside"),
        ("no\u00a0break", "whitespace inside"),
        ("k3y\u00a0", "whitespace inside"),
        ("sep\x1carated", "whitespace inside"),
        ("be\x07ll", "control character"),
        ("de\x7fl", "control character"),
        ("schlüssel", "not ASCII"),
        ("ключ", "not ASCII"),
    ],
)
def test_what_can_be_none_is_refused_in_a_sentence_that_does_not_show_it(
    monkeypatch: pytest.MonkeyPatch, name: str, given: str, why: str
) -> None:
    monkeypatch.setenv(name, given)
    with pytest.raises(ConfigurationError, match=f"{name} .*{why}") as refused:
        credential(name)
    assert given not in refused.value.message or not given.strip()


def test_bytes_that_are_no_utf8_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(API_KEY, os.fsdecode("schlüssel".encode("latin-1")))
    with pytest.raises(ConfigurationError, match="not ASCII"):
        credential(API_KEY)


def test_all_of_visible_ascii_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    visible = "".join(map(chr, range(0x21, 0x7F)))
    for name in ALL:
        monkeypatch.setenv(name, visible)
        assert credential(name) == visible


@pytest.mark.parametrize("given", ["t0ken\n", "t0 ken"])
def test_token_that_is_taken_is_out_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    monkeypatch.setenv(CONTROLLER_TOKEN, given)
    if " " in given:
        with pytest.raises(ConfigurationError):
            take_credential(CONTROLLER_TOKEN)
    else:
        assert take_credential(CONTROLLER_TOKEN) == "t0ken"
    assert CONTROLLER_TOKEN not in os.environ


def test_required_ones_are_read_in_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CLUSTER_SECRET, "s3cret\n")
    monkeypatch.setenv("REDIS_URL", "redis://nowhere:1/0\n")
    assert required_environment(CLUSTER_SECRET) == "s3cret"
    assert required_environment("REDIS_URL") == "redis://nowhere:1/0"
    monkeypatch.setenv("REDIS_URL", "\n")
    with pytest.raises(ConfigurationError, match="REDIS_URL is not set"):
        required_environment("REDIS_URL")
    monkeypatch.setenv(CLUSTER_SECRET, "s3 cret")
    with pytest.raises(ConfigurationError, match="whitespace inside"):
        required_environment(CLUSTER_SECRET)


KEY = "k3y:+/="


@pytest.mark.parametrize(
    "shown",
    [
        bearer(KEY),
        f"bearer {KEY}".encode(),
        f"BEARER {KEY}".encode(),
        f"Bearer   {KEY}".encode(),
        f" \tBearer {KEY} \t".encode(),
    ],
)
def test_header_shows_the_key_after_a_scheme_of_any_case(shown: bytes) -> None:
    assert BearerCheck(KEY).passes([(b"accept", b"*/*"), (b"authorization", shown)])


@pytest.mark.parametrize(
    "shown",
    [
        *(b"", b"Bearer", b"Bearer ", KEY.encode(), f"Bearer{KEY}".encode()),
        *(f"Basic {KEY}".encode(), f"Bearer Bearer {KEY}".encode()),
        *(f"Bearer {KEY.upper()}".encode(), f"Bearer {KEY[:-1]}".encode()),
        *(f"Bearer {KEY}x".encode(), f"Bearer {KEY} x".encode(), f"Bearer {KEY},".encode()),
        *("Bearer schlüssel".encode("latin-1"), b"Bearer \xff\xfe", f"Bearer {KEY}\x00".encode()),
    ],
)
def test_header_that_shows_anything_else_does_not_pass(shown: bytes) -> None:
    check = BearerCheck(KEY)
    assert not check.passes([(b"authorization", shown)])
    assert not check.passes([(b"x-authorization", bearer(KEY))])
    assert not check.passes([])


def test_only_the_first_of_two_headers_counts() -> None:
    headers = [(b"authorization", b"Bearer wrong"), (b"authorization", bearer(KEY))]
    assert not BearerCheck(KEY).passes(headers)
