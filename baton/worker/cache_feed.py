"""Tells every gateway what this worker's prefix cache holds, and how that changes.

Runs on the event loop, on a copy of the cache's hashes that only the engine's
changes alter. So a snapshot is in step with the numbered changes around it, and
taking one costs the engine nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from baton.v1 import session_pb2 as pb

MAX_HASHES = 32_768
"""Of one message: 512 KiB."""

Post = Callable[[int, pb.WorkerMessage], None]


class CacheFeed:
    """``post`` sends a message on a Session, in order; it may call ``leave`` meanwhile."""

    def __init__(self, post: Post) -> None:
        self._post = post
        self._held: dict[bytes, None] = {}  # in order of arrival
        self._num_sent: dict[int, int] = {}

    def join(self, session: int) -> None:
        """Sends a snapshot, and from then on every change; again, a new snapshot."""
        self._num_sent.setdefault(session, 0)
        held = list(self._held)
        self._send(session, [], held[:MAX_HASHES], snapshot=True)
        for start in range(MAX_HASHES, len(held), MAX_HASHES):
            self._send(session, [], held[start : start + MAX_HASHES])

    def leave(self, session: int) -> None:
        self._num_sent.pop(session, None)

    def change(self, changes: dict[bytes, bool]) -> None:
        """Takes over hashes and whether each is held now, and tells every Session."""
        removed = [hash_ for hash_, is_held in changes.items() if not is_held]
        removed = [hash_ for hash_ in removed if hash_ in self._held]
        added = [hash_ for hash_, is_held in changes.items() if is_held]
        added = [hash_ for hash_ in added if hash_ not in self._held]
        for hash_ in removed:
            del self._held[hash_]
        self._held.update(dict.fromkeys(added))
        # What is gone goes first, so that no gateway ever counts more than the pool has.
        ordered = [*removed, *added]
        for start in range(0, len(ordered), MAX_HASHES):
            end = start + MAX_HASHES
            some_added = added[max(0, start - len(removed)) : max(0, end - len(removed))]
            for session in list(self._num_sent):
                self._send(session, removed[start:end], some_added)

    def _send(
        self,
        session: int,
        removed: Sequence[bytes],
        added: Sequence[bytes],
        *,
        snapshot: bool = False,
    ) -> None:
        if session not in self._num_sent:
            return
        self._num_sent[session] += 1
        events = pb.CacheEvents(
            sequence=self._num_sent[session],
            snapshot=snapshot,
            removed=b"".join(removed),
            added=b"".join(added),
        )
        self._post(session, pb.WorkerMessage(cache_events=events))
