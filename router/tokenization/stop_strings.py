"""Finds stop strings in text that arrives in pieces.

One Knuth-Morris-Pratt automaton per stop string reads each character once, so
the outcome does not depend on where the pieces were cut: the stop string that
is complete first wins, of several complete at once the longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Scanned:
    """Text that may be shown, and whether a stop string followed it."""

    text: str
    matched: bool = False


def _failure_links(stop: str) -> list[int]:
    """For each length of a matched prefix, that of its longest proper border."""
    links, border = [0, 0], 0
    for character in stop[1:]:
        while border and stop[border] != character:
            border = links[border]
        border += stop[border] == character
        links.append(border)
    return links


class StopStrings:
    """Immutable; shared by the choices of one request. Each ``scanner()`` has a state."""

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops), "an empty stop string"
        self.patterns = [(stop, _failure_links(stop)) for stop in dict.fromkeys(stops)]

    def scanner(self) -> StopScanner:
        return StopScanner(self)


class StopScanner:
    """Reads one choice's text. Holds back what may yet be the start of a stop string."""

    def __init__(self, stops: StopStrings) -> None:
        self._patterns = stops.patterns
        self._matched = [0] * len(self._patterns)
        self._held = ""

    def push(self, text: str) -> Scanned:
        """After a match the scanner is spent; the text after the stop string is dropped."""
        if not self._patterns:
            return Scanned(text)
        for position, character in enumerate(text):
            length = self._advance(character)
            if length:
                seen = self._held + text[: position + 1]
                self._held = ""
                return Scanned(seen[: len(seen) - length], matched=True)
        seen = self._held + text
        keep = len(seen) - max(self._matched)
        self._held = seen[keep:]
        return Scanned(seen[:keep])

    def flush(self) -> str:
        """What was held back, at the end of a choice that matched nothing."""
        held, self._held = self._held, ""
        return held

    def _advance(self, character: str) -> int:
        """Length of the longest stop string that ends with ``character``, else 0."""
        complete = 0
        for index, (stop, links) in enumerate(self._patterns):
            length = self._matched[index]
            while length and stop[length] != character:
                length = links[length]
            length += stop[length] == character
            self._matched[index] = length
            if length == len(stop):
                complete = max(complete, length)
        return complete
