"""What the pool controller reads and writes in Redis: workers' records, wishes, its lease."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import redis.asyncio
from pydantic import ValidationError
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from baton.errors import ConfigurationError, UnavailableError
from baton.records import PoolWishes, pools_key, worker_key

logger = logging.getLogger(__name__)

ANSWER_S = 1.0
"""How long one answer of Redis may take."""

_TAKE_LEASE = """
local holder = redis.call('get', KEYS[1])
if holder and holder ~= ARGV[1] then return holder end
redis.call('set', KEYS[1], ARGV[1], 'px', ARGV[2])
return false
"""
_DELETE_IF_OURS = """
if redis.call('get', KEYS[1]) == ARGV[1] then redis.call('del', KEYS[1]) end
"""


LOOKED_MS = 1000


def lease_key(cluster: str) -> str:
    """Redis key of who controls the pools."""
    return f"baton:{cluster}:controller"


def served_key(cluster: str) -> str:
    """Redis key of which of the pools' processes have been registered."""
    return f"{lease_key(cluster)}:served"


@dataclass(frozen=True, slots=True)
class Registered:
    """A worker's record, as far as a controller cares."""

    epoch: str
    expires_in_s: float
    generation: str = ""
    """Empty where the record does not say it as we do."""


@dataclass(frozen=True, slots=True)
class RegistryRead:
    """One answer of Redis."""

    server: str
    """Another one after every restart of Redis."""
    workers: Mapping[str, Registered]
    """By worker id; without those that are not registered."""
    wishes: bytes | None
    """As they are stored."""
    served: frozenset[str] = frozenset()
    """Names of processes that a controller has seen registered, as they are stored."""


class ControllerStore:
    """Every method raises UnavailableError when Redis does not answer in time."""

    def __init__(self, redis_url: str, cluster: str) -> None:
        try:
            self._redis = redis.asyncio.from_url(
                redis_url,
                socket_timeout=ANSWER_S,
                socket_connect_timeout=ANSWER_S,
                retry=Retry(NoBackoff(), 0),
            )
        except ValueError as error:
            raise ConfigurationError(
                f"REDIS_URL is malformed: {error}", param="REDIS_URL"
            ) from None
        self._take_lease = self._redis.register_script(_TAKE_LEASE)
        self._delete_if_ours = self._redis.register_script(_DELETE_IF_OURS)
        self._cluster = cluster

    async def close(self) -> None:
        await self._redis.aclose()

    # -------------------------------------------------------------- registry

    async def read(self, worker_ids: Sequence[str]) -> RegistryRead:
        """What Redis says of these workers, and of the wishes.

        It writes first, a mark that nobody reads: a Redis that answers but takes no writes
        (read-only after a failover, its disk full) lets every record expire, and what is
        missing there means nothing.
        """
        with _answering():
            pipe = self._redis.pipeline(transaction=False)
            pipe.set(f"{lease_key(self._cluster)}:looked", b"", px=LOOKED_MS)
            pipe.info("server")
            pipe.get(pools_key(self._cluster))
            pipe.get(served_key(self._cluster))
            for worker_id in worker_ids:
                pipe.get(worker_key(self._cluster, worker_id))
                pipe.pttl(worker_key(self._cluster, worker_id))
            _, server, wishes, served, *answers = await pipe.execute()
        workers = {}
        for worker_id, value, left_ms in zip(worker_ids, answers[::2], answers[1::2], strict=True):
            if value is not None:
                epoch, generation = _process_of(value)
                workers[worker_id] = Registered(epoch, max(left_ms, 0) / 1000, generation)
        return RegistryRead(str(server.get("run_id", "")), workers, wishes, _names(served))

    async def write_served(self, names: frozenset[str]) -> None:
        """Takes note of which processes have been registered, for the next controller."""
        with _answering():
            await self._redis.set(served_key(self._cluster), json.dumps(sorted(names)))

    # ---------------------------------------------------------------- wishes

    async def read_wishes(self) -> PoolWishes | None:
        """What is stored; None for nothing, or nothing that makes sense."""
        with _answering():
            value = cast(bytes | None, await self._redis.get(pools_key(self._cluster)))
        if value is None:
            return None
        try:
            return PoolWishes.model_validate_json(value)
        except ValidationError as error:
            logger.error("ignored the stored sizes of pools: %d faults", error.error_count())
            return None

    async def write_wishes(self, wishes: bytes) -> None:
        with _answering():
            await self._redis.set(pools_key(self._cluster), wishes)

    # ----------------------------------------------------------------- lease

    async def take_lease(self, holder: str, ttl_s: float) -> str | None:
        """Takes or renews the lease. None when it is ours now, else who has it."""
        with _answering():
            other = await self._take_lease(
                keys=[lease_key(self._cluster)], args=[holder, int(ttl_s * 1000)]
            )
        return None if other is None else cast(bytes, other).decode(errors="replace")

    async def give_lease_back(self, holder: str) -> None:
        with _answering():
            await self._delete_if_ours(keys=[lease_key(self._cluster)], args=[holder])


def _process_of(record: bytes) -> tuple[str, str]:
    """Epoch and generation of a record that may be another version's: its being there is
    what counts."""
    try:
        fields = json.loads(record)
        return str(fields["epoch"]), str(fields.get("generation", ""))
    except (ValueError, TypeError, KeyError):
        return repr(record), ""


def _names(value: bytes | None) -> frozenset[str]:
    """None where it makes no sense: whoever it should name has then to start anew."""
    try:
        names = json.loads(value or b"[]")
    except ValueError:
        return frozenset()
    return frozenset(map(str, names)) if isinstance(names, list) else frozenset()


@contextmanager
def _answering() -> Iterator[None]:
    try:
        yield
    except (RedisError, OSError) as error:
        reason = str(error) or type(error).__name__
        raise UnavailableError(f"Redis does not answer: {reason}") from error
