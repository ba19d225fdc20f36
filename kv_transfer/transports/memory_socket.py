"""Hands a worker's memory to the processes of one user that know the cluster secret.

A Unix socket in the abstract namespace: it has no file, so nothing is left
behind when the process is killed. What passes, after the kernel has vouched for
the peer's user (``SO_PEERCRED``)::

    prefill -> decode   32 random bytes
    decode  -> prefill  HMAC-SHA256(secret, context ‖ those bytes)
    prefill -> decode   one byte, with a read-only descriptor of the memory

The socket stays open: its end of file tells decode that the memory's owner died.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import os
import secrets
import socket
import struct

from kv_transfer.memory import KvMemory
from kv_transfer.transports.base import LinkError, UnansweredError

logger = logging.getLogger(__name__)

_NONCE_BYTES = 32
_PROOF_BYTES = 32
_CONTEXT = b"baton kv memory 1"
_UCRED = struct.Struct("iII")  # pid, uid, gid: struct ucred of unix(7)


def _proof(secret: str, nonce: bytes) -> bytes:
    return hmac.digest(secret.encode(), _CONTEXT + nonce, hashlib.sha256)


def _same_user(connection: socket.socket) -> bool:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    _, uid, _ = _UCRED.unpack(credentials)
    return bool(uid == os.getuid())


def _abstract(path: str) -> str:
    """``@name`` as people write it, as the kernel wants it."""
    if not path.startswith("@"):
        raise LinkError(f"{path!r} names no abstract Unix socket")
    return "\0" + path[1:]


async def _receive(connection: socket.socket, num_bytes: int) -> bytes:
    loop = asyncio.get_running_loop()
    received = b""
    while len(received) < num_bytes:
        chunk = await loop.sock_recv(connection, num_bytes - len(received))
        if not chunk:
            raise LinkError("the peer refused: another cluster secret, or another user")
        received += chunk
    return received


class MemorySocket:
    """The prefill side. ``path`` is what peers are told."""

    def __init__(self, memory: KvMemory, *, secret: str, timeout_s: float) -> None:
        self._memory = memory
        self._secret = secret
        self._timeout_s = timeout_s
        self._listener: socket.socket | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.path = f"@baton-kv-{secrets.token_hex(16)}"

    def start(self) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.setblocking(False)
        self._listener.bind(_abstract(self.path))
        self._listener.listen(128)
        self._spawn(self._accept(self._listener))

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def _spawn(self, work: object) -> None:
        task: asyncio.Task[None] = asyncio.ensure_future(work)  # type: ignore[call-overload]
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(listener)
            except OSError as error:  # out of descriptors: peers try again, so do we
                logger.error("cannot accept a peer for shared memory: %s", error)
                await asyncio.sleep(1.0)
                continue
            connection.setblocking(False)
            self._spawn(self._serve(connection))

    async def _serve(self, connection: socket.socket) -> None:
        """Hands the memory over, then holds the socket until the peer closes it."""
        with connection:
            try:
                async with asyncio.timeout(self._timeout_s):
                    await self._hand_over(connection)
                while await asyncio.get_running_loop().sock_recv(connection, 1):
                    pass
            except (LinkError, OSError, TimeoutError) as error:
                logger.warning("a peer did not get the KV memory: %s", error)

    async def _hand_over(self, connection: socket.socket) -> None:
        if not _same_user(connection):
            raise LinkError("it runs as another user")
        nonce = secrets.token_bytes(_NONCE_BYTES)
        await asyncio.get_running_loop().sock_sendall(connection, nonce)
        given = await _receive(connection, _PROOF_BYTES)
        if not hmac.compare_digest(given, _proof(self._secret, nonce)):
            raise LinkError("it does not know the cluster secret")
        # A second open file, because the access mode belongs to the open file.
        read_only = os.open(f"/proc/self/fd/{self._memory.fd}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            socket.send_fds(connection, [b"\1"], [read_only])
        finally:
            os.close(read_only)


async def fetch_memory(path: str, *, secret: str, timeout_s: float) -> tuple[int, socket.socket]:
    """The decode side: a read-only descriptor, and the socket that tells of its owner's death.

    The caller closes both. Raises LinkError, with the reason: UnansweredError where the owner
    may be busy or gone.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.setblocking(False)
        async with asyncio.timeout(timeout_s):
            return await _prove_and_receive(connection, path, secret), connection
    except LinkError:
        connection.close()
        raise
    except TimeoutError:
        connection.close()
        late = f"the peer's memory socket did not answer in {timeout_s:g} s"
        raise UnansweredError(late) from None
    except OSError as error:
        connection.close()
        raise UnansweredError(f"the peer's memory socket cannot be reached: {error}") from error
    except BaseException:
        connection.close()
        raise


async def _prove_and_receive(connection: socket.socket, path: str, secret: str) -> int:
    loop = asyncio.get_running_loop()
    await loop.sock_connect(connection, _abstract(path))
    if not _same_user(connection):
        raise LinkError("the peer's memory socket belongs to another user")
    nonce = await _receive(connection, _NONCE_BYTES)
    await loop.sock_sendall(connection, _proof(secret, nonce))
    await wait_readable(connection)
    data, descriptors, _, _ = socket.recv_fds(connection, 1, 1)
    if not data or not descriptors:
        raise LinkError("the peer refused: another cluster secret, or another user")
    return descriptors[0]


async def wait_readable(connection: socket.socket) -> None:
    """Returns when ``connection`` has data or its end of file to read."""
    loop = asyncio.get_running_loop()
    readable = loop.create_future()

    def ready() -> None:
        if not readable.done():
            readable.set_result(None)

    loop.add_reader(connection, ready)
    try:
        await readable
    finally:
        loop.remove_reader(connection)
