"""How this gateway talks to Redis: with bounds, and without retries of the library's own."""

from __future__ import annotations

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from baton.errors import ConfigurationError

ANSWER_S = 1.0
"""How long one answer of Redis may take."""


def redis_client(redis_url: str) -> redis.asyncio.Redis:
    """A client that has not connected yet. Raises ConfigurationError for a malformed URL."""
    try:
        return redis.asyncio.from_url(
            redis_url,
            socket_timeout=ANSWER_S,
            socket_connect_timeout=ANSWER_S,
            # Whoever asks does so again anyway.
            retry=Retry(NoBackoff(), 0),
        )
    except ValueError as error:
        raise ConfigurationError(f"REDIS_URL is malformed: {error}", param="REDIS_URL") from None
