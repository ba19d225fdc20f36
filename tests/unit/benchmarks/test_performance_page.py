"""docs/performance.md says what the results beside it say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import goodput, local_prefill, page, prefix_cache
from benchmarks.engine import compare, curves, quantized
from benchmarks.gpu import bench
from benchmarks.handoff import run as handoff
from benchmarks.interference import compare as interference
from benchmarks.routing import replay

SECTIONS = [
    (module.SECTION, module.KEPT, module.section)
    for module in (
        *(goodput, interference, replay, local_prefill, prefix_cache),
        *(compare, curves, quantized, handoff, bench),
    )
]
MOST_BYTES = 100 * 1024


@pytest.mark.parametrize(("name", "kept", "section"), SECTIONS, ids=[s[0] for s in SECTIONS])
def test_each_section_is_what_its_results_come_to(
    name: str, kept: Path, section: Callable[[], str]
) -> None:
    expected = section().strip() if kept.exists() else page.NO_RESULTS
    assert page.section_of(name) == expected, f"write it anew with --report, or restore {kept}"


def test_every_result_is_small_and_belongs_to_a_section() -> None:
    known = {goodput.PLOT, interference.PLOT, curves.PLOT, *(kept for _, kept, _ in SECTIONS)}
    found = set(page.KEPT.glob("*"))
    assert found <= known
    assert all(file.stat().st_size < MOST_BYTES for file in found)


def test_only_the_named_section_is_replaced(tmp_path: Path) -> None:
    file = tmp_path / "performance.md"
    file.write_text(
        "# Mine\n\n<!-- one -->\n\nold\n\n<!-- end of one -->\n\n"
        "<!-- two -->\n\nother\n\n<!-- end of two -->\n\n## More\n"
    )
    page.into_page("one", "first\n\nsecond\n", file)
    assert page.section_of("one", file) == "first\n\nsecond"
    assert file.read_text() == (
        "# Mine\n\n<!-- one -->\n\nfirst\n\nsecond\n\n<!-- end of one -->\n\n"
        "<!-- two -->\n\nother\n\n<!-- end of two -->\n\n## More\n"
    )


def test_a_page_without_marks_is_left_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "performance.md"
    file.write_text("# Mine\n")
    with pytest.raises(ValueError, match="lacks the lines <!-- one --> and <!-- end of one -->"):
        page.into_page("one", "text\n", file)
    assert file.read_text() == "# Mine\n"


def test_results_are_written_a_line_for_each_element(tmp_path: Path) -> None:
    data = {"name": "a", "empty": [], "numbers": [1, 2], "runs": [{"x": 1.5}, {"x": None}]}
    page.write_json(tmp_path / "sub" / "r.json", data)
    text = (tmp_path / "sub" / "r.json").read_text()
    assert json.loads(text) == data
    assert text.splitlines()[4:7] == ['"runs": [', ' {"x": 1.5},', ' {"x": null}']
