"""What a replay is judged by, and its section of the page."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.measured import Measured
from benchmarks.routing import replay, replay_report
from benchmarks.routing.results import PolicyResult, Results, Setting, faults

MEASURED = Measured("2030-01-01 00:00 UTC", "cmd", "abc1234", "A CPU", 2, 0, "3.11.7", 0.1)


def result(policy: str, local: int, num_cached: int, **more: Any) -> PolicyResult:
    return PolicyResult(
        policy=policy,
        local_prefill_max_tokens=local,
        num_cached=num_cached,
        num_not_computed=num_cached,
        ratio=num_cached / 1000,
        optimal_ratio=0.99,
        ttft_p50_ms=100.0,
        ttft_p90_ms=200.0,
        handoff_mib=12.3,
        duration_s=60.0,
        by_worker={"prefill-0": 10},
        num_preemptions=0,
        same_answers=True,
        index_is_true=True,
        **more,
    )


GOOD = Results(
    MEASURED,
    Setting(20, 200, 800, 16, 2, 240),
    (
        result("kv_aware", 128, 940),
        result("kv_aware", 0, 870),
        result("round_robin", 0, 560),
        result("random", 0, 550),
    ),
)


def with_first(**changes: Any) -> Results:
    first, *rest = GOOD.policies
    return replace(GOOD, policies=(replace(first, **changes), *rest))


def test_nothing_is_wrong_with_a_run_that_keeps_its_promises() -> None:
    assert faults(GOOD) == []
    assert faults(with_first(ratio=0.9)) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ratio": 0.899}, "kv_aware, up to 128 locally has 0.899 of the oracle's tokens"),
        ({"same_answers": False}, "kv_aware, up to 128 locally gave other answers"),
        ({"index_is_true": False}, "the KV index is not what the workers hold"),
    ],
)
def test_what_is_wrong_is_said(changes: dict[str, Any], words: str) -> None:
    (sentence,) = faults(with_first(**changes))
    assert words in sentence
    assert sentence in replay_report.section(with_first(**changes))


@pytest.mark.parametrize("field", ["same_answers", "index_is_true"])
def test_every_policy_has_to_answer_alike_and_to_keep_the_index_true(field: str) -> None:
    last = replace(GOOD.policies[-1], **{field: False})
    (sentence,) = faults(replace(GOOD, policies=(*GOOD.policies[:-1], last)))
    assert "random" in sentence


def test_the_command_fails_with_the_sentence_and_keeps_the_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, out = with_first(ratio=0.899), tmp_path / "routing.json"
    monkeypatch.setattr("sys.argv", ["replay", "--out", str(out)])
    monkeypatch.setattr(replay, "_measure", lambda *_: bad)
    with pytest.raises(SystemExit) as ended:
        replay.main()
    assert "0.899" in str(ended.value.code)  # a sentence: exit status 1
    assert Results.read(out) == bad
    monkeypatch.setattr(replay, "_measure", lambda *_: GOOD)
    replay.main()
    assert Results.read(out) == GOOD


def test_the_section_says_what_the_figures_say() -> None:
    text = replay_report.section(GOOD)
    assert "2 cores of A CPU, no GPU" in text
    assert "each pool holds 60% of them" in text
    assert "*kv_aware, up to 128 locally* had 0.940 of the oracle's tokens (the goal of 0.9" in text
    assert "*kv_aware, nothing locally* had 0.870 of the oracle's tokens." in text
    assert "The others had 0.550 to 0.560." in text
    assert "Every answer was the same" in text
    assert "is missed" in replay_report.section(with_first(ratio=0.899))
    assert "Every answer" not in replay_report.section(with_first(same_answers=False))


def test_another_programs_file_is_no_result(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text('{"measured": {}}')
    with pytest.raises(ValueError, match="no results of this version"):
        Results.read(tmp_path / "r.json")
