"""Fault points of code that acts in two parts have a name in each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from baton.errors import InternalError
from baton.faults import Faults


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    return tmp_path / "faults.json"


def plans(path: Path, point: str) -> None:
    path.write_text(json.dumps({point: {"action": "fail"}}))


@pytest.mark.parametrize("point", ["copy", "attach", "release"])
async def test_a_pulls_points_are_not_those_of_a_handoff(plan: Path, point: str) -> None:
    handoff = Faults(plan, "prefill-0")
    pull = handoff.named("decode", "pull")
    plans(plan, f"pull.{point}")
    await handoff.wait(f"decode.{point}")
    with pytest.raises(InternalError, match=rf"pull\.{point}"):
        await pull.wait(f"decode.{point}")
    plans(plan, f"decode.{point}")
    pull.hit(f"decode.{point}")
    with pytest.raises(InternalError, match=rf"decode\.{point}"):
        handoff.hit(f"decode.{point}")


@pytest.mark.parametrize("point", ["offer", "commit", "released"])
def test_a_lends_points_are_not_those_of_a_handoff(plan: Path, point: str) -> None:
    plans(plan, f"lend.{point}")
    lend = Faults(plan, "decode-0").named("prefill", "lend")
    with pytest.raises(InternalError, match=rf"lend\.{point}"):
        lend.hit(f"prefill.{point}")
