"""Invariant 9 of the hand-off over HTTP: of an answer that fails at any of its outputs, a client
sees a status or an event that says so, and no finish reason.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from support.fake_gateway import Gateway, answer, error_of, events

from baton.errors import (
    BatonError,
    DeadlineExceededError,
    DrainingError,
    InternalError,
    OverloadedError,
    ReservationError,
    TransferError,
    UnavailableError,
    WorkerLostError,
)
from router.gateway import respond
from router.gateway.choices import ChoiceStream
from router.request import ChoiceOutput

FAILURES: tuple[type[BatonError], ...] = (
    TransferError,
    ReservationError,
    OverloadedError,
    DrainingError,
    UnavailableError,
    WorkerLostError,
    DeadlineExceededError,
    InternalError,
)

TEXT = "Hello, world! Rome is old."


@pytest.fixture(scope="module")
def http() -> Gateway:
    return Gateway()


async def check_http(
    http: Gateway, *, num_before: int, error: BatonError | None, stream: bool, chat: bool
) -> None:
    """An answer of which ``num_before`` outputs come, and then ``error`` or the rest."""
    whole = answer(TEXT, end="length")
    http.orchestrator.script = lambda _: whole if error is None else [*whole[:num_before], error]
    asked = http.chat if chat else http.complete
    response = await asked(stream=stream)
    cut_off = error is not None
    if not stream:
        if cut_off:
            assert response.status_code >= 400, "a failure has status 200"
            assert error_of(response)["code"] == error.code
            return
        assert response.status_code == 200
        assert response.json()["choices"][0]["finish_reason"] == "length"
        return
    found = events(response.text)
    reasons = [
        each["choices"][0]["finish_reason"]
        for each in found
        if isinstance(each, dict) and each.get("choices")
    ]
    if cut_off and num_before == 0:
        assert response.status_code >= 400, "a failure has status 200"
    elif cut_off:
        assert isinstance(found[-1], dict), "the stream ends as if it were whole"
        assert found[-1]["error"]["code"] == error.code
        assert set(reasons) == {None}, "a cut-off stream has a finish reason"
    else:
        assert found[-1] == "data: [DONE]"
        assert reasons[-1] == "length"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("chat", [False, True])
async def test_http_says_of_every_failure_at_any_output_that_it_is_one(
    http: Gateway, stream: bool, chat: bool
) -> None:
    num = len(answer(TEXT, end="length"))
    for error in (None, *(kind("it failed") for kind in FAILURES)):
        for num_before in (0, 1, num // 2, num - 1):
            await check_http(http, num_before=num_before, error=error, stream=stream, chat=chat)


class SwallowsErrors(ChoiceStream):
    async def run(self, orchestrator: Any, emit: Callable[..., None]) -> None:
        try:
            await super().run(orchestrator, emit)
        except BatonError:
            emit(self._apply(ChoiceOutput((), "length")))


@pytest.mark.parametrize("stream", [False, True])
async def test_mutant_of_http_is_killed(
    http: Gateway, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(respond, "ChoiceStream", SwallowsErrors)
    error = WorkerLostError("lost")
    with pytest.raises(AssertionError):
        await check_http(http, num_before=2, error=error, stream=stream, chat=True)
