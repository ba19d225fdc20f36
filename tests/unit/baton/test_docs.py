"""The documentation names only files that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=[str(p.relative_to(ROOT)) for p in PAGES])
def test_links_and_named_files_exist(page: Path) -> None:
    text = page.read_text()
    targets = [page.parent / target for target in re.findall(r"\]\((?!http)([^)#]+)", text)]
    assert [str(target) for target in targets if not target.exists()] == []
    named = re.findall(r"`((?:[a-z_0-9]+/)+[a-z_0-9]+\.(?:py|md|proto|toml))`", text)
    rooms = [ROOT, *(init.parent for init in ROOT.glob("*/__init__.py"))]
    assert [name for name in named if not any((room / name).exists() for room in rooms)] == []


def test_every_mutant_of_the_hand_offs_page_is_in_the_tests_of_its_invariant() -> None:
    text = (ROOT / "docs/handoff.md").read_text()
    lines = [line for line in text.splitlines() if re.match(r"\| \d \|", line)]
    assert [line[2] for line in lines] == list("123456789")
    for line in lines:
        files = re.findall(r"`(tests/\S+\.py)`", line)
        text = "".join((ROOT / file).read_text() for file in files)
        mutants = re.findall(r"`(\w+)`", line.rsplit("|", 2)[1])
        assert mutants
        assert [name for name in mutants if not re.search(rf"\b{name}\b", text)] == [], line
