"""A call's scope: what ends it, what no longer can, and which reason it leaves with."""

from __future__ import annotations

import asyncio

import pytest

from baton.errors import CancelledError, DeadlineExceededError, DrainingError
from router.gateway.call import Call
from router.gateway.lifecycle import Lifecycle


class Client:
    """A ``receive`` whose client leaves when told to."""

    def __init__(self) -> None:
        self.left = asyncio.Event()

    async def receive(self) -> dict[str, str]:
        await self.left.wait()
        return {"type": "http.disconnect"}


def call(client: Client, *, in_s: float = 60.0) -> Call:
    deadline = asyncio.get_running_loop().time() + in_s
    return Call(client.receive, deadline=deadline, lifecycle=Lifecycle())


async def forever() -> None:
    await asyncio.get_running_loop().create_future()


async def test_client_that_leaves_ends_the_body() -> None:
    client = Client()
    with pytest.raises(CancelledError):
        async with call(client):
            client.left.set()
            await forever()


async def test_deadline_ends_the_body() -> None:
    with pytest.raises(DeadlineExceededError):
        async with call(Client(), in_s=0.01):
            await forever()


async def test_first_reason_counts() -> None:
    with pytest.raises(DrainingError):
        async with call(Client()) as running:
            running.end(DrainingError("x"))
            running.end(CancelledError("y"))
            await forever()


async def test_answer_that_is_too_late_is_not_begun() -> None:
    begun = False
    with pytest.raises(DrainingError):
        async with call(Client()) as running:
            running.end(DrainingError("x"))
            await running.answered()
            begun = True
    assert not begun


async def test_answered_call_is_ended_by_nothing() -> None:
    client = Client()
    async with call(client, in_s=0.02) as running:
        await running.answered()
        client.left.set()
        running.end(DrainingError("x"))
        await asyncio.sleep(0.05)


async def test_cancellation_from_outside_stays_one() -> None:
    async def body() -> None:
        async with call(Client()):
            await forever()

    task = asyncio.create_task(body())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_own_error_of_the_body_passes() -> None:
    with pytest.raises(TimeoutError, match="mine"):
        async with call(Client()):
            raise TimeoutError("mine")


async def test_no_task_is_left() -> None:
    before = asyncio.all_tasks()
    async with call(Client()):
        pass
    assert asyncio.all_tasks() == before
