"""docs/performance.md: each of its sections is written between two marks, from results that
are kept beside the page."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

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


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """The cells of a head and of the rows below it."""
    head, *rows = lines
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows))


def listed(names: Sequence[str]) -> str:
    """At least one, as a sentence has them."""
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def _parts(name: str, page: Path) -> tuple[str, str, str]:
    begin, end = f"<!-- {name} -->\n\n", f"\n\n<!-- end of {name} -->"
    before, begun, rest = page.read_text().partition(begin)
    text, ended, after = rest.partition(end)
    if not (begun and ended):
        raise ValueError(f"{page} lacks the lines {begin.strip()} and {end.strip()}")
    return before + begin, text, end + after


@dataclass(frozen=True, slots=True)
class KeptResults:
    """What a benchmark has found out, as it is kept in a file: a dataclass of JSON's types and
    of such dataclasses, which ``_from_json`` makes of the file's object."""

    def write(self, path: Path) -> None:
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises OSError, or ValueError for a file that is none of ours."""
        return read_json(path, cls._from_json)

    @classmethod
    def _from_json(cls, data: dict[str, Any]) -> Self:
        """May raise KeyError or TypeError for an object that is none of ours."""
        raise NotImplementedError


def publish(
    results: type[KeptResults],
    path: Path,
    *,
    module: str,
    kept: Path,
    name: str,
    section: Callable[[], str],
) -> None:
    """Keeps the results at ``path``, which ``module`` writes, and puts the ``section`` that is
    made of them between the page's marks of ``name``. Raises OSError or ValueError."""
    expect_results(path, module)
    results.read(path).write(kept)
    into_page(name, section())
    print(f"written: {PAGE}, {kept}")


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
