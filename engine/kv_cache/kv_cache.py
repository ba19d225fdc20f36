"""A sequence's view of the KV pool: takes, shares, publishes and returns its blocks.

Which block holds a prefix is known here and nowhere else (routers keep hints).
Only full blocks are hashed and shared, so a held prefix is a multiple of
``block_size`` tokens.
"""

from __future__ import annotations

import torch

from baton.block_hash import HashDomain
from baton.kv_layout import KvLayout
from engine.kv_cache.block_pool import BlockPool
from engine.sequence import Sequence

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class KvCache:
    """The paged KV memory of one engine and its prefix cache.

    ``memory`` is a writable buffer (or a tensor) of ``layout.num_bytes`` bytes
    that the caller owns and keeps alive; ``tensor`` is a view of it in
    ``layout.shape``.
    """

    def __init__(
        self, layout: KvLayout, memory: memoryview | torch.Tensor, domain: HashDomain
    ) -> None:
        self.layout = layout
        self.domain = domain
        self.pool = BlockPool(layout.num_blocks)
        if not isinstance(memory, torch.Tensor):
            memory = torch.frombuffer(memory, dtype=torch.uint8, count=layout.num_bytes)
        self.tensor = memory.view(_DTYPES[layout.dtype]).view(layout.shape)
        self.zeroes_new_blocks = True
        """Wanted where attention reads a last block whole, with weight 0 behind its last token:
        what an earlier holder left there must be finite, since 0 × NaN is NaN. It takes a
        millisecond for some 400 tokens of SmolLM2-135M."""

    def num_cached_prefix(self, seq: Sequence) -> int:
        """Leading tokens that ``hold_prefix`` would find now; takes nothing."""
        return len(self._find_prefix(seq)) * self.layout.block_size

    def hold_prefix(self, seq: Sequence) -> int:
        """Takes the longest cached prefix for a sequence without blocks.

        Returns its length in tokens, a multiple of ``block_size``. An input that
        is cached to its end keeps all these blocks shared, and only its last token
        is left to compute: the engine writes that token's KV to the scratch block.
        """
        assert not seq.block_table, "the sequence holds blocks already"
        block_ids = self._find_prefix(seq)
        self.pool.retain(block_ids)
        num_held = len(block_ids) * self.layout.block_size
        seq.block_table = block_ids
        seq.num_published_blocks = len(block_ids)
        seq.num_shared_tokens = seq.num_cached_tokens = num_held
        seq.num_computed_tokens = min(num_held, seq.num_tokens - 1)
        return num_held

    def extend_prefix(self, seq: Sequence) -> int:
        """Takes what others have published since, in place of blocks that the sequence
        holds and has not begun to compute.

        Blocks that it has computed stay what they are: somebody may have been told of
        them. One that is half computed is computed to its end. Returns by how many
        tokens less are left to compute.
        """
        size = self.layout.block_size
        first, num_begun = divmod(seq.num_computed_tokens, size)
        if num_begun or seq.num_shared_tokens > seq.num_computed_tokens:
            return 0
        found = self._find_prefix(seq, first)
        if not found:
            return 0
        end = first + len(found)
        self.pool.retain(found)
        self.pool.release(reversed(seq.block_table[first:end]))
        seq.block_table[first:end] = found
        seq.num_published_blocks = end
        seq.num_shared_tokens = end * size
        seq.num_cached_tokens += len(found) * size
        num_remaining = seq.num_remaining
        seq.num_computed_tokens = min(end * size, seq.num_tokens - 1)
        return num_remaining - seq.num_remaining

    def next_block_hash(self, seq: Sequence) -> bytes | None:
        """Of the block that the sequence's next token fills or helps to fill; None where
        others could not use it."""
        index = seq.num_computed_tokens // self.layout.block_size
        is_full = (index + 1) * self.layout.block_size <= seq.num_tokens
        is_shared = seq.num_shared_tokens > seq.num_computed_tokens
        return self._block_hash(seq, index) if is_full and not is_shared else None

    def ensure_blocks(self, seq: Sequence, num_tokens: int) -> bool:
        """Gives the sequence room for its first ``num_tokens`` tokens.

        Returns False, and changes nothing, if the pool cannot.
        """
        num_missing = self.layout.num_blocks_for(num_tokens) - len(seq.block_table)
        if num_missing <= 0:
            return True
        block_ids = self.pool.allocate(num_missing)
        if block_ids is None:
            return False
        if self.zeroes_new_blocks:
            for block_id in block_ids:
                self.tensor[block_id].zero_()
        seq.block_table += block_ids
        return True

    def publish(self, seq: Sequence) -> None:
        """Lets others find the blocks that are full within ``num_computed_tokens``."""
        num_full = seq.num_computed_tokens // self.layout.block_size
        for index in range(seq.num_published_blocks, num_full):
            self.pool.publish(seq.block_table[index], self._block_hash(seq, index))
            seq.num_published_blocks = index + 1

    def adopt(self, seq: Sequence, num_tokens: int) -> None:
        """Takes the KV of the first ``num_tokens`` tokens as computed: somebody else
        wrote it into the sequence's blocks, and is done."""
        assert num_tokens <= seq.num_tokens
        assert self.layout.num_blocks_for(num_tokens) <= len(seq.block_table)
        seq.num_computed_tokens = num_tokens
        self.publish(seq)

    def adopt_prefix(self, seq: Sequence, num_tokens: int) -> None:
        """The same for whole blocks of an input that is computed on from there. They are
        shared from now on, so of an input that ends with them the last token is left to
        compute, into the scratch block."""
        assert num_tokens % self.layout.block_size == 0
        self.adopt(seq, num_tokens)
        seq.num_shared_tokens = num_tokens
        seq.num_computed_tokens = min(num_tokens, seq.num_tokens - 1)

    def free(self, seq: Sequence) -> None:
        """Returns every block; the sequence can be computed again from its tokens."""
        self.pool.release(reversed(seq.block_table))
        self._forget_blocks(seq)

    def quarantine(self, seq: Sequence, num_tokens: int | None = None) -> list[int]:
        """Like ``free``, for a sequence whose own blocks somebody may still write: all of
        them, or those of its first ``num_tokens`` tokens, which end a block.

        Returns those blocks, which only ``pool.end_quarantine`` frees. Blocks shared
        with the prefix cache are never written, so they are just released.
        """
        size, table = self.layout.block_size, seq.block_table
        num_shared = seq.num_shared_tokens // size
        end = len(table) if num_tokens is None else num_tokens // size
        own = table[num_shared:end]
        self.pool.quarantine(own)
        self.pool.release(reversed([*table[:num_shared], *table[end:]]))
        self._forget_blocks(seq)
        return own

    @staticmethod
    def _forget_blocks(seq: Sequence) -> None:
        seq.block_table = []
        seq.num_computed_tokens = seq.num_shared_tokens = seq.num_published_blocks = 0

    def _find_prefix(self, seq: Sequence, first: int = 0) -> list[int]:
        """The blocks that are published from the ``first``-th of the sequence on."""
        block_ids: list[int] = []
        for index in range(first, seq.num_tokens // self.layout.block_size):
            block_id = self.pool.lookup(self._block_hash(seq, index))
            if block_id is None:
                break
            block_ids.append(block_id)
        return block_ids

    def _block_hash(self, seq: Sequence, index: int) -> bytes:
        """Hash of a full block of the sequence; the chain up to it is kept."""
        size, hashes = self.layout.block_size, seq.block_hashes
        for start in range(len(hashes) * size, (index + 1) * size, size):
            parent = hashes[-1] if hashes else seq.root_hash
            hashes.append(self.domain.extend(parent, seq.token_ids[start : start + size]))
        return hashes[index]
