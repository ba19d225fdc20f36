"""What every report begins with."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.measured import Measured, measured_now

MEASURED = Measured("2030-01-01 00:00 UTC", "cmd --x", "abc1234", "A CPU", 2, 0, "3.11.7", 0.1)


def test_the_sentence_names_date_revision_command_and_machine() -> None:
    assert MEASURED.sentence == (
        "Measured 2030-01-01 00:00 UTC at `abc1234` with `cmd --x` on 2 cores of A CPU, no GPU, "
        "Python 3.11.7."
    )
    assert "A CPU, 2 GPUs" in replace(MEASURED, gpus=2).sentence


@pytest.mark.parametrize(("load", "named"), [(1.7, True), (0.5, False), (None, False)])
def test_a_machine_that_was_not_quiet_is_named_so(load: float | None, named: bool) -> None:
    assert ("not quiet" in replace(MEASURED, load_average=load).sentence) is named


def test_this_machine_can_be_described() -> None:
    here = measured_now("cmd")
    assert here.processor
    assert here.cores >= 1
    assert here.begun_at.endswith(" UTC")
    assert here.load_average is not None
