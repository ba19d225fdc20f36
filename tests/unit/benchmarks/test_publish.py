"""``--report`` of every benchmark, where nothing has been measured yet."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from benchmarks import goodput, local_prefill, prefix_cache
from benchmarks.handoff import run as handoff
from benchmarks.interference import compare as interference
from benchmarks.routing import replay


@pytest.mark.parametrize(
    "module", [goodput, local_prefill, prefix_cache, replay, handoff, interference]
)
def test_report_without_results_names_the_command_that_makes_them(
    module: ModuleType, tmp_path: Path
) -> None:
    absent = tmp_path / "absent.json"
    with pytest.raises(FileNotFoundError) as refused:
        module._publish(absent)
    assert str(refused.value) == (
        f"there are no results at {absent}; run `python -m {module.__name__}` first"
    )
