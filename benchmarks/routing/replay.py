"""Replays a trace of chats against a real ``baton serve``, once for each routing policy.

First all chats are asked for without thinking, of one pair of workers with ample room:
this gives the answers that every later run has to give, token for token, and with them
the working set, from which the pools are sized. Then each policy serves the trace in its
own time with two prefill and two decode workers.

    python -m benchmarks.routing.replay --out routing.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import secrets
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from baton.config import RoutingConfig
from baton.errors import BatonError
from benchmarks import page
from benchmarks.measured import Measured, measured_now
from benchmarks.routing import oracle, replay_report, trace
from benchmarks.routing.report import percentile
from benchmarks.routing.results import PolicyResult, Results, Setting, faults
from benchmarks.routing.run import Run, run_trace
from benchmarks.routing.sizing import BLOCK_SIZE, NUM_WORKERS, kv_cache_bytes, worker_blocks
from benchmarks.server import BatonServer

POLICIES = ("kv_aware", "round_robin", "least_loaded", "random")
SECTION = "routing"
KEPT = page.KEPT / "routing.json"
_RESULTS = page.RESULTS / "routing.json"
_AMPLE_BYTES = 2 * 1024**3


def _serve_and_run(
    folder: Path,
    chats: Sequence[trace.Chat],
    *,
    num_workers: int,
    num_bytes: int,
    routing: dict[str, Any],
    time_scale: float,
) -> Run:
    secret = secrets.token_hex(16)
    settings = {
        "engine": {
            "dtype": "float32",
            "block_size": BLOCK_SIZE,
            "kv_cache_bytes": num_bytes,
        },
        "routing": routing,
    }
    arguments = ("--prefill", str(num_workers), "--decode", str(num_workers))
    environment = {"BATON_SECRET": secret}
    with BatonServer(
        folder, settings=settings, arguments=arguments, environment=environment
    ) as server:
        return asyncio.run(run_trace(server.url, chats, secret=secret, time_scale=time_scale))


def _result(
    policy: str, local: int, run: Run, reference: Run, *, worker_blocks: int
) -> PolicyResult:
    ttft_ms = [each.ttft_s * 1000 for each in run.answered]
    asked = [each.asked for each in run.answered]
    best = oracle.infinite_cache(asked, BLOCK_SIZE)
    bound = oracle.optimal_replacement(asked, BLOCK_SIZE, NUM_WORKERS * worker_blocks)
    return PolicyResult(
        policy=policy,
        local_prefill_max_tokens=local,
        num_cached=run.num_cached,
        num_not_computed=run.num_not_computed,
        ratio=run.num_cached / best if best else 1.0,
        optimal_ratio=bound / best if best else 1.0,
        ttft_p50_ms=round(percentile(ttft_ms, 0.5), 1),
        ttft_p90_ms=round(percentile(ttft_ms, 0.9), 1),
        handoff_mib=round(run.num_handoff_bytes / 2**20, 1),
        duration_s=round(run.duration_s, 1),
        by_worker=run.input_tokens,
        num_preemptions=run.num_preemptions,
        same_answers=run.answers == reference.answers,
        index_is_true=run.index_is_true,
    )


def _plans(policies: Sequence[str], local: int) -> list[tuple[str, int]]:
    """Policies, and up to how many tokens of each prompt a decode worker prefills;
    ``kv_aware`` with and without."""
    plans: list[tuple[str, int]] = []
    for policy in policies:
        if policy == "kv_aware" and local:
            plans.append((policy, local))
        plans.append((policy, 0))
    return plans


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.routing.replay", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--trace", type=Path, default=trace.DEFAULT_TRACE)
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES))
    parser.add_argument(
        "--local-prefill-max-tokens",
        type=int,
        default=RoutingConfig().local_prefill_max_tokens,
        help="of kv_aware, which is run without as well (default: %(default)s, as Baton's is)",
    )
    parser.add_argument(
        "--share",
        type=float,
        default=0.6,
        help="of the working set that each pool's workers hold together (default: 0.6)",
    )
    parser.add_argument("--time-scale", type=float, default=1.0, help="stretches think times")
    parser.add_argument("--users", type=int, default=1000, help="at most so many, from the first")
    parser.add_argument("--turns", type=int, default=1000, help="at most so many of each user")
    parser.add_argument("--out", type=Path, default=_RESULTS, metavar="FILE", help="of the figures")
    parser.add_argument(
        "--report", action="store_true", help="write docs/performance.md from those figures"
    )
    parser.add_argument("--record", type=Path, help="write prompts and answers as token ids")
    return parser


def _record(path: Path, run: Run) -> None:
    lines = (
        {"user": e.user, "turn": e.turn, "prompt": e.prompt, "answer": e.answer}
        for e in run.answered
    )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _measure(given: argparse.Namespace, measured: Measured, folder: Path) -> Results:
    chats = trace.shortened(trace.load(given.trace), num_users=given.users, num_turns=given.turns)
    reference = _serve_and_run(
        folder / "reference",
        chats,
        num_workers=1,
        num_bytes=_AMPLE_BYTES,
        routing={"policy": "kv_aware"},
        time_scale=0.0,
    )
    if given.record:
        _record(given.record, reference)
    asked = [each.asked for each in reference.answered]
    setting = Setting(
        num_users=len(chats),
        num_requests=len(asked),
        num_distinct_blocks=oracle.working_set(asked, BLOCK_SIZE),
        block_size=BLOCK_SIZE,
        num_workers=NUM_WORKERS,
        worker_blocks=worker_blocks(asked, given.share),
    )
    print(replay_report.sizes(setting), flush=True)
    results: list[PolicyResult] = []
    for number, (policy, local) in enumerate(
        _plans(given.policies, given.local_prefill_max_tokens)
    ):
        run = _serve_and_run(
            folder / str(number),
            chats,
            num_workers=NUM_WORKERS,
            num_bytes=kv_cache_bytes(setting.worker_blocks),
            routing={"policy": policy, "local_prefill_max_tokens": local},
            time_scale=given.time_scale,
        )
        result = _result(policy, local, run, reference, worker_blocks=setting.worker_blocks)
        results.append(result)
        print(
            f"{result.label}: {result.ratio:.3f} of the oracle's cached tokens in "
            f"{result.duration_s:.0f} s; {result.remarks}",
            flush=True,
        )
    return Results(measured, setting, tuple(results))


def section(kept: Path = KEPT) -> str:
    """Of docs/performance.md. Raises OSError or ValueError."""
    return replay_report.section(Results.read(kept))


def _publish(path: Path) -> None:
    module = "benchmarks.routing.replay"
    page.publish(Results, path, module=module, kept=KEPT, name=SECTION, section=section)


def main() -> None:
    """Exit status: 0 all is well, 1 with a sentence for each thing that is not."""
    given = _parser().parse_args()
    if given.report:
        _publish(given.out)
        return
    measured = measured_now(
        shlex.join(["python", "-m", "benchmarks.routing.replay", *sys.argv[1:]])
    )
    with tempfile.TemporaryDirectory(prefix="baton-routing-") as name:
        results = _measure(given, measured, Path(name))
    results.write(given.out)
    print(f"\n{replay_report.policies(results)}\nwritten: {given.out}")
    if sentences := faults(results):
        sys.exit("\n".join(sentences))


if __name__ == "__main__":
    try:
        main()
    except BatonError as error:
        sys.exit(error.message)
    except (OSError, ValueError) as error:
        sys.exit(f"replay: {error}")
