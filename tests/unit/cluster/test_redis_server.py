"""A private Redis: its binary, its password, its readiness."""

from __future__ import annotations

import socket
import stat
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import redis.asyncio

from baton.errors import ConfigurationError, UnavailableError
from cluster import redis_server
from cluster.processes_backend import Command, ProcessesBackend


async def test_private_redis_answers_with_its_password_alone(tmp_path: Path) -> None:
    private = redis_server.prepare(tmp_path)
    backend = ProcessesBackend(lambda _r, _i: Command(private.arguments), log_folder=tmp_path)
    process = await backend.start("redis", "redis")
    try:
        await redis_server.wait_answers(private.url, timeout_s=10)
        port = urlsplit(private.url).port
        with pytest.raises(ConfigurationError, match="refuses the password"):
            await redis_server.ping(f"redis://:wrong@127.0.0.1:{port}/0", timeout_s=5)
        with pytest.raises(ConfigurationError, match="refuses the password"):
            await redis_server.ping(f"redis://127.0.0.1:{port}/0", timeout_s=5)
        client = redis.asyncio.from_url(private.url)
        assert (await client.config_get("save"))["save"] == ""
        assert (await client.config_get("bind"))["bind"] == "127.0.0.1"
        await client.aclose()
    finally:
        await process.kill()
        await process.wait()


def test_password_lies_in_a_file_of_its_owner_alone(tmp_path: Path) -> None:
    private = redis_server.prepare(tmp_path)
    password = urlsplit(private.url).password
    assert password is not None
    assert len(password) == 64
    assert stat.S_IMODE((tmp_path / "redis.conf").stat().st_mode) == 0o600
    assert not any(password in argument for argument in private.arguments)
    assert f"requirepass {password}\n" in (tmp_path / "redis.conf").read_text()


def test_each_private_redis_has_its_own_password(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    urls = [redis_server.prepare(tmp_path / name).url for name in ("a", "b")]
    assert urlsplit(urls[0]).password != urlsplit(urls[1]).password


class FirstTwo:
    """The first two ports that are asked about."""

    def __init__(self) -> None:
        self.ports: list[object] = []

    def __contains__(self, port: object) -> bool:
        self.ports.append(port)
        return len(self.ports) <= 2


def test_port_is_none_on_which_something_is_to_listen(tmp_path: Path) -> None:
    taken = FirstTwo()
    private = redis_server.prepare(tmp_path, taken=taken)
    assert urlsplit(private.url).port == taken.ports[2]
    assert len(set(taken.ports)) == 3


def test_redis_on_the_path_wins_over_the_wheels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "redis-server"
    own.write_text("#!/bin/sh\n")
    own.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert redis_server.find_redis_server() == str(own)


def test_missing_redis_is_a_sentence_that_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(redis_server.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(redis_server.sys, "prefix", str(tmp_path))
    with pytest.raises(ConfigurationError, match="--redis-url or REDIS_URL"):
        redis_server.find_redis_server()


async def test_redis_that_is_not_there_is_named_without_its_password() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, and nobody listens
        url = f"redis://:hunter2@127.0.0.1:{taken.getsockname()[1]}/0"
        with pytest.raises(UnavailableError, match=r"redis://:\*\*\*@127") as caught:
            await redis_server.ping(url, timeout_s=1)
    assert "hunter2" not in caught.value.message


@pytest.mark.parametrize("url", ["localhost:6379", "http://127.0.0.1", ""])
async def test_text_that_is_no_redis_address_is_refused(url: str) -> None:
    with pytest.raises(ConfigurationError, match="no address of a Redis"):
        await redis_server.ping(url, timeout_s=1)


def test_address_without_password_is_shown_as_it_is() -> None:
    assert redis_server.without_password("redis://h:1/0") == "redis://h:1/0"
    assert redis_server.without_password("redis://u:p@h:1/0") == "redis://u:***@h:1/0"


def test_free_port_can_be_bound() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", redis_server.free_port()))
