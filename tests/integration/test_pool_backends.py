"""What the reconciler may rely on, of either backend: one contract, real processes."""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import redis.asyncio
import yaml
from support.redis_server import RedisServer
from support.standin_pool import noted, write_standin
from support.tiny_models import write_tiny_llama

from baton.config import BatonConfig, parse_config
from baton.errors import BatonError
from baton.records import WorkerRecord, worker_key
from cluster.backend import PoolBackend, Started
from cluster.processes_backend import Command, ProcessesBackend
from cluster.procfs import ProcessName, is_alive, name_of
from cluster.ray_backend import RayBackend
from cluster.ray_worker import RayWorker

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

NUMBERS = itertools.count()
MODULES = {"prefill": "prefill_workers.main", "decode": "decode_workers.main"}


@dataclass(frozen=True)
class Ground:
    """A backend, and where its workers leave traces."""

    backend: PoolBackend
    kind: str
    folder: Path
    redis_url: str

    async def started(self, worker_id: str) -> tuple[Started, ProcessName]:
        """A stand-in that has come up."""
        process = await self.backend.start("prefill", worker_id)
        await until(lambda: noted(self.folder, worker_id) is not None, worker_id)
        facts = noted(self.folder, worker_id)
        assert facts is not None
        name = name_of(facts["pid"])
        assert name is not None
        return process, name

    def log(self, worker_id: str) -> str:
        return (self.folder / f"{worker_id}.log").read_text()


async def until(condition: Callable[[], bool], what: str) -> None:
    ends_at = asyncio.get_running_loop().time() + 30
    while not condition():
        assert asyncio.get_running_loop().time() < ends_at, what
        await asyncio.sleep(0.02)


def fresh(name: str) -> str:
    return f"{name}-{next(NUMBERS)}"


async def ended(process: Started) -> Any:
    return await asyncio.wait_for(process.wait(), 30)


@pytest.fixture(scope="module")
def short_folder() -> Iterator[Path]:
    """Ray puts sockets there, whose paths must be short."""
    folder = Path(tempfile.mkdtemp(prefix="bp-"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def redis_url(short_folder: Path) -> Iterator[str]:
    server = RedisServer(short_folder)
    server.start()
    yield server.url
    server.stop()


def configuration(folder: Path, kind: str) -> BatonConfig:
    engine = {"kv_cache_bytes": 2 << 20, "block_size": 8}
    pool = {"engine": engine}
    return parse_config(
        {
            "model": str(write_tiny_llama(folder / "model")),
            "registry": {"cluster": f"contract-{kind}"},
            "engine": {"threads": 1, "dtype": "float32"},
            "pools": {
                "prefill": pool,
                "decode": pool,
                "broken": {"role": "decode", "engine": {**engine, "max_model_len": 100_000}},
                # On a Ray that we start, only GPUs can be lacking.
                "nowhere": {"role": "prefill", "num_gpus": 64, **pool},
            },
        }
    )


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["processes", "ray"])
async def ground(
    request: pytest.FixtureRequest, short_folder: Path, redis_url: str
) -> AsyncIterator[Ground]:
    folder = short_folder / request.param
    folder.mkdir()
    config = configuration(folder, request.param)
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    with pytest.MonkeyPatch.context() as patch:
        shadow = str(write_standin(folder))
        patch.chdir(shadow)  # where Ray's workers look first
        path = [shadow, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        patch.setenv("PYTHONPATH", os.pathsep.join(path))
        patch.setenv("BATON_SECRET", "of-this-test")
        patch.setenv("REDIS_URL", redis_url)
        patch.setenv("BATON_RUN_DIR", str(folder / "run"))
        if request.param == "ray":
            assert "ray" not in sys.modules, "Ray would not see its token: see tests/conftest.py"
            (folder / "tmp").mkdir()
            backend: PoolBackend = RayBackend(
                config,
                secret="of-this-test",
                redis_url=redis_url,
                log_folder=folder,
                temp_folder=folder / "tmp",
            )
        else:

            def command(pool: str, worker_id: str) -> Command:
                module = MODULES[config.for_pool(pool).pools[pool].role]
                start = (
                    sys.executable,
                    "-P",
                    "-m",
                    module,
                    "--config",
                    str(folder / "config.yaml"),
                )
                return Command((*start, "--pool", pool, "--worker-id", worker_id))

            backend = ProcessesBackend(command, log_folder=folder)
        yield Ground(backend, request.param, folder, redis_url)
        await backend.close()


async def test_nothing_is_there_to_adopt_of_a_backend_that_owns_its_workers(
    ground: Ground,
) -> None:
    assert await ground.backend.adopt() == {}


async def test_worker_registers_and_a_stop_ends_it_with_proof(ground: Ground) -> None:
    worker_id = fresh("decode")
    process = await ground.backend.start("decode", worker_id)
    key = worker_key(f"contract-{ground.kind}", worker_id)
    client = redis.asyncio.from_url(ground.redis_url)
    ends_at = asyncio.get_running_loop().time() + 60
    while (record := await client.get(key)) is None:
        assert asyncio.get_running_loop().time() < ends_at, "not registered"
        await asyncio.sleep(0.05)
    registered = WorkerRecord.model_validate_json(record)
    assert registered.block_size == 8, "the pool's own settings"
    name = name_of(registered.pid)
    assert name is not None
    await process.stop()
    end = await ended(process)
    assert end.code == 0, end
    assert not is_alive(name)
    assert await client.get(key) is None, "it has deregistered"
    await client.aclose()


async def test_stop_asks_and_wait_returns_when_the_process_is_gone(ground: Ground) -> None:
    worker_id = fresh("prefill")
    process, name = await ground.started(worker_id)
    waiting = asyncio.create_task(process.wait())
    await asyncio.sleep(0.1)
    assert not waiting.done()
    await process.stop()
    end = await asyncio.wait_for(waiting, 30)
    assert end.code == 0
    assert not is_alive(name)
    assert (ground.folder / f"{worker_id}.asked").exists()


@pytest.mark.parametrize("state", ["running", "stopped", "deaf"])
async def test_kill_ends_a_worker_whatever_it_does(ground: Ground, state: str) -> None:
    process, name = await ground.started(fresh("deaf" if state == "deaf" else "prefill"))
    if state == "stopped":
        os.kill(name.pid, signal.SIGSTOP)
    if state == "deaf":
        await process.stop()
    await process.kill()
    end = await ended(process)
    assert end.code != 0
    assert "killed" in end.reason
    assert not is_alive(name)


async def test_kill_of_a_worker_that_has_only_been_asked_for(ground: Ground) -> None:
    worker_id = fresh("prefill")
    process = await ground.backend.start("prefill", worker_id)
    await process.kill()
    end = await ended(process)
    assert end.code != 0
    facts = noted(ground.folder, worker_id)
    assert facts is None or name_of(facts["pid"]) is None


async def test_worker_without_room_waits_says_so_once_and_can_be_cancelled(
    ground: Ground, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    if ground.kind == "processes":
        pytest.skip("needs a backend that places workers: ray")
    monkeypatch.setattr("cluster.ray_worker._NO_ROOM_S", 0.1)
    for end_it in ("kill", "stop"):
        caplog.clear()
        process = await ground.backend.start("nowhere", fresh("nowhere"))
        waiting = asyncio.create_task(process.wait())
        await until(lambda: "waits for room" in caplog.text, "nothing was said")
        await asyncio.sleep(0.5)
        assert caplog.text.count("waits for room") == 1
        assert "64 GPU" in caplog.text
        assert not waiting.done()
        await getattr(process, end_it)()
        end = await asyncio.wait_for(waiting, 10)
        assert end.reason == "was ended before it had a place"
        assert isinstance(process, RayWorker)
        await asyncio.wait_for(process.wait_cleared(), 10)
        assert await groups_left() == []


async def groups_left() -> list[str]:
    import ray

    table = ray.util.placement_group_table().values()
    return [group["name"] for group in table if group["state"] != "REMOVED"]


@pytest.mark.parametrize("how", ["raises", "killed"])
async def test_worker_that_dies_by_itself_is_reported_with_its_reason(
    ground: Ground, how: str
) -> None:
    if how == "raises":
        worker_id = fresh("fails")
        end = await ended(await ground.backend.start("prefill", worker_id))
        assert end.code == 1
        assert "exited with status 1" in end.reason or "the weights are missing" in end.reason
        assert "the weights are missing" in ground.log(worker_id)
        return
    process, name = await ground.started(fresh("prefill"))
    os.kill(name.pid, signal.SIGKILL)
    end = await ended(process)
    assert end.code != 0
    assert "killed" in end.reason
    assert not is_alive(name)


async def test_start_that_cannot_work_ends_with_a_sentence(ground: Ground) -> None:
    with pytest.raises(BatonError, match="there is no pool 'nobody'"):
        await ground.backend.start("nobody", "nobody-0")
    worker_id = fresh("broken")
    end = await ended(await ground.backend.start("broken", worker_id))
    assert end.code == 1
    assert "Traceback" not in end.reason
    assert "lower it" in ground.log(worker_id)


async def test_workers_get_their_pools_settings_and_no_secret_is_logged(ground: Ground) -> None:
    worker_id = fresh("prefill")
    process, _ = await ground.started(worker_id)
    facts = noted(ground.folder, worker_id)
    assert facts is not None
    assert (facts["block_size"], facts["host"]) == (8, "127.0.0.1")
    assert facts["secret"] == "of-this-test"
    await process.kill()
    await ended(process)
    assert "of-this-test" not in ground.log(worker_id)


async def leaving(timeout_s: float) -> tuple[int | None, str]:
    """Status and words of the command that a pod runs before it ends."""
    command = (sys.executable, "-m", "baton.worker.leave", "--timeout-s", str(timeout_s))
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
    _, words = await asyncio.wait_for(process.communicate(), 60)
    return process.returncode, words.decode()


async def test_workers_of_a_node_that_is_left_drain_and_no_other_starts(ground: Ground) -> None:
    leave_file = ground.folder / "run" / "leave"
    try:
        first, _ = await ground.started(fresh("prefill"))
        deaf_id = fresh("deaf")
        deaf, _ = await ground.started(deaf_id)
        status, words = await leaving(1)
        assert status == 1
        assert words.endswith(f": {deaf_id}\n"), "the other one has ended"
        assert (await ended(first)).code == 0
        await deaf.kill()
        await ended(deaf)
        assert await leaving(0) == (0, "")
        late_id = fresh("prefill")
        late = await ended(await ground.backend.start("prefill", late_id))
        assert late.code == 1
        assert "this node is being left" in ground.log(late_id)
    finally:
        leave_file.unlink()


async def test_leaving_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BATON_RUN_DIR", raising=False)
    status, words = await leaving(1)
    assert status == 2
    assert words.startswith("BATON_RUN_DIR is not set")


async def test_close_leaves_no_process(ground: Ground) -> None:
    """The last: the backend is of no use after it."""
    _, running = await ground.started(fresh("prefill"))
    _, stopped = await ground.started(fresh("deaf"))
    os.kill(stopped.pid, signal.SIGSTOP)
    assert await asyncio.wait_for(ground.backend.close(), 40)
    assert not is_alive(running)
    assert not is_alive(stopped)
