"""One process's NIXL agent over UCX: the only file that calls that library.

A serving agent registers its pool, and UCX's own thread answers whatever peers want
of it (sleeping while nothing comes; in Python it would wait for the GIL). A reading
agent reads from peers into its pool; all its methods are for one thread.

What measuring and reading the library has shown, and what follows from it:

- On one host ``read`` copies within the call. It drops the GIL.
- Releasing an unfinished read returns without error, and its bytes go on arriving. So
  a read is released when it is done, or has failed: then the flush that NIXL posts
  behind its descriptors has ended, on every path to the peer.
- A read that fails while it is posted has no such flush: an ``InDoubtError``. Its
  endpoint is gone, and with ``close``, which destroys UCX's queues and registrations,
  nothing can write any more.
- An endpoint that is let go in order amid a read over TCP makes the *peer's* UCX abort
  its process, where that has still to answer. So no peer is forgotten while it is read from,
  and no agent closed but where what has not ended is not to be expected any more.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from baton.kv_layout import KvLayout
from kv_transfer.memory import KvMemory
from kv_transfer.runs import Area, Runs
from kv_transfer.transports import ucx
from kv_transfer.transports.base import LinkError

if TYPE_CHECKING:
    from kv_transfer.gpu_memory import GpuMemory

logger = logging.getLogger(__name__)

PACKAGES = ("nixl_cu12", "nixl_cu13")
"""The builds for CUDA 12 and 13; either works without a GPU."""

_WAKE_US = 10_000
"""How often a serving agent's thread looks, should UCX have failed to wake it."""
_PROBE_BYTES = 64


class InDoubtError(LinkError):
    """A read failed, and what was posted of it may still arrive until the agent is closed."""


def package() -> str | None:
    """The installed build; imports nothing."""
    return next((name for name in PACKAGES if importlib.util.find_spec(name)), None)


def _load() -> Any:
    """The library. Raises LinkError where there is none."""
    name = package()
    if name is None:
        raise LinkError("the package nixl-cu12 is not installed: pip install 'baton[nixl]'")
    raises = logging.raiseExceptions
    try:
        return importlib.import_module(f"{name}._bindings")
    except ImportError as error:
        raise LinkError(f"{name} cannot be loaded: {error}") from error
    finally:
        # On import it would write to standard output, and silence others' faulty log calls.
        logging.raiseExceptions = raises
        logging.getLogger("nixl").handlers.clear()
        logging.getLogger("nixl").propagate = True


def area_of(layout: KvLayout, memory: KvMemory | GpuMemory) -> Area:
    """Where this process has its pool: for as long as ``memory`` is not closed."""
    if isinstance(memory, KvMemory):
        return Area(layout, np.frombuffer(memory.buffer, dtype=np.uint8).ctypes.data)
    return Area(layout, memory.address, memory.device)


class Agent:
    """Raises LinkError where it cannot be made.

    Args:
        name: of this very process; peers know the agent by it.
        memory: the pool, laid out as ``layout``, of the host or of a GPU; in use until ``close``.
        environment: what UCX must find in the environment (``ucx.environment``).
        serves: whether peers read from it.
    """

    def __init__(
        self,
        name: str,
        *,
        layout: KvLayout,
        memory: KvMemory | GpuMemory,
        environment: Mapping[str, str],
        serves: bool,
    ) -> None:
        self.name = name
        self.area = area_of(layout, memory)
        self._library = library = _load()
        if isinstance(memory, KvMemory):
            self._segment = library.DRAM_SEG
            probe = np.zeros(_PROBE_BYTES, dtype=np.uint8)
            self._probe = probe.ctypes.data
            self._kept: Any = np.frombuffer(memory.buffer, dtype=np.uint8), probe
        else:
            self._segment = library.VRAM_SEG
            on_gpu = memory.buffer.new_zeros(_PROBE_BYTES)
            self._probe = on_gpu.data_ptr()
            self._kept = memory, on_gpu
        try:
            config = library.nixlAgentConfig()
            config.useProgThread = serves
            config.pthrDelay = _WAKE_US
            config.syncMode = library.NIXL_THREAD_SYNC_STRICT
            agent = library.nixlAgent(name, config)
            with ucx.applied(environment):
                self._ucx = agent.createBackend("UCX", {})
            device = self.area.device
            regions = [(self.area.address, layout.num_bytes, device, "")]
            if not serves:
                regions.append((self._probe, _PROBE_BYTES, device, ""))
            agent.registerMem(library.nixlRegDList(self._segment, regions), [self._ucx])
            self.metadata: bytes = agent.getLocalMD()
        except Exception as error:  # the library's errors have no base of their own
            raise LinkError(f"NIXL cannot be used here: {_named(error)}") from error
        self._agent = agent

    def close(self) -> None:
        """Nothing reads or writes the pool by this agent any more."""
        agent = weakref.ref(self._agent)
        self._agent = None  # its destructor joins UCX's thread
        if agent() is not None:
            raise RuntimeError(f"{self.name} is not closed: something refers to NIXL's agent")
        self._kept = None

    # ------------------------------------------------------------------ reading agents

    def connect(self, metadata: bytes) -> None:
        """Makes the peer known that has this metadata. Raises LinkError."""
        try:
            self._agent.loadRemoteMD(metadata)
        except Exception as error:
            raise LinkError(f"its agent is not reachable: {_named(error)}") from error

    def forget(self, peer: str) -> None:
        """Lets go of a peer, known or not, from which nothing is being read."""
        try:
            self._agent.invalidateRemoteMD(peer)
        except self._library.nixlNotFoundError:
            return  # it has disconnected, and NIXL forgot it then
        except Exception as error:
            logger.warning("%s cannot forget %s: %s", self.name, peer, _named(error))

    def probe(self, peer: str, area: Area) -> int:
        """Starts reading a few bytes of the peer's ``area``; returns as ``read`` does."""
        local = np.array([[self._probe, _PROBE_BYTES, self.area.device]], dtype=np.uint64)
        remote = np.array([[area.address, _PROBE_BYTES, area.device]], dtype=np.uint64)
        return self.read(peer, local, remote)

    def read(self, peer: str, local: Runs, remote: Runs) -> int:
        """Posts a read, to be asked for with ``is_done`` and then released.

        Raises LinkError where nothing was posted, and InDoubtError.
        """
        library = self._library
        try:
            into = library.nixlXferDList(self._segment, local)
            out_of = library.nixlXferDList(self._segment, remote)
            handle: int = self._agent.createXferReq(
                library.NIXL_READ, into, out_of, peer, "", [self._ucx]
            )
        except Exception as error:
            raise LinkError(f"NIXL cannot read from the peer: {_named(error)}") from error
        try:
            self._agent.postXferReq(handle)
        except Exception as error:
            self.release(handle)
            raise InDoubtError(f"NIXL failed to read: {_named(error)}") from error
        return handle

    def is_done(self, handle: int) -> bool:
        """Whether every byte of a read is there. Raises LinkError: it has ended without."""
        try:
            state = self._agent.getXferStatus(handle)
        except Exception as error:
            raise LinkError(f"the read failed: {_named(error)}") from error
        return bool(state == self._library.NIXL_SUCCESS)

    def release(self, handle: int) -> None:
        """Of a read that has ended."""
        try:
            self._agent.releaseXferReq(handle)
        except Exception as error:
            logger.warning("%s cannot release a read: %s", self.name, _named(error))

    def progress(self) -> None:
        """Does what UCX has to do while nothing is read: letting go of peers takes some."""
        try:
            self._agent.getNotifs({}, [self._ucx])
        except Exception as error:
            logger.warning("%s: %s", self.name, _named(error))


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
