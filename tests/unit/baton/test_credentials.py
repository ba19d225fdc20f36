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
        ("be\x07ll", "control character"),
        ("de\x7fl", "control character"),
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
    with pytest.raises(ConfigurationError, match="not UTF-8"):
        credential(API_KEY)


def test_any_letters_make_a_key_but_the_clusters_secret_is_ascii(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ALL:
        monkeypatch.setenv(name, "ключ")
    assert credential(API_KEY) == credential(CONTROLLER_TOKEN) == "ключ"
    with pytest.raises(ConfigurationError, match="ASCII"):
        credential(CLUSTER_SECRET)


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


@pytest.mark.parametrize("key", ["k3y", "schlüssel", "ключ", "鍵"])
def test_header_shows_the_keys_utf8_bytes_and_nothing_else(key: str) -> None:
    check = BearerCheck(key)
    assert check.passes([(b"accept", b"*/*"), (b"authorization", f"Bearer {key}".encode())])
    assert bearer(key) == f"Bearer {key}".encode()
    question_marks = f"Bearer {'?' * len(key)}".encode()
    latin = f"Bearer {key}".encode("latin-1", "replace")
    others = [question_marks, b"", b"Bearer ", key.encode(), *([] if key.isascii() else [latin])]
    assert not any(check.passes([(b"authorization", other)]) for other in others)
    assert not check.passes([])
