"""A worker's place in the registry: a record in Redis that every beat renews.

1. REGISTERED: the record is ours and renewed in time.
2. ADRIFT: Redis does not answer. The worker serves on; Sessions are unaffected.
3. LOST: another process took the name, or this one slept through its lease (a
   stopped process that wakes up). ``lost`` is set and the worker must exit:
   somebody else may have its place by now.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time

import redis.asyncio
from redis.exceptions import RedisError

from baton.config import RegistryConfig
from baton.records import WorkerRecord, worker_key

logger = logging.getLogger(__name__)


class Registration:
    """Keeps one worker's record alive from ``start`` to ``close``."""

    def __init__(self, redis_url: str, record: WorkerRecord, config: RegistryConfig) -> None:
        self._redis = redis.asyncio.from_url(
            redis_url, socket_timeout=config.ttl_s / 2, socket_connect_timeout=config.ttl_s / 2
        )
        self._record = record
        self._config = config
        self._key = worker_key(config.cluster, record.worker_id)
        self._task: asyncio.Task[None] | None = None
        self.lost = asyncio.Event()

    async def start(self) -> None:
        """Registers, taking the name over from whoever had it, and beats from then on.

        Raises ConnectionError of redis when there is no Redis to begin with.
        """
        await self._write()
        self._task = asyncio.create_task(self._beat())

    async def _write(self) -> None:
        ttl_ms = int(self._config.ttl_s * 1000)
        await self._redis.set(self._key, self._record.model_dump_json(), px=ttl_ms)

    async def _holder(self) -> str | None:
        """Epoch in the record, or None where there is none."""
        raw = await self._redis.get(self._key)
        return None if raw is None else str(json.loads(raw).get("epoch"))

    async def _beat(self) -> None:
        renewed_at = time.monotonic()
        while not self.lost.is_set():
            await asyncio.sleep(self._config.heartbeat_s)
            slept_s = time.monotonic() - renewed_at
            try:
                holder = await self._holder()
                if holder not in (None, self._record.epoch):
                    self._give_up("another process has registered under this name")
                elif holder is None and slept_s > self._config.ttl_s:
                    self._give_up(f"this process slept {slept_s:.1f} s, longer than its lease")
                else:
                    await self._write()
                renewed_at = time.monotonic()
            except (RedisError, OSError) as error:
                # Being unable to ask is not being asleep: the lease starts anew.
                renewed_at = time.monotonic()
                logger.warning("registry does not answer, serving on: %s", error)

    def _give_up(self, reason: str) -> None:
        logger.error("%s has lost its registration: %s", self._record.worker_id, reason)
        self.lost.set()

    async def close(self) -> None:
        """Deregisters, unless the name is somebody else's by now."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        try:
            if await self._holder() == self._record.epoch:
                await self._redis.delete(self._key)
        except (RedisError, OSError) as error:
            logger.warning("could not deregister: %s", error)
        await self._redis.aclose()
