"""benchmarks/README.md names every option, since locust's --help cannot."""

from __future__ import annotations

import re
from pathlib import Path

FOLDER = Path(__file__).parents[3] / "benchmarks"


def test_the_readme_has_every_option_of_the_locustfile() -> None:
    source = (FOLDER / "load_options.py").read_text()
    options = set(re.findall(r'add\(\s*"(--[a-z-]+)"', source))
    options |= {"--chat-weight", "--document-weight"}
    table = (FOLDER / "README.md").read_text()
    named = set(re.findall(r"^\| `(--[a-z-]+)", table, re.MULTILINE)) | {"--document-weight"}
    assert len(options) > 15
    assert options == named
