"""One worker in its actor: from the asking for a place to the proof of its end.

1. ASKED: Ray is to find a place. Where there is no room it waits, until there is.
2. LIVING: its process is known, and its life begun.
3. ENDING: it ended, or is to be killed. Its process is ended and proved gone: here by
   the kernel, elsewhere by a task on its node, or by the death of the whole node. One
   that never came to a place was never begun, and leaves nothing to prove.
4. OVER: a replacement may start. What Ray still has of it is cleared away, however
   long Ray does not hear of that.
"""

from __future__ import annotations

import asyncio
import json
import logging
import signal
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

from baton.errors import UnavailableError
from cluster import ray_calls
from cluster.backend import Exit
from cluster.procfs import ProcessName, send, wait_gone
from cluster.ray_actor import Place, WorkerSecrets
from cluster.ray_calls import Actor, first_line
from cluster.ray_thread import RayThread

logger = logging.getLogger(__name__)

T = TypeVar("T")

_HEAR_S = 5.0
"""Ray hears of an end within this time, or it is said that it has not."""
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
        secrets: WorkerSecrets,
        needs: str,
        on_started: Callable[[ProcessName], None],
    ) -> None:
        self._thread = thread
        self._name = name
        self._secrets = secrets
        self._needs = needs
        self._on_started = on_started
        self._actor = actor if isinstance(actor, Actor) else None
        self._place = actor.noted if isinstance(actor, Actor) else None
        self._unwanted = asyncio.Event()
        self._stopping: asyncio.Task[None] | None = None
        self._clearing: asyncio.Task[None] | None = None
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
    def cleared(self) -> bool:
        """It is over, and Ray has nothing left of it."""
        return self.over and (self._clearing is None or self._clearing.done())

    @property
    def is_placed(self) -> bool:
        return self._place is not None

    async def wait(self) -> Exit:
        return await asyncio.shield(self._life)

    async def wait_cleared(self) -> None:
        await asyncio.wait({self._life})
        if self._clearing is not None:
            await asyncio.wait({self._clearing})

    async def stop(self) -> None:
        """A worker that has not come up yet has nothing to finish: it is killed. So is
        one that Ray cannot be asked to stop."""
        if self._actor is None or self._place is None or self._thread.given_up:
            await self.kill()
        elif self._stopping is None:
            asking = self._ask_to_stop(self._actor)
            self._stopping = asyncio.create_task(asking, name=f"stop {self._name}")

    async def kill(self) -> None:
        self._unwanted.set()
        if self._local is not None:
            send(self._local, signal.SIGKILL)

    async def leave(self) -> None:
        """Lets go of it: it lives on if it does, and nobody here waits for it any more."""
        tasks = [task for task in (self._life, self._stopping, self._clearing) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

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
        if not self._thread.given_up:
            clearing = self._clear_away()
            self._clearing = asyncio.create_task(clearing, name=f"clear {self._name} away")
        return end

    async def _until_end(self, actor: Actor) -> Exit:
        if self._place is None:
            try:
                self._place = await _until(self._unwanted.wait(), self._placed(actor))
            except UnavailableError:
                raise
            except Exception as error:
                return Exit(1, f"failed: {first_line(error)}")
        if self._place is None:
            return Exit(None, "was ended before it had a place")
        if self._local is not None:
            try:
                self._on_started(self._local)
            except Exception as error:
                return Exit(None, f"was killed: nobody took note of it: {first_line(error)}")
        if self._unwanted.is_set():
            return Exit(None, "was killed")
        try:
            end = await _until(self._killed(), self._lived(actor))
        except UnavailableError:
            raise
        except Exception as error:
            return Exit(None, f"was killed: {first_line(error)}")
        return end or Exit(None, "was killed")

    async def _without_ray(self) -> Exit:
        """Of a process here the kernel still tells. Nobody can prove the end of another."""
        if self._local is not None:
            await wait_gone(self._local)
        else:
            await self._unwanted.wait()
            if self._place is not None:
                await asyncio.Event().wait()
        return Exit(None, "was lost with Ray")

    async def _placed(self, actor: Actor) -> Place:
        """Raises when Ray says that it will have none."""
        placing = asyncio.create_task(self._answer(actor.place))
        try:
            while not (await asyncio.wait({placing}, timeout=_NO_ROOM_S))[0]:
                if await self._waits_for_room():
                    logger.warning(
                        "%s waits for room: no node of Ray's has %s free; it starts once one has",
                        self._name, self._needs,
                    )  # fmt: skip
                    break
            return Place.from_json(await placing)
        finally:
            placing.cancel()

    async def _waits_for_room(self) -> bool:
        try:
            return await self._thread.call(partial(ray_calls.waits_for_room, self._name))
        except Exception as error:  # it is asked again
            logger.info("%s: Ray does not say where it is: %s", self._name, first_line(error))
            return False

    async def _killed(self) -> None:
        """Until it is to be killed or, as seen from here, has been."""
        if self._local is not None:
            await _until(self._unwanted.wait(), wait_gone(self._local))
        else:
            await self._unwanted.wait()

    async def _lived(self, actor: Actor) -> Exit:
        """Asks again and again, so that no call outlives its caller for long. Raises when
        Ray says that it has died."""
        await self._answer(partial(actor.begin, self._secrets))
        while (answer := await self._answer(actor.wait_end)) is None:
            pass
        return _exit_of(answer)

    async def _ask_to_stop(self, actor: Actor) -> None:
        try:
            await _until(asyncio.wait({self._life}), self._answer(actor.stop))
        except UnavailableError:  # Ray was given up
            await self.kill()
        except Exception as error:
            logger.info("%s ends by itself: %s", self._name, first_line(error))

    async def _answer(self, question: Callable[[], Future[T]]) -> T:
        """The actor's. Asks again while Ray does not bring it. Raises what says that the actor
        is dead, and UnavailableError once Ray was given up."""
        told = False
        while True:
            try:
                return await asyncio.wrap_future(await self._thread.call(question))
            except UnavailableError:
                raise
            except Exception as error:
                if ray_calls.says_dead(error):
                    raise
                if not told:
                    logger.warning("%s: Ray does not answer: %s", self._name, first_line(error))
                told = True
            await asyncio.sleep(_RETRY_S)

    # ----------------------------------------------------------------- ending

    async def _make_sure(self) -> None:
        """Ends its process and has that proved."""
        if self._local is not None:
            send(self._local, signal.SIGKILL)
            await wait_gone(self._local)
        elif self._place is not None:
            await self._prove_gone(self._place)

    async def _prove_gone(self, place: Place) -> None:
        """Of a process elsewhere: asks until there is proof, because a replacement may
        take over what it held. Nobody can prove it any more once Ray was given up."""
        while not self._thread.given_up:
            try:
                ending = await self._thread.call(partial(ray_calls.end_process, self._name, place))
                async with asyncio.timeout(_PROOF_S):
                    if await asyncio.wrap_future(ending):
                        return
            except Exception as error:
                logger.warning("%s is not proved gone yet: %s", self._name, first_line(error))
            try:
                if await self._thread.call(partial(ray_calls.node_is_dead, place.node_id)):
                    return
            except Exception as error:
                logger.warning("%s: Ray does not answer: %s", self._name, first_line(error))
            await asyncio.sleep(_RETRY_S)
        await asyncio.Event().wait()

    async def _clear_away(self) -> None:
        """Tells Ray until it has heard, or was given up."""
        told = False

        def complain(reason: str) -> None:
            nonlocal told
            if not told:
                logger.warning("%s is gone, and Ray is told until it hears: %s", self._name, reason)
            told = True

        while True:
            telling = self._thread.call(partial(ray_calls.clear_away, self._name))
            trying = asyncio.create_task(telling)
            try:
                if not (await asyncio.wait({trying}, timeout=_HEAR_S))[0]:
                    complain("it does not answer")
                return await trying
            except UnavailableError:
                return
            except Exception as error:
                complain(first_line(error))
            finally:
                trying.cancel()
            await asyncio.sleep(_RETRY_S)


async def _until(end: Coroutine[Any, Any, Any], work: Coroutine[Any, Any, T]) -> T | None:
    """What ``work`` returns or raises; None when ``end`` is over before, and ``work`` is
    cancelled."""
    ending, working = asyncio.ensure_future(end), asyncio.ensure_future(work)
    try:
        await asyncio.wait({ending, working}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        ending.cancel()
        working.cancel()


def _exit_of(answer: str) -> Exit:
    failure: str | None = json.loads(answer)
    if failure is None:
        return Exit(0, "ended")
    return Exit(1, f"failed: {failure.splitlines()[0]}")
