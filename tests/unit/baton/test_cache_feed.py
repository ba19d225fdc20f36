"""What gateways are told of a worker's prefix cache."""

from __future__ import annotations

import pytest

from baton.v1 import session_pb2 as pb
from baton.worker import cache_feed
from baton.worker.cache_feed import CacheFeed


def name(number: int) -> bytes:
    return number.to_bytes(16, "little")


class Sessions:
    def __init__(self) -> None:
        self.sent: dict[int, list[pb.CacheEvents]] = {}

    def post(self, session: int, message: pb.WorkerMessage) -> None:
        self.sent.setdefault(session, []).append(message.cache_events)


def test_a_large_snapshot_comes_in_messages_that_are_not_too_large() -> None:
    sessions = Sessions()
    feed = CacheFeed(sessions.post)
    num_hashes = 2 * cache_feed.MAX_HASHES + 1
    feed.change({name(number): True for number in range(num_hashes)})
    feed.join(1)
    events = sessions.sent[1]
    assert [one.sequence for one in events] == [1, 2, 3]
    assert [one.snapshot for one in events] == [True, False, False]
    assert max(one.ByteSize() for one in events) < 1024 * 1024
    assert b"".join(one.added for one in events) == b"".join(map(name, range(num_hashes)))


def test_what_is_gone_is_told_before_what_has_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_feed, "MAX_HASHES", 2)
    sessions = Sessions()
    feed = CacheFeed(sessions.post)
    feed.change({name(number): True for number in range(3)})
    feed.join(1)
    del sessions.sent[1][:]
    feed.change({name(8): True, name(0): False, name(9): True, name(1): False, name(2): False})
    assert [(one.removed, one.added) for one in sessions.sent[1]] == [
        (name(0) + name(1), b""),
        (name(2), name(8)),
        (b"", name(9)),
    ]


def test_changes_that_change_nothing_are_not_told() -> None:
    sessions = Sessions()
    feed = CacheFeed(sessions.post)
    feed.change({name(1): True})
    feed.join(1)
    feed.change({name(1): True, name(2): False})
    assert len(sessions.sent[1]) == 1


def test_session_that_has_gone_is_told_nothing() -> None:
    sessions = Sessions()
    feed = CacheFeed(sessions.post)
    feed.join(1)
    feed.leave(1)
    feed.change({name(1): True})
    assert len(sessions.sent[1]) == 1
