"""The controller's HTTP API over a controller with fakes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from support.controller_rig import ControllerRig

from cluster.controller_app import Seat, create_controller_app

TOKEN = "t0ken"
HEADERS = {"Authorization": f"Bearer {TOKEN}"}


def client_of(rig: ControllerRig, seat: Seat) -> httpx.AsyncClient:
    app = create_controller_app(seat, token=TOKEN, samples=rig.samples)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://controller")


@pytest.fixture
async def rig() -> AsyncIterator[ControllerRig]:
    rig = ControllerRig()
    await rig.begin()
    yield rig
    await rig.close()


@pytest.fixture
async def client(rig: ControllerRig) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(rig, Seat(rig.controller)) as client:
        yield client


def error_of(answer: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize("shown", [f"bearer {TOKEN}", f"BEARER {TOKEN}", f"Bearer {TOKEN} "])
async def test_scheme_of_any_case_and_blanks_after_the_token_are_taken(
    client: httpx.AsyncClient, shown: str
) -> None:
    answer = await client.get("/v1/pools", headers={"Authorization": shown})
    assert answer.status_code == 200


async def test_pools_are_shown(client: httpx.AsyncClient) -> None:
    answer = await client.get("/v1/pools", headers=HEADERS)
    assert answer.status_code == 200
    assert answer.json() == {
        "pools": {
            "prefill": {
                **{"role": "prefill", "desired": 1, "running": 1},
                **{"ready": 0, "leaving": 0, "max_replicas": 64},
            },
            "decode": {
                **{"role": "decode", "desired": 2, "running": 2},
                **{"ready": 0, "leaving": 0, "max_replicas": 8},
            },
        },
        "registry_up": True,
    }


async def test_wish_is_answered_with_the_new_sizes_and_carried_out(
    client: httpx.AsyncClient, rig: ControllerRig
) -> None:
    answer = await client.put("/v1/pools", json={"decode": 3}, headers=HEADERS)
    assert answer.status_code == 200
    desired = {name: pool["desired"] for name, pool in answer.json()["pools"].items()}
    assert desired == {"prefill": 1, "decode": 3}
    await rig.settle()
    assert rig.running() == ["decode-0", "decode-1", "decode-2", "prefill-0"]


@pytest.mark.parametrize("method", ["GET", "PUT"])
@pytest.mark.parametrize(
    "authorization", [None, "", "Bearer", "Bearer wrong", TOKEN, f"Basic {TOKEN}", "Bearer é"]
)
async def test_wrong_token_is_refused_and_changes_nothing(
    client: httpx.AsyncClient, rig: ControllerRig, method: str, authorization: str | None
) -> None:
    headers = {} if authorization is None else {"Authorization": authorization.encode("latin-1")}
    answer = await client.request(method, "/v1/pools", json={"decode": 3}, headers=headers)
    assert answer.status_code == 401
    assert error_of(answer)["code"] == "invalid_api_key"
    assert TOKEN not in answer.text
    assert answer.headers["www-authenticate"] == "Bearer"
    assert rig.controller.pools()["decode"].desired == 2


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b'{"decode": 0}', "decode"),
        (b'{"decode": -1}', "decode"),
        (b'{"decode": 1.5}', "decode"),
        (b'{"decode": true}', "decode"),
        (b'{"decode": 9}', "decode"),
        (b'{"decode": 99999999999999999999999999}', "decode"),
        (b'{"decoder": 1}', "decoder"),
        (b'{"decode": NaN}', "decode"),
        (b'{"decode": 1, "decode": 3}', "decode"),
        (b'{"decode": 1, "d\\u0065code": 3}', "decode"),
        (b"[1]", None),
        (b"3", None),
        (b"", None),
        (b'{"decode": 3', None),
        (b"\xff", None),
    ],
)
async def test_bad_body_is_a_400_that_names_the_pool_and_changes_nothing(
    client: httpx.AsyncClient, rig: ControllerRig, body: bytes, param: str | None
) -> None:
    stored = rig.store.wishes
    headers = {**HEADERS, "content-type": "application/json"}
    answer = await client.put("/v1/pools", content=body, headers=headers)
    assert answer.status_code == 400, answer.text
    assert error_of(answer)["param"] == param
    assert error_of(answer)["type"] == "invalid_request_error"
    assert rig.store.wishes == stored
    assert rig.controller.pools()["decode"].desired == 2


async def test_body_that_is_too_large_or_no_json_by_its_header_is_refused(
    client: httpx.AsyncClient,
) -> None:
    headers = {**HEADERS, "content-type": "application/json"}
    answer = await client.put("/v1/pools", content=b" " * 70_000, headers=headers)
    assert answer.status_code == 413
    answer = await client.put("/v1/pools", content=b'{"decode": 3}', headers=HEADERS)
    assert answer.status_code == 415
    assert "application/json" in error_of(answer)["message"]


async def test_wish_without_redis_is_a_503_with_a_sentence(
    client: httpx.AsyncClient, rig: ControllerRig
) -> None:
    rig.store.up = False
    answer = await client.put("/v1/pools", json={"decode": 3}, headers=HEADERS)
    assert answer.status_code == 503
    assert "nothing was changed" in error_of(answer)["message"]
    assert (await client.get("/v1/pools", headers=HEADERS)).status_code == 200


async def test_open_pages_need_no_token(client: httpx.AsyncClient) -> None:
    for path in ("/health", "/ready"):
        assert (await client.get(path)).status_code == 200
    page = (await client.get("/metrics")).text
    assert 'baton_pool_desired_workers{pool="decode",role="decode"} 2.0' in page
    assert 'baton_worker_replacements_total{cause="fenced",pool="decode"} 0.0' in page


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/nothing", 404), ("POST", "/v1/pools", 405), ("GET", "/docs", 404)],
)
async def test_what_is_not_there_is_refused_in_the_same_shape(
    client: httpx.AsyncClient, method: str, path: str, status: int
) -> None:
    answer = await client.request(method, path, headers=HEADERS)
    assert answer.status_code == status
    assert path in error_of(answer)["message"]


async def test_controller_that_waits_says_why_and_touches_nothing(rig: ControllerRig) -> None:
    seat = Seat(reason="not controlling: another controller has the pools: host, pid 7")
    async with client_of(rig, seat) as client:
        for method, path in (("GET", "/ready"), ("GET", "/v1/pools"), ("PUT", "/v1/pools")):
            answer = await client.request(method, path, json={"decode": 3}, headers=HEADERS)
            assert answer.status_code == 503
            assert "another controller" in error_of(answer)["message"]
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/metrics")).status_code == 200


async def test_fault_of_ours_is_a_500_without_details(
    client: httpx.AsyncClient, rig: ControllerRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rig.controller, "pools", lambda: 1 / 0)
    answer = await client.get("/v1/pools", headers=HEADERS)
    assert answer.status_code == 500
    assert "division" not in answer.text
    assert error_of(answer)["code"] == "internal_error"
