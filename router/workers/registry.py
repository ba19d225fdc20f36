"""The gateway's eyes on Redis: who is registered, which pools are wished for, and its own
presence.

Nothing here is on a request's path. While Redis does not answer, what was known
stays known and ``up`` is False.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Callable, Mapping
from typing import cast

from pydantic import ValidationError
from redis.exceptions import RedisError

from baton.config import RegistryConfig
from baton.protocol import EPOCH_BYTES
from baton.records import (
    PoolWishes,
    Role,
    WorkerRecord,
    gateway_key,
    index_key,
    pools_key,
    worker_key,
)
from baton.telemetry import GatewayMetrics
from router.redis_client import redis_client

logger = logging.getLogger(__name__)

_READ_LISTED = """
local names = redis.call('smembers', KEYS[1])
names[#names + 1] = KEYS[2]
local found, values = {}, redis.call('mget', unpack(names))
for number, name in ipairs(names) do
  if values[number] then
    found[#found + 1] = name
    found[#found + 1] = values[number]
  else
    redis.call('srem', KEYS[1], name)
  end
end
return found
"""
"""Every listed key that there is, and the one that needs no listing, each with its value;
what has expired is listed no more. In one script: nothing is taken out that is renewed
meanwhile."""


def _faults(error: ValueError) -> str:
    """One line, without the record's content."""
    if not isinstance(error, ValidationError):
        return str(error)
    return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())


class Registry:
    """Reads the workers' records every ``poll_s`` and hands them to ``on_records``."""

    def __init__(
        self,
        redis_url: str,
        config: RegistryConfig,
        *,
        gateway_id: str,
        metrics: GatewayMetrics,
        on_records: Callable[[Mapping[str, WorkerRecord]], None],
    ) -> None:
        self.up = False
        self.gateways: tuple[str, ...] = ()
        """Ids of the gateways that lived when Redis was last read, this one's included."""
        self.wishes: PoolWishes | None = None
        """The pools' desired sizes as last read; None while nobody has ever wished."""
        self._redis = redis_client(redis_url)
        self._read_listed = self._redis.register_script(_READ_LISTED)
        self._config = config
        self._gateway_id = gateway_id
        self._presence_key = gateway_key(config.cluster, gateway_id)
        self._metrics = metrics
        self._on_records = on_records
        self._malformed: dict[str, bytes] = {}
        self._complaint: str | None = None
        self._closed = False
        self._task: asyncio.Task[None] | None = None
        metrics.registry_up.set(0)

    async def start(self) -> None:
        """Reads once, so that what is registered already is known, then goes on reading."""
        await self._poll()
        self._task = asyncio.create_task(self._run(), name="registry")

    def wants(self, role: Role) -> bool | None:
        """Somebody wishes for workers of that role; None while nothing is known of wishes."""
        if self.wishes is None:
            return None
        return any(pool.role == role and pool.replicas for pool in self.wishes.pools.values())

    async def close(self) -> None:
        """Stops reading and takes the gateway's presence back, if Redis lets it."""
        self._closed = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        try:
            async with self._redis.pipeline() as pipe:
                pipe.delete(self._presence_key)
                pipe.srem(index_key(self._config.cluster), self._presence_key)
                await pipe.execute()
        except (RedisError, OSError) as error:
            logger.info("could not take the gateway's presence back: %s", error)
        await self._redis.aclose()

    async def _run(self) -> None:
        # Cancelling is not enough: redis uses asyncio.wait_for, which before Python 3.12
        # can swallow it (https://github.com/python/cpython/issues/86296).
        while not self._closed:
            await asyncio.sleep(self._config.poll_s)
            try:
                await self._poll()
            except Exception:
                logger.exception("reading the registry failed")

    async def _poll(self) -> None:
        try:
            # Writes first: a Redis that takes none lets every record expire, and what is
            # missing there means nothing.
            await self._announce()
            self._on_records(await self._read())
        except (RedisError, OSError) as error:
            self._set_up(False, str(error))
        else:
            self._set_up(True, None)

    def _set_up(self, up: bool, complaint: str | None) -> None:
        if complaint is not None and (self.up or self._complaint is None):
            logger.warning("the registry does not answer, serving on: %s", complaint)
        elif complaint is None and self._complaint is not None:
            logger.info("the registry answers again")
        self._complaint = complaint
        self.up = up
        self._metrics.registry_up.set(int(up))

    async def _read(self) -> dict[str, WorkerRecord]:
        """All well-formed records by worker id; takes over who else there is to know."""
        cluster = self._config.cluster
        pools = pools_key(cluster)
        found = cast(list[bytes], await self._read_listed(keys=[index_key(cluster), pools]))
        names = [name.decode(errors="replace") for name in found[::2]]
        values = dict(zip(names, found[1::2], strict=True))
        beginning = gateway_key(cluster, "")
        ids = {name.removeprefix(beginning) for name in names if name.startswith(beginning)}
        self.gateways = tuple(sorted({self._gateway_id, *ids}))
        self._metrics.gateways.set(len(self.gateways))
        beginning = worker_key(cluster, "")
        wanted = sorted(name for name in names if name.startswith(beginning) or name == pools)
        records: dict[str, WorkerRecord] = {}
        malformed: dict[str, bytes] = {}
        for name in wanted:
            value = values[name]
            try:
                if name == pools:
                    self.wishes = PoolWishes.model_validate_json(value)
                    continue
                record = self._parse(name, value)
            except ValueError as error:
                malformed[name] = value
                if self._malformed.get(name) != value:
                    logger.error("ignored the malformed record %s: %s", name, _faults(error))
            else:
                records[record.worker_id] = record
        self._malformed = malformed
        return records

    def _parse(self, key: str, value: bytes) -> WorkerRecord:
        """Raises ValueError for what no worker of ours would write there."""
        record = WorkerRecord.model_validate_json(value)
        if worker_key(self._config.cluster, record.worker_id) != key:
            raise ValueError(f"worker_id is {record.worker_id!r}")
        if len(bytes.fromhex(record.epoch)) != EPOCH_BYTES:
            raise ValueError("epoch has a wrong length")
        return record

    async def _announce(self) -> None:
        """Renews the gateway's presence."""
        presence = json.dumps({"gateway_id": self._gateway_id, "pid": os.getpid()})
        ttl_ms = int(self._config.ttl_s * 1000)
        async with self._redis.pipeline() as pipe:
            pipe.set(self._presence_key, presence, px=ttl_ms)
            pipe.sadd(index_key(self._config.cluster), self._presence_key)
            await pipe.execute()
