"""A worker's actor in this very process, called as Ray's handle of it would be.

What it is made of and called with is pickled on the way, and kept: the bytes are what Ray
would be given. Its place is a process of its own, which may be killed.
"""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from cluster.procfs import name_of
from cluster.ray_actor import Place, WorkerActor, WorkerStart, machine_id


def _cloudpickle() -> Any:
    from ray import cloudpickle  # not before a test runs: see tests/conftest.py

    return cloudpickle


class InlineActor:
    """``away``: while it is set, calls fail as if Ray could not be reached. ``mute``: names
    of methods whose calls are never answered."""

    def __init__(self, start: WorkerStart) -> None:
        self.made_of: bytes = _cloudpickle().dumps(start)
        self.away = threading.Event()
        self.mute: set[str] = set()
        self.num_failed = 0
        self.ended = threading.Event()
        self._process = subprocess.Popen(["sleep", "60"])
        name = name_of(self._process.pid)
        assert name is not None
        self.place = Place(name, machine_id())
        self._actor = WorkerActor(
            _cloudpickle().loads(self.made_of), lambda: self.place, after_end=self.ended.set
        )

    @property
    def handle(self) -> Any:
        return _Handle(self)

    def call(self, method: str, arguments: tuple[Any, ...]) -> Future[Any]:
        if self.away.is_set():
            self.num_failed += 1
            raise ConnectionError("Ray is away")
        future: Future[Any] = Future()
        if method not in self.mute:
            sent = _cloudpickle().loads(_cloudpickle().dumps(arguments))

            def run() -> None:
                if future.set_running_or_notify_cancel():
                    future.set_result(getattr(self._actor, method)(*sent))

            threading.Thread(target=run, daemon=True).start()
        return future

    def close(self) -> None:
        self._actor.stop()
        self._process.kill()
        self._process.wait()


class _Handle:
    def __init__(self, actor: InlineActor) -> None:
        self._actor = actor

    def __getattr__(self, method: str) -> _Method:
        return _Method(lambda arguments: self._actor.call(method, arguments))


class _Method:
    def __init__(self, call: Callable[[tuple[Any, ...]], Future[Any]]) -> None:
        self._call = call

    def remote(self, *arguments: Any) -> _Reference:
        return _Reference(self._call(arguments))


class _Reference:
    def __init__(self, future: Future[Any]) -> None:
        self._future = future

    def future(self) -> Future[Any]:
        return self._future
