"""A worker's KV memory: one anonymous file that the kernel frees with its last user.

It can be passed to another process over a Unix socket and mapped there, leaves
nothing behind when processes are killed, and is allocated for real at start:
a pool that does not fit fails here, not in the middle of a request.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

from baton.errors import ConfigurationError

_F_SEAL_FUTURE_WRITE = 0x10  # linux/fcntl.h; Python 3.11 has no name for it
_SIZE_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


def available_bytes() -> int:
    """What this machine, and this process's control group, could still give."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    available = int(fields["MemAvailable"].split()[0]) * 1024
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        if line.startswith("0::"):  # version 2 of control groups
            group = Path("/sys/fs/cgroup") / line[3:].lstrip("/")
            with contextlib.suppress(OSError, ValueError):  # "max" is no number: no limit
                limit = int((group / "memory.max").read_text())
                available = min(available, limit - int((group / "memory.current").read_text()))
    return available


@contextlib.contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Of the workers that run this file on this machine: many may start together, and what
    one finds available another must not be about to take. The kernel lets go of it when its
    holder ends in whatever way."""
    lock = os.open(__file__, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


class KvMemory:
    """``num_bytes`` of zeroed shared memory of the host, writable by this process alone.

    The file is sealed: nobody can resize it, so a peer's mapping never faults,
    and nobody can map it writable again, whatever descriptor he holds. Where other
    processes of this worker are to write too, they map it before ``seal``.

    Raises ConfigurationError where the machine has too little memory.
    """

    def __init__(self, num_bytes: int, *, sealed: bool = True) -> None:
        with _one_at_a_time():
            self._allocate(num_bytes, sealed=sealed)
        self.buffer = memoryview(self._map)
        """The memory. Views of it (numpy, torch) keep it alive past ``close``."""

    def _allocate(self, num_bytes: int, *, sealed: bool) -> None:
        # Asked first: the kernel would rather kill a process than refuse the pages.
        available = available_bytes()
        if num_bytes > available:
            raise ConfigurationError(
                f"{num_bytes} bytes of KV cache do not fit in the {available} that are "
                "available; lower engine.kv_cache_bytes"
            )
        self.num_bytes = num_bytes
        self.fd = os.memfd_create("baton-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, num_bytes)
            os.posix_fallocate(self.fd, 0, num_bytes)
            self._map = mmap.mmap(self.fd, num_bytes, mmap.MAP_SHARED | mmap.MAP_POPULATE)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SIZE_SEALS)
            if sealed:
                self.seal()
        except OSError as error:
            os.close(self.fd)
            raise ConfigurationError(
                f"cannot allocate {num_bytes} bytes of KV cache ({error.strerror}); "
                "lower engine.kv_cache_bytes"
            ) from error

    def seal(self) -> None:
        """From here on nobody else can map it writable. A second time it does nothing."""
        try:
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _F_SEAL_FUTURE_WRITE)
        except OSError as error:
            if error.errno != errno.EINVAL:  # a kernel older than 5.1 knows no such seal
                raise

    def close(self) -> None:
        """Gives the memory back, or leaves that to the last view of it."""
        if self.fd < 0:
            return
        os.close(self.fd)
        self.fd = -1
        with contextlib.suppress(BufferError):
            self.buffer.release()
            self._map.close()


def map_read_only(fd: int, num_bytes: int) -> mmap.mmap:
    """A peer's memory, mapped for reading. ``fd`` may be closed afterwards.

    For a thread: all its pages are mapped now, so that the first copy faults on none.

    Raises ValueError unless the file is of exactly this size and sealed against
    shrinking: reading a file that shrinks would kill this process.
    """
    size = os.fstat(fd).st_size
    if size != num_bytes:
        raise ValueError(f"the peer's memory has {size} bytes, {num_bytes} were announced")
    if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
        raise ValueError("the peer's memory is not sealed against shrinking")
    return mmap.mmap(fd, num_bytes, mmap.MAP_SHARED | mmap.MAP_POPULATE, mmap.PROT_READ)
