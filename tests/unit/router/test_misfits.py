"""Workers that get no requests because they are unlike the others are named, with what differs."""

from __future__ import annotations

import logging
from typing import Any, get_args

import pytest

from baton.protocol import PROTOCOL_VERSION
from baton.records import Role, WorkerRecord
from router.routing.misfits import strangers, without_partner
from router.routing.pairing import pairings
from router.workers.session import WorkerSession
from tests.support.fake_cluster import fake_cluster, wait_until
from tests.support.fake_worker import worker_record
from tests.support.routing import Workers

OTHER = b"\x02" * 16


def _added(
    workers: Workers, role: Role, worker_id: str, *, kv_dtype: str = "float32", **facts: object
) -> WorkerSession:
    session = workers.add(role)
    session.record = session.record.model_copy(update={"worker_id": worker_id, **facts})
    session.kv_dtype = kv_dtype
    return session


@pytest.mark.parametrize(
    ("differing", "said"),
    [
        (
            {"block_size": 32},
            "prefill-0 (block size 16), decode-0 and decode-1 (block size 32)",
        ),
        (
            {"kv_dtype": "bfloat16"},
            "prefill-0 (dtype float32), decode-0 and decode-1 (dtype bfloat16)",
        ),
        (
            {"generation": "b"},
            "prefill-0 (generation '0'), decode-0 and decode-1 (generation 'b')",
        ),
        ({}, "prefill-0 (digest one), decode-0 and decode-1 (digest other)"),
    ],
)
def test_pools_that_cannot_pair_are_named_with_what_differs(
    differing: dict[str, Any], said: str
) -> None:
    workers = Workers()
    prefill = [_added(workers, "prefill", "prefill-0")]
    decode = [
        _added(workers, "decode", name, digest="other", **differing)
        for name in ("decode-1", "decode-0")
    ]
    assert all(pairing.prefill is None for pairing in pairings(prefill, decode))
    sentence = without_partner(prefill, decode)
    assert sentence == f"No worker of the other role can be paired with {said}."


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_one_worker_without_partners_is_told_from_those_that_pair(role: Role) -> None:
    workers = Workers()
    pools = {name: [_added(workers, name, f"{name}-0")] for name in get_args(Role)}
    pools[role].append(_added(workers, role, "odd", digest="other", kv_dtype="bfloat16"))
    assert without_partner(pools["prefill"], pools["decode"]) == (
        "No worker of the other role can be paired with odd (dtype bfloat16); those that are "
        "paired: prefill-0 and decode-0 (dtype float32)."
    )


def test_digest_is_told_where_all_else_would_say_that_they_fit() -> None:
    workers = Workers()
    prefill = [_added(workers, "prefill", "prefill-0", digest="aaaa")]
    decode = [
        _added(workers, "decode", "decode-0", digest="bbbb"),
        _added(workers, "decode", "decode-1", digest="cccc", block_size=32),
    ]
    sentence = without_partner(prefill, decode)
    assert sentence is not None
    assert "prefill-0 (block size 16, digest aaaa)" in sentence
    assert "decode-0 (block size 16, digest bbbb)" in sentence


def test_workers_that_pair_or_are_of_one_role_alone_are_no_fault() -> None:
    workers = Workers()
    prefill, decode = workers.several("prefill", 2), workers.several("decode", 2)
    odd = workers.add("decode", digest="other")
    assert without_partner(prefill, decode) is None
    assert without_partner([], [*decode, odd]) is None
    assert without_partner(prefill, []) is None
    assert without_partner([], []) is None


def _record(worker_id: str, **changes: object) -> WorkerRecord:
    return worker_record(worker_id, "prefill", b"\x00" * 16).model_copy(update=changes)


def test_workers_of_another_protocol_or_generation_are_strangers() -> None:
    alike = _record("prefill-0")
    assert strangers([alike], "0") is None
    said = strangers(
        [
            alike,
            _record("prefill-1", generation="b"),
            _record("prefill-2", protocol_version=PROTOCOL_VERSION + 1, generation="b"),
        ],
        "0",
    )
    assert said == (
        "prefill-1 (generation 'b', this gateway's is '0'), prefill-2 "
        f"(protocol {PROTOCOL_VERSION + 1}, this gateway's is {PROTOCOL_VERSION})"
    )


async def test_misfits_degrade_and_are_logged_once_per_change(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING, "router.workers.pool")

    def warnings() -> list[str]:
        return [r.getMessage() for r in caplog.records if r.name == "router.workers.pool"]

    async with fake_cluster() as cluster:
        odd = await cluster.add("prefill-0", "prefill", digest=OTHER)
        assert (warnings(), cluster.orchestrator.status().degraded) == ([], ())
        await cluster.add("decode-0", "decode")
        status = cluster.orchestrator.status()
        assert status.ready
        (sentence,) = status.degraded
        assert "prefill-0 (digest 02020202)" in sentence
        assert "decode-0 (digest 01010101)" in sentence
        for _ in range(3):
            cluster.pool.update({link.record.worker_id: link.record for link in cluster.pool.links})
        assert warnings() == [sentence]
        await cluster.add("prefill-1", "prefill")
        (other,) = cluster.orchestrator.status().degraded
        assert "paired with prefill-0" in other
        assert warnings() == [sentence, other]
        await odd.stop()
        await wait_until(lambda: cluster.orchestrator.status().degraded == ())
        assert warnings() == [sentence, other]


async def test_prefill_workers_of_another_generation_are_named_as_not_ready() -> None:
    async with fake_cluster() as cluster:
        await cluster.add("decode-0", "decode")
        (live,) = cluster.pool.links
        cluster.pool.update(
            {"decode-0": live.record, "prefill-0": _record("prefill-0", generation="b")}
        )
        assert cluster.orchestrator.status().degraded == (
            "No prefill worker is ready: prefill-0 (generation 'b', this gateway's is '0').",
        )
