"""How blocks of tokens are named: a hash chain, used alike by router and engine.

``h[i] = H(h[i-1] ‖ tokens of block i)`` with BLAKE2b (RFC 7693) cut to 128 bits
and keyed by the cluster secret, so that no client can make two prompts collide.
What must not be shared across (weights, KV dtype, adapter, tenant's salt) is
folded into ``h[-1]``, the root.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

HASH_BYTES = 16


def block_key(secret: str) -> bytes:
    """The key of all block hashes in the cluster whose processes share ``secret``."""
    return hashlib.blake2b(secret.encode(), digest_size=32, person=b"baton-blocks").digest()


@dataclass(frozen=True, slots=True)
class HashDomain:
    """What all blocks of one deployment have in common."""

    key: bytes
    weights_revision: str
    kv_dtype: str

    def root(self, *, adapter: str = "", cache_salt: str = "") -> bytes:
        """The parent of a sequence's first block."""
        digest = hashlib.blake2b(digest_size=HASH_BYTES, key=self.key[:64], person=b"baton-root")
        for part in (self.weights_revision, self.kv_dtype, adapter, cache_salt):
            encoded = part.encode()
            digest.update(len(encoded).to_bytes(8, "little"))
            digest.update(encoded)
        return digest.digest()

    def extend(self, parent: bytes, token_ids: Sequence[int]) -> bytes:
        """The hash of one full block that follows ``parent``."""
        digest = hashlib.blake2b(parent, digest_size=HASH_BYTES, key=self.key[:64])
        digest.update(array("I", token_ids).tobytes())
        return digest.digest()

    def chain(self, root: bytes, token_ids: Sequence[int], block_size: int) -> list[bytes]:
        """Hashes of all full blocks of ``token_ids``; a partial last block has none."""
        hashes: list[bytes] = []
        parent = root
        for end in range(block_size, len(token_ids) + 1, block_size):
            parent = self.extend(parent, token_ids[end - block_size : end])
            hashes.append(parent)
        return hashes
