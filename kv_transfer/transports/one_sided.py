"""Prefill's side of a link on which decode does everything."""

from __future__ import annotations

import asyncio
import logging

from baton.errors import TransferError
from kv_transfer.ranges import BlockRange
from kv_transfer.transports.base import Ended, ServeLink

logger = logging.getLogger(__name__)


class OneSidedServeLink(ServeLink):
    """There is nothing to do here, and nothing to wait for."""

    def __init__(self, name: str) -> None:
        self._name = name

    @property
    def name(self) -> str:  # type: ignore[override]
        return self._name

    async def connect(self) -> None:
        return

    def send(self, blocks: BlockRange, ended: Ended) -> None:
        error = TransferError(f"nothing is sent over {self.name}: the peer copies by itself")
        asyncio.get_running_loop().call_soon(ended, error)

    def send_filler(self, start_token: int, end_token: int) -> None:
        logger.warning("a peer on %s asked for bytes to be sent", self.name)

    async def close(self) -> None:
        return
