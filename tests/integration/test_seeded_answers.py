"""A seeded answer is the same, token for token at fp32, however workers come to it: alone, among
fifteen others, handed over, preempted, or gone on with by another worker."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_engine import tokens
from support.tiny_models import write_tiny_llama
from support.worker_pair import Ask, Built, WorkerPair, built, worker_pair

from baton.v1 import session_pb2 as pb

NUM_TOKENS = 30
KINDS: list[dict[str, Any]] = [
    {"temperature": 1.5, "top_p": 1.0},
    {"temperature": 1.2, "top_p": 0.9, "top_k": 60},
    {"temperature": 1.3, "top_p": 1.0, "min_p": 0.02, "repetition_penalty": 1.3},
    {
        "temperature": 1.4,
        "top_p": 0.97,
        "presence_penalty": 0.6,
        "frequency_penalty": 0.4,
        "logit_bias": {7: 3.0, 9: -50.0},
    },
]
ASKS = [
    Ask(
        tokens(12 + number, seed=number),
        NUM_TOKENS,
        sampling=pb.Sampling(seed=2**63 + number, **KINDS[number % len(KINDS)]),
    )
    for number in range(16)
]
SIZES = {"num_heads": 4, "num_kv_heads": 4, "head_dim": 64}
"""So that a block is as large as to let 1 MiB hold 15 of them."""
NUM_SMALL_BLOCKS = 15


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    before = torch.get_num_threads()
    yield write_tiny_llama(tmp_path_factory.mktemp("model"), **SIZES)
    torch.set_num_threads(before)


@pytest.fixture
def engines(model: Path) -> Iterator[tuple[Built, Built]]:
    """Two with room for everybody, nothing cached."""
    with built(model, kv_cache_bytes=1 << 23) as one, built(model, kv_cache_bytes=1 << 23) as two:
        yield one, two


@pytest.fixture(scope="module")
def alone(model: Path) -> list[list[int]]:
    """Every answer where nobody else asks."""

    async def ask_in_turn() -> list[list[int]]:
        with built(model, kv_cache_bytes=1 << 23) as one, built(model) as other:
            async with worker_pair(other, one) as pair:
                return [(await pair.answers([ask]))[0].token_ids for ask in ASKS]

    return asyncio.run(ask_in_turn())


def num_preemptions(pair: WorkerPair) -> float:
    labels = {"worker": "w", "role": "decode"}
    found = pair.decode_rig.registry.get_sample_value("baton_preemptions_total", labels)
    assert found is not None
    return found


def test_answers_differ_by_their_seeds_and_samplings(alone: list[list[int]]) -> None:
    assert len({tuple(answer) for answer in alone}) == len(ASKS)
    assert all(len(answer) == NUM_TOKENS for answer in alone)


@pytest.mark.parametrize("handed_over", [False, True])
async def test_sixteen_at_once_get_the_answers_that_each_gets_alone(
    engines: tuple[Built, Built], alone: list[list[int]], handed_over: bool
) -> None:
    async with worker_pair(*engines, chunk=50) as pair:
        answers = await pair.answers(ASKS, handed_over=handed_over)
        assert num_preemptions(pair) == 0
    assert [answer.token_ids for answer in answers] == alone


async def test_preempted_answers_go_on_as_they_would_have(
    model: Path, alone: list[list[int]]
) -> None:
    with built(model) as small, built(model) as other:
        assert small.plan.layout.num_blocks == NUM_SMALL_BLOCKS
        async with worker_pair(other, small) as pair:
            answers = await pair.answers(ASKS)
            assert num_preemptions(pair) > 3
    assert [answer.token_ids for answer in answers] == alone


@pytest.mark.parametrize(
    ("num_emitted", "handed_over"),
    [(1, False), (11, False), (NUM_TOKENS - 1, False), (1, True), (11, True)],
)
async def test_another_attempt_goes_on_from_what_was_emitted(
    engines: tuple[Built, Built], alone: list[list[int]], num_emitted: int, handed_over: bool
) -> None:
    again = [
        Ask(ask.prompt, NUM_TOKENS, answer[:num_emitted], ask.sampling)
        for ask, answer in zip(ASKS, alone, strict=True)
    ]
    async with worker_pair(*engines) as pair:
        answers = await pair.answers(again, handed_over=handed_over)
    assert [answer.token_ids for answer in answers] == [each[num_emitted:] for each in alone]
