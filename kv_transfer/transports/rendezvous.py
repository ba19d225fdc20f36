"""How the two ends of a link find each other while it is built: values named by keys.

They travel on the pair's own stream, which is authenticated already, so no port
is opened for it and nothing is left to clean up. (A TCPStore would be the usual
way. It listens without authentication and looks its peers' names up in DNS: 5 s
for a pair were measured on loopback, when 32 formed at once.)
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from kv_transfer.transports.base import LinkError


class Rendezvous:
    """One end. ``received`` and ``close`` are for the event loop, the rest for threads.

    Args:
        send: passes a value to the peer's end; called in the thread that sets it.
    """

    def __init__(self, send: Callable[[str, bytes], None]) -> None:
        self._send = send
        self._values: dict[str, bytes] = {}
        self._changed = threading.Condition()
        self._closed = False

    def received(self, key: str, value: bytes) -> None:
        """A value that the peer set."""
        with self._changed:
            self._values[key] = value
            self._changed.notify_all()

    def close(self) -> None:
        """The stream is gone: whoever waits is told so at once."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def set(self, key: str, value: bytes) -> None:
        self.received(key, value)
        self._send(key, value)

    def wait(self, keys: Sequence[str], timeout_s: float) -> list[bytes]:
        """Blocks until both ends know all ``keys``. Raises LinkError."""
        until = time.monotonic() + timeout_s
        with self._changed:
            while not all(key in self._values for key in keys):
                remaining_s = until - time.monotonic()
                if self._closed:
                    raise LinkError("the peer is gone")
                if remaining_s <= 0:
                    raise LinkError(f"the peer did not turn up in {timeout_s:g} s")
                self._changed.wait(remaining_s)
            return [self._values[key] for key in keys]
