"""Writes the table of docs/models.md that says which architecture is tested in which way.

    .venv/bin/python scripts/models_page.py [--check]

Its cells are those that tests/integration/test_model_coverage.py runs. With --check the page
stays as it is: exit status 1 if it differs.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "models.md"
FIRST_HEAD = "| architecture | stored as |"


def _table() -> str:
    sys.path.insert(0, str(ROOT / "tests"))
    try:
        return "\n".join(importlib.import_module("support.model_coverage").table())
    finally:
        sys.path.pop(0)


def main() -> None:
    old, table = PAGE.read_text(), _table()
    before, found, rest = old.partition(FIRST_HEAD)
    if not found:
        sys.exit(f"{PAGE.name} has no table that begins with {FIRST_HEAD}")
    new = "\n\n".join([before.rstrip(), table, rest.partition("\n\n")[2]]).rstrip() + "\n"
    if sys.argv[1:] != ["--check"]:
        PAGE.write_text(new)
    elif new != old:
        sys.exit(f"{PAGE.name} is out of date; run scripts/models_page.py")


if __name__ == "__main__":
    main()
