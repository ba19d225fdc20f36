"""The one thread that computes: commands, then a step, for as long as it lives."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable

from baton.worker.inbox import Inbox

logger = logging.getLogger(__name__)

IDLE_WAIT_S = 0.1
SWITCH_INTERVAL_S = 0.0005
"""How soon the interpreter lets the event loop's thread in while this one computes;
with Python's default of 5 ms a token event waits that long."""


class EngineThread:
    """Runs ``step`` whenever it has work; ``on_fatal`` hears of its death once."""

    def __init__(
        self, inbox: Inbox, *, step: Callable[[], bool], on_fatal: Callable[[BaseException], None]
    ) -> None:
        self._inbox = inbox
        self._step = step
        self._on_fatal = on_fatal
        self._stopping = False
        self._began_at = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def round_age_s(self) -> float:
        """How long the round under way has taken so far: commands and a step, or an
        idle wait of at most ``IDLE_WAIT_S``.

        An engine that hangs still has a process that answers, so this is what to watch.
        """
        return time.monotonic() - self._began_at

    def start(self) -> None:
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        self._began_at = time.monotonic()
        self._thread.start()

    def stop(self, *, timeout_s: float) -> None:
        """Ends the thread after its current step; blocks for at most ``timeout_s``."""
        self._stopping = True
        self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            busy = True
            while not self._stopping:
                self._began_at = time.monotonic()
                arrived = self._inbox.run_pending(wait_s=0.0 if busy else IDLE_WAIT_S)
                busy = self._step() or (arrived and busy)
        except BaseException as error:
            logger.exception("the engine thread died")
            self._inbox.call(self._on_fatal, error)
