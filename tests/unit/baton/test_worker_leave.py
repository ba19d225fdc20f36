"""Leaving a node: locks, the file that asks, and how both sides see each other."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from baton.errors import ConfigurationError, DrainingError
from baton.worker.leave import leave, living, stay


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BATON_RUN_DIR", str(tmp_path / "run"))
    return tmp_path / "run"


async def test_worker_is_known_for_as_long_as_it_stays(folder: Path) -> None:
    async with stay("decode-0", asyncio.Event()):
        async with stay("prefill-0", asyncio.Event()):
            assert living(folder) == ["decode-0", "prefill-0"]
        assert living(folder) == ["decode-0"]
    assert living(folder) == []
    async with stay("decode-0", asyncio.Event()):  # what is left behind is in nobody's way
        assert living(folder) == ["decode-0"]


async def test_leaving_asks_every_worker_and_returns_when_they_have_gone(folder: Path) -> None:
    async def worker(worker_id: str, up: asyncio.Event) -> None:
        stop = asyncio.Event()
        async with stay(worker_id, stop):
            up.set()
            await stop.wait()

    ups = [asyncio.Event(), asyncio.Event()]
    lives = [asyncio.create_task(worker(f"w-{n}", up)) for n, up in enumerate(ups)]
    for up in ups:
        await up.wait()
    assert await asyncio.to_thread(leave, folder, timeout_s=30) == []
    await asyncio.wait_for(asyncio.gather(*lives), 10)


async def test_worker_that_does_not_end_is_named_after_the_timeout(folder: Path) -> None:
    async with stay("decode-0", asyncio.Event()):
        assert await asyncio.to_thread(leave, folder, timeout_s=0) == ["decode-0"]


async def test_worker_does_not_start_where_the_node_is_being_left(folder: Path) -> None:
    assert leave(folder, timeout_s=0) == []
    with pytest.raises(DrainingError, match=r"remove .*leave"):
        async with stay("decode-0", asyncio.Event()):
            pytest.fail("it started")
    assert living(folder) == []


async def test_second_worker_of_one_name_is_refused(folder: Path) -> None:
    async with stay("decode-0", asyncio.Event()):
        with pytest.raises(ConfigurationError, match="another decode-0 lives on this node"):
            async with stay("decode-0", asyncio.Event()):
                pytest.fail("both hold it")
        assert living(folder) == ["decode-0"]


async def test_folder_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("BATON_RUN_DIR", str(tmp_path / "file" / "run"))
    with pytest.raises(ConfigurationError, match="BATON_RUN_DIR: cannot write"):
        async with stay("decode-0", asyncio.Event()):
            pytest.fail("it started")
    with pytest.raises(ConfigurationError, match="BATON_RUN_DIR: cannot write"):
        leave(tmp_path / "file" / "run", timeout_s=0)


def written(folder: Path) -> list[Path]:
    return list(folder.iterdir())


async def test_without_a_folder_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BATON_RUN_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    async with stay("decode-0", asyncio.Event()):
        assert written(tmp_path) == []
