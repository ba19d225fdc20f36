"""One sequence's state as the engine sees it, and how it enters and leaves a step.

What lies where, in tokens (a sequence that is about to be computed further)::

    | shared with the prefix cache | own, computed |  scheduled now  | waiting |
    0                 num_shared_tokens   num_computed_tokens            num_tokens

A worker makes a sequence, and adds a token itself only when it comes from another
worker. ``KvCache`` keeps the block fields; ``Engine.step`` moves
``num_computed_tokens`` on and appends what it samples. What is made anew for every row of every
step is a named tuple: a frozen dataclass takes three times as long to make.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import NamedTuple

from baton.logprobs import TokenLogprobs
from engine.sampling.params import SamplingParams
from engine.sampling.processors import Processors


@dataclass(slots=True, eq=False)
class Sequence:
    """The mutable state of one choice of one request on this worker."""

    key: Hashable
    token_ids: list[int]
    """The prompt and, after it, every emitted token."""
    num_prompt_tokens: int
    sampling: SamplingParams
    root_hash: bytes
    """Parent of the first block's hash."""
    block_table: list[int] = field(default_factory=list)
    """Block ids in the order of tokens; each holds one reference."""
    block_hashes: list[bytes] = field(default_factory=list)
    """Of the leading full blocks, as far as somebody has asked for them."""
    num_computed_tokens: int = 0
    """Leading tokens whose KV is present."""
    num_shared_tokens: int = 0
    """Leading tokens in blocks that the prefix cache shares: never written."""
    num_cached_tokens: int = 0
    """Found in the prefix cache since blocks were last taken."""
    num_published_blocks: int = 0
    """Leading blocks that need no publishing any more."""
    processors: Processors | None = None
    """Made with the first token that is sampled here."""

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_remaining(self) -> int:
        """Tokens whose KV is still to be computed."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def num_emitted_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens


class Scheduled(NamedTuple):
    """One sequence's part of a step: its next ``num_tokens`` tokens."""

    seq: Sequence
    num_tokens: int


class Sampled(NamedTuple):
    """A token that a step drew; after the step it is the last of ``seq.token_ids``."""

    seq: Sequence
    token_id: int
    logprobs: TokenLogprobs | None = None
    """Where ``seq.sampling`` wants them."""
