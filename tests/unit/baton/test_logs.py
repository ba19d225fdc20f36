"""How a process's log looks."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator

import pytest

from baton.errors import ConfigurationError
from baton.logs import configure

LIBRARIES = ("uvicorn", "uvicorn.error")


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    """Loggers as in a process that has just begun, whichever servers ran in this one before."""
    root, libraries = logging.getLogger(), [logging.getLogger(name) for name in LIBRARIES]
    before = [(each, each.handlers[:], each.level, each.propagate) for each in (root, *libraries)]
    for library in libraries:
        library.handlers[:] = []
        library.setLevel(logging.NOTSET)
        library.propagate = True
    yield
    for logger, handlers, level, propagate in before:
        logger.handlers[:] = handlers
        logger.setLevel(level)
        logger.propagate = propagate


def test_line_has_time_level_process_and_message(capsys: pytest.CaptureFixture[str]) -> None:
    configure("decode-0 100%")
    configure("decode-0 100%")
    logging.getLogger("baton.test").info("hello %s", "there")
    line = capsys.readouterr().err
    pattern = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} INFO decode-0 100% hello there\n"
    assert re.fullmatch(pattern, line)


def test_level_comes_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BATON_LOG_LEVEL", "warning")
    configure("gateway-0")
    logging.getLogger("baton.test").info("not shown")
    logging.getLogger("baton.test").warning("shown")
    line = capsys.readouterr().err
    assert "WARNING gateway-0 shown" in line
    assert "not shown" not in line


def test_libraries_speak_up_only_from_warning_on(capsys: pytest.CaptureFixture[str]) -> None:
    configure("gateway-0")
    logging.getLogger("uvicorn.error").info("Started server process")
    logging.getLogger("uvicorn.error").warning("a warning")
    assert capsys.readouterr().err.count("\n") == 1


def test_unknown_level_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_LOG_LEVEL", "loud")
    with pytest.raises(ConfigurationError, match="LOUD"):
        configure("gateway-0")
