"""One worker in its actor: from the asking for a place to the proof of its end.

1. ASKED: Ray is to find a place. Where there is no room it waits, until there is.
2. LIVING: its process is known, and its life begun.
3. ENDING: it ended, or is to be killed. Its process is ended and proved gone: here by
   the kernel, elsewhere by a task on its node, or by the death of the whole node.
"""

from __future__ import annotations

import asyncio
import json
import logging
import signal
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

from baton.errors import UnavailableError
from cluster import ray_calls
from cluster.backend import Exit
from cluster.procfs import ProcessName, send, wait_gone
from cluster.ray_actor import Place
from cluster.ray_calls import Actor, first_line
from cluster.ray_thread import RayThread

logger = logging.getLogger(__name__)

T = TypeVar("T")

_TELL_S = 5.0
"""How long Ray may take to hear something that nobody waits for."""
_NO_ROOM_S = 5.0
"""Without a place for this long, a worker may be waiting for room."""
_RETRY_S = 1.0
_PROOF_S = 20.0
"""How long a task that ends a process may take to be placed and run."""


class RayWorker:
    """``actor`` is there already, or about to be. ``on_started`` hears of the process, when
    it is on this machine."""

    def __init__(
        self,
        thread: RayThread,
        name: str,
        actor: Actor | Awaitable[Actor],
        *,
        needs: str,
        on_started: Callable[[ProcessName], None],
    ) -> None:
        self._thread = thread
        self._name = name
        self._needs = needs
        self._on_started = on_started
        self._actor = actor if isinstance(actor, Actor) else None
        self._place = actor.noted if isinstance(actor, Actor) else None
        self._unwanted = asyncio.Event()
        # A task of its own: whoever waits may give up waiting, the worker lives on.
        self._life = asyncio.create_task(self._live(actor), name=f"life of {name}")

    @property
    def name(self) -> str:
        return self._name

    @property
    def over(self) -> bool:
        """Its end is proved."""
        return self._life.done()

    @property
    def is_placed(self) -> bool:
        return self._place is not None

    async def wait(self) -> Exit:
        return await asyncio.shield(self._life)

    async def stop(self) -> None:
        """A worker that has not come up yet has nothing to finish: it is killed. So is
        one that Ray cannot be asked to stop."""
        if self._actor is None or self._place is None or self._thread.given_up:
            await self.kill()
        else:
            await self._tell_ray(self._actor.stop)

    async def kill(self) -> None:
        self._unwanted.set()
        if self._local is not None:
            send(self._local, signal.SIGKILL)

    async def leave(self) -> None:
        """Lets go of it: it lives on, and nobody here waits for it any more."""
        self._life.cancel()
        await asyncio.gather(self._life, return_exceptions=True)

    @property
    def _local(self) -> ProcessName | None:
        """Its process, when it is on this machine."""
        return self._place.process if self._place is not None and self._place.is_local else None

    # ------------------------------------------------------------------- life

    async def _live(self, actor: Actor | Awaitable[Actor]) -> Exit:
        try:
            if not isinstance(actor, Actor):
                actor = await actor
            self._actor = actor
            end = await self._until_end(actor)
        except UnavailableError:  # Ray was given up
            return await self._without_ray()
        except Exception as error:
            end = Exit(None, f"could not be created by Ray: {first_line(error)}")
        await self._make_sure()
        return end

    async def _until_end(self, actor: Actor) -> Exit:
        try:
            self._place = self._place or await self._placed(actor)
        except UnavailableError:
            raise
        except Exception as error:
            return Exit(1, f"failed: {first_line(error)}")
        if self._place is None:
            return Exit(None, "was ended before it had a place")
        if self._local is not None:
            self._on_started(self._local)
        if self._unwanted.is_set():
            return Exit(None, "was killed")
        await self._thread.call(actor.begin)
        return await self._ended(actor)

    async def _without_ray(self) -> Exit:
        """Of a process here the kernel still tells. Nobody can prove the end of another."""
        if self._local is not None:
            await wait_gone(self._local)
        else:
            await self._unwanted.wait()
            if self._place is not None:
                await asyncio.Event().wait()
        return Exit(None, "was lost with Ray")

    async def _placed(self, actor: Actor) -> Place | None:
        """None once it is unwanted. Raises when Ray says that it will have none."""
        told = False
        while True:
            placing = await self._ask(actor.place)
            while not placing.done():
                if not await self._any({placing}, timeout_s=_NO_ROOM_S):
                    told = told or await self._tell_of_no_room()
                if self._unwanted.is_set():
                    placing.cancel()
                    return None
            if (error := placing.exception()) is None:
                return Place.from_json(placing.result())
            if ray_calls.says_dead(error):
                raise error
            await self._pause(error)

    async def _tell_of_no_room(self) -> bool:
        if not await self._thread.call(partial(ray_calls.waits_for_room, self._name)):
            return False
        logger.warning(
            "%s waits for room: no node of Ray's has %s free; it starts once one has",
            self._name, self._needs,
        )  # fmt: skip
        return True

    async def _ended(self, actor: Actor) -> Exit:
        """Asks again and again, so that no call outlives its caller for long."""
        gone = None
        if self._local is not None:
            gone = asyncio.ensure_future(wait_gone(self._local))
        waits: set[asyncio.Future[Any]] = {gone} if gone is not None else set()
        try:
            while True:
                asking = await self._ask(actor.wait_end)
                await self._any(waits | {asking})
                error = asking.exception() if asking.done() else None
                if asking.done() and error is None:
                    if (answer := asking.result()) is not None:
                        return _exit_of(answer)
                elif (gone is not None and gone.done()) or self._unwanted.is_set():
                    asking.cancel()
                    return Exit(None, "was killed")
                elif error is not None and ray_calls.says_dead(error):
                    return Exit(None, f"was killed: {first_line(error)}")
                elif error is not None:
                    await self._pause(error)
        finally:
            if gone is not None:
                gone.cancel()

    async def _ask(self, question: Callable[[], Future[T]]) -> asyncio.Future[T]:
        return asyncio.wrap_future(await self._thread.call(question))

    async def _any(
        self, waits: set[asyncio.Future[Any]], *, timeout_s: float | None = None
    ) -> bool:
        """Until one is done or the worker unwanted; False: neither, within the time."""
        unwanted: asyncio.Future[Any] = asyncio.ensure_future(self._unwanted.wait())
        try:
            done, _ = await asyncio.wait(
                waits | {unwanted}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            unwanted.cancel()
        return bool(done)

    async def _pause(self, error: BaseException) -> None:
        logger.warning("%s: Ray does not answer: %s", self._name, first_line(error))
        await asyncio.sleep(_RETRY_S)

    # ----------------------------------------------------------------- ending

    async def _make_sure(self) -> None:
        """Ends its process, has that proved, and gives its place back."""
        if self._local is None:
            await self._tell_ray(partial(ray_calls.kill, self._name))
        if self._place is None and not self._thread.given_up:
            # It may have come to its place just now. It holds nothing, and ends soon.
            await self._tell_ray(self._learn_place)
        if self._local is not None:
            send(self._local, signal.SIGKILL)
            await wait_gone(self._local)
            await self._tell_ray(partial(ray_calls.kill, self._name))
        elif self._place is not None:
            await self._prove_gone(self._place)
        await self._tell_ray(partial(ray_calls.give_back, self._name))

    def _learn_place(self) -> None:
        self._place = ray_calls.noted_place(self._name)

    async def _prove_gone(self, place: Place) -> None:
        """Of a process elsewhere: asks until there is proof, because a replacement may
        take over what it held."""
        while not self._thread.given_up:
            try:
                ending = await self._ask(partial(ray_calls.end_process, place))
                if await asyncio.wait_for(ending, _PROOF_S):
                    return
            except Exception as error:
                logger.warning("%s is not proved gone yet: %s", self._name, first_line(error))
            try:
                if await self._thread.call(partial(ray_calls.node_is_dead, place.node_id)):
                    return
            except Exception as error:
                logger.warning("%s: Ray does not answer: %s", self._name, first_line(error))
            await asyncio.sleep(_RETRY_S)

    async def _tell_ray(self, function: Callable[[], None]) -> None:
        """For what Ray should know; a Ray that has died itself cannot hear it."""
        try:
            await asyncio.wait_for(self._thread.call(function), _TELL_S)
        except Exception as error:  # Ray raises many kinds, documented nowhere
            logger.warning("%s: Ray did not hear of its end: %s", self._name, first_line(error))


def _exit_of(answer: str) -> Exit:
    failure: str | None = json.loads(answer)
    if failure is None:
        return Exit(0, "ended")
    return Exit(1, f"failed: {failure.splitlines()[0]}")
