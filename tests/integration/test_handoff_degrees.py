"""Pools of different degrees of tensor parallelism hand KV over to each other, both ways: the
ranks are real processes, the tokens those of one process, over every transport."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.degrees import DEGREES, KINDS, NUM_TOKENS, PROMPTS, write_model
from support.handoff import sample
from support.rank_pool import RankPool, one_thread_and_own_cache
from support.transports import TRANSPORTS
from support.worker_pair import TRANSFER, Ask, Built, built, worker_pair

from baton.parallelism import Parallelism


@pytest.fixture(scope="module", autouse=True)
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with one_thread_and_own_cache(tmp_path_factory.mktemp("cache")):
        yield


@pytest.fixture(scope="module")
def ranks(surroundings: None) -> Iterator[tuple[RankPool, RankPool]]:
    """The other ranks of prefill, and those of decode."""
    with contextlib.ExitStack() as stack:
        pools = RankPool(3), RankPool(3)
        for pool in pools:
            stack.callback(pool.close)
        yield pools


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: write_model(kind, folder / kind) for kind in KINDS}


@pytest.fixture(scope="module")
def expected(models: dict[str, Path]) -> dict[str, list[list[int]]]:
    """What one process answers."""
    return {}


async def answers_of_one(model: Path) -> list[list[int]]:
    with built(model) as prefill, built(model) as decode:
        async with worker_pair(prefill, decode) as pair:
            answers = await pair.answers([Ask(prompt, NUM_TOKENS) for prompt in PROMPTS])
    return [answer.token_ids for answer in answers]


@contextlib.contextmanager
def pools_of(
    model: Path, degrees: tuple[int, int], ranks: tuple[RankPool, RankPool]
) -> Iterator[tuple[Built, Built]]:
    with contextlib.ExitStack() as stack:
        prefill, decode = (
            stack.enter_context(built(model, Parallelism(degree), pool.connections))
            for degree, pool in zip(degrees, ranks, strict=True)
        )
        yield prefill, decode


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("degrees", DEGREES, ids=lambda degrees: "{} to {}".format(*degrees))
@pytest.mark.parametrize("kind", KINDS)
async def test_tokens_are_those_of_one_process(
    models: dict[str, Path],
    expected: dict[str, list[list[int]]],
    ranks: tuple[RankPool, RankPool],
    kind: str,
    degrees: tuple[int, int],
    transport: str,
) -> None:
    if kind not in expected:
        expected[kind] = await answers_of_one(models[kind])
    config = TRANSFER.model_copy(update={"transport": transport})
    with pools_of(models[kind], degrees, ranks) as pools:
        async with worker_pair(*pools, transfer=config, chunk=33) as pair:
            asks = [Ask(prompt, NUM_TOKENS) for prompt in PROMPTS]
            answers = await pair.answers(asks, handed_over=True)
            registry = pair.decode_rig.registry
            moved = sample(registry, "baton_kv_handoff_bytes_total", transport=transport)
            assert sample(registry, "baton_kv_handoffs_total", outcome="ready") == len(PROMPTS)
            assert moved == sum(map(len, PROMPTS)) * pools[0].plan.layout.token_bytes
    assert [answer.token_ids for answer in answers] == expected[kind]
