"""A worker's place in the registry: a record in Redis that every beat renews.

1. STARTING: Redis is asked until it takes the record, within a bound.
2. REGISTERED: the record is ours and renewed in time.
3. ADRIFT: Redis does not answer. The worker serves on; Sessions are unaffected.
4. LOST: another process took the name, or this one slept through its lease (a
   stopped process that wakes up). ``lost`` is set and the worker must exit:
   somebody else may have its place by now.
"""

from __future__ import annotations

import asyncio
import logging
import time

import redis.asyncio
from redis.exceptions import RedisError

from baton.config import RegistryConfig
from baton.records import WorkerRecord, index_key, worker_key

logger = logging.getLogger(__name__)

_RENEW_IF_OURS = """
local value = redis.call('get', KEYS[1])
if not value then return 'none' end
if value ~= ARGV[1] then return 'other' end
redis.call('pexpire', KEYS[1], ARGV[2])
redis.call('sadd', KEYS[2], KEYS[1])
return 'ours'
"""
_DELETE_IF_OURS = """
if redis.call('get', KEYS[1]) == ARGV[1] then
  redis.call('del', KEYS[1])
  redis.call('srem', KEYS[2], KEYS[1])
end
"""


class Registration:
    """Keeps one worker's record alive from ``start`` to ``close``."""

    def __init__(self, redis_url: str, record: WorkerRecord, config: RegistryConfig) -> None:
        self._redis = redis.asyncio.from_url(
            redis_url, socket_timeout=config.ttl_s / 4, socket_connect_timeout=config.ttl_s / 4
        )
        self._renew_if_ours = self._redis.register_script(_RENEW_IF_OURS)
        self._delete_if_ours = self._redis.register_script(_DELETE_IF_OURS)
        self._record = record
        self._value = record.model_dump_json()
        self._config = config
        self._ttl_ms = int(config.ttl_s * 1000)
        self._key = worker_key(config.cluster, record.worker_id)
        self._keys = [self._key, index_key(config.cluster)]
        self._task: asyncio.Task[None] | None = None
        self._closed = False
        self._slept = False
        self._seen_at = 0.0
        self.lost = asyncio.Event()

    async def start(self, *, within_s: float = 0.0) -> None:
        """Registers, taking the name over from whoever had it, and beats from then on.

        A Redis that does not take the record is asked again, for ``within_s`` seconds.
        Raises then what redis raises.
        """
        gives_up_at, is_told = time.monotonic() + within_s, False
        while not self._closed:
            try:
                await self._put()
                break
            except (RedisError, OSError) as error:
                if time.monotonic() + self._config.heartbeat_s >= gives_up_at:
                    raise
                if not is_told:
                    logger.warning(
                        "%s cannot register, trying for %g s: %s",
                        self._record.worker_id, within_s, error,
                    )  # fmt: skip
                is_told = True
            await asyncio.sleep(self._config.heartbeat_s)
        self._seen_at = time.monotonic()
        self._task = asyncio.create_task(self._beat())

    async def _put(self, *, unless_taken: bool = False) -> None:
        """Writes the record and lists it, in one transaction."""
        async with self._redis.pipeline() as pipe:
            pipe.set(self._key, self._value, px=self._ttl_ms, nx=unless_taken)
            pipe.sadd(self._keys[1], self._key)
            await pipe.execute()

    async def _beat(self) -> None:
        # Cancelling is not enough: the client library may swallow it (asyncio.wait_for
        # does, before Python 3.12, when an answer comes at the same moment).
        while not (self.lost.is_set() or self._closed):
            await asyncio.sleep(self._config.heartbeat_s)
            self._notice_sleep()
            await self._renew()
            self._notice_sleep()

    def _notice_sleep(self) -> None:
        """Nothing that a beat waits for takes as long as the lease: their own timeouts
        are shorter. If that much time has passed all the same, the process was stopped."""
        now = time.monotonic()
        self._slept = self._slept or now - self._seen_at > self._config.ttl_s
        self._seen_at = now

    async def _renew(self) -> None:
        """One beat. Being unable to ask is not being asleep: a worker that finds no record
        because Redis was away registers again, one that slept has lost it."""
        try:
            found = await self._renew_if_ours(keys=self._keys, args=[self._value, self._ttl_ms])
            if found == b"ours":
                self._slept = False
            elif found == b"other":
                self._give_up("another process has registered under this name")
            elif self._slept:
                self._give_up("this process was stopped for longer than its lease")
            else:
                await self._put(unless_taken=True)
        except (RedisError, OSError) as error:
            logger.warning("registry does not answer, serving on: %s", error)

    def _give_up(self, reason: str) -> None:
        logger.error("%s has lost its registration: %s", self._record.worker_id, reason)
        self.lost.set()

    async def close(self) -> None:
        """Deregisters, unless the name is somebody else's by now."""
        self._closed = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        try:
            await self._delete_if_ours(keys=self._keys, args=[self._value])
        except (RedisError, OSError) as error:
            logger.warning("could not deregister: %s", error)
        await self._redis.aclose()
