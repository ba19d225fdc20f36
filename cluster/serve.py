"""`baton serve`: checks, starts, prints what to do, waits, stops."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
import os
import secrets
import signal
import sys
import time
from collections.abc import Mapping
from typing import TextIO

import yaml

from baton.config import BatonConfig
from baton.credentials import (
    API_KEY,
    CLUSTER_SECRET,
    CONTROLLER_TOKEN,
    credential,
    take_credential,
)
from baton.errors import BatonError, CheckpointError, ConfigurationError, UnavailableError
from cluster import preflight, redis_server
from cluster.announcement import announce
from cluster.commands import MODULES
from cluster.console import Progress
from cluster.launcher import Doors, Launcher, stop_within_s
from cluster.procfs import name_of
from cluster.server_client import url_of
from cluster.state import RunFolder, ServerState, make_temp_folder

_ONE_PRESS_S = 0.5
"""Signals closer together are one: a terminal's and that of `make` or `timeout`."""


class StopSignals:
    """SIGINT, SIGTERM and SIGHUP: the first asks to stop, a later one to hurry."""

    def __init__(self) -> None:
        self.stop = asyncio.Event()
        self.hurry = asyncio.Event()
        self._first_at = 0.0

    def install(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self.received)

    def ignore(self) -> None:
        """Everything has ended; one Ctrl-C too many must not look like a failure."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)

    def received(self) -> None:
        now = time.monotonic()
        if not self.stop.is_set():
            self._first_at = now
            self.stop.set()
        elif now - self._first_at >= _ONE_PRESS_S:
            self.hurry.set()


def check(config: BatonConfig) -> tuple[BatonConfig, tuple[int, ...]]:
    """Everything that can be known beforehand. Returns the configuration with what is
    left to us filled in, and the gateways' ports. Raises ConfigurationError or
    CheckpointError."""
    preflight.check_platform()
    preflight.check_backend(config, importlib.util.find_spec)
    preflight.check_pools(config)
    preflight.check_gpus(config)
    ports = preflight.gateway_ports(config)
    gateway, engine = config.gateway.model_copy(update={"port": ports[0]}), config.engine
    if engine.threads == 0:
        engine = engine.model_copy(update={"threads": preflight.default_threads(config)})
    model = preflight.local_model(config)
    return config.model_copy(update={"gateway": gateway, "engine": engine, "model": model}), ports


def serve(
    config: BatonConfig, *, redis_url: str | None, modules: Mapping[str, str] = MODULES
) -> int:
    """Serves until a signal. Returns the exit status: 0 after a stop that was asked
    for, 1 when the cluster could not be started, 2 when it could not be as asked."""
    progress = Progress()
    try:
        with progress.waiting("checking"):
            config, ports = check(config)
        for name in (API_KEY, CLUSTER_SECRET):  # said here, and not in each process's log
            credential(name)
        token = take_credential(CONTROLLER_TOKEN) or secrets.token_hex(32)
        with preflight.listen_for_controller(config.controller) as listener:
            doors = Doors(ports, listener, token)
            code, clean = asyncio.run(_serve(config, doors, redis_url, modules, progress))
    except BatonError as error:
        progress.fail(error.message)
        return 2 if isinstance(error, ConfigurationError | CheckpointError) else 1
    if not clean:
        sys.stdout.flush()
        os._exit(code)  # a thread may hang in Ray, whose processes are dead by now
    return code


async def _serve(
    config: BatonConfig,
    doors: Doors,
    redis_url: str | None,
    modules: Mapping[str, str],
    progress: Progress,
) -> tuple[int, bool]:
    """Exit status, and whether every thread has let go. Raises BatonError before
    anything was started."""
    signals = StopSignals()
    signals.install()
    folder = RunFolder(config.registry.cluster)
    folder.lock()
    with contextlib.ExitStack() as stack:
        stack.callback(folder.unlock)
        if redis_url is not None:
            await redis_server.ping(redis_url, timeout_s=5.0)
        folder.prepare()
        log = _log_to(folder)
        stack.enter_context(contextlib.redirect_stdout(log))
        stack.enter_context(contextlib.redirect_stderr(log))
        folder.config_file.write_text(
            "# The configuration in effect; written by `baton serve`, read by its processes.\n"
            + yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
        )
        temp_folder = make_temp_folder()
        folder.write(_state(config, doors, str(temp_folder)))
        launcher = Launcher(
            config,
            folder=folder,
            temp_folder=temp_folder,
            doors=doors,
            redis_url=redis_url,
            progress=progress,
            restore_signals=signals.install,
            modules=modules,
        )
        return await _run(launcher, config, folder, signals, progress)


async def _run(
    launcher: Launcher,
    config: BatonConfig,
    folder: RunFolder,
    signals: StopSignals,
    progress: Progress,
) -> tuple[int, bool]:
    code = 0
    stop = asyncio.create_task(signals.stop.wait())
    start = asyncio.create_task(launcher.start())
    try:
        await asyncio.wait({start, stop}, return_when=asyncio.FIRST_COMPLETED)
        if not stop.done():
            announce(start.result(), launcher.gateway_urls, config, folder, progress)
            await _wait_end(launcher, stop)
            bound = f"at most {config.gateway.drain_s:g} s"
            progress.say(f"\nstopping: finishing what is in flight ({bound}; Ctrl-C hurries)")
        else:
            start.cancel()
            await asyncio.gather(start, return_exceptions=True)
            progress.say("\nstopping what has begun")
    except BatonError as error:
        code = 1
        progress.fail(error.message)
    finally:
        start.cancel()
        await asyncio.gather(start, return_exceptions=True)
        clean = await launcher.stop(signals.hurry)
        stop.cancel()
        signals.ignore()
    if code == 0:
        progress.say("stopped; nothing is left running")
    return code, clean


async def _wait_end(launcher: Launcher, stop: asyncio.Task[bool]) -> None:
    """Until a stop is asked for. Raises UnavailableError when the cluster is lost."""
    lost = asyncio.create_task(launcher.wait_lost())
    try:
        await asyncio.wait({lost, stop}, return_when=asyncio.FIRST_COMPLETED)
        if lost.done() and not stop.done():
            raise UnavailableError(f"{lost.result()}; stopping everything")
    finally:
        lost.cancel()


def _state(config: BatonConfig, doors: Doors, temp_folder: str) -> ServerState:
    process = name_of(os.getpid())
    assert process is not None
    return ServerState(
        pid=process.pid,
        start_time=process.start_time,
        url=url_of(config.gateway.host, config.gateway.port),
        cluster=config.registry.cluster,
        stop_within_s=stop_within_s(config),
        temp_folder=temp_folder,
        controller_url=url_of(*doors.controller.getsockname()[:2]),
        controller_token=doors.controller_token,
    )


def _log_to(folder: RunFolder) -> TextIO:
    """Logs to the launcher's own file, open until the process ends, and returns it: a
    terminal gets the progress lines alone, whatever libraries print."""
    handler = logging.FileHandler(folder.logs / "launcher.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s launcher %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    for noisy in ("asyncio", "httpcore", "httpx", "uvicorn"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    assert handler.stream is not None
    return handler.stream
