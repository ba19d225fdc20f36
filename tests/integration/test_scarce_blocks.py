"""Whole workers whose pool holds a fraction of what is asked of them at once."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

from support.tiny_models import write_tiny_llama
from support.worker_pair import Answer, Ask, built, worker_pair

NUM_CLIENTS = 12
NUM_TURNS = 4
PROMPTS = tuple([3 + (7 * n + j * (n + 1)) % 250 for j in range(112)] for n in range(2))


async def test_clients_with_common_prompts_are_all_answered_and_every_token_is_counted_once(
    tmp_path: Path,
) -> None:
    """Prefills take blocks from one another, are preempted, lose them and take them again."""
    model = write_tiny_llama(tmp_path, num_heads=4, num_kv_heads=4, head_dim=64)
    draws = random.Random(1)
    with built(model, kv_cache_bytes=int(1.3 * 2**20)) as small, built(model) as other:
        assert small.plan.layout.num_blocks == 19  # of 14 for each client

        async with worker_pair(other, small, chunk=64) as pair:

            async def client() -> list[Answer]:
                own: list[Answer] = []
                while len(own) < NUM_TURNS:
                    own += await pair.answers([Ask(draws.choice(PROMPTS), 96)])
                return own

            answers = await asyncio.gather(*(client() for _ in range(NUM_CLIENTS)))
    for answer in (each for own in answers for each in own):
        assert answer.decode is not None
        assert answer.decode.error_message == ""
        used = answer.decode.num_cached_tokens + answer.decode.num_computed_tokens
        assert used == len(PROMPTS[0])
        assert answer.decode.num_computed_tokens > 0
