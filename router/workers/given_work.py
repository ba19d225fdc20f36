"""What a gateway gave one worker and the worker's last report does not tell of.

Both ends number the Opens of a Session, and a report says how many of them it includes:
those beyond it are this gateway's to count, however long the worker's step takes.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class _Work:
    """Of one open stream."""

    number: int
    """Of its Open on the Session, from 1."""
    num_tokens: int
    """To compute; 0 once a token of it is here."""
    num_blocks: int


class GivenWork:
    """Of one Session. A stream counts from its Open to the report that includes it: its
    tokens to its first token at most, its blocks to its end at most."""

    def __init__(self) -> None:
        self.num_tokens = 0
        """To compute, beyond the report."""
        self.num_blocks = 0
        """Beyond the report."""
        self.num_sequences = 0
        """Beyond the report, less those within it that have ended since it came."""
        self._num_opened = 0
        self._num_reported = 0
        self._decided = 0
        self._streams: dict[int, _Work] = {}

    def decided(self, num_tokens: int) -> None:
        """What the next Open will give to compute. A decision that no Open follows counts for
        nothing."""
        self._decided = num_tokens

    def opened(self, stream_id: int, num_blocks: int) -> None:
        """``num_blocks``: of its whole input."""
        self._num_opened += 1
        work = self._streams[stream_id] = _Work(self._num_opened, self._decided, num_blocks)
        self._decided = 0
        self.num_tokens += work.num_tokens
        self.num_blocks += work.num_blocks
        self.num_sequences += 1

    def computed(self, stream_id: int) -> None:
        """A token of the stream is here, so its input is computed."""
        work = self._streams.get(stream_id)
        if work is not None and work.num_tokens:
            if work.number > self._num_reported:
                self.num_tokens -= work.num_tokens
            work.num_tokens = 0

    def ended(self, stream_id: int) -> None:
        """Closed, cancelled or lost; streams that are not open are ignored."""
        self.computed(stream_id)
        work = self._streams.pop(stream_id, None)
        if work is not None:
            self.num_sequences -= 1
            if work.number > self._num_reported:
                self.num_blocks -= work.num_blocks

    def reported(self, num_opens: int) -> None:
        """A report has come that includes so many Opens."""
        self._num_reported = num_opens
        beyond = [work for work in self._streams.values() if work.number > num_opens]
        self.num_tokens = sum(work.num_tokens for work in beyond)
        self.num_blocks = sum(work.num_blocks for work in beyond)
        self.num_sequences = len(beyond)
