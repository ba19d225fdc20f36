"""locust with our files against a server that knows what it did: the numbers must agree."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from support.openai_standin import NUM_TOKENS, OpenAIStandin
from support.server import wait_until

from benchmarks.arrivals import Load, make_plan

NUM = 60
"""Requests of a run."""
ROOT = Path(__file__).parents[2]
FAILURES = {
    "cut": "cut: peer closed connection",
    "short": "cut: the stream ended without finish_reason",
    "error": "error event: worker_lost: gone",
    "refuse": "status: 429 overloaded: full",
}


def locust_command(file: str, *arguments: str) -> list[str]:
    return [
        *(sys.executable, "-m", "locust", "-f", str(ROOT / "benchmarks" / file)),
        *("--headless", "--only-summary", *arguments),
    ]


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def chat_users_command(server: OpenAIStandin, report: Path, *more: str) -> list[str]:
    return locust_command(
        "locustfile.py",
        *("--host", server.url, "--users", "4", "--spawn-rate", "20", "--requests", str(NUM)),
        *("--run-time", "90s", "--think-time", "0.02", "--document-tokens", "300"),
        *("--report-json", str(report), *more),
    )


def chat_users(server: OpenAIStandin, report: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return run(chat_users_command(server, report, *more))


def run_locust(file: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run(locust_command(file, *arguments))


def locusts_own_counts(output: str) -> dict[str, tuple[int, int]]:
    """Request type → requests and failures of all names, from locust's final table."""
    table = output.partition("Response time percentiles")[0]
    counts: dict[str, tuple[int, int]] = {}
    for kind, num, failed in re.findall(r"^([A-Z0-9]+) +\S+ +(\d+) +(\d+)\(", table, re.MULTILINE):
        old = counts.get(kind, (0, 0))
        counts[kind] = (old[0] + int(num), old[1] + int(failed))
    return counts


def test_the_report_says_what_the_server_did(tmp_path: Path) -> None:
    with OpenAIStandin(lambda number, _: "whole") as server:
        ended = chat_users(server, tmp_path / "r.json")
    assert ended.returncode == 0, ended.stderr
    report: dict[str, Any] = json.loads((tmp_path / "r.json").read_text())
    figures = report["figures"]
    assert len(server.bodies) == server.done["whole"] == NUM
    assert (figures["num_requests"], figures["num_whole"], report["num_cut"]) == (NUM, NUM, 0)
    assert figures["num_tokens"] == NUM * NUM_TOKENS
    assert figures["counted_by"] == ["usage"]
    prompts = sum(record["num_prompt_tokens"] for record in report["records"])
    assert prompts == sum(len(m["content"].split()) for b in server.bodies for m in b["messages"])
    assert locusts_own_counts(ended.stderr) == {
        "E2E": (NUM, 0),
        "TTFT": (NUM, 0),
        "TPOT": (NUM, 0),
        "ITL": (NUM * (NUM_TOKENS - 1), 0),
    }
    assert f"of {NUM}: TTFT within" in ended.stdout


def test_turns_grow_a_history_and_documents_are_long_and_each_another(tmp_path: Path) -> None:
    with OpenAIStandin(lambda number, _: "whole") as server:
        chat_users(server, tmp_path / "r.json", "--turns", "3")
    kinds = Counter(r["kind"] for r in json.loads((tmp_path / "r.json").read_text())["records"])
    assert set(kinds) == {"chat", "document", "follow-up"}
    assert {len(body["messages"]) for body in server.bodies} == {1, 3, 5}
    firsts = {body["messages"][0]["content"] for body in server.bodies}
    assert len(firsts) == kinds["chat"] + kinds["document"]
    assert sum(len(text.split()) > 200 for text in firsts) == kinds["document"]
    for body in server.bodies:
        roles = [message["role"] for message in body["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]


def test_what_is_not_answered_whole_is_a_failure_with_its_reason(tmp_path: Path) -> None:
    order = ["whole", *FAILURES]
    with OpenAIStandin(lambda number, _: order[number % len(order)]) as server:
        ended = chat_users(server, tmp_path / "r.json")
    assert ended.returncode == 1
    report = json.loads((tmp_path / "r.json").read_text())
    whole = server.done.pop("whole")
    assert report["figures"]["num_whole"] == whole
    assert report["figures"]["num_failed"] == sum(server.done.values())
    assert report["figures"]["num_good"] <= whole
    for behaviour, words in FAILURES.items():
        (found,) = [n for why, n in report["figures"]["failures"].items() if words in why]
        assert found == server.done[behaviour], behaviour
    failed = sum(server.done.values())
    assert locusts_own_counts(ended.stderr)["E2E"] == (whole + failed, failed)
    assert locusts_own_counts(ended.stderr)["TTFT"] == (whole, 0)


def test_a_stream_that_the_end_of_the_run_cuts_counts_nowhere(tmp_path: Path) -> None:
    with OpenAIStandin(lambda number, _: "stall") as server:
        running = subprocess.Popen(
            chat_users_command(server, tmp_path / "r.json"),
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            wait_until(lambda: len(server.bodies) == 4, timeout_s=50, what="all users have asked")
        finally:
            running.terminate()
            running.wait(30)
    report = json.loads((tmp_path / "r.json").read_text())
    assert (report["figures"]["num_requests"], report["num_cut"]) == (0, 4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--host", "http://127.0.0.1:1"), "cannot load http://127.0.0.1:1: connect"),
        ((), "no server is named; use --host URL"),
    ],
)
def test_without_a_server_the_run_ends_with_a_sentence(
    arguments: tuple[str, ...], words: str
) -> None:
    ended = run_locust("locustfile.py", "--users", "1", "--run-time", "20s", *arguments)
    assert ended.returncode == 1
    assert words in ended.stderr


def test_a_plan_is_replayed_to_the_moment_and_slow_requests_are_overdue(tmp_path: Path) -> None:
    load = Load(long_share=0.25, long_tokens=60, answer_tokens=NUM_TOKENS, bound_s=4.0)
    plan = make_plan("seed", load, rates=[8.0], num_requests=8)
    plan.write(tmp_path / "plan.json")
    arrivals = plan.phases[0].arrivals
    met = ["whole", "stall", "refuse", "cut"] * 2
    behaviours = {a.messages[0]["content"]: b for a, b in zip(arrivals, met, strict=True)}

    def behave(_: int, body: dict[str, Any]) -> str:
        return behaviours.get(body["messages"][0]["content"], "whole")

    with OpenAIStandin(behave) as server:
        ended = run_locust(
            "open_loop.py",
            *("--users", "1", "--host", server.url, "--plan", str(tmp_path / "plan.json")),
            *("--records", str(tmp_path / "records.json")),
        )
    assert (tmp_path / "records.json").exists(), ended.stderr
    (phase,) = json.loads((tmp_path / "records.json").read_text())["phases"]
    records = phase["records"]
    num_warm_up = len(plan.warm_up)
    assert [body["messages"] for body in server.bodies[:num_warm_up]] == plan.warm_up
    asked = [body["messages"][0]["content"] for body in server.bodies[num_warm_up:]]
    assert sorted(asked) == sorted(behaviours)
    assert [record["began_at_s"] for record in records] == pytest.approx(
        [arrival.at_s for arrival in arrivals], abs=1e-5
    )
    assert all(record["late_s"] >= 0 for record in records)
    assert [record["kind"] for record in records] == [arrival.kind for arrival in arrivals]
    assert [r["outcome"] for r in records] == ["whole", "overdue", "failed", "failed"] * 2
    assert [r["num_tokens"] for r in records] == [NUM_TOKENS, 1, 0, 2] * 2
    assert all(body["ignore_eos"] for body in server.bodies)


def test_a_plan_without_a_server_leaves_no_records(tmp_path: Path) -> None:
    load = Load(long_share=0.25, long_tokens=60, answer_tokens=4, bound_s=1.0)
    make_plan("seed", load, rates=[8.0], num_requests=8).write(tmp_path / "plan.json")
    ended = run_locust(
        "open_loop.py",
        *("--users", "1", "--host", "http://127.0.0.1:1", "--plan", str(tmp_path / "plan.json")),
        *("--records", str(tmp_path / "records.json")),
    )
    assert ended.returncode == 3
    assert "the load could not begin: connect" in ended.stderr
    assert not (tmp_path / "records.json").exists()
