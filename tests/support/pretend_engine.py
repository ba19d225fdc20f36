"""An engine without a model that knows what every slot of its KV pool holds, and what follows
from every input: a token that was computed from other KV than its own is noticed at once."""

from __future__ import annotations

from collections.abc import Sequence as Items

from engine.kv_cache.kv_cache import KvCache
from engine.sequence import Sampled, Scheduled, Sequence

GARBAGE = -1


def next_token(token_ids: Items[int]) -> int:
    """What the pretended model says after an input."""
    return 50 + (7 * sum(token_ids) + len(token_ids)) % 11


def kv_of(token_ids: Items[int], position: int) -> int:
    """Stands for the KV of one token, which depends on all before it."""
    return hash(tuple(token_ids[: position + 1]))


class PretendKv:
    """A number for every slot of a pool."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self._slots = [[GARBAGE] * block_size for _ in range(num_blocks)]

    def read(self, block_ids: Items[int], token: int) -> int:
        block, slot = divmod(token, self.block_size)
        return self._slots[block_ids[block]][slot]

    def write(self, block_ids: Items[int], token: int, value: int) -> None:
        block, slot = divmod(token, self.block_size)
        self._slots[block_ids[block]][slot] = value

    def block(self, block_id: int) -> list[int]:
        return list(self._slots[block_id])

    def check(self, seq: Sequence) -> None:
        """The KV of every token that counts as computed is there, and is its own."""
        for token in range(seq.num_computed_tokens):
            found = self.read(seq.block_table, token)
            assert found == kv_of(seq.token_ids, token), f"token {token} of {seq.key} is not its KV"


class KnowingEngine:
    """Moves sequences on as ``Engine.step`` does."""

    def __init__(self, kv: KvCache) -> None:
        self.kv = kv
        self.slots = PretendKv(kv.layout.num_blocks, kv.layout.block_size)

    def step(self, chunks: Items[Scheduled]) -> list[Sampled]:
        return [Sampled(c.seq, c.seq.token_ids[-1]) for c in chunks if self._compute(c)]

    def _compute(self, chunk: Scheduled) -> bool:
        """Whether a token came of it."""
        seq = chunk.seq
        assert 0 < chunk.num_tokens <= seq.num_remaining
        self.slots.check(seq)
        end = seq.num_computed_tokens + chunk.num_tokens
        for token in range(seq.num_computed_tokens, end):
            if token >= seq.num_shared_tokens:  # else to the scratch block
                block = seq.block_table[token // self.kv.layout.block_size]
                assert self.kv.pool._hashes[block] is None, "a shared block is written"
                self.slots.write(seq.block_table, token, kv_of(seq.token_ids, token))
        seq.num_computed_tokens = end
        self.kv.publish(seq)
        if seq.num_remaining:
            return False
        seq.token_ids.append(next_token(seq.token_ids))
        return True
