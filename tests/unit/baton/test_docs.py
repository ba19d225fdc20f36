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
