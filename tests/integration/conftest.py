"""What several files share: it is dear to make."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.installed import Installed


@pytest.fixture(scope="session")
def installed() -> Iterator[Installed]:
    """1.6 GB when all are made: gone at the end, and not kept like other temporary folders."""
    with tempfile.TemporaryDirectory(prefix="baton-installed-") as folder:
        yield Installed(Path(folder))
