"""Compares routing policies and weights on simulated workers: a table in seconds.

python -m benchmarks.routing.simulate                       the committed chats
python -m benchmarks.routing.simulate --hot --rate 4        strangers, one system prompt
python -m benchmarks.routing.simulate --trace FILE.jsonl    Mooncake's conversation trace
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baton.config import RoutingConfig
from benchmarks.routing import loads, oracle, trace
from benchmarks.routing.oracle import Asked
from benchmarks.routing.report import Row, percentile, table
from benchmarks.routing.sim_worker import ACCELERATOR, SMALL_CPU, Speeds
from benchmarks.routing.simulation import Pools, Served, Simulation, Turn
from benchmarks.routing.sizing import BLOCK_SIZE, worker_blocks
from router.routing.kv_aware import Weights


@dataclass(frozen=True, slots=True)
class Load:
    """Users, and how fast the workers are that serve them."""

    users: Sequence[Sequence[Turn]]
    speeds: Speeds
    token_scale: int = 1
    """Real tokens that a simulated one stands for."""

    @property
    def asked(self) -> list[Asked]:
        return [Asked(turn.prompt, turn.answer) for turns in self.users for turn in turns]


def _load(given: argparse.Namespace) -> Load:
    if given.hot:
        return Load(loads.hot_prompt(rate=given.rate), SMALL_CPU)
    if given.trace:
        users = loads.from_mooncake(given.trace, limit=given.limit)
        return Load(users, ACCELERATOR, loads.MOONCAKE_SCALE)
    chats = trace.load(trace.DEFAULT_TRACE)
    if given.recording:
        return Load(loads.from_recording(given.recording, chats), SMALL_CPU)
    return Load(loads.from_chats(chats), SMALL_CPU)


def _row(label: str, load: Load, served: Sequence[Served], num_preemptions: int) -> Row:
    ttft_ms = [each.ttft_s * 1000 for each in served]
    gaps_ms = [
        (after - before) * 1000 / load.token_scale
        for each in served
        for before, after in zip(each.token_times, each.token_times[1:], strict=False)
    ]
    workers = Counter(each.decode for each in served)
    workers.update(each.prefill for each in served if each.prefill is not None)
    num_local = sum(each.prefill is None for each in served)
    num_cached = sum(each.num_cached for each in served)
    return Row(
        policy=label,
        num_cached=num_cached * load.token_scale,
        ratio=num_cached / (_endless([each.asked for each in served]) or 1),
        ttft_p50_ms=percentile(ttft_ms, 0.5),
        ttft_p90_ms=percentile(ttft_ms, 0.9),
        handoff=f"{sum(each.num_moved for each in served) * load.token_scale:,} tokens",
        by_worker=workers,
        remarks=f"ITL p99 {percentile(gaps_ms, 0.99):.0f} ms, {num_local} local, "
        f"{num_preemptions} preemptions",
    )


def _endless(asked: Sequence[Asked]) -> int:
    return oracle.infinite_cache(asked, BLOCK_SIZE)


def _plans(given: argparse.Namespace) -> list[tuple[str, dict[str, Any]]]:
    weights = {
        "decode_block_weight": given.decode_block_weight,
        "transfer_weight": given.transfer_weight,
    }
    pulls = {"prefill_pulls": not given.no_pulls}
    weights = {name: value for name, value in weights.items() if value is not None}
    plans: list[tuple[str, dict[str, Any]]] = [
        (
            f"kv_aware, up to {most} locally",
            {"policy": "kv_aware", "local_prefill_max_tokens": most, **weights, **pulls},
        )
        for most in given.local_prefill_max_tokens
    ]
    if not given.only_kv_aware:
        others = ("round_robin", "least_loaded", "random")
        plans += [(name, {"policy": name, **pulls}) for name in others]
    return plans


def _parser() -> argparse.ArgumentParser:
    default = Weights()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.routing.simulate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--hot", action="store_true", help="strangers who share a system prompt")
    parser.add_argument("--rate", type=float, default=4.0, help="of those strangers, per second")
    parser.add_argument("--trace", type=Path, help="Mooncake's conversation trace, as JSON lines")
    parser.add_argument("--limit", type=int, default=2500, help="requests of that trace")
    parser.add_argument("--recording", type=Path, help="chats as `replay --record` wrote them")
    parser.add_argument("--share", type=float, help="of the working set in each pool")
    parser.add_argument("--local-prefill-max-tokens", type=int, nargs="+", default=[0, 128, 256])
    parser.add_argument("--decode-block-weight", type=float)
    parser.add_argument("--transfer-weight", type=float)
    parser.add_argument("--balance", type=float, default=default.balance)
    parser.add_argument("--disturbance", type=float, default=default.disturbance)
    parser.add_argument("--no-pulls", action="store_true", help="prefill fetches nothing")
    parser.add_argument("--only-kv-aware", action="store_true")
    return parser


def main() -> None:
    given = _parser().parse_args()
    load = _load(given)
    # Mooncake's requests come from far more users than ever wait for an answer at once.
    share = given.share if given.share is not None else (0.2 if given.trace else 0.6)
    num_blocks = worker_blocks(load.asked, share)
    weights = Weights(balance=given.balance, disturbance=given.disturbance)
    rows: list[Row] = []
    asked = load.asked
    for label, settings in _plans(given):
        simulation = Simulation(
            RoutingConfig.model_validate(settings),
            Pools(prefill_blocks=num_blocks, decode_blocks=num_blocks),
            speeds=load.speeds,
            weights=weights,
        )
        served = simulation.run(load.users)
        num_preemptions = sum(w.decode.num_preemptions for w in simulation.workers.values())
        rows.append(_row(label, load, served, num_preemptions))
        if label.startswith("kv_aware"):
            asked = [each.asked for each in served]
    best = oracle.optimal_replacement(asked, BLOCK_SIZE, 2 * num_blocks)
    print(
        f"{len(load.asked)} requests; {num_blocks} blocks a worker, {share:g} of the working set "
        f"in each pool. One pool of that size with optimal replacement has at most "
        f"{min(1.0, best / (_endless(asked) or 1)):.3f} of the oracle's tokens."
    )
    print("\n" + table(rows, by_worker="requests by worker"))


if __name__ == "__main__":
    main()
