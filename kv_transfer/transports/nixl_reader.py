"""The thread of a decode worker that reads from all its peers over NIXL.

It posts reads and asks whether they are done; while nothing ends it sleeps in between, 50 µs at
first and up to 1 ms. A peer is one agent, known as long as a link wants it:

1. Probed: a few bytes are read from it, which also makes UCX's connection.
2. Known: links read from it.
3. Failed: one of its reads failed, or none has ended for long. No further ones are posted, and
   the links that read from it are told. It is forgotten when its last read has ended; a new
   link can bring it back then.

A read in doubt (``InDoubtError``) ends when no other is under way: then the agent is closed,
which proves it, and made anew. Posts wait for that, unless what is under way is from a failed
peer, and may last as long as that lives. The same is done about what UCX has been seen to lose:
once for each link about a probe without an answer, and about reads that do not end although
their peer would have been killed by now if it were stopped.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from kv_transfer.runs import Area, Runs
from kv_transfer.transports.base import LinkError, OnFatal
from kv_transfer.transports.nixl import Agent, InDoubtError

logger = logging.getLogger(__name__)

_PAUSES_S = (50e-6, 1e-3)
_TIDY_S = 1.0
"""How often UCX is given time while peers are known and nothing is read."""

_PROBE_S = 2.0
"""Within which a peer answers; a transfer waits for its link longer (``kv_transfer.attach_s``)."""

_GIVE_UP_S = 30.0
"""Without the end of any read from a peer. A worker that is stopped is replaced before, by its
controller; one that goes on later, over TCP, may not survive what it has still to answer."""

_LOOP_S = 0.1
"""What one turn of the thread counts for, at most: while it does not run, nothing can end."""

Finished = Callable[[Exception | None], None]
"""Called in the thread: the read has ended, and writes no more. LinkErrors are the peer's."""
Stalled = Callable[[str], None]
"""Called in the thread: the peer has failed, though this read of it has not ended."""


@dataclass(slots=True, eq=False)
class Peer:
    """One remote agent; its fields are the thread's."""

    name: str
    metadata: bytes
    num_links: int = 0
    is_known: bool = False
    failed: str = ""
    has_stalled: bool = False
    moved_at: float = 0.0
    """By the thread's clock: when one of its reads ended, or was the first to be posted."""


@dataclass(frozen=True, slots=True, eq=False)
class _Post:
    """A read that waits for its turn."""

    peer: Peer
    into: Runs
    out_of: Runs
    about_to: Callable[[], None]
    finished: Finished
    stalled: Stalled


@dataclass(frozen=True, slots=True, eq=False)
class _Read:
    peer: Peer
    handle: int
    finished: Finished
    stalled: Stalled | None
    """None of a probe: it reads into no block, and is nothing to wait for."""

    @property
    def is_probe(self) -> bool:
        return self.stalled is None


@dataclass(slots=True, eq=False)
class _Doubt:
    """A read of which nobody knows when it ends, before its agent does."""

    peer: Peer
    finished: Finished
    error: LinkError


@dataclass(slots=True, eq=False)
class _Wish:
    """A link that wants its peer."""

    name: str
    metadata: bytes
    area: Area
    until: float
    made: Callable[[Peer | LinkError], None]
    has_probed: bool = False
    renews_at: float = 0.0
    """When the agent is made anew for it, unless the peer has answered."""


class Reader:
    """Its methods are for any thread, and never wait.

    Args:
        make: makes the agent, in the thread. Raises LinkError.
        stall_s: a peer fails where none of its reads ends within.
        on_fatal: called, in the thread, when it fails of an error that nobody has foreseen. It
            has to see to it that no block is used any more: what was being read into may still
            be written, and nobody knows until when, though all is told to have ended then.
    """

    def __init__(self, make: Callable[[], Agent], *, stall_s: float, on_fatal: OnFatal) -> None:
        self._make = make
        self._stall_s = stall_s
        self._on_fatal = on_fatal
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed: Callable[[], None] | None = None
        self._made: Agent | None = None
        self._peers: dict[str, Peer] = {}
        self._wishes: list[_Wish] = []
        self._posts: deque[_Post] = deque()
        self._reads: list[_Read] = []
        self._doubts: list[_Doubt] = []
        self._must_renew = False
        self._clock = 0.0
        """Seconds for which the thread has run."""

    def start(self, made: Callable[[LinkError | None], None]) -> None:
        """Makes the agent if there is none; ``made`` is called in the thread."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="kv-nixl", daemon=True)
            self._thread.start()
        self._jobs.put(lambda: made(self._make_agent()))

    def connect(
        self,
        name: str,
        metadata: bytes,
        area: Area,
        *,
        timeout_s: float,
        made: Callable[[Peer | LinkError], None],
    ) -> None:
        """Gives ``made``, in the thread, the peer of this name once bytes of its ``area`` have
        come from it. To be followed by ``let_go``; ``start`` has succeeded before."""
        now = time.monotonic()
        wish = _Wish(name, metadata, area, now + timeout_s, made, renews_at=now + _PROBE_S)
        self._jobs.put(lambda: self._wishes.append(wish))

    def read(
        self,
        peer: Peer,
        into: Runs,
        out_of: Runs,
        *,
        about_to: Callable[[], None],
        finished: Finished,
        stalled: Stalled,
    ) -> None:
        """Reads when its turn has come. ``about_to`` is called before, in the thread; where it
        raises, nothing is read."""
        post = _Post(peer, into, out_of, about_to, finished, stalled)
        self._jobs.put(lambda: self._posts.append(post))

    def let_go(self, peer: Peer) -> None:
        """A link wants its peer no more; all that it read has finished."""

        def let_go() -> None:
            peer.num_links -= 1

        self._jobs.put(let_go)

    def close(self, closed: Callable[[], None]) -> None:
        """Links have let go before. ``closed`` is called, in the thread, when nothing
        reads any more."""
        if self._thread is None:
            closed()
        else:
            self._jobs.put(lambda: setattr(self, "_closed", closed))

    # ------------------------------------------------------------------- in the thread

    @property
    def _agent(self) -> Agent:
        assert self._made is not None, "there is one while peers are known"
        return self._made

    def _run(self) -> None:
        try:
            self._serve()
        except Exception as error:
            logger.exception("the thread that reads over NIXL failed")
            self._on_fatal(error)
            self._end_all(error)
            while self._closed is None:
                self._jobs.get()()
                self._end_all(error)
        assert self._closed is not None
        self._closed()

    def _serve(self) -> None:
        """Until it is closed, and nothing reads any more."""
        pause_s, now = _PAUSES_S[0], time.monotonic()
        while self._closed is None or self._posts or self._is_reading or self._doubts:
            moved = self._do_jobs(pause_s)
            before, now = now, time.monotonic()
            self._clock += min(now - before, _LOOP_S)
            moved |= self._ask()
            self._watch()
            self._settle_doubts()
            self._grant_wishes()
            self._forget_peers()
            if self._post():
                pause_s = 0.0  # on one host it has ended already
            elif moved or not pause_s:
                pause_s = _PAUSES_S[0]
            else:
                pause_s = min(2 * pause_s, _PAUSES_S[1])
        if self._made is not None:
            self._made.close()

    def _end_all(self, error: Exception) -> None:
        """So that nobody waits for what nobody looks after any more."""
        for post in self._posts:
            post.finished(error)
        for read in self._reads:
            if not read.is_probe:
                read.finished(error)
        for doubt in self._doubts:
            doubt.finished(doubt.error)
        for wish in self._wishes:
            wish.made(LinkError(f"the thread that reads over NIXL failed: {error!r}"))
        for waiting in (self._posts, self._reads, self._doubts, self._wishes):
            waiting.clear()

    @property
    def _is_reading(self) -> bool:
        """Into blocks."""
        return not all(read.is_probe for read in self._reads)

    def _do_jobs(self, pause_s: float) -> bool:
        """Does what was asked for; sleeps until something is, or is to be looked after."""
        busy = self._is_reading or self._wishes or self._posts
        wait_s = pause_s if busy else _TIDY_S if self._peers else None
        try:
            self._jobs.get(timeout=wait_s)()
        except queue.Empty:
            if not busy:
                self._agent.progress()
            return False
        while not self._jobs.empty():
            self._jobs.get()()
        return True

    def _make_agent(self) -> LinkError | None:
        try:
            self._made = self._made or self._make()
        except LinkError as error:
            return error
        except Exception as error:
            logger.exception("NIXL's agent cannot be made")
            return LinkError(f"NIXL's agent cannot be made: {error!r}")
        return None

    def _ask(self) -> bool:
        """Ends the reads that are done, or have failed; whether there were any."""
        under_way = []
        for read in self._reads:
            error = None
            try:
                if not self._agent.is_done(read.handle):
                    under_way.append(read)
                    continue
            except LinkError as failure:
                error = failure
                read.peer.failed = str(failure)
            self._agent.release(read.handle)
            read.peer.moved_at = self._clock
            read.finished(error)
        moved = len(under_way) < len(self._reads)
        self._reads = under_way
        return moved

    def _watch(self) -> None:
        """Fails the peers none of whose reads ends; gives those reads up, later."""
        for peer in {read.peer for read in self._reads if not read.is_probe}:
            waited_s = self._clock - peer.moved_at
            if waited_s >= self._stall_s and not peer.has_stalled:
                peer.has_stalled = True
                peer.failed = peer.failed or f"no read has ended in {self._stall_s:g} s"
                for read in self._reads:
                    if read.peer is peer and read.stalled is not None:
                        read.stalled(peer.failed)
            if waited_s >= max(_GIVE_UP_S, self._stall_s):
                error = LinkError(f"no read from {peer.name} has ended in {waited_s:.0f} s")
                given_up = [read for read in self._reads if read.peer is peer]
                self._doubts += [_Doubt(peer, read.finished, error) for read in given_up]
                self._reads = [read for read in self._reads if read.peer is not peer]

    def _settle_doubts(self) -> None:
        if not (self._doubts or self._must_renew) or self._is_reading:
            return
        reasons = {str(doubt.error) for doubt in self._doubts}
        why = "; ".join(reasons) or f"no answer to a probe in {_PROBE_S:g} s"
        logger.warning("NIXL's agent is made anew: %s", why)
        self._must_renew = False
        self._agent.close()
        self._made = None
        error = self._make_agent()
        self._reads.clear()  # probes; their wishes try again
        self._peers = {name: peer for name, peer in self._peers.items() if peer.is_known}
        for peer in self._peers.values():
            try:
                if error is not None:
                    raise error
                if not peer.failed:
                    self._agent.connect(peer.metadata)
            except LinkError as failure:
                peer.failed = str(failure)
        for doubt in self._doubts:
            doubt.finished(doubt.error)
        self._doubts.clear()

    @property
    def _is_to_renew(self) -> bool:
        """Whether the agent is made anew once nothing reads, and that is to be expected soon."""
        if not (self._doubts or self._must_renew):
            return False
        return not any(read.peer.failed and not read.is_probe for read in self._reads)

    def _grant_wishes(self) -> None:
        self._wishes = [wish for wish in self._wishes if not self._grant(wish)]

    def _grant(self, wish: _Wish) -> bool:
        """Whether its link has been told."""
        peer = self._peers.get(wish.name)
        if peer is None:
            return not self._probe(wish)
        if peer.failed and (wish.has_probed or peer.has_stalled):
            wish.made(LinkError(peer.failed))
            return True
        if peer.is_known and not peer.failed:
            peer.num_links += 1
            wish.made(peer)
            return True
        now = time.monotonic()
        if not peer.failed and now > wish.renews_at:
            wish.renews_at, self._must_renew = float("inf"), True
        if now < wish.until:
            return False
        late = "an earlier read from the peer has not ended" if peer.failed else "no answer"
        peer.failed = peer.failed or late
        wish.made(LinkError(late))
        return True

    def _probe(self, wish: _Wish) -> bool:
        """Makes the peer known, unless its link has been told why not."""
        peer = Peer(wish.name, wish.metadata)
        wish.has_probed = True

        def finished(error: Exception | None) -> None:
            peer.is_known = error is None

        try:
            if (error := self._make_agent()) is not None:
                raise error
            self._agent.connect(wish.metadata)
            handle = self._agent.probe(wish.name, wish.area)
        except LinkError as error:
            if self._made is not None:
                self._made.forget(wish.name)
            wish.made(error)
            return False
        self._peers[wish.name] = peer
        self._reads.append(_Read(peer, handle, finished, stalled=None))
        return True

    def _forget_peers(self) -> None:
        """Those that failed, and those that no link wants; not while they are read from."""
        read_from = {read.peer for read in self._reads} | {doubt.peer for doubt in self._doubts}
        for peer in [*self._peers.values()]:
            if (peer.failed or not peer.num_links) and peer not in read_from:
                del self._peers[peer.name]
                if self._made is not None:
                    self._made.forget(peer.name)

    def _post(self) -> bool:
        """Posts the next read: one, since what has ended meanwhile is to be told of."""
        if not self._posts or self._is_to_renew:
            return False
        post = self._posts.popleft()
        peer = post.peer
        try:
            if peer.failed:
                raise LinkError(peer.failed)
            post.about_to()
            handle = self._agent.read(peer.name, post.into, post.out_of)
        except InDoubtError as error:
            peer.failed = str(error)
            self._doubts.append(_Doubt(peer, post.finished, error))
        except Exception as error:
            if isinstance(error, LinkError):
                peer.failed = str(error)
            post.finished(error)
        else:
            if all(read.peer is not peer for read in self._reads):
                peer.moved_at = self._clock
            self._reads.append(_Read(peer, handle, post.finished, post.stalled))
        return True
