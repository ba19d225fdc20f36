"""Fault points act where and when a plan says, and every one that is named is passed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from baton.errors import InternalError
from baton.faults import POINTS, Faults

ROOT = Path(__file__).parents[3]
ROOMS = ("router", "kv_transfer", "prefill_workers", "decode_workers")
OF_HANDOFF = {"pull": "decode", "lend": "prefill"}
"""What the code of a hand-off calls the points of a pull."""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "faults.json"


@pytest.fixture
def faults(file: Path) -> Faults:
    return Faults(file, "decode-0")


def plan(file: Path, **plan: Any) -> None:
    file.write_text(json.dumps({"decode.copy": {"action": "fail", **plan}}))


def acts(faults: Faults, times: int) -> list[int]:
    """Which of so many hits acted, from 1 on."""
    acted = []
    for number in range(1, times + 1):
        try:
            faults.hit("decode.copy")
        except InternalError:
            acted.append(number)
    return acted


@pytest.mark.parametrize("point", sorted(POINTS))
def test_every_point_is_in_the_code(point: str) -> None:
    room, _, name = point.partition(".")
    passed = f"{OF_HANDOFF.get(room, room)}.{name}"
    sources = [path for room in ROOMS for path in (ROOT / room).rglob("*.py")]
    assert [path for path in sources if f'"{passed}"' in path.read_text()], "nobody passes it"


def test_point_that_nobody_has_named_is_refused(faults: Faults) -> None:
    with pytest.raises(InternalError, match="no fault point is named"):
        faults.hit("decode.cpoy")


def test_nothing_happens_without_a_plan(file: Path, faults: Faults) -> None:
    assert acts(faults, 2) == []
    plan(file, worker="decode-1")
    assert acts(faults, 2) == []


def test_every_hit_acts_unless_one_is_named(file: Path, faults: Faults, tmp_path: Path) -> None:
    plan(file)
    assert acts(faults, 3) == [1, 2, 3]
    reached = tmp_path / "reached"
    plan(file, hit=3, reached=str(reached))
    assert acts(faults, 2) == []
    assert not reached.exists(), "hits before it are none"
    assert acts(faults, 4) == [1]
    assert reached.exists()


def test_another_plan_counts_its_hits_anew(file: Path, faults: Faults) -> None:
    plan(file, hit=2)
    assert acts(faults, 1) == []
    plan(file, hit=2, worker="decode-0")
    assert acts(faults, 3) == [2]


async def test_coroutines_pass_points_in_the_same_way(file: Path, faults: Faults) -> None:
    plan(file, hit=2)
    await faults.wait("decode.copy")
    with pytest.raises(InternalError, match=r"injected at decode\.copy"):
        await faults.wait("decode.copy")
    await faults.wait("decode.copy")
