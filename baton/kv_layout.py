"""The shape of a paged KV pool in memory, shared by engine and hand-off.

One pool is one allocation ``[block][kv_head][layer][part][token][dim]``; the parts of
a token are its key and its value, or one row that is both (latent attention). A block
is one contiguous run, and so is every (block, kv_head): moving a block, or one
rank's heads of it, needs one descriptor.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Literal

KvDtype = Literal["bfloat16", "float32"]
DTYPE_BYTES: dict[str, int] = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True, slots=True)
class KvLayout:
    """Sizes of one worker's pool. ``num_blocks`` counts usable blocks only:
    the memory holds one more, ``scratch_block``, where padding writes go.

    ``num_kv_parts`` is 2 where a token has a key and a value of ``head_dim`` elements
    each, 1 where its value is the beginning of its key.
    """

    num_blocks: int
    num_kv_heads: int
    num_layers: int
    block_size: int
    head_dim: int
    dtype: KvDtype
    num_kv_parts: int = 2

    @property
    def shape(self) -> tuple[int, int, int, int, int, int]:
        """Of the memory, in elements; the scratch block included."""
        return (
            self.num_blocks + 1,
            self.num_kv_heads,
            self.num_layers,
            self.num_kv_parts,
            self.block_size,
            self.head_dim,
        )

    @property
    def scratch_block(self) -> int:
        """Id of the block that nobody reads."""
        return self.num_blocks

    @property
    def item_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @property
    def token_bytes(self) -> int:
        """KV bytes of one token: layers × parts × KV heads × head_dim × element size."""
        rows = self.num_layers * self.num_kv_parts * self.num_kv_heads
        return rows * self.head_dim * self.item_bytes

    @property
    def block_bytes(self) -> int:
        return self.token_bytes * self.block_size

    @property
    def num_bytes(self) -> int:
        """Of the memory, the scratch block included."""
        return (self.num_blocks + 1) * self.block_bytes

    @property
    def strides(self) -> tuple[int, int, int, int, int, int]:
        """Bytes between neighbours along each axis of ``shape``."""
        sizes = self.shape
        strides = [self.item_bytes]
        for size in reversed(sizes[1:]):
            strides.append(strides[-1] * size)
        block, head, layer, part, token, dim = reversed(strides)
        return (block, head, layer, part, token, dim)

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that ``num_tokens`` tokens occupy."""
        return -(-num_tokens // self.block_size)

    def digest(self, *, weights_revision: str, generation: str, protocol_version: int) -> bytes:
        """What two workers must have equal before one may pull from the other.

        Pool sizes may differ; everything that gives bytes their meaning may not.
        """
        facts = asdict(self)
        del facts["num_blocks"]
        facts |= {
            "weights_revision": weights_revision,
            "generation": generation,
            "protocol_version": protocol_version,
        }
        encoded = json.dumps(facts, sort_keys=True).encode()
        return hashlib.blake2b(encoded, digest_size=16).digest()
