"""A worker's memory: real, sealed, and readable to peers only."""

from __future__ import annotations

import fcntl
import mmap
import os
from pathlib import Path

import numpy as np
import pytest

from baton.errors import ConfigurationError
from kv_transfer import memory as memory_module
from kv_transfer.memory import KvMemory, map_read_only


def test_memory_is_allocated_for_real_and_zero() -> None:
    memory = KvMemory(1 << 20)
    assert os.fstat(memory.fd).st_blocks * 512 >= 1 << 20
    assert len(memory.buffer) == memory.num_bytes == 1 << 20
    assert not np.frombuffer(memory.buffer, dtype=np.uint8).any()
    memory.close()


def test_reader_sees_what_the_owner_writes_and_cannot_write() -> None:
    memory = KvMemory(8192)
    descriptor = os.open(f"/proc/self/fd/{memory.fd}", os.O_RDONLY)
    reader = map_read_only(descriptor, 8192)
    os.close(descriptor)
    memory.buffer[5000] = 7
    assert reader[5000] == 7
    with pytest.raises(TypeError):
        reader[0] = 1
    reader.close()
    memory.close()


def test_nobody_can_resize_the_memory_or_map_it_writable() -> None:
    memory = KvMemory(8192)
    for size in (4096, 16384):
        with pytest.raises(PermissionError):
            os.ftruncate(memory.fd, size)
    again = os.open(f"/proc/self/fd/{memory.fd}", os.O_RDWR)
    with pytest.raises(PermissionError):
        mmap.mmap(again, 8192, mmap.MAP_SHARED)
    with pytest.raises(PermissionError):
        os.pwrite(again, b"x", 0)
    os.close(again)
    memory.close()


def test_others_may_write_who_have_mapped_the_memory_before_it_is_sealed() -> None:
    memory = KvMemory(8192, sealed=False)
    with pytest.raises(PermissionError):
        os.ftruncate(memory.fd, 4096)
    again = os.open(f"/proc/self/fd/{memory.fd}", os.O_RDWR)
    early = mmap.mmap(again, 8192, mmap.MAP_SHARED)
    memory.seal()
    memory.seal()
    early[5000] = 7
    assert memory.buffer[5000] == 7
    with pytest.raises(PermissionError):
        mmap.mmap(again, 8192, mmap.MAP_SHARED)
    early.close()
    os.close(again)
    memory.close()


def test_closed_memory_lives_as_long_as_its_views() -> None:
    memory = KvMemory(4096)
    view = np.frombuffer(memory.buffer, dtype=np.int64)
    view[3] = 9
    memory.close()
    memory.close()
    assert view[3] == 9


def test_memory_that_does_not_fit_is_refused_before_it_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert memory_module.available_bytes() > 1 << 20
    monkeypatch.setattr(memory_module, "available_bytes", lambda: 8191)
    KvMemory(8191).close()
    with pytest.raises(ConfigurationError, match=r"lower engine\.kv_cache_bytes"):
        KvMemory(8192)


def test_peer_memory_of_another_size_or_unsealed_is_refused() -> None:
    memory = KvMemory(8192)
    with pytest.raises(ValueError, match="8192 bytes, 4096"):
        map_read_only(memory.fd, 4096)
    unsealed = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, 8192)
    with pytest.raises(ValueError, match="not sealed"):
        map_read_only(unsealed, 8192)
    fcntl.fcntl(unsealed, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    map_read_only(unsealed, 8192).close()
    os.close(unsealed)
    memory.close()


def test_what_is_available_is_asked_and_taken_by_one_worker_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / "memory.py"
    lock.touch()
    monkeypatch.setattr(memory_module, "__file__", str(lock))
    held: list[tuple[str, bool]] = []

    def is_held() -> bool:
        with lock.open() as another:
            try:
                fcntl.flock(another, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def available() -> int:
        held.append(("asked", is_held()))
        return 1 << 30

    allocate = os.posix_fallocate

    def taken(fd: int, offset: int, length: int) -> None:
        allocate(fd, offset, length)
        held.append(("taken", is_held()))

    monkeypatch.setattr(memory_module, "available_bytes", available)
    monkeypatch.setattr(memory_module.os, "posix_fallocate", taken)
    KvMemory(8192).close()
    assert held == [("asked", True), ("taken", True)]
    assert not is_held()
    monkeypatch.setattr(memory_module, "available_bytes", lambda: 0)
    with pytest.raises(ConfigurationError):
        KvMemory(8192)
    assert not is_held(), "a worker that finds too little holds up all others"
