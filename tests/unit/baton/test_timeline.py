"""Where a choice's time went, by a clock in the test's hands."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest

from baton.timeline import MAX_ATTEMPTS, MAX_GAPS, Timeline


@dataclass(frozen=True)
class Pair:
    prefill: str | None
    decode: str
    cost: float


class Rig:
    """A choice that is admitted after 1 s and opened half a second later."""

    def __init__(self, prefill: str | None = "prefill-0") -> None:
        self.now = 100.0
        self.timeline = Timeline(lambda: self.now)
        self.timeline.submitted()
        self.now += 1.0
        self.timeline.admitted()
        self.now += 0.5
        self.open(prefill)

    def open(self, prefill: str | None = "prefill-0", cause: str = "first") -> None:
        pairs = [Pair(prefill, "decode-0", 12.34567)]
        self.timeline.opened(cause, prefill=prefill, decode="decode-0", candidates=pairs)

    def reserve(self, after_s: float) -> None:
        self.now += after_s
        self.timeline.reserved(self.now)

    def tokens(self, *arrivals: tuple[float, int]) -> None:
        """After so many seconds, so many tokens."""
        for after_s, num_tokens in arrivals:
            self.now += after_s
            self.timeline.arrived(num_tokens, self.now)

    def fail(self, after_s: float, code: str = "worker_lost") -> None:
        self.now += after_s
        self.timeline.failed(code)


def test_times_of_a_handoff_add_up() -> None:
    rig = Rig()
    rig.reserve(after_s=0.75)
    rig.tokens((1.25, 1), (0.5, 1), (0.1, 1), (0.2, 1), (0.3, 1))
    rig.timeline.pulled(96)
    report = rig.timeline.report()
    assert report["queue"] == 1000
    assert report["route"] == 500
    assert report["lost"] == 0
    assert report["room"] == 750
    assert report["prefill"] == 1250
    assert report["decode"] == 1100
    assert report["total"] == 4600
    assert report["handoff_exposed"] == pytest.approx(300)  # 500 less the median of 100, 200, 300
    (attempt,) = report["attempts"]
    assert attempt == {
        "cause": "first",
        "prefill": "prefill-0",
        "decode": "decode-0",
        "opened": 1500,
        "room": 750,
        "num_tokens": 5,
        "num_pulled_tokens": 96,
        "error": None,
        "candidates": [{"prefill": "prefill-0", "decode": "decode-0", "cost": 12.346}],
    }
    json.dumps(report, allow_nan=False)


def test_handoff_that_hides_behind_a_slow_decode_is_not_exposed() -> None:
    rig = Rig()
    rig.tokens((2.0, 1), (0.1, 1), (0.2, 1), (0.2, 1))
    assert rig.timeline.handoff_exposed_s == 0.0


@pytest.mark.parametrize(
    "arrivals", [[], [(1.0, 1)], [(1.0, 1), (0.1, 1)], [(1.0, 1), (0.1, 1), (0.1, 1)]]
)
def test_too_few_tokens_know_no_steady_gap(arrivals: list[tuple[float, int]]) -> None:
    rig = Rig()
    rig.tokens(*arrivals)
    assert rig.timeline.handoff_exposed_s is None
    assert rig.timeline.report()["handoff_exposed"] is None


def test_local_prefill_has_no_handoff() -> None:
    rig = Rig(prefill=None)
    rig.tokens((1.0, 1), (0.5, 1), (0.1, 1), (0.1, 1))
    assert rig.timeline.handoff_exposed_s is None


def test_tokens_that_come_together_share_their_gap() -> None:
    rig = Rig()
    rig.tokens((1.0, 1), (0.5, 3), (0.4, 4), (0.2, 2), (0.1, 1))
    assert rig.timeline.handoff_exposed_s == pytest.approx(0.4)
    rig = Rig()
    rig.tokens((1.0, 2), (0.1, 1), (0.1, 1))  # the second came with the first
    assert rig.timeline.handoff_exposed_s == 0.0


def test_attempt_that_gave_nothing_is_lost_time() -> None:
    rig = Rig()
    rig.fail(after_s=3.0)
    rig.now += 0.25
    rig.open(cause="worker_lost")
    rig.reserve(after_s=0.5)
    rig.tokens((1.5, 1), (0.5, 1), (0.1, 1), (0.1, 1))
    report = rig.timeline.report()
    assert (report["route"], report["lost"]) == (750, 3000)
    assert (report["room"], report["prefill"]) == (500, 1500)
    parts = ("queue", "route", "lost", "room", "prefill", "decode")
    assert sum(report[part] for part in parts) == pytest.approx(report["total"])
    assert report["handoff_exposed"] == pytest.approx(400)
    first, second = report["attempts"]
    assert (first["room"], second["room"]) == (None, 500)
    assert (first["error"], first["num_tokens"]) == ("worker_lost", 0)
    assert (second["cause"], second["num_tokens"], second["opened"]) == ("worker_lost", 4, 4750)


def test_gap_over_two_attempts_says_nothing_of_a_handoff() -> None:
    rig = Rig()
    rig.tokens((1.0, 1))
    rig.fail(after_s=1.0)
    rig.open(cause="worker_lost")
    rig.tokens((1.0, 1), (0.1, 1), (0.1, 1))
    report = rig.timeline.report()
    assert report["handoff_exposed"] is None
    assert (report["lost"], report["route"], report["decode"]) == (0, 500, 2200)
    assert [attempt["num_tokens"] for attempt in report["attempts"]] == [1, 3]


def test_what_has_not_happened_is_null() -> None:
    timeline = Timeline(lambda: 0.0)
    timeline.submitted()
    report = timeline.report()
    names = ("queue", "room", "prefill", "handoff_exposed", "decode", "total")
    assert [report[name] for name in names] == [None] * 6


def test_memory_is_bounded_for_endless_answers_and_refusals() -> None:
    rig = Rig()
    for _ in range(3 * MAX_ATTEMPTS):
        rig.fail(after_s=1.0, code="reservation_refused")
        rig.open(cause="reservation_refused")
    rig.tokens((1.0, 1), (0.5, 1), *[(0.25, 1)] * MAX_GAPS, *[(10.0, 1)] * 2 * MAX_GAPS)
    report = rig.timeline.report()
    assert len(report["attempts"]) == MAX_ATTEMPTS
    assert report["num_attempts_left_out"] == 2 * MAX_ATTEMPTS + 1
    assert report["attempts"][0]["cause"] == "first"
    assert report["attempts"][-1]["num_tokens"] == 2 + 3 * MAX_GAPS
    assert report["lost"] == 3 * MAX_ATTEMPTS * 1000
    assert report["handoff_exposed"] == pytest.approx(250)
