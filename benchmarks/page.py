"""docs/performance.md: each of its sections is written between two marks, from results that
are kept beside the page."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

_ROOT = Path(__file__).resolve().parent.parent
PAGE = _ROOT / "docs" / "performance.md"
KEPT = _ROOT / "docs" / "benchmarks"
"""The results that the page shows, and its pictures."""
RESULTS = _ROOT / "benchmarks" / "results"
"""What the last run of each benchmark has found out; not in the repository."""

NO_RESULTS = "No results are kept here yet."


def expect_results(path: Path, module: str) -> None:
    """Raises FileNotFoundError where ``path`` is not there yet, naming what writes it."""
    if not path.exists():
        raise FileNotFoundError(f"there are no results at {path}; run `python -m {module}` first")


def section_of(name: str, page: Path = PAGE) -> str:
    """What is between the marks of ``name``. Raises ValueError for a page without them."""
    return _parts(name, page)[1]


def into_page(name: str, text: str, page: Path = PAGE) -> None:
    """Puts ``text`` between the marks of ``name``. Raises OSError, or ValueError for a page
    without them."""
    before, _, after = _parts(name, page)
    page.write_text(f"{before}{text.strip()}{after}")


def _parts(name: str, page: Path) -> tuple[str, str, str]:
    begin, end = f"<!-- {name} -->\n\n", f"\n\n<!-- end of {name} -->"
    before, begun, rest = page.read_text().partition(begin)
    text, ended, after = rest.partition(end)
    if not (begun and ended):
        raise ValueError(f"{page} lacks the lines {begin.strip()} and {end.strip()}")
    return before + begin, text, end + after


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """A line for each entry of the object, and for each element of its lists."""
    entries = ",\n".join(f"{json.dumps(key)}: {_value(value)}" for key, value in data.items())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + entries + "\n}\n")


def read_json(path: Path, make: Callable[[dict[str, Any]], T]) -> T:
    """What ``make`` makes of the object in the file. Raises OSError, or ValueError for a file
    that is none of ours."""
    data = json.loads(path.read_text())
    try:
        return make(data)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no results of this version: {error}") from None


def _value(value: Any) -> str:
    if isinstance(value, list | tuple) and value and isinstance(value[0], dict):
        return "[\n " + ",\n ".join(map(json.dumps, value)) + "\n]"
    return json.dumps(value)
