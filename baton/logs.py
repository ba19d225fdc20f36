"""What every process's log looks like: plain text on standard error."""

from __future__ import annotations

import logging
import os
import sys

from baton.errors import ConfigurationError

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")

_NOISY = ("asyncio", "grpc", "httpcore", "httpx", "uvicorn")
"""Loggers of libraries that say at INFO what only their authors need."""


def configure(process: str) -> None:
    """Sets logging up for this process: time, level, ``process``, message.

    The level is ``BATON_LOG_LEVEL``, INFO by default. Called once, by the
    composition root; calling it again replaces the first.
    Raises: ConfigurationError for a level that does not exist.
    """
    level = os.environ.get("BATON_LOG_LEVEL", "").upper() or "INFO"
    if level not in LEVELS:
        raise ConfigurationError(
            f"BATON_LOG_LEVEL is {level!r}; use one of {', '.join(LEVELS)}", param="BATON_LOG_LEVEL"
        )
    handler = logging.StreamHandler(sys.stderr)
    name = process.replace("%", "%%")
    handler.setFormatter(
        logging.Formatter(f"%(asctime)s.%(msecs)03d %(levelname)s {name} %(message)s", "%F %T")
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for library in _NOISY:
        logging.getLogger(library).setLevel(max(logging.WARNING, root.level))
