"""`baton scale`: what it asks for, what it waits for, how it fails."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

import cluster.controller_client as client_module
import cluster.scale as scale_module
from baton.errors import InvalidRequestError, UnavailableError
from cluster.cli import app
from cluster.console import Progress
from cluster.controller_client import ControllerAddress, known_controller
from cluster.procfs import name_of
from cluster.redis_server import free_port
from cluster.scale import parse_sizes, scale
from cluster.state import RunFolder, ServerState

runner = CliRunner()
URL = "http://127.0.0.1:1235"


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.delenv("BATON_CONTROLLER_TOKEN", raising=False)


def pool(desired: int, ready: int, leaving: int = 0, running: int | None = None) -> dict[str, Any]:
    return {
        "role": "decode",
        "desired": desired,
        "running": ready if running is None else running,
        "ready": ready,
        "leaving": leaving,
        "max_replicas": 8,
        "later": "versions may say more",
    }


class FakeController:
    """In the place of the network: answers with ``answers`` in turn, the last one for ever."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, Any, str]] = []
        self.answers: list[httpx.Response | Exception] = []

    def __call__(self, method: str, url: str, **options: Any) -> httpx.Response:
        shown = options["headers"][b"Authorization"].decode()
        self.asked.append((method, url, options["json"], shown))
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def will_say(self, *pools: dict[str, dict[str, Any]]) -> None:
        self.answers = [httpx.Response(200, json={"pools": each}) for each in pools]

    def will_refuse(self, status: int, code: str, message: str) -> None:
        error = {"message": message, "type": "t", "param": None, "code": code}
        self.answers = [httpx.Response(status, json={"error": error})]


@pytest.fixture
def controller(monkeypatch: pytest.MonkeyPatch) -> FakeController:
    fake = FakeController()
    monkeypatch.setattr(client_module.httpx, "request", fake)
    return fake


@pytest.fixture
def served() -> ServerState:
    """A server of this cluster, as far as its state tells."""
    me = name_of(os.getpid())
    assert me is not None
    state = ServerState(
        pid=me.pid,
        start_time=me.start_time,
        url="http://127.0.0.1:1234",
        cluster="default",
        stop_within_s=30.0,
        temp_folder="",
        controller_url=URL,
        controller_token="from-state",
    )
    folder = RunFolder("default")
    folder.lock()
    folder.write(state)
    return state


def test_words_become_sizes() -> None:
    assert parse_sizes(["prefill=2", "long-ctx=0"]) == {"prefill": 2, "long-ctx": 0}


@pytest.mark.parametrize(
    "word", ["decode", "decode=", "decode=x", "decode=-1", "=3", "decode=1.5", "decode=٣", ""]
)
def test_malformed_word_is_a_sentence_and_status_2(word: str) -> None:
    result = runner.invoke(app, ["scale", "prefill=1", word])
    assert result.exit_code == 2
    assert "write POOL=N" in result.output
    assert "decode=3" in result.output


def test_pool_that_is_named_twice_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="named twice"):
        parse_sizes(["decode=1", "decode=2"])


def test_no_words_are_a_usage_error() -> None:
    assert runner.invoke(app, ["scale"]).exit_code == 2


def test_no_server_here_is_a_sentence_and_status_1() -> None:
    result = runner.invoke(app, ["scale", "decode=2"])
    assert result.exit_code == 1
    assert "no server of cluster 'default' runs here" in result.output
    assert "--url" in result.output


def test_address_and_token_come_from_the_server_that_runs_here(
    served: ServerState, controller: FakeController
) -> None:
    controller.will_say({"decode": pool(2, 2)})
    result = runner.invoke(app, ["scale", "decode=2"])
    assert result.exit_code == 0, result.output
    assert controller.asked == [("PUT", f"{URL}/v1/pools", {"decode": 2}, "Bearer from-state")]


def test_other_controller_wants_a_token_from_the_environment(
    served: ServerState, controller: FakeController, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = runner.invoke(app, ["scale", "decode=2", "--url", "http://other:1/"])
    assert result.exit_code == 1
    assert "BATON_CONTROLLER_TOKEN is not set" in result.output
    assert controller.asked == []
    assert known_controller("default", f"{URL}/v1").token == "from-state"
    monkeypatch.setenv("BATON_CONTROLLER_TOKEN", "given")
    controller.will_say({"decode": pool(2, 2)})
    assert runner.invoke(app, ["scale", "decode=2", "--url", "http://other:1/"]).exit_code == 0
    assert controller.asked == [("PUT", "http://other:1/v1/pools", {"decode": 2}, "Bearer given")]


def test_token_that_no_header_can_carry_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_CONTROLLER_TOKEN", "be\x07ll")
    result = runner.invoke(app, ["scale", "decode=2", "--url", "http://other:1"])
    assert result.exit_code == 1
    assert "no HTTP header can carry" in result.output


def test_token_is_shown_without_the_lines_end_after_it(
    controller: FakeController, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BATON_CONTROLLER_TOKEN", "t0ken\n")
    controller.will_say({"decode": pool(2, 2)})
    assert runner.invoke(app, ["scale", "decode=2", "--url", "http://other:1"]).exit_code == 0
    assert [shown for *_, shown in controller.asked] == ["Bearer t0ken"]


@pytest.mark.parametrize(
    ("status", "code", "message", "exit_code", "said"),
    [
        (400, "invalid_request", "pool decode may have at most 8", 2, "at most 8"),
        (401, "invalid_api_key", "no", 1, "BATON_CONTROLLER_TOKEN"),
        (503, "unavailable", "Redis does not answer; nothing was changed", 1, "nothing was"),
    ],
)
def test_refusal_is_said_in_the_controllers_words(
    served: ServerState,
    controller: FakeController,
    status: int,
    code: str,
    message: str,
    exit_code: int,
    said: str,
) -> None:
    controller.will_refuse(status, code, message)
    result = runner.invoke(app, ["scale", "decode=9"])
    assert result.exit_code == exit_code
    assert said in " ".join(result.output.split())


@pytest.mark.parametrize("url", ["http://127.0.0.1:PORT", "nonsense", "ftp://h:1", "http://h:x"])
def test_address_where_nobody_answers_is_a_sentence_and_status_1(
    monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.setenv("BATON_CONTROLLER_TOKEN", "given")
    address = url.replace("PORT", str(free_port()))
    result = runner.invoke(app, ["scale", "decode=2", "--url", address])
    assert result.exit_code == 1
    assert "controller" in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    "answer",
    [
        httpx.Response(200, text="hello"),
        httpx.Response(200, json=[]),
        httpx.Response(200, json={"pools": {"decode": {}}}),
        httpx.Response(500, json={"error": "text"}),
    ],
)
def test_another_program_at_that_address_is_told_apart(
    served: ServerState, controller: FakeController, answer: httpx.Response
) -> None:
    controller.answers = [answer]
    result = runner.invoke(app, ["scale", "decode=2"])
    assert result.exit_code == 1
    assert "no Baton controller" in result.output


@pytest.mark.parametrize(
    ("status", "code"), [(404, "not_found"), (405, "method_not_allowed"), (401, "invalid_api_key")]
)
def test_address_of_a_gateway_is_answered_with_where_controllers_are(
    served: ServerState, controller: FakeController, status: int, code: str
) -> None:
    controller.will_refuse(status, code, "PUT /v1/pools: Not Found")
    result = runner.invoke(app, ["scale", "decode=1", "--url", URL])
    assert result.exit_code == 1
    said = " ".join(result.output.split())
    assert URL in said
    assert "Without --url" in said
    assert "controller listening on" in said
    assert "Not Found" not in said


# --------------------------------------------------------------------- waiting


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that only sleeping moves."""
    naps: list[float] = []
    monkeypatch.setattr(scale_module.time, "monotonic", lambda: sum(naps))
    monkeypatch.setattr(scale_module.time, "sleep", naps.append)
    return naps


def run(sizes: dict[str, int], wait_s: float | None = 60.0) -> None:
    scale(ControllerAddress(URL, "t"), sizes, wait_s=wait_s, progress=Progress())


def test_waits_until_new_workers_are_ready_and_old_ones_gone(
    controller: FakeController, slept: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    controller.will_say(
        {"decode": pool(1, 2, leaving=0)},
        {"decode": pool(1, 1, leaving=1)},
        {"decode": pool(1, 0, running=1)},
        {"decode": pool(1, 1)},
        {"decode": pool(1, 0)},
    )
    run({"decode": 1})
    assert len(controller.asked) == 4
    assert [method for method, *_ in controller.asked] == ["PUT", "GET", "GET", "GET"]
    said = capsys.readouterr().out
    assert "decode: 1 of 1 ready, 1 leaving" in said
    assert said.strip().endswith("decode: 1 of 1 ready")


def test_does_not_wait_where_it_is_told_so(
    controller: FakeController, slept: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    controller.will_say({"decode": pool(5, 1)})
    run({"decode": 5}, wait_s=None)
    assert (len(controller.asked), slept) == (1, [])
    assert "5 wished" in capsys.readouterr().out


def test_wait_ends_at_its_bound_and_says_what_is_missing(
    controller: FakeController, slept: list[float]
) -> None:
    controller.will_say({"decode": pool(3, 1)})
    with pytest.raises(UnavailableError, match=r"not within 60 s \(decode: 1 of 3 ready\)"):
        run({"decode": 3})
    assert sum(slept) == pytest.approx(60, abs=1)


def test_wish_of_somebody_else_ends_the_wait(
    controller: FakeController, slept: list[float]
) -> None:
    controller.will_say({"decode": pool(3, 1)}, {"decode": pool(2, 2)})
    with pytest.raises(UnavailableError, match="somebody else has changed pool decode"):
        run({"decode": 3})


def test_controller_that_is_away_for_a_moment_is_asked_again(
    controller: FakeController, slept: list[float]
) -> None:
    controller.will_say({"decode": pool(2, 1)}, {"decode": pool(2, 2)})
    controller.answers.insert(1, httpx.ConnectError("refused"))
    run({"decode": 2})
    assert len(controller.asked) == 3
