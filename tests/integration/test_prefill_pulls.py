"""A prefill worker pulls from decode what it lacks of a second turn: real workers, the real
hand-off both ways, a tiny model at fp32."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.handoff import FaultsAt, until
from support.rank_pool import RankPool
from support.tiny_models import write_tiny_llama
from support.worker_pair import TRANSFER, Answer, Ask, Built, WorkerPair, built, worker_pair

from baton.config import KvTransferConfig
from baton.errors import InternalError
from baton.parallelism import Parallelism

SIZE = 16
PROMPT = [3 + (11 * j) % 240 for j in range(40)]
NUM_ANSWERED = 90
NEW = [5, 9, 14, 23, 31, 47, 60]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return write_tiny_llama(folder, num_heads=4, num_kv_heads=4, head_dim=64)


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    pool = RankPool(1)
    yield pool
    pool.close()


@pytest.fixture
def engines(model: Path) -> Iterator[tuple[Built, Built]]:
    with built(model, kv_cache_bytes=4 << 20) as prefill, built(model, kv_cache_bytes=4 << 20) as d:
        yield prefill, d


async def two_turns(pair: WorkerPair, ask_next: list[int] = NEW) -> tuple[list[int], Answer, int]:
    """The second turn's prompt, its answer, and how many tokens prefill computed for it."""
    [first] = await pair.answers([Ask(PROMPT, NUM_ANSWERED)], handed_over=True)
    prompt = [*PROMPT, *first.token_ids, *ask_next]
    before = pair.prefill_engine.num_tokens
    [second] = await pair.answers([Ask(prompt, 12)], handed_over=True)
    return prompt, second, pair.prefill_engine.num_tokens - before


async def alone(engines: tuple[Built, Built], prompt: list[int]) -> list[int]:
    """What a worker answers that computes everything itself."""
    async with worker_pair(*engines) as pair:
        for engine in engines:
            engine.engine.kv.pool.allocate(engine.engine.kv.pool.num_available)  # forget caches
            engine.engine.kv.pool.release(range(engine.engine.kv.pool.num_blocks))
        [answer] = await pair.answers([Ask(prompt, 12)])
    return answer.token_ids


@pytest.mark.parametrize("transport", ["shared_memory", "gloo"])
async def test_second_turn_pulls_the_answer_and_computes_only_what_is_new(
    engines: tuple[Built, Built], transport: str
) -> None:
    config = KvTransferConfig(transport=transport, verify=True)  # type: ignore[arg-type]
    async with worker_pair(*engines, pulls=True, transfer=config) as pair:
        prompt, answer, num_computed = await two_turns(pair)
        pulls = pulls_of(pair)
        received = pair.prefill_rig.counted("received")
    num_held = (len(PROMPT) + NUM_ANSWERED - 1) // SIZE * SIZE  # the last token's KV is nowhere
    num_cached = len(PROMPT) // SIZE * SIZE
    assert num_computed == len(prompt) - num_held
    assert (pulls, received) == ({"ready": 1}, num_held - num_cached)
    assert answer.prefill is not None
    assert answer.prefill.num_received_tokens == num_held - num_cached
    assert answer.prefill.num_cached_tokens == num_cached
    assert answer.token_ids == await alone(engines, prompt)


async def test_without_the_lenders_address_the_answer_is_computed_again(
    engines: tuple[Built, Built],
) -> None:
    async with worker_pair(*engines) as pair:
        prompt, _, num_computed = await two_turns(pair)
    assert num_computed == len(prompt) - len(PROMPT) // SIZE * SIZE


async def test_input_that_decode_holds_whole_is_pulled_and_its_last_token_computed(
    engines: tuple[Built, Built],
) -> None:
    async with worker_pair(*engines, pulls=True) as pair:
        [first] = await pair.answers([Ask(PROMPT, NUM_ANSWERED)], handed_over=True)
        prompt = [*PROMPT, *first.token_ids][: 8 * SIZE]
        before = pair.prefill_engine.num_tokens
        [again] = await pair.answers([Ask(prompt, 6)], handed_over=True)
        assert pair.prefill_engine.num_tokens - before == 1
        [more] = await pair.answers([Ask([*prompt, *NEW], 6)], handed_over=True)
    assert (
        again.token_ids
        == [*PROMPT, *first.token_ids][8 * SIZE : 8 * SIZE + 2] + (again.token_ids[2:])
    )
    assert more.token_ids == (await alone(engines, [*prompt, *NEW]))[:6]


async def test_pulled_blocks_serve_the_next_prompt_that_begins_alike(
    engines: tuple[Built, Built],
) -> None:
    async with worker_pair(*engines, pulls=True) as pair:
        prompt, _, num_computed = await two_turns(pair)
        before = pair.prefill_engine.num_tokens
        other = [*prompt[: -len(NEW)], 77, 78]
        await pair.answers([Ask(other, 4)], handed_over=True)
        pulls = pulls_of(pair)
        assert pair.prefill_engine.num_tokens - before == len(other) - (len(prompt) - num_computed)
    assert pulls == {"ready": 1}


@pytest.mark.parametrize("degrees", [(2, 1), (1, 2)], ids=["prefill", "decode"])
async def test_workers_of_other_degrees_lend_to_each_other(
    model: Path, engines: tuple[Built, Built], ranks: RankPool, degrees: tuple[int, int]
) -> None:
    parallel, side = Parallelism(2), degrees.index(2)
    with built(model, parallel, ranks.connections, kv_cache_bytes=4 << 20) as wide:
        pools = (wide, engines[1]) if side == 0 else (engines[0], wide)
        async with worker_pair(*pools, pulls=True) as pair:
            prompt, answer, num_computed = await two_turns(pair)
    assert num_computed == len(prompt) - (len(PROMPT) + NUM_ANSWERED - 1) // SIZE * SIZE
    assert answer.token_ids == await alone(engines, prompt)


async def test_first_pull_of_two_workers_connects_them_and_waits_for_nothing(
    engines: tuple[Built, Built],
) -> None:
    async with worker_pair(*engines, pulls=True) as pair:
        [peer] = pair._puller._peers.values()
        await peer.close()
        prompt, answer, num_computed = await two_turns(pair)
        assert pulls_of(pair) == {"connecting": 1}
        await until(lambda: all(peer.link for peer in pair._puller._peers.values()))
        await pair.answers([Ask([*prompt, *answer.token_ids], 4)], handed_over=True)
        assert pulls_of(pair) == {"connecting": 1, "ready": 1}
    assert num_computed == len(prompt) - len(PROMPT) // SIZE * SIZE


async def test_refused_pull_is_computed(engines: tuple[Built, Built]) -> None:
    async with worker_pair(*engines, pulls=True) as pair:
        pair.decode.lends._receiving = lambda transfer: None
        prompt, answer, num_computed = await two_turns(pair)
        assert pulls_of(pair) == {"transfer_failed": 1}
    assert num_computed == len(prompt) - len(PROMPT) // SIZE * SIZE
    assert answer.token_ids == await alone(engines, prompt)


async def test_late_pull_is_given_up_and_what_it_still_writes_is_nobodys(
    engines: tuple[Built, Built],
) -> None:
    copying, go_on = threading.Event(), threading.Event()

    def copy() -> None:
        copying.set()
        assert go_on.wait(20)

    async with worker_pair(*engines, pulls=True, faults=FaultsAt(pull_copy=copy)) as pair:
        pair.costs.longest_s = 0.3
        prompt, answer, num_computed = await two_turns(pair)
        assert copying.is_set()
        assert pulls_of(pair) == {"late": 1}
        num_asked = (len(PROMPT) + NUM_ANSWERED - 1) // SIZE - len(PROMPT) // SIZE
        assert engines[0].engine.kv.pool.counts().quarantined == num_asked
        assert not pair.prefill.idle
        go_on.set()
    assert num_computed == len(prompt) - len(PROMPT) // SIZE * SIZE
    assert answer.token_ids == await alone(engines, prompt)


def pulls_of(pair: WorkerPair) -> dict[str, float]:
    """How many ended, by how."""
    return {
        sample.labels["outcome"]: sample.value
        for metric in pair.prefill_rig.registry.collect()
        for sample in metric.samples
        if sample.name == "baton_kv_pulls_total"
    }


def fails() -> None:
    raise InternalError("injected")


POINTS = ("pull.attach", "pull.copy", "pull.release", "lend.offer", "lend.commit", "lend.released")


@pytest.mark.parametrize("point", POINTS)
async def test_pull_that_fails_anywhere_is_computed_instead(
    engines: tuple[Built, Built], point: str
) -> None:
    """The pair asserts at its end that no block is held or quarantined any more."""
    reached: list[str] = []

    def act() -> None:
        reached.append(point)
        fails()

    config = TRANSFER.model_copy(update={"operation_s": 0.5, "lease_s": 1.0})
    faults = FaultsAt(**{point.replace(".", "_"): act})
    async with worker_pair(*engines, pulls=True, transfer=config, faults=faults) as pair:
        prompt, answer, num_computed = await two_turns(pair)
        assert "ready" not in pulls_of(pair)
        assert sum(pulls_of(pair).values()) == 1
    assert reached
    assert num_computed == len(prompt) - len(PROMPT) // SIZE * SIZE
    assert answer.token_ids == await alone(engines, prompt)
