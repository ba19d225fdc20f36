"""The names of the blocks that a choice's input fills, as its workers will name them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from baton.block_hash import HashDomain, block_key
from baton.records import WorkerRecord

BLOCKS_AT_ONCE = 512
"""Hashed before the event loop gets its turn: about a millisecond."""


class Hashing(Protocol):
    """What of a worker decides how it names blocks."""

    @property
    def record(self) -> WorkerRecord: ...

    @property
    def kv_dtype(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Kind:
    """Workers of one kind give equal blocks equal names."""

    kv_dtype: str
    block_size: int


def _kind(worker: Hashing) -> Kind:
    return Kind(worker.kv_dtype, worker.record.block_size)


class BlockNames:
    """What is the same for all requests of a gateway."""

    def __init__(self, *, secret: str, weights_revision: str) -> None:
        self._key = block_key(secret)
        self._weights_revision = weights_revision

    def domain(self, kv_dtype: str) -> HashDomain:
        return HashDomain(self._key, self._weights_revision, kv_dtype)


class InputHashes:
    """One choice's. Each block is hashed once; a later attempt adds its emitted tokens.

    Without ``names`` no block has one: for policies that do not ask.
    """

    def __init__(self, names: BlockNames | None, *, cache_salt: str = "") -> None:
        self.num_tokens = 0
        """Of the input as of the last ``prepare``."""
        self._names = names
        self._cache_salt = cache_salt
        self._chains: dict[Kind, list[bytes]] = {}

    async def prepare(self, token_ids: Sequence[int], workers: Sequence[Hashing]) -> None:
        """Names all full blocks of the input, whose beginning never changes, for these workers."""
        self.num_tokens = len(token_ids)
        if self._names is None:
            return
        for kind in {_kind(worker) for worker in workers}:
            domain = self._names.domain(kind.kv_dtype)
            chain, size = self._chains.setdefault(kind, []), kind.block_size
            parent = chain[-1] if chain else domain.root(cache_salt=self._cache_salt)
            for index in range(len(chain), len(token_ids) // size):
                parent = domain.extend(parent, token_ids[index * size : (index + 1) * size])
                chain.append(parent)
                if (index + 1) % BLOCKS_AT_ONCE == 0:
                    await asyncio.sleep(0)

    def of(self, worker: Hashing) -> Sequence[bytes]:
        """The input's full blocks under the worker's names; empty if not prepared for it."""
        return self._chains.get(_kind(worker), ()) if self._chains else ()
