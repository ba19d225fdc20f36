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
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from baton.errors import BatonError
from benchmarks.routing import oracle, trace
from benchmarks.routing.report import Row, percentile, table
from benchmarks.routing.run import Run, run_trace
from benchmarks.routing.sizing import BLOCK_SIZE, NUM_WORKERS, kv_cache_bytes, worker_blocks
from benchmarks.server import BatonServer

POLICIES = ("kv_aware", "round_robin", "least_loaded", "random")
_AMPLE_BYTES = 2 * 1024**3
GOAL = 0.9


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


def _row(label: str, run: Run, reference: Run) -> Row:
    ttft_ms = [each.ttft_s * 1000 for each in run.answered]
    remarks = [
        "same answers" if run.answers == reference.answers else "ANSWERS DIFFER",
        "index true" if run.index_is_true else "INDEX WRONG",
    ]
    if run.num_cached != run.num_not_computed:
        remarks.append(f"workers say {run.num_not_computed:,} cached")
    if run.num_preemptions:
        remarks.append(f"{run.num_preemptions} preemptions")
    return Row(
        policy=label,
        num_cached=run.num_cached,
        oracle=oracle.infinite_cache([each.asked for each in run.answered], BLOCK_SIZE),
        ttft_p50_ms=percentile(ttft_ms, 0.5),
        ttft_p90_ms=percentile(ttft_ms, 0.9),
        handoff=f"{run.num_handoff_bytes / 2**20:,.0f} MiB",
        by_worker=run.input_tokens,
        remarks=", ".join(remarks),
    )


def _plans(policies: Sequence[str], local: int) -> list[tuple[str, dict[str, Any]]]:
    """Labels and settings; ``kv_aware`` with and without local prefill."""
    plans: list[tuple[str, dict[str, Any]]] = []
    for policy in policies:
        if policy == "kv_aware" and local:
            settings = {"policy": policy, "local_prefill_max_tokens": local}
            plans.append((f"{policy}, up to {local} locally", settings))
        plans.append((policy, {"policy": policy, "local_prefill_max_tokens": 0}))
    return plans


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.routing.replay", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--trace", type=Path, default=trace.DEFAULT_TRACE)
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES))
    parser.add_argument(
        *("--local-prefill-max-tokens",),
        type=int,
        default=256,
        help="of a further run of kv_aware; 0: none (default: 256)",
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
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--record", type=Path, help="write prompts and answers as token ids")
    return parser


def _record(path: Path, run: Run) -> None:
    lines = (
        {"user": e.user, "turn": e.turn, "prompt": e.prompt, "answer": e.answer}
        for e in run.answered
    )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def main() -> None:
    given = _parser().parse_args()
    chats = trace.shortened(trace.load(given.trace), num_users=given.users, num_turns=given.turns)
    with tempfile.TemporaryDirectory(prefix="baton-routing-") as name:
        folder = Path(name)
        reference = _serve_and_run(
            folder / "reference",
            chats,
            num_workers=1,
            num_bytes=_AMPLE_BYTES,
            routing={"policy": "kv_aware"},
            time_scale=0.0,
        )
        asked = [each.asked for each in reference.answered]
        num_blocks = worker_blocks(asked, given.share)
        if given.record:
            _record(given.record, reference)
        print(
            f"{len(asked)} requests of {len(chats)} users fill "
            f"{oracle.working_set(asked, BLOCK_SIZE)} blocks; each of {NUM_WORKERS} prefill and "
            f"{NUM_WORKERS} decode workers has {num_blocks}",
            flush=True,
        )
        rows: list[Row] = []
        for number, (label, routing) in enumerate(
            _plans(given.policies, given.local_prefill_max_tokens)
        ):
            run = _serve_and_run(
                folder / str(number),
                chats,
                num_workers=NUM_WORKERS,
                num_bytes=kv_cache_bytes(num_blocks),
                routing=routing,
                time_scale=given.time_scale,
            )
            rows.append(_row(label, run, reference))
            asked = [each.asked for each in run.answered]
            best = oracle.optimal_replacement(asked, BLOCK_SIZE, NUM_WORKERS * num_blocks)
            print(
                f"{label}: {rows[-1].ratio:.3f} of the oracle's cached tokens in "
                f"{run.duration_s:.0f} s; {rows[-1].remarks}. One pool with optimal replacement: "
                f"at most {best / rows[-1].oracle:.3f}",
                flush=True,
            )
    print("\n" + table(rows, by_worker="input tokens by worker"))
    if given.out:
        given.out.write_text(json.dumps([row.as_json() for row in rows], indent=2) + "\n")
    wrong = [row.policy for row in rows if row.remarks != row.remarks.lower()]
    short = [row.policy for row in rows if row.policy.startswith("kv_aware") and row.ratio < GOAL]
    if short:
        print(f"below {GOAL} of the oracle: {'; '.join(short)}")
    if wrong:
        sys.exit(f"answers or the index are wrong: {'; '.join(wrong)}")


if __name__ == "__main__":
    try:
        main()
    except BatonError as error:
        sys.exit(error.message)
