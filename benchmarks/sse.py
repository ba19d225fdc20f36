"""Server-sent events from bytes that come in any portions.

https://html.spec.whatwg.org/multipage/server-sent-events.html, without its bare CR as
the end of a line, which no server sends.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SseEvent:
    """``type`` is "message" unless the server named one."""

    type: str
    data: str


class SseReader:
    """Bytes in, whole events out; what is unfinished waits for more."""

    def __init__(self) -> None:
        self._line = b""
        self._type = ""
        self._data: list[str] = []

    def push(self, data: bytes) -> list[SseEvent]:
        """The events that ``data`` completes. Raises UnicodeDecodeError."""
        *lines, self._line = (self._line + data).split(b"\n")
        found = (self._take(line.removesuffix(b"\r").decode()) for line in lines)
        return [event for event in found if event is not None]

    def _take(self, line: str) -> SseEvent | None:
        """One line; an empty one ends an event."""
        if line:
            name, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if name == "data":
                self._data.append(value)
            elif name == "event":
                self._type = value
            return None
        kind, data = self._type or "message", self._data
        self._type, self._data = "", []
        return SseEvent(kind, "\n".join(data)) if data else None
