"""Runs the sweep: every system at every rate, round by round, one server at a time.

In a round each system is started afresh, warmed up and given the round's plan: the same
requests at the same moments for all. The order of the systems turns from round to round,
so that none is always first. A process of locust (open_loop.py) sends the load.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baton.errors import UnavailableError
from benchmarks.arrivals import Load, Plan, make_plan
from benchmarks.goodput_results import Run, System, run_from_json
from benchmarks.server import BatonServer

START_S = 12.0
"""Of a server and of locust, with warm-up and stop: for the estimate of a round."""
_LOCUST_EXTRA_S = 120.0
_ROOT = Path(__file__).resolve().parent.parent
_MIB = 1024 * 1024

SYSTEMS = (
    System(
        "disaggregated", "1 prefill + 1 decode", ("--prefill", "1", "--decode", "1"), 512 * _MIB
    ),
    System("colocated-2", "2 colocated", ("--prefill", "0", "--decode", "2"), 512 * _MIB),
    System(
        "colocated-2-128",
        "2 colocated, chunks of 128",
        ("--prefill", "0", "--decode", "2"),
        512 * _MIB,
        max_num_batched_tokens=128,
    ),
    System("colocated-1", "1 colocated", ("--prefill", "0", "--decode", "1"), 1024 * _MIB),
)
"""All with the same memory for KV; workers share the machine's cores out evenly.
Small chunks are what colocated serving has against long pauses: without them it would be
beaten too easily."""


@dataclass(frozen=True, slots=True)
class Sweep:
    """What is to be run. ``budget_s`` bounds it: no round begins that might not fit."""

    systems: tuple[System, ...]
    load: Load
    rates: tuple[float, ...]
    num_requests: int
    """Of a system at a rate in a round."""
    num_rounds: int
    seed: int
    budget_s: float
    model: str

    @property
    def longest_round_s(self) -> float:
        """If every phase had a request that is given up only at its bound."""
        phases_s = (self.num_requests / rate + self.load.bound_s + 1.0 for rate in self.rates)
        return len(self.systems) * (sum(phases_s) + START_S)

    def plan(self, round_: int) -> Plan:
        return make_plan(
            f"{self.seed}/{round_}",
            self.load,
            rates=list(self.rates),
            num_requests=self.num_requests,
        )


def run_sweep(sweep: Sweep, say: Callable[[str], None]) -> tuple[int, list[Run]]:
    """Whole rounds, at least one, and their runs. Raises UnavailableError."""
    began = time.monotonic()
    longest_s = 0.0
    runs: list[Run] = []
    with tempfile.TemporaryDirectory(prefix="baton-goodput-") as name:
        for round_ in range(sweep.num_rounds):
            round_began = time.monotonic()
            if round_ and round_began - began + longest_s > sweep.budget_s:
                say(f"{round_} of {sweep.num_rounds} rounds: another might not fit the budget")
                return round_, runs
            runs += _round(sweep, round_, Path(name), say)
            longest_s = max(longest_s, time.monotonic() - round_began)
    return sweep.num_rounds, runs


def _round(sweep: Sweep, round_: int, folder: Path, say: Callable[[str], None]) -> list[Run]:
    turn = round_ % len(sweep.systems)
    runs: list[Run] = []
    for system in (*sweep.systems[turn:], *sweep.systems[:turn]):
        own = folder / f"{round_}-{system.name}"
        began = time.monotonic()
        arguments = (*system.arguments, "--model", sweep.model)
        with BatonServer(own, settings=system.settings, arguments=arguments) as server:
            for phase in _drive(server, sweep.plan(round_), own):
                runs.append(run_from_json({**phase, "system": system.name, "round": round_}))
        say(f"round {round_ + 1}: {system.name} in {time.monotonic() - began:.0f} s")
    return runs


def _drive(server: BatonServer, plan: Plan, folder: Path) -> list[dict[str, Any]]:
    """What locust found out, phase by phase. Raises UnavailableError."""
    plan_file, records, log = folder / "plan.json", folder / "records.json", folder / "locust.log"
    plan.write(plan_file)
    command = [
        *(sys.executable, "-m", "locust", "-f", str(_ROOT / "benchmarks" / "open_loop.py")),
        *("--headless", "--users", "1", "--only-summary", "--host", server.url),
        *("--plan", str(plan_file), "--records", str(records)),
    ]
    limit_s = sum(p.window_s + plan.load.bound_s + 1.0 for p in plan.phases) + _LOCUST_EXTRA_S
    with log.open("wb") as output:
        try:  # its status tells of failed requests too, which are in the records
            subprocess.run(
                command,
                cwd=_ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=limit_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise UnavailableError(f"locust did not end:\n{log.read_text()}") from None
    if not records.exists():
        raise UnavailableError(f"locust has no records:\n{log.read_text()}")
    phases: list[dict[str, Any]] = json.loads(records.read_text())["phases"]
    return phases
