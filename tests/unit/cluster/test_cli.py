"""The command line: what it passes on, and how it fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import cluster.chat
import cluster.serve
from baton.config import BatonConfig
from cluster.cli import app

runner = CliRunner()


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.delenv("REDIS_URL", raising=False)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[tuple[BatonConfig, str | None]]:
    """What `baton serve` was asked for, instead of being done."""
    calls: list[tuple[BatonConfig, str | None]] = []

    def serve(config: BatonConfig, *, redis_url: str | None) -> int:
        calls.append((config, redis_url))
        return 0

    monkeypatch.setattr(cluster.serve, "serve", serve)
    return calls


Served = list[tuple[BatonConfig, str | None]]


def replicas(config: BatonConfig) -> dict[str, int]:
    return {name: pool.replicas for name, pool in config.pools.items()}


def test_options_win_over_the_file_and_the_file_over_the_defaults(
    tmp_path: Path, served: Served
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("gateway: {port: 9000, drain_s: 3}\npools: {decode: {replicas: 4}}\n")
    result = runner.invoke(
        app, ["serve", "--config", str(file), "--port", "9001", "--prefill", "0"]
    )
    assert result.exit_code == 0, result.output
    config, redis_url = served[0]
    assert (config.gateway.port, config.gateway.drain_s) == (9001, 3)
    assert replicas(config) == {"prefill": 0, "decode": 4}
    assert redis_url is None


def test_every_option_of_serve_reaches_the_configuration(served: Served) -> None:
    options = {
        "--model": "m",
        "--prefill": "2",
        "--decode": "3",
        "--host": "::1",
        "--port": "9",
        "--gateways": "3",
        "--dtype": "float32",
        "--backend": "ray",
        "--kv-transport": "gloo",
        "--redis-url": "redis://h:1/0",
        "--ray-address": "h:2",
        "--cluster": "c",
    }
    result = runner.invoke(app, ["serve", *(word for pair in options.items() for word in pair)])
    assert result.exit_code == 0, result.output
    config, redis_url = served[0]
    assert (config.model, replicas(config)) == ("m", {"prefill": 2, "decode": 3})
    assert (config.gateway.host, config.gateway.port) == ("::1", 9)
    assert config.gateway.replicas == 3
    assert (config.engine.dtype, config.kv_transfer.transport) == ("float32", "gloo")
    assert (config.cluster.backend, config.cluster.ray_address) == ("ray", "h:2")
    assert (config.registry.cluster, redis_url) == ("c", "redis://h:1/0")


def test_redis_url_comes_from_the_environment(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REDIS_URL", "redis://e:1/0")
    runner.invoke(app, ["serve"])
    assert served[0][1] == "redis://e:1/0"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--decode", "0"], "no pool of role decode has replicas"),
        (["--port", "70000"], "gateway.port"),
        (["--gateways", "0"], "gateway.replicas"),
        (["--cluster", "no/such"], "registry.cluster"),
        (["--config", "/no/such.yaml"], "cannot read configuration"),
    ],
)
def test_wrong_settings_are_a_sentence_and_status_2(
    served: Served, arguments: list[str], sentence: str
) -> None:
    result = runner.invoke(app, ["serve", *arguments])
    assert result.exit_code == 2
    assert sentence in result.output
    assert "Traceback" not in result.output
    assert served == []


def test_unknown_backend_is_a_usage_error() -> None:
    assert runner.invoke(app, ["serve", "--backend", "slurm"]).exit_code == 2


@pytest.mark.parametrize("command", ["serve", "chat", "status", "scale", "stop"])
def test_every_command_has_help_with_examples(command: str) -> None:
    result = runner.invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert f"baton {command}" in result.output.split("Examples")[1]


@pytest.mark.parametrize("command", [["status"], ["chat", "hello"]])
def test_no_server_is_a_sentence_and_status_1(command: list[str]) -> None:
    from cluster.redis_server import free_port

    result = runner.invoke(app, [*command, "--url", f"http://127.0.0.1:{free_port()}"])
    assert result.exit_code == 1
    assert "no server answers at" in result.output
    assert "baton serve" in result.output


def test_stop_without_a_server_is_a_sentence_and_status_1() -> None:
    result = runner.invoke(app, ["stop"])
    assert result.exit_code == 1
    assert "no server of cluster 'default' runs here" in result.output


def test_chat_passes_its_options_on(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(
        cluster.chat, "chat", lambda options, message: calls.append((options, message))
    )
    arguments = ["hi", "--url", "http://h:1/", "--model", "m", "--temperature", "0"]
    result = runner.invoke(app, ["chat", *arguments, "--max-tokens", "5", "--system", "s"])
    assert result.exit_code == 0, result.output
    assert calls == [(cluster.chat.ChatOptions("http://h:1", "m", 0.0, 5, "s"), "hi")]


def test_version_is_shown() -> None:
    assert runner.invoke(app, ["--version"]).output.startswith("baton ")
