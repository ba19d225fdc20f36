"""Every cell of the table in docs/models.md: an architecture as it is stored, on so many ranks,
served by real workers in each way, gives the greedy tokens of transformers at fp32.

``tests/support/model_coverage.py`` declares the cells.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Awaitable, Callable, Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.model_coverage import (
    GGUF,
    ONE_PROCESS,
    RANKS,
    TRIED,
    WAYS,
    Served,
    cells,
    table,
)
from support.rank_pool import RankPool, one_thread_and_own_cache
from support.scripts import load, run
from support.tiny_architecture_gguf import gguf_of
from support.tiny_architectures import VARIANTS, oracle_logits, save_variant
from support.tiny_engine import tokens
from support.worker_pair import Answer, Ask, Built, WorkerPair, built, worker_pair

from baton.checkpoint.architectures import ARCHITECTURES
from baton.checkpoint.checkpoint import open_checkpoint
from baton.v1 import session_pb2 as pb

NUM_TOKENS = 10
DECODED = NUM_TOKENS - 1
"""Tokens of an answer that decode computes beside its prompt: not the last."""
BLOCK = 16


class Models:
    """Each tiny model once, as a folder and as a file, with transformers' own beside it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._oracles: dict[str, Any] = {}

    def path(self, variant: str, stored: str) -> Path:
        folder = self._folder / variant
        if variant not in self._oracles:
            self._oracles[variant] = save_variant(folder, VARIANTS[variant])
        if stored != GGUF:
            return folder
        file = folder.with_suffix(".gguf")
        return file if file.exists() else gguf_of(file, folder)

    def likeliest(self, variant: str, token_ids: list[int]) -> list[int]:
        """The token that follows from each position, greedily."""
        best: list[int] = oracle_logits(self._oracles[variant], token_ids).argmax(-1).tolist()
        return best


@dataclass(frozen=True)
class Cluster:
    """The engine that a cell is about, one of a single process beside it, and the oracle."""

    engine: Built
    other: Built
    likeliest: Callable[[list[int]], list[int]]

    def check(self, answers: Items[Answer], prompts: Items[list[int]]) -> None:
        for answer, prompt in zip(answers, prompts, strict=True):
            best = self.likeliest([*prompt, *answer.token_ids])
            assert answer.token_ids == best[len(prompt) - 1 : -1]


@pytest.fixture(scope="module", autouse=True)
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with one_thread_and_own_cache(tmp_path_factory.mktemp("cache")):
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def ranks(surroundings: None) -> Iterator[RankPool]:
    pool = RankPool(1)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def cluster(request: pytest.FixtureRequest, models: Models, ranks: RankPool) -> Iterator[Cluster]:
    cell: Served = request.param
    path = models.path(cell.variant, cell.stored)
    with contextlib.ExitStack() as stack:
        engine = stack.enter_context(built(path, RANKS[cell.ranks], ranks.connections))
        other = stack.enter_context(built(path))
        yield Cluster(engine, other, lambda ids: models.likeliest(cell.variant, ids))


async def prefix_cache(cluster: Cluster) -> None:
    """A prompt whose beginning another one has computed, and one that is cached to its end."""
    first, own = tokens(60, seed=1), tokens(27, seed=2)
    prompts = [first, [*first[: 3 * BLOCK], *own], first[: 3 * BLOCK]]
    async with worker_pair(cluster.other, cluster.engine) as pair:
        answers, computed = await in_turn(pair, prompts)
    cluster.check(answers, prompts)
    assert computed == [(0, 60 + DECODED), (0, 27 + DECODED), (0, 1 + DECODED)]
    assert [_use(each.decode) for each in answers] == [(0, 60, 0), (48, 27, 0), (47, 1, 0)]


async def chunked_prefill(cluster: Cluster) -> None:
    """A prompt in chunks that end within blocks, alone and then beside others."""
    alone, *others = prompts = [tokens(num, seed=num) for num in (75, 61, 40, 3)]
    async with worker_pair(cluster.other, cluster.engine, chunk=19) as pair:
        answers, _ = await in_turn(pair, [alone])
        assert pair.decode_engine.num_steps == 4 + DECODED
        answers += await pair.answers([Ask(prompt, NUM_TOKENS) for prompt in others])
    cluster.check(answers, prompts)
    assert [_use(each.decode) for each in answers] == [(0, len(each), 0) for each in prompts]


async def disaggregated(cluster: Cluster) -> None:
    """Prefill hands over to decode: a whole prompt, the end of one that both hold, and nothing
    of one that decode holds to its end; ranks are once on this and once on that side."""
    for seed, (prefill, decode) in enumerate(
        ((cluster.engine, cluster.other), (cluster.other, cluster.engine)), start=100
    ):
        first, own = tokens(75, seed), tokens(20, seed + 50)
        prompts = [first, [*first[: 4 * BLOCK], *own], first[: 4 * BLOCK]]
        async with worker_pair(prefill, decode, chunk=33) as pair:
            answers, computed = await in_turn(pair, prompts, handed_over=True)
        cluster.check(answers, prompts)
        assert computed == [(75, DECODED), (20, DECODED), (1, DECODED)]
        assert [_use(each.decode) for each in answers] == [(0, 0, 75), (64, 0, 20), (64, 0, 0)]
        for answer in answers:
            assert answer.prefill is not None
            assert answer.prefill.reason == pb.CLOSE_REASON_HANDED_OFF


async def in_turn(
    pair: WorkerPair, prompts: Items[list[int]], *, handed_over: bool = False
) -> tuple[list[Answer], list[tuple[int, int]]]:
    """The answers, and how many tokens prefill and decode computed for each."""
    answers, computed = [], []
    for prompt in prompts:
        before = pair.prefill_engine.num_tokens, pair.decode_engine.num_tokens
        answers += await pair.answers([Ask(prompt, NUM_TOKENS)], handed_over=handed_over)
        after = pair.prefill_engine.num_tokens, pair.decode_engine.num_tokens
        computed.append((after[0] - before[0], after[1] - before[1]))
    return answers, computed


def _use(closed: pb.Closed | None) -> tuple[int, int, int]:
    """Where the input's KV came from: cached, computed, received."""
    assert closed is not None
    return closed.num_cached_tokens, closed.num_computed_tokens, closed.num_received_tokens


SERVE: dict[str, Callable[[Cluster], Awaitable[None]]] = {
    "prefix cache": prefix_cache,
    "chunked prefill": chunked_prefill,
    "disaggregated": disaggregated,
}
CELLS = list(cells())


@pytest.mark.parametrize(
    ("cluster", "way"),
    CELLS,
    indirect=["cluster"],
    ids=[f"{served}-{way}" for served, way in CELLS],
)
async def test_greedy_tokens_are_those_of_transformers(cluster: Cluster, way: str) -> None:
    await SERVE[way](cluster)


# ------------------------------------------------------------------ the declaration itself


def test_every_architecture_says_how_it_is_tried_and_is_tried_so(models: Models) -> None:
    assert ARCHITECTURES.keys() == TRIED.keys(), "tests/support/model_coverage.py declares them"
    run = set(CELLS)
    for architecture, tried in TRIED.items():
        names = {tried.folder, tried.gguf} - {None}
        assert {f"{VARIANTS[name].architecture}ForCausalLM" for name in names} == {architecture}
        config = open_checkpoint(str(models.path(tried.folder, "folder"))).config
        assert (config.parts.moe is not None) == tried.has_experts
        if tried.gguf is None:
            assert ARCHITECTURES[architecture].gguf is None, "GGUF files of it are read"
        for ranks in set(RANKS) - set(tried.not_tested):
            expected = tried.has_experts or RANKS[ranks].expert == 1
            for way in WAYS:
                assert ((Served(tried.folder, "folder", ranks), way) in run) == expected


def test_page_says_what_is_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    run(load("models_page"), monkeypatch, "--check")


def test_stale_page_is_found_and_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = load("models_page")
    good = script.PAGE.read_text()
    monkeypatch.setattr(script, "PAGE", tmp_path / "models.md")
    script.PAGE.write_text(good.replace("| 1, TP 2, EP 2 |", "| 1 |"))
    with pytest.raises(SystemExit, match=r"out of date; run scripts/models_page\.py"):
        run(script, monkeypatch, "--check")
    run(script, monkeypatch)
    assert script.PAGE.read_text() == good


def test_what_nobody_tests_is_said_to_be_untested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(TRIED, "Qwen2ForCausalLM")
    less = dataclasses.replace(TRIED["MixtralForCausalLM"], not_tested=("EP 2",))
    monkeypatch.setitem(TRIED, "MixtralForCausalLM", less)
    rows = table()
    assert [row.count("| not tested ") for row in rows if "Qwen2ForCausalLM" in row] == [3, 3]
    assert [row.count("| 1, TP 2, not EP 2 ") for row in rows if "Mixtral" in row] == [3, 3]
    ranks = {(served.variant, served.ranks) for served, _ in cells()}
    assert ("mixtral", "TP 2") in ranks
    assert not ranks & {("qwen2", ONE_PROCESS), ("mixtral", "EP 2")}
